"""Copying and selective copying: items, then a mark, after which the items are to be told in their order.

Ids: 0 is blank, 1 the mark, items are from 2 on. Items stand together at the row's start (`copy`) or anywhere among
blanks (`selective_copy`). With `form` = parallel a blank stands where each item is to be told, so that nothing helps
the answer; with lm the items told so far stand there, as when a text goes on.
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, buckets, other_than

BLANK, MARK, FIRST = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class CopyConfig(TokenTaskConfig):
    """Copying. Longer examples have more items, too."""

    vocab: int = knob(16, "different items", other=(8,), least=2)
    items: int = knob(8, "items of a row, at most", other=(4,), least=1)
    shortest: int | None = knob(
        None, "items of a row, at least, each number as likely; none: always `items`", other=(2,), least=1
    )
    length: int = knob(128, "T; what is not needed is blank, between the items and the mark", other=(64,), least=3)
    form: str = knob("parallel", "parallel: blanks stand where items are told; lm: the items told so far",
                     other=("lm",), choices=("parallel", "lm"))  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        if self.shortest is not None:
            need(self.shortest <= self.items, "data.shortest", self.shortest, f"at most data.items = {self.items}")
        least = 2 * self.items + (self.form == "parallel")
        need(self.length >= least, "data.length", self.length, f"{least} or more for {self.items} items")

    @property
    def ids(self) -> int:
        return FIRST + self.vocab

    def longer(self, multiple: int) -> CopyConfig:
        more = {"length": multiple * self.length, "items": multiple * self.items}
        return dataclasses.replace(self, **more, shortest=self.shortest if multiple == 1 else None)

    @property
    def answer(self) -> slice:
        """Where items are told: from the mark on in the form lm, after it in the other."""
        return slice(self.length - self.items, self.length)

    @property
    def mark(self) -> int:
        """Where the mark stands."""
        return self.length - self.items - (self.form == "parallel")


class Copying(TokenTask):
    """What both tasks share."""

    Config = CopyConfig
    variants = ({"shortest": 1, "form": "lm"},)

    @abc.abstractmethod
    def places(self, stream: Stream, count: int) -> np.ndarray:
        """Ascending positions of the items, before the mark."""

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        count = c.items if c.shortest is None else c.shortest + stream.integer(c.items - c.shortest + 1)
        items = FIRST + stream.integers(c.vocab, count)
        tokens, targets, weights = np.zeros((3, c.length), np.int64)
        tokens[self.places(stream, count)] = items
        tokens[c.mark] = MARK
        first = c.answer.start
        targets[first : first + count] = items
        weights[first : first + count] = 1
        if c.form == "lm":
            tokens[first + 1 : first + count] = items[:-1]
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def solve(self, row: Arrays) -> np.ndarray:
        c = self.config
        before = row["tokens"][: c.mark]
        items = before[before >= FIRST]
        out = np.zeros(c.length, np.int64)
        out[c.answer.start : c.answer.start + len(items)] = items
        return out

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        tokens = row["tokens"].copy()
        where = np.flatnonzero(tokens[: self.config.mark] >= FIRST)
        at = where[stream.integer(len(where))]
        tokens[at] = other_than(stream, tokens[at], FIRST, self.config.vocab)
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return self.config.vocab

    def slices(self, rows: Arrays) -> Slices:
        """By the number of items, and by which item is told."""
        c, scored = self.config, rows["weights"] > 0
        order = np.where(scored, np.arange(c.length) - c.answer.start, -1)
        count = (rows["tokens"][:, : c.mark] >= FIRST).sum(1)
        return {"items": buckets(count, c.items, least=1), "item": buckets(order, c.items - 1)}


@register("copy")
class Copy(Copying):
    """Items at the start of the row, to be told after a mark."""

    title = "keeping a sequence whole"
    source = (
        "Jelassi et al. 2024, Repeat After Me, arXiv:2402.01032; blanks while answering as in MAD, arXiv:2403.17844"
    )

    def places(self, stream: Stream, count: int) -> np.ndarray:
        return np.arange(count)


@register("selective_copy")
class SelectiveCopy(Copying):
    """Items anywhere among blanks, to be told after a mark."""

    title = "keeping what matters, and nothing else"
    source = "Gu and Dao 2023, Mamba, arXiv:2312.00752, section 4.1.1"

    def places(self, stream: Stream, count: int) -> np.ndarray:
        return np.sort(stream.distinct(count, self.config.mark))
