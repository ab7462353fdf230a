"""Multi-query associative recall: pairs of key and value, then the keys again, each to be answered by its value.

Ids of a vocabulary V: 0 is filler, keys are 1 to V/2 - 1, values V/2 to V - 1. A row is P pairs `k v`, keys and values
distinct, then slots as wide as a pair, of which P are chosen without replacement with weights s^(power - 1), s = 1,
2..; each has one of the keys, where its value is to be told, and filler.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, buckets, constant, other_than


@dataclasses.dataclass(frozen=True)
class MqarConfig(TokenTaskConfig):
    """Multi-query associative recall."""

    vocab: int = knob(256, "V: half are keys and the filler, half values; even", other=(128,), least=4)
    length: int = knob(64, "T", other=(96,), least=4)
    pairs: int = knob(8, "P: pairs, and queries", other=(4,), least=1)
    power: float = knob(0.01, "of the slots' weights s^(power - 1): near 0 most queries follow the pairs at once; "
                        "1: all slots are alike", other=(1.0,), above=0)  # fmt: skip
    filler: str = knob("zero", "zero: id 0; disjoint: V/4 ids of its own; any: any id, keys of the row too, unasked",
                       other=("disjoint", "any"), choices=("zero", "disjoint", "any"))  # fmt: skip
    passes: int = knob(1, "times that the pairs are shown, each time in another order", other=(2,), least=1)
    updates: int = knob(0, "keys that are shown once more, with a new value, which counts", other=(2,), least=0)
    compound: int = knob(
        1, "ids of a key: 1, or 2, of which neither alone tells the value", other=(2,), least=1, below=3
    )
    loss: str = knob("scored", "scored: of answers; all: training also tells every next token, as the publication does",
                     other=("all",), choices=("scored", "all"))  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.vocab % 2 == 0, "data.vocab", self.vocab, "an even number")
        keys, values = (self.vocab // 2 - 1 if self.compound == 1 else self.grid**2), self.vocab // 2
        need(self.grid <= (self.vocab // 2 - 1) // 2 or self.compound == 1, "data.pairs", self.pairs,
             f"fewer with compound keys of data.vocab = {self.vocab}")  # fmt: skip
        most = min(keys, values - self.updates)
        need(self.pairs <= most, "data.pairs", self.pairs, f"at most {most} with data.vocab = {self.vocab}")
        need(self.updates <= self.pairs, "data.updates", self.updates, f"at most data.pairs = {self.pairs}")
        least = self.shown + self.pairs * self.width
        need(
            self.length >= least,
            "data.length",
            self.length,
            f"{least} or more for {self.pairs} pairs and their queries",
        )

    @property
    def width(self) -> int:
        """Ids of a pair."""
        return self.compound + 1

    @property
    def shown(self) -> int:
        """Positions before the first slot."""
        return (self.passes * self.pairs + self.updates) * self.width

    @property
    def grid(self) -> int:
        """Ids that each half of a compound key is one of, in a row: about two keys share each."""
        return max(2, math.isqrt(2 * self.pairs - 1) + 1)

    @property
    def ids(self) -> int:
        return self.vocab + (self.vocab // 4 if self.filler == "disjoint" else 0)


@register("mqar")
class Mqar(TokenTask):
    """`k1 v1 .. kP vP`, then keys among filler: each is to be answered by its value."""

    Config = MqarConfig
    title = "recall of many pairs, asked at once"
    source = "Arora et al. 2023, Zoology, arXiv:2312.04927; disjoint filler and compound keys are ours"
    variants = ({"updates": 2, "compound": 2, "passes": 2, "length": 96}, {"filler": "any", "power": 1.0})

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        P, w, half = c.pairs, c.width, c.vocab // 2
        keys, drawn = self._keys(stream), half + stream.distinct(P + c.updates, half)
        values = drawn[:P].copy()
        tokens, targets = self._filler(stream), np.zeros(c.length, np.int64)
        order = np.concatenate([np.arange(P) if i == 0 else stream.permutation(P) for i in range(c.passes)])
        tokens[: len(order) * w] = np.column_stack([keys[order], values[order]]).ravel()
        if c.updates:
            again = stream.distinct(c.updates, P)
            values[again] = drawn[P:]
            tokens[len(order) * w : c.shown] = np.column_stack([keys[again], values[again]]).ravel()
        slots = (c.length - c.shown) // w
        chosen = stream.weighted((c.power - 1) * np.log(np.arange(1, slots + 1)), P)
        at = c.shown + w * chosen
        tokens[at[:, None] + np.arange(c.compound)] = keys
        asked = at + c.compound - 1
        targets[asked] = values
        weights = np.zeros(c.length)
        weights[asked] = 1
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def _keys(self, stream: Stream) -> np.ndarray:
        """[P, compound]."""
        c = self.config
        count = c.vocab // 2 - 1
        if c.compound == 1:
            return 1 + stream.distinct(c.pairs, count)[:, None]
        first = 1 + stream.distinct(c.grid, count // 2)
        second = 1 + count // 2 + stream.distinct(c.grid, count - count // 2)
        cells = stream.distinct(c.pairs, c.grid**2)
        return np.column_stack([first[cells // c.grid], second[cells % c.grid]])

    def _filler(self, stream: Stream) -> np.ndarray:
        c = self.config
        if c.filler == "zero":
            return np.zeros(c.length, np.int64)
        if c.filler == "any":
            return stream.integers(c.vocab, c.length)
        return c.vocab + stream.integers(c.vocab // 4, c.length)

    def _told(self, tokens: np.ndarray) -> dict[tuple[int, ...], int]:
        """By key, where the value that counts stands."""
        c = self.config
        starts = range(0, c.shown, c.width)
        return {tuple(tokens[s : s + c.compound].tolist()): s + c.compound for s in starts}

    def solve(self, row: Arrays) -> np.ndarray:
        c, tokens = self.config, row["tokens"]
        told, out = self._told(tokens), np.zeros(c.length, np.int64)
        for start in range(c.shown, c.length - c.width + 1, c.width):
            if (where := told.get(tuple(tokens[start : start + c.compound].tolist()))) is not None:
                out[start + c.compound - 1] = tokens[where]
        return out

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        c, tokens = self.config, row["tokens"].copy()
        asked = np.flatnonzero(row["weights"])[0]
        where = self._told(tokens)[tuple(tokens[asked - c.compound + 1 : asked + 1].tolist())]
        tokens[where] = other_than(stream, tokens[where], c.vocab // 2, c.vocab // 2)
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return self.config.vocab // 2

    def slices(self, rows: Arrays) -> Slices:
        """By the number of pairs, and by how far back the value stands."""
        c = self.config
        gaps = np.full(rows["tokens"].shape, -1)
        for tokens, weights, gap in zip(rows["tokens"], rows["weights"], gaps):
            told = self._told(tokens)
            for t in np.flatnonzero(weights):
                gap[t] = t - told[tuple(tokens[t - c.compound + 1 : t + 1].tolist())]
        return {"pairs": constant(c.pairs, len(gaps)), "gap": buckets(gaps, c.length - 1, least=1)}
