"""Tasks of tokens: ids in, an id to be told at each position whose weight is 1."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from attnlab import batch as batch_lib
from attnlab.data.base import Arrays
from attnlab.tasks.base import Task, TaskConfig
from attnlab.tasks.streams import Stream

Slices = dict[str, tuple[list[str], np.ndarray]]
MEASURED = 2048  # examples on which chance is measured where there is no formula


@dataclasses.dataclass(frozen=True)
class TokenTaskConfig(TaskConfig):
    """What tasks of tokens share."""

    @property
    @abc.abstractmethod
    def ids(self) -> int:
        """Tokens and targets are below it."""

    @property
    def bidirectional(self) -> bool:
        """Whether a target is of its own position, which then sees the whole row; else it is what comes next."""
        return False

    def batch_spec(self) -> batch_lib.Spec:
        plain = batch_lib.Field((self.length,), "int32", ("seq",))
        ids = dataclasses.replace(plain, ids=self.ids, said=f"the ids of data.name = {self.node_name!r}")
        return {
            "tokens": ids,
            "targets": dataclasses.replace(ids, about=batch_lib.OWN if self.bidirectional else batch_lib.NEXT),
            "segments": plain,
            "positions": plain,
            "weights": dataclasses.replace(plain, dtype="float32"),
        }

    def fitting(self) -> dict[str, Any]:
        return {"name": "classifier" if self.bidirectional else "lm", "vocab": self.ids}


class TokenTask(Task):
    """Base class of tasks of tokens.

    `example` gives `tokens`, `targets` and `weights` [T], and `segments` where a row ends before T. What is scored is
    told by weights of 1; with a field `loss` = all, training rows tell the next token everywhere, as a text does.

    Attributes:
      inputs: arrays that the answer is a function of; nothing else is shown to `solve`.
      commonest: whether chance is the share of the commonest answer; else what answers in a random order score.
    """

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "segments", "positions")
    commonest: ClassVar[bool] = False

    @abc.abstractmethod
    def solve(self, row: Arrays) -> np.ndarray:
        """The right targets [T] of one row from its inputs; anything where the weight is 0."""

    @abc.abstractmethod
    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """The row's inputs with what one scored target hangs on replaced by something else of its kind.

        `solve` then gives another answer at one scored position at least.
        """

    def answers(self) -> int | None:
        """How many answers there are, all as likely; None: they are not, and chance is measured."""
        return None

    def slices(self, rows: Arrays) -> Slices:
        """What scores are told by: for each name the labels, the same for all batches, and which one [B] or [B, T]."""
        return {}

    def oracle(self, rows: Arrays) -> np.ndarray:
        """`solve` of every row, [B, T]."""
        count = len(rows["weights"])
        return np.stack([self.solve({name: rows[name][i] for name in self.inputs}) for i in range(count)])

    def chance(self) -> dict[str, float]:
        """What guessing scores, by metric."""
        answers = self.answers()
        return {"accuracy": 1 / answers if answers else _measured(type(self), self._law())}

    def guessed(self, rows: Arrays) -> float:
        """The accuracy of guessing on these rows: their targets in a random order (the mean over all orders), or the
        commonest of them.
        """
        scored = rows["weights"] > 0
        groups = np.zeros(len(scored), np.int64) if (g := self.guess_groups(rows)) is None else g
        right = total = 0
        for group in np.unique(groups):
            own = scored & (groups == group)[:, None]
            targets = rows["targets"][own]
            count = np.bincount(targets)
            right += count.max() if self.commonest else (count * (count - 1)).sum() / max(len(targets) - 1, 1)
            total += len(targets)
        return float(right / total)

    def guess_groups(self, rows: Arrays) -> np.ndarray | None:
        """int [B], of rows whose kind of answer is told so plainly that guessing should know it; None: one kind."""
        return None

    def facts(self, batches: Callable[[], Iterator[Arrays]]) -> dict[str, Any]:
        """`chance`, `oracle`, and `slices`, the labels of the array of that name."""
        labels = [f"{name}={label}" for name, (labels, _) in self.slices(self._few).items() for label in labels]
        return {"chance": self.chance(), "oracle": self._oracle_scores(), "slices": labels}

    def references(self) -> dict[str, float]:
        known = {"chance": self.chance(), "oracle": self._oracle_scores()}
        return {f"{who}_{metric}": value for who, scores in known.items() for metric, value in scores.items()}

    def marks(self, rows: Arrays) -> Arrays:
        """`slices` int8 [B, T, N]: which of the slices each position belongs to."""
        shape, found = rows["weights"].shape, []
        for labels, index in self.slices(rows).values():
            index = np.broadcast_to(index[:, None] if index.ndim == 1 else index, shape)
            found.append(index[..., None] == np.arange(len(labels)))
        return {"slices": np.concatenate(found, axis=-1).astype(np.int8)} if found else {}

    def filled(self, row: Arrays, split: str) -> Arrays:
        spec, length = self.config.batch_spec(), self.config.length
        row = {"segments": np.ones(length, np.int32), "positions": np.arange(length, dtype=np.int32), **row}
        if getattr(self.config, "loss", "scored") == "all" and split == "train":
            follows = np.append(row["tokens"][1:], 0)
            weights = (row["segments"] > 0) & np.append(row["segments"][1:] > 0, False)
            scored = row["weights"] > 0
            row |= {"targets": np.where(scored, row["targets"], follows), "weights": weights | scored}
        return {name: row[name] for name in spec}

    def _law(self) -> TaskConfig:
        return dataclasses.replace(self.config, batch=1, heldout=1, workers=0, split="valid", train_examples=None)

    @functools.cached_property
    def _few(self) -> Arrays:
        return self.rows(self.config.split, range(32))

    def _oracle_scores(self) -> dict[str, float]:
        scored = self._few["weights"] > 0
        return {"accuracy": float((self.oracle(self._few) == self._few["targets"])[scored].mean())}


@functools.cache
def _measured(task: type[TokenTask], config: TaskConfig) -> float:
    opened = task(config)
    return opened.guessed(opened.rows("valid", range(10**6, 10**6 + MEASURED)))


def buckets(values: np.ndarray, most: int, least: int = 0) -> tuple[list[str], np.ndarray]:
    """Labels of ranges from `least` to `most` whose bounds double, and in which each value lies (-1: in none)."""
    edges = [least]
    while edges[-1] <= most:
        edges.append(max(edges[-1] + 1, 2 * edges[-1]) if edges[-1] else 1)
    last = [min(hi - 1, most) for hi in edges[1:]]
    named = [str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in zip(edges, last)]
    index = np.searchsorted(edges, values, side="right") - 1
    return named, np.where((values >= least) & (values <= most), index, -1)


def constant(label: Any, count: int) -> tuple[list[str], np.ndarray]:
    """The slice of all of `count` rows."""
    return [str(label)], np.zeros(count, np.int64)


def other_than(stream: Stream, value: int, first: int, count: int) -> int:
    """One of `count` ids from `first` on that is not `value`."""
    return first + (int(value) - first + 1 + stream.integer(count - 1)) % count


def place(stream: Stream, sizes: Sequence[int], room: int) -> np.ndarray:
    """Starts of blocks of these sizes, in their order, laid without overlap into `room` positions.

    Every way to share the rest out before, between and after them is as likely.
    """
    filler, count = room - sum(sizes), len(sizes)
    before = np.sort(stream.distinct(count, filler + count)) - np.arange(count)
    return before + np.cumsum([0, *sizes[:-1]])
