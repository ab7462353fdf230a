"""Loaders: which rows form which batch, and the grain pipeline that reads them ahead of time."""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import util
from typing import Any

import numpy as np

from attnlab.data.base import Arrays
from attnlab.data.config import DataConfig
from attnlab.data.packing import PackedRows, require_rows, split_documents
from attnlab.data.progress import ProgressFn
from attnlab.data.records import open_records
from attnlab.data.store import Store, open_flat
from attnlab.data.tokenizers import Tokenizer
from attnlab.errors import ConfigError, UserError

_READ_THREADS = 2
# Batches read ahead, by each worker: up to 8, fewer where they are large.
_BATCHES_AHEAD = 8
_BYTES_AHEAD = 1 << 27
# What must be the same for step s to mean the same batch, with the config's word for each.
_IDENTITY = {
    "seed": "the seed",
    "batch": "data.batch",
    "length": "data.length",
    "heldout": "data.heldout",
    "shuffle": "data.shuffle",
    "tokenizer": "the tokenizer (its fingerprint)",
    "data": "the text of data.source (its digest)",
}


class Batches:
    """The batches of one process by step: a pure function of the seed and the step, for grain to read.

    The rows of epoch 0 in a permutation drawn from the seed, then of epoch 1 in another, and so on, form one
    stream; batch s is its entries s B to (s + 1) B, of which this process reads those of `entries`.
    """

    def __init__(self, rows: PackedRows, config: DataConfig, seed: int, entries: Sequence[int]):
        self._rows = rows
        self._batch = config.batch
        self._entries = entries
        self._shuffle = config.shuffle
        self._seed = seed

    @property
    def ahead(self) -> int:
        """How many batches to read ahead."""
        size = 4 * 4 * len(self._entries) * self._rows.length
        return max(2, min(_BATCHES_AHEAD, _BYTES_AHEAD // size))

    def __len__(self) -> int:
        return sys.maxsize // self._batch

    def __getitem__(self, step: int) -> Arrays:
        return self._rows.pack([self.row_index(step * self._batch + i) for i in self._entries])

    def row_index(self, entry: int) -> int:
        """The row at an entry of the stream."""
        from grain.experimental import index_shuffle

        count = len(self._rows)
        epoch, index = divmod(entry, count)
        if not self._shuffle:
            return index
        seed = hashlib.blake2b(f"{self._seed}:{epoch}".encode(), digest_size=4).digest()
        return index_shuffle(index, max_index=count - 1, seed=int.from_bytes(seed, "little"), rounds=4)


class Loader(Iterator[Arrays]):
    """Batches without end: dicts of arrays [rows of a batch that this process reads, ..].

    The batch at a step is that of `batches`, whatever the number of workers. Not for several threads at once.

    Args:
      batches: by step, and how many to read `ahead`; see `Batches`.
      workers: processes that read; 0: threads of this one.
      identity: what must be the same for a step to mean the same batch.
      summary: figures of the data.
      words: what a config calls each key of the identity.
    """

    def __init__(
        self,
        batches: Any,
        workers: int,
        identity: dict[str, Any],
        summary: dict[str, Any],
        words: Mapping[str, str] = types.MappingProxyType(_IDENTITY),
    ):
        self._batches = batches
        self._words = words
        self._workers = workers
        self._identity = identity
        self._summary = summary
        self._step = 0
        self._running: list[Any] = []  # the grain iterator, while there is one
        # Where nobody closes: when the loader goes, or at exit before multiprocessing kills the workers.
        util.Finalize(self, _close, args=(self._running,), exitpriority=10)

    def __next__(self) -> Arrays:
        if not self._running:
            self._running.append(self._start(self._step))
        batch = next(self._running[0])
        self._step += 1
        return _unpacked(batch) if self._workers else batch

    def _start(self, step: int) -> Any:
        import grain

        batches = grain.MapDataset.source(self._batches)[step:]
        if self._workers:
            batches = batches.map(_packed)
        batches = batches.to_iter_dataset(grain.ReadOptions(_READ_THREADS, self._batches.ahead))
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which only programs run by absl parse
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=self._batches.ahead)
            )
        return iter(batches)

    def get_state(self) -> dict[str, Any]:
        """Where the loader stands, for JSON: `step`, batches given so far, and what step s depends on."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state of `get_state`, of this or another process: the batch that came then is next.

        Raises:
          UserError: the state is of other data, tokenizer, seed or shape of batch; the message says which.
        """
        differing = [
            f"{word} was {str(state.get(key))[:12]} and is {str(self._identity[key])[:12]}"
            for key, word in self._words.items()
            if state.get(key) != self._identity[key]
        ]
        if differing:
            raise UserError(
                "the saved position in the data does not fit: " + "; ".join(differing) + ".\n"
                "Restore these, or start a new run."
            )
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise UserError(f"the saved position in the data is damaged: step = {step!r}.")
        self.close()
        self._step = step

    def summary(self) -> dict[str, Any]:
        """Figures of the corpus, see `summarise`."""
        return dict(self._summary)

    def close(self) -> None:
        """Stops threads and worker processes. The next `next` starts them again."""
        _close(self._running)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _packed(batch: Arrays) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """A batch on its way between processes. grain would put arrays into shared memory, which containers have
    little of and which is left behind at exit."""
    return {name: (array.shape, array.dtype.str, array.tobytes()) for name, array in batch.items()}


def _unpacked(packed: dict[str, tuple[tuple[int, ...], str, bytes]]) -> Arrays:
    return {name: np.frombuffer(data, dtype).reshape(shape).copy() for name, (shape, dtype, data) in packed.items()}


def _close(running: list[Any]) -> None:
    while running:
        running.pop().close()


class HeldoutLoader:
    """The held-out rows in order, in batches as a `Loader` gives; every iteration starts anew.

    The last batch is filled up with rows of padding (segments 0), so that every process has as many batches.
    """

    def __init__(
        self,
        config: DataConfig,
        rows: PackedRows,
        summary: dict[str, Any],
        *,
        batches: int | None,
        entries: Sequence[int],
        byte_lengths: np.ndarray | None,
    ):
        self._rows = rows
        self._byte_lengths = byte_lengths
        self._summary = summary
        self._batch = config.batch
        self._entries = entries
        full = -(-len(rows) // config.batch)
        self._batches = full if batches is None else min(batches, full)

    def __len__(self) -> int:
        return self._batches

    @functools.cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the text that the targets of all processes' batches stand for."""
        return self._rows.text_bytes(self._batches * self._batch, self._byte_lengths)

    def facts(self) -> dict[str, Any]:
        """`bytes`, see there."""
        return {"bytes": self.bytes}

    def __iter__(self) -> Iterator[Arrays]:
        for batch in range(self._batches):
            yield self._rows.pack([batch * self._batch + i for i in self._entries])

    def summary(self) -> dict[str, Any]:
        """Figures of the corpus, see `summarise`."""
        return dict(self._summary)


def train_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    rows: Sequence[int] | None = None,
    progress: ProgressFn | None = None,
) -> Loader:
    """The training batches of one process; tokenises the source first if that has not been done.

    Args:
      seed: draws the order of rows; any integer of at least 0.
      rows: which of every B rows this process gets, in ascending order; None: all. Every process that is given the
        same row reads the same.
      progress: called with bytes read and bytes in all while tokenising, or while shards that this machine has not
        read before are compared with their SHA-256; None shows a bar on stderr.

    Raises:
      ConfigError: a batch has no such rows.
      UserError: the source cannot be read, is damaged, or holds less than one batch.
    """
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed = {seed!r} is not allowed: it must be an integer of at least 0.")
    entries = entries_of(config, rows)
    store = open_store(config, tokenizer, progress)
    train, heldout = split_documents(store.corpus, config)
    packed = PackedRows(store, train, config.length, tokenizer.eod_id)
    require_rows(packed, config, "train", len(store.corpus.lengths))
    identity = {
        "seed": int(seed),
        "batch": config.batch,
        "length": config.length,
        "heldout": config.heldout,
        "shuffle": config.shuffle,
        "tokenizer": tokenizer.fingerprint(),
        "data": store.corpus.digest,
    }
    batches = Batches(packed, config, int(seed), entries)
    return Loader(batches, config.workers, identity, summarise(store, config, tokenizer, train, heldout))


def heldout_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batches: int | None = None,
    rows: Sequence[int] | None = None,
    progress: ProgressFn | None = None,
) -> HeldoutLoader:
    """The held-out batches of one process: all, or the first `batches`.

    Arguments and errors as `train_loader`; and UserError where nothing is held out.
    """
    if batches is not None and (not isinstance(batches, int) or batches < 1):
        raise ConfigError(f"batches = {batches!r} is not allowed: it must be an integer of at least 1, or None.")
    entries = entries_of(config, rows)
    store = open_store(config, tokenizer, progress)
    train, heldout = split_documents(store.corpus, config)
    packed = PackedRows(store, heldout, config.length, tokenizer.eod_id)
    require_rows(packed, config, "heldout", len(store.corpus.lengths))
    summary = summarise(store, config, tokenizer, train, heldout)
    return HeldoutLoader(
        config, packed, summary, batches=batches, entries=entries, byte_lengths=tokenizer.byte_lengths()
    )


def heldout_texts(config: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """The held-out documents in their order, decoded."""
    store = open_store(config, tokenizer)
    for document in split_documents(store.corpus, config)[1]:
        yield tokenizer.decode(store.read(int(document), 1, int(store.corpus.lengths[document]) + 1))


def open_store(config: DataConfig, tokenizer: Tokenizer, progress: ProgressFn | None = None) -> Store:
    """The documents of a config as ids."""
    if config.kind == "array_record":
        return open_records(config, tokenizer, progress)
    return open_flat(config, tokenizer, progress)


def summarise(
    store: Store, config: DataConfig, tokenizer: Tokenizer, train: np.ndarray, heldout: np.ndarray
) -> dict[str, Any]:
    """Figures of a corpus and its split, for a run's metadata. Tokens are counted without end-of-document."""
    corpus = store.corpus
    figures: dict[str, Any] = {
        "source": config.source,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "files": corpus.files,
        "skipped": corpus.skipped,
        "empty": corpus.empty,
        "digest": corpus.digest,
    }
    for prefix, documents in (("", slice(None)), ("train_", train), ("heldout_", heldout)):
        figures[f"{prefix}documents"] = len(corpus.lengths[documents])
        figures[f"{prefix}tokens"] = int(corpus.lengths[documents].sum())
        figures[f"{prefix}bytes"] = int(corpus.text_bytes[documents].sum())
    figures["rows"] = -(-(figures["train_tokens"] + figures["train_documents"]) // config.length)
    return figures


def describe(summary: dict[str, Any]) -> str:
    """A summary in one line, for people."""
    line = (
        f"data: {summary['source']}: {summary['files']:,} files, {summary['documents']:,} documents,"
        f" {summary['bytes'] / 1e6:,.1f} MB, {summary['tokens']:,} tokens ({summary['tokenizer']});"
        f" held out {summary['heldout_documents']:,} documents, {summary['heldout_tokens']:,} tokens"
    )
    return line + (f"; SKIPPED {summary['skipped']:,} bad records" if summary["skipped"] else "")


def entries_of(config: Any, rows: Sequence[int] | None) -> list[int]:
    """Which of every B rows a process reads."""
    chosen = list(range(config.batch)) if rows is None else [int(row) for row in rows]
    if not chosen or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < config.batch:
        raise ConfigError(
            f"rows = {chosen} is not allowed: it must be ascending, from 0 to data.batch - 1 = {config.batch - 1}."
        )
    return chosen


def require_held_out(config: Any, digest: str, trained_on: Mapping[str, Any], who: str, *, named: bool) -> list[str]:
    """`Data.require_heldout` of a source with a digest, of which `config.heldout` is held out."""
    before = trained_on["data"]
    if digest == before:
        if config.heldout != trained_on["heldout"]:
            raise UserError(
                f"data.heldout = {config.heldout} holds out text that {who} was trained on, with "
                f"{trained_on['heldout']}; allowed: {trained_on['heldout']}, or other data with "
                "data.source"
            )
        return []
    if not named:
        raise UserError(
            f"the text of data.source = {config.source!r} is not what {who} was trained on (digest "
            f"{digest[:12]}, was {before[:12]}): what is held out of it may have been trained on\n"
            "restore it, or say that it is other data with data.source"
        )
    return [f"on other data than it was trained on ({config.source})"]
