"""Induction: what followed the same token before, follows again."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, buckets, other_than

SPECIAL = 0


@dataclasses.dataclass(frozen=True)
class InductionConfig(TokenTaskConfig):
    """Induction heads."""

    form: str = knob("first", "first: a special token, its follower asked at the end; repeat: a random half, and again",
                     other=("repeat",), choices=("first", "repeat"))  # fmt: skip
    vocab: int = knob(16, "ids, the special one among them", other=(8,), least=3)
    length: int = knob(128, "T; with form = repeat even", other=(64,), least=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        even = self.form == "first" or self.length % 2 == 0
        config_lib.require(even, "data.length", self.length, "an even number where data.form = 'repeat'")

    @property
    def ids(self) -> int:
        return self.vocab


@register("induction")
class Induction(TokenTask):
    """The follower of a special token, or a random half that comes again, told from its second token on."""

    Config = InductionConfig
    title = "an induction head"
    source = (
        "Olsson et al. 2022, In-context Learning and Induction Heads; form first: Gu and Dao 2023, arXiv:2312.00752"
    )

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        T, half = c.length, c.length // 2
        targets, weights = np.zeros((2, T), np.int64)
        if c.form == "first":
            tokens = 1 + stream.integers(c.vocab - 1, T)
            at = stream.integer(T - 2)
            tokens[[at, T - 1]] = SPECIAL
            targets[T - 1], weights[T - 1] = tokens[at + 1], 1
        else:
            tokens = np.tile(stream.integers(c.vocab, half), 2)
            targets[half:-1], weights[half:-1] = tokens[half + 1 :], 1
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def solve(self, row: Arrays) -> np.ndarray:
        tokens, half = row["tokens"], self.config.length // 2
        if self.config.form == "first":
            return np.full(len(tokens), tokens[np.flatnonzero(tokens == SPECIAL)[0] + 1])
        return np.concatenate([tokens[:half], tokens[1 : half + 1]])

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        tokens, c = row["tokens"].copy(), self.config
        if c.form == "first":
            at = np.flatnonzero(tokens == SPECIAL)[0] + 1
            tokens[at] = other_than(stream, tokens[at], 1, c.vocab - 1)
        else:
            at = 1 + stream.integer(c.length // 2 - 1)
            tokens[at] = other_than(stream, tokens[at], 0, c.vocab)
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return self.config.vocab - (self.config.form == "first")

    def slices(self, rows: Arrays) -> Slices:
        """By how far back the answer stands."""
        c = self.config
        if c.form == "repeat":
            return {}
        first = (rows["tokens"] == SPECIAL).argmax(1)
        return {"gap": buckets(c.length - 2 - first, c.length - 2, least=1)}
