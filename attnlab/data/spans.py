"""Rows of ids that say where images, questions and answers lie: multimodal data of one's own, already tokenised.

A line of a JSON Lines file (plain, .gz, .zst) is one row:

    {"ids": [7, 300, 301, .., 12, 9, 44], "images": [[first, rows, columns], ..], "questions": [[first, end], ..],
     "answers": [[first, end], ..]}

`first` and `end` count ids from 0, `end` is one past the last. An image is rows * columns ids, row by row; a question
ends with what opens its answer. Spans do not overlap; ids in none of them are text. All but `ids` may be left out.

A row may have `"boxes": [[id, x, y, width, height], ..]`, too: the object that an id stands for, its middle and sides.

What counts never stands between an image and the end of its question, which is the next one where no answer comes
before it: the mask `modality_mutual` lets an image see its question, so that what lies there is known early. Only
`loss=all` counts every id, and is for masks under which no position sees a later one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.batch import ANSWER, LAYOUT, QUESTION, VISUAL, RowLayout
from attnlab.config import knob
from attnlab.data.base import Arrays, Data, register
from attnlab.data.files import matching_files, split_globs
from attnlab.data.loader import Batches, HeldoutLoader, Loader, entries_of, require_held_out
from attnlab.data.packing import split_documents
from attnlab.data.progress import ProgressFn, stderr_progress
from attnlab.data.sources import BadRecord, json_object, jsonl_lines, stable_key
from attnlab.errors import UserError

_KINDS = "images", "questions", "answers"
_LOSSES = {
    "answers": "ids of answers",
    "text": "ids of text and of answers, but for text between an image and its question, which modality_mutual makes "
    "known early",
    "all": "every id, for masks under which no position sees a later one",
}
_WORDS = {
    "seed": "the seed",
    "data": "the rows of data.source (their digest)",
    **{key: f"data.{key}" for key in ("batch", "length", "heldout", "shuffle", "ids", "loss")},
}


@dataclasses.dataclass(frozen=True)
class SpansConfig:
    """Which rows are read, and what of them counts."""

    node_name: ClassVar[str]
    free: ClassVar[tuple[str, ...]] = ("workers", "cache")

    source: str = knob("", "globs of JSON Lines files, separated by commas; a line is a row (attnlab.data.spans)")
    ids: int = knob(32_768, "ids are below it", least=1)
    length: int = knob(256, "positions of a row, T; a row of n ids needs n - 1", least=1)
    batch: int = knob(16, "rows per step over all devices and hosts, B", least=1)
    loss: str = knob("answers", f"what counts; {'; '.join(f'{k}: {v}' for k, v in _LOSSES.items())}", choices=_LOSSES)
    heldout: float = knob(0.05, "fraction of the rows that is held out, by a hash of the file's name and the line",
                          least=0, below=1)  # fmt: skip
    shuffle: bool = knob(True, "whether every epoch has an order of its own")
    workers: int = knob(0, "processes that make batches; 0: threads of this one. The batches are the same", least=0)
    cache: str | None = knob(None, "directory of copies of files in buckets; none: as text data has it")

    def __post_init__(self) -> None:
        config_lib.require_knobs(self, "data.")
        config_lib.require(bool(self.source), "data.source", self.source, "globs of JSON Lines files")

    def batch_spec(self) -> batch_lib.Spec:
        """The arrays of a batch."""
        plain = batch_lib.Field((self.length,), "int32", ("seq",))
        ids = dataclasses.replace(plain, ids=self.ids, said="data.ids")
        return {
            "tokens": ids,
            "targets": dataclasses.replace(ids, about=batch_lib.NEXT),
            "segments": plain,
            "positions": plain,
            "weights": dataclasses.replace(plain, dtype="float32"),
            "layout": batch_lib.Field((self.length, LAYOUT), "int32", ("seq", None)),
            "node": plain,
            "boxes": batch_lib.Field((self.length, 4), "float32", ("seq", None)),
        }

    def longer(self, multiple: int) -> SpansConfig:
        """The same rows, with room for `multiple` times the length."""
        return dataclasses.replace(self, length=multiple * self.length)

    def fitting(self) -> dict[str, Any]:
        """Keys of a model's node that fit these batches."""
        return {"name": "lm", "vocab": self.ids}


@dataclasses.dataclass(frozen=True)
class Records:
    """All rows: ids one after the other, where each row ends, its spans by kind and its boxes, its key; a digest."""

    ids: np.ndarray
    ends: np.ndarray
    spans: list[dict[str, list[list[Any]]]]
    keys: np.ndarray
    digest: str

    def row(self, number: int) -> np.ndarray:
        """Its ids."""
        return self.ids[self.ends[number - 1] if number else 0 : self.ends[number]]


@register("spans")
class Spans(Data):
    """Rows of ids with the places of images, questions and answers, for masks that read these.

    Held-out figures are those of answers that are right or wrong; guessing is the commonest id.
    """

    Config = SpansConfig
    names_other = ("source",)

    def training(self, *, seed: int, rows: Sequence[int] | None = None) -> Loader:
        c, entries, records = self.config, entries_of(self.config, rows), read(self.config)
        train, heldout = split_documents(records, c)
        if len(train) < c.batch:
            raise UserError(
                f"data.source = {c.source!r}: {len(train)} rows to train on, less than one batch of {c.batch}"
            )
        kept = ("batch", "length", "heldout", "shuffle", "ids", "loss")
        identity = {"seed": int(seed), "data": records.digest} | {key: getattr(c, key) for key in kept}
        batches = Batches(Rows(records, train, c), c, int(seed), entries)
        return Loader(batches, c.workers, identity, _summary(c, records, train, heldout), _WORDS)

    def heldout(self, *, batches: int | None = None, rows: Sequence[int] | None = None) -> HeldoutRows:
        c, entries, records = self.config, entries_of(self.config, rows), read(self.config)
        train, heldout = split_documents(records, c)
        if not len(heldout):
            raise UserError(f"data.source = {c.source!r}: nothing is held out; data.heldout = {c.heldout} of "
                            f"{len(records.ends)} row(s)")  # fmt: skip
        summary = _summary(c, records, train, heldout)
        args = c, Rows(records, heldout, c), summary
        return HeldoutRows(*args, batches=batches, entries=entries, byte_lengths=None)

    def describe(self, summary: Mapping[str, Any]) -> str:
        figures = {key: f"{value:,}" for key, value in summary.items() if isinstance(value, int)}
        line = (
            "data: {source}: {rows} rows, {ids} ids, {images} images, {answers} answers; held out {heldout_rows} rows"
        )
        return line.format(source=summary["source"], **figures)

    def require_heldout(self, heldout: Any, trained_on: Mapping[str, Any], who: str, *, named: bool) -> list[str]:
        return require_held_out(self.config, heldout.summary()["digest"], trained_on, who, named=named)


class Rows:
    """The rows of a split as batches; a number beyond the last is a row of padding."""

    def __init__(self, records: Records, numbers: np.ndarray, config: SpansConfig):
        self._records, self._numbers, self._config = records, numbers, config
        self.length = config.length

    def __len__(self) -> int:
        return len(self._numbers)

    def pack(self, indices: Sequence[int]) -> Arrays:
        """The rows of these numbers, stacked."""
        rows = [self._row(int(self._numbers[i])) if i < len(self) else self._padding() for i in indices]
        spec = self._config.batch_spec()
        return {name: np.stack([row[name] for row in rows]).astype(spec[name].dtype) for name in spec}

    def _row(self, number: int) -> Arrays:
        ids, spans = self._records.row(number), self._records.spans[number]
        layout, node = RowLayout(len(ids)), np.zeros(len(ids), np.int32)
        boxes = np.zeros((len(ids), 4), np.float32)
        for at, *box in spans.get("boxes", ()):
            boxes[at] = box
        for i, (first, rows, columns) in enumerate(spans["images"]):
            layout.image(first, (rows, columns))
            node[first : first + rows * columns] = i + 1
        for first, end in spans["questions"]:
            layout.question(first, end)
        for first, end in spans["answers"]:
            layout.answer(first, end)
        kind, used, places = layout.columns[:, 0], len(ids) - 1, layout.columns[:-1].copy()
        places[:, 5:] = np.minimum(places[:, 5:], used)  # the last id is a target alone
        of_text = (kind == VISUAL) | (kind == QUESTION) | _asked_about(kind)
        left_out = {"answers": kind != ANSWER, "text": of_text, "all": kind < 0}
        row = {
            "tokens": ids[:-1],
            "targets": ids[1:],
            "segments": np.ones(used),
            "positions": np.arange(used),
            "weights": ~left_out[self._config.loss][1:],
            "layout": places,
            "node": node[:-1],
            "boxes": boxes[:-1],
        }
        behind = self.length - used
        return {name: np.pad(x, [(0, behind)] + [(0, 0)] * (x.ndim - 1)) for name, x in row.items()}

    def _padding(self) -> Arrays:
        return {name: np.zeros(field.shape) for name, field in self._config.batch_spec().items()}


class HeldoutRows(HeldoutLoader):
    """The held-out rows in order; what counts is compared with the commonest of their ids."""

    def facts(self) -> dict[str, Any]:
        """`chance`, see `attnlab.models.scores.Scores`; there are no slices, and no oracle."""
        counts = np.zeros(0, np.int64)
        for batch in range(len(self)):
            made = self._rows.pack(range(batch * self._batch, (batch + 1) * self._batch))
            here = np.bincount(made["targets"][made["weights"] > 0])
            counts, here = (np.pad(x, (0, max(len(here), len(counts)) - len(x))) for x in (counts, here))
            counts = counts + here
        if not counts.sum():
            raise UserError("data: no id of the held-out rows counts; allowed: rows with answers, or another data.loss")
        return {"chance": {"accuracy": float(counts.max() / counts.sum())}, "slices": []}


def read(config: SpansConfig, progress: ProgressFn | None = None) -> Records:
    """All rows of the source, in memory.

    Raises UserError: no file, or a line that cannot be used, which is named.
    """
    if progress is None:
        with stderr_progress(f"reading {config.source}") as progress:
            return read(config, progress)
    files = matching_files(split_globs(config.source), config.cache)
    rows, spans, keys, digest, done = [], [], [], hashlib.sha256(), 0
    for file in files:
        for number, line in jsonl_lines(file):
            where = f"{file.path}, line {number}:"
            ids, found = _parsed(where, json_object(where, line, "'ids'"), config)
            rows.append(ids)
            spans.append(found)
            keys.append(stable_key(f"{file.name}:{number - 1}"))
            digest.update(ids.tobytes() + repr(found).encode())
        done += file.size
        progress(done, sum(f.size for f in files))
    if not rows:
        raise UserError(f"data.source = {config.source!r}: no row in {len(files)} file(s)")
    ends, keys = np.cumsum([len(ids) for ids in rows]), np.array(keys, np.uint64)
    digest.update(ends.tobytes() + keys.tobytes())  # keys say which rows are held out
    return Records(np.concatenate(rows), ends, spans, keys, digest.hexdigest())


def _asked_about(kind: np.ndarray) -> np.ndarray:
    """Which ids lie between an image and its question, the first one behind it that no answer comes before, bool [n].

    Ids of images and questions may be among them or not.
    """
    place, n = np.arange(len(kind)), len(kind)
    last = lambda which: np.maximum.accumulate(np.where(which, place, -1))
    following = lambda which: np.minimum.accumulate(np.where(which, place, n)[::-1])[::-1]
    question, answer = kind == QUESTION, kind == ANSWER
    return (last(kind == VISUAL) > last(question | answer)) & (following(question) < following(answer))


def _parsed(
    where: str, record: dict[str, Any] | BadRecord, config: SpansConfig
) -> tuple[np.ndarray, dict[str, list[list[Any]]]]:
    """The ids of a line, its spans, and its boxes if it has any."""
    if isinstance(record, BadRecord):
        raise UserError(record.message)
    if unknown := sorted(record.keys() - {"ids", *_KINDS, "boxes"}):
        raise UserError(f"{where} unknown key {unknown[0]!r}; allowed: ids, {', '.join(_KINDS)}, boxes")
    integer = lambda x: isinstance(x, int) and not isinstance(x, bool)
    ids = record.get("ids")
    if not isinstance(ids, list) or len(ids) < 2 or not all(integer(x) and 0 <= x < config.ids for x in ids):
        raise UserError(f"{where} 'ids' must be 2 or more integers from 0, below data.ids = {config.ids}")
    if len(ids) > config.length + 1:
        raise UserError(f"{where} {len(ids)} ids; data.length = {config.length} has room for {config.length + 1}")
    found, covered = {}, np.zeros(len(ids), bool)
    for kind in _KINDS:
        size = 3 if kind == "images" else 2
        found[kind] = record.get(kind, [])
        form = "[first, rows, columns]" if kind == "images" else "[first, end]"
        if not isinstance(found[kind], list):
            raise UserError(f"{where} {kind!r} must be a list of {form}")
        for span in found[kind]:
            good = isinstance(span, list) and len(span) == size and all(integer(x) and x >= 0 for x in span)
            first, end = (span[0], span[0] + span[1] * span[2] if size == 3 else span[1]) if good else (0, 0)
            if not first < end <= len(ids) or covered[first:end].any():
                raise UserError(f"{where} {kind!r} has {span!r}; allowed: {form} of ids that are in no other span")
            covered[first:end] = True
    if "boxes" in record:
        found["boxes"] = _boxes(where, record["boxes"], len(ids))
    return np.array(ids, np.int32), found


def _boxes(where: str, boxes: Any, count: int) -> list[list[float]]:
    """Those of a line of so many ids."""
    form = "[id, x, y, width, height], sides above 0, one for an id"
    if not isinstance(boxes, list):
        raise UserError(f"{where} 'boxes' must be a list of {form}")
    seen: set[int] = set()
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
    for box in boxes:
        good = isinstance(box, list) and len(box) == 5 and all(map(number, box)) and min(box[3:]) > 0
        if not good or not isinstance(box[0], int) or not 0 <= box[0] < count or box[0] in seen:
            raise UserError(f"{where} 'boxes' has {box!r}; allowed: {form} of {count}")
        seen.add(box[0])
    return boxes


def _summary(config: SpansConfig, records: Records, train: np.ndarray, heldout: np.ndarray) -> dict[str, Any]:
    count = lambda kind: sum(len(spans[kind]) for spans in records.spans)
    return {
        "source": config.source, "rows": len(records.ends), "ids": len(records.ids), "images": count("images"),
        "answers": count("answers"), "train_rows": len(train), "heldout_rows": len(heldout), "digest": records.digest,
    }  # fmt: skip
