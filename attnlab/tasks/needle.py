"""Needles in a haystack: keys with values hidden in filler, and some of the keys asked for at the end.

A needle is `KEY k v1 .. vm`, the question `ASK k`, after which the values are to be told digit by digit, those of a key
with several needles in the order in which these stand.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, other_than

KEY, ASK, DIGITS = 0, 1, 2
_FILLER = DIGITS + 10
FILLERS = 16
_KEYS = _FILLER + FILLERS
DEPTHS = 5


@dataclasses.dataclass(frozen=True)
class NeedleConfig(TokenTaskConfig):
    """Needles of keys and values, as in RULER's needle tasks; a passkey is one needle and one question."""

    length: int = knob(256, "T", other=(192,), least=8)
    needles_k: int = knob(1, "different keys among the needles", other=(4,), least=1)
    needles_v: int = knob(1, "needles of each key, with values of their own", other=(2,), least=1)
    queries: int = knob(1, "keys asked for", least=1)
    key_length: int = knob(1, "ids of a key", other=(2,), least=1, below=3)
    value_length: int = knob(4, "digits of a value, m", other=(7,), least=1)
    haystack: str = knob("noise", "noise: filler ids; needle: needles of keys that nobody asks for", other=("needle",),
                         choices=("noise", "needle"))  # fmt: skip
    depth: str = knob("random", "where the first needle asked for begins: random, or shares of the room that there is, "
                                "each as likely, e.g. 0,0.5,1", other=("0.5", "0,0.25,0.5,0.75,1"))  # fmt: skip
    vocab: int = knob(
        128, f"all ids: {_KEYS} are markers, digits and filler, the rest keys", other=(96,), least=_KEYS + 2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.queries <= self.needles_k, "data.queries", self.queries, f"at most data.needles_k = {self.needles_k}")
        room, taken = self.length - self.question, self.count * self.block
        least = taken + self.question
        need(taken <= room, "data.length", self.length, f"{least} or more for {self.count} needles and the questions")
        keys = (self.vocab - _KEYS) ** self.key_length
        most = max(1, (keys - self.hay_needles) if self.haystack == "needle" else keys)
        need(self.needles_k + self.hay_needles <= keys, "data.needles_k", self.needles_k,
             f"at most {most} with {keys} different keys; data.vocab and data.key_length make more")  # fmt: skip
        self.depths()

    @property
    def ids(self) -> int:
        return self.vocab

    @property
    def block(self) -> int:
        """Positions of a needle."""
        return 1 + self.key_length + self.value_length

    @property
    def count(self) -> int:
        """Needles that could be asked for."""
        return self.needles_k * self.needles_v

    @property
    def hay_needles(self) -> int:
        """Needles that are the haystack."""
        rest = self.length - self.question - self.count * self.block
        return rest // self.block if self.haystack == "needle" else 0

    @property
    def asked(self) -> int:
        """Positions of one question and its answer."""
        return 1 + self.key_length + self.needles_v * self.value_length

    @property
    def question(self) -> int:
        """Positions of all of them; the very last digit is told, not read."""
        return self.queries * self.asked - 1

    def depths(self) -> list[float] | None:
        """None: random."""
        if self.depth == "random":
            return None
        try:
            found = [float(part) for part in self.depth.split(",")]
        except ValueError:
            found = []
        good = bool(found) and all(0 <= share <= 1 for share in found)
        config_lib.require(good, "data.depth", self.depth, "random, or numbers from 0 to 1 with commas between them")
        return found


@register("needle")
class Needle(TokenTask):
    """`.. KEY k v1 .. vm .. ASK k v1 .. v(m-1)`, a value to be told digit by digit."""

    Config = NeedleConfig
    title = "finding what was told long ago: needle, passkey, several keys and values"
    source = "Hsieh et al. 2024, RULER, arXiv:2404.06654; as ids, so that small models read it, is ours"
    variants = (
        {"needles_k": 4, "queries": 2},
        {"needles_k": 3, "needles_v": 2, "queries": 2, "depth": "0,0.5,1"},
        {"haystack": "needle", "depth": "0.3"},
    )

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        keys = self._keys(stream, c.needles_k + c.hay_needles)
        values = DIGITS + stream.integers(10, (c.count + c.hay_needles) * c.value_length).reshape(-1, c.value_length)
        owner = np.concatenate([np.repeat(np.arange(c.needles_k), c.needles_v), c.needles_k + np.arange(c.hay_needles)])
        asked = stream.distinct(c.queries, c.needles_k)
        first = int(asked[0]) * c.needles_v
        starts = self._starts(stream, len(owner), first)
        tokens = _FILLER + stream.integers(FILLERS, c.length)
        blocks = np.column_stack([np.full(len(owner), KEY), keys[owner], values])
        tokens[starts[:, None] + np.arange(c.block)] = blocks
        targets, weights = np.zeros((2, c.length), np.int64)
        at = c.length - c.question
        for k in asked:
            mine = np.flatnonzero(owner == k)
            told = values[mine[np.argsort(starts[mine])]].ravel()
            line = np.concatenate([[ASK], keys[k], told])
            end = min(at + len(line), c.length)
            tokens[at:end] = line[: end - at]
            here = at + c.key_length + np.arange(len(told))
            targets[here], weights[here] = told, 1
            at += len(line)
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def _keys(self, stream: Stream, count: int) -> np.ndarray:
        """[count, key_length], all different."""
        c = self.config
        base = c.vocab - _KEYS
        drawn = stream.distinct(count, base**c.key_length)
        return _KEYS + drawn[:, None] // base ** np.arange(c.key_length)[::-1] % base

    def _starts(self, stream: Stream, count: int, first: int) -> np.ndarray:
        """Where each needle begins; the one of index `first` as deep as the config says."""
        c = self.config
        filler = c.length - c.question - count * c.block
        order = stream.permutation(count)  # which needle comes where
        if (depths := c.depths()) is None:
            before = np.sort(stream.distinct(count, filler + count)) - np.arange(count)
        else:
            share = depths[stream.integer(len(depths))]
            at = round(share * (count - 1))
            order = np.insert(order[order != first], at, first)
            own = int(np.clip(round(share * (c.length - c.question - c.block)) - at * c.block, 0, filler))
            left = np.sort(stream.integers(own + 1, at))
            right = own + np.sort(stream.integers(filler - own + 1, count - 1 - at))
            before = np.concatenate([left, [own], right])
        starts = np.empty(count, np.int64)
        starts[order] = before + np.arange(count) * c.block
        return starts

    def _needles(self, tokens: np.ndarray) -> dict[tuple[int, ...], list[int]]:
        """By key, where its values begin."""
        c, found = self.config, {}
        for at in np.flatnonzero(tokens[: c.length - c.question] == KEY):
            found.setdefault(tuple(tokens[at + 1 : at + 1 + c.key_length].tolist()), []).append(at + 1 + c.key_length)
        return found

    def _questions(self, tokens: np.ndarray) -> list[tuple[int, list[int]]]:
        """Where each answer's telling begins, and where its needles' values do."""
        c, needles = self.config, self._needles(tokens)
        starts = range(c.length - c.question, c.length, c.asked)
        return [(at + c.key_length, needles[tuple(tokens[at + 1 : at + 1 + c.key_length].tolist())]) for at in starts]

    def solve(self, row: Arrays) -> np.ndarray:
        tokens, m = row["tokens"], self.config.value_length
        out = np.zeros(len(tokens), np.int64)
        for at, values in self._questions(tokens):
            for i, value in enumerate(values):
                out[at + i * m : at + (i + 1) * m] = tokens[value : value + m]
        return out

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        tokens = row["tokens"].copy()
        _, values = self._questions(tokens)[stream.integer(self.config.queries)]
        at = values[stream.integer(len(values))] + stream.integer(self.config.value_length)
        tokens[at] = other_than(stream, tokens[at], DIGITS, 10)
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return 10

    def slices(self, rows: Arrays) -> Slices:
        """By the depth of the first needle asked for, in fifths of the room."""
        c = self.config
        room = max(1, c.length - c.question - c.block)
        first = [self._questions(tokens)[0][1][0] - 1 - c.key_length for tokens in rows["tokens"]]
        share = np.minimum(DEPTHS * np.array(first) // (room + 1), DEPTHS - 1)
        labels = [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}%" for i in range(DEPTHS)]
        return {"depth": (labels, share)}
