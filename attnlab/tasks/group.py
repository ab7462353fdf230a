"""Tracking a state: the product of group elements so far, told at every position.

Elements of S_n are the permutations of n in lexicographic order, those of A_n the even ones of them, those of Z_n
numbers; id 0 is the identity. A row is g_1 .. g_T, and at t `g_1 g_2 .. g_t` is to be told, with `(f g)(i) = f(g(i))`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, buckets, other_than


def permutations(group: str) -> list[tuple[int, ...]]:
    """Of S_n or A_n, by id."""
    every = list(itertools.permutations(range(int(group[1:]))))
    even = lambda p: sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0
    return [p for p in every if group[0] == "S" or even(p)]


@functools.cache
def multiplication(group: str) -> np.ndarray:
    """[n, n] ids of all products `f g`."""
    if group[0] == "Z":
        order = np.arange(int(group[1:]))
        return (order[:, None] + order) % len(order)
    elements = permutations(group)
    index = {p: i for i, p in enumerate(elements)}
    return np.array([[index[tuple(f[i] for i in g)] for g in elements] for f in elements])


@dataclasses.dataclass(frozen=True)
class GroupConfig(TokenTaskConfig):
    """The word problem of a group. Longer examples are all of full length."""

    group: str = knob("S3", "Zn (Z2: parity), S3 to S5, A3 to A5", other=("Z2", "A4", "Z5"))
    length: int = knob(24, "T", other=(16,), least=1)
    generators: str = knob("all", "elements of a row: all, or in S_n adjacent, the n - 1 swaps of neighbours",
                           other=("adjacent",), choices=("all", "adjacent"))  # fmt: skip
    shortest: int | None = knob(
        None, "rows are from this long to T, each length as likely; none: all T", other=(8,), least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = re.fullmatch(r"Z([2-9]|[1-9]\d{1,2})|[SA][3-5]", self.group) is not None
        config_lib.require(known, "data.group", self.group, "Z2 to Z999, S3 to S5, A3 to A5")
        fits = self.generators == "all" or self.group[0] == "S"
        config_lib.require(fits, "data.generators", self.generators, f"all where data.group = {self.group!r}")
        if self.shortest is not None:
            most = f"at most data.length = {self.length}"
            config_lib.require(self.shortest <= self.length, "data.shortest", self.shortest, most)

    @property
    def ids(self) -> int:
        return len(multiplication(self.group))

    def longer(self, multiple: int) -> GroupConfig:
        shortest = self.shortest if multiple == 1 else None
        return dataclasses.replace(self, length=multiple * self.length, shortest=shortest)

    def letters(self) -> np.ndarray:
        """Ids that a row is made of."""
        if self.generators == "all":
            return np.arange(self.ids)
        n = int(self.group[1:])
        swap = lambda i: tuple({i: i + 1, i + 1: i}.get(j, j) for j in range(n))
        return np.array([permutations(self.group).index(swap(i)) for i in range(n - 1)])

    def different(self) -> float:
        return float(len(self.letters())) ** min(self.length, 99)


@register("group")
class Group(TokenTask):
    """The product of all elements so far, at every position."""

    Config = GroupConfig
    title = "tracking a state: parity, cyclic and permutation groups"
    source = "Merrill et al. 2024, The Illusion of State in State-Space Models, arXiv:2404.08819"

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        table, letters = multiplication(c.group), c.letters()
        used = c.length if c.shortest is None else c.shortest + stream.integer(c.length - c.shortest + 1)
        tokens, segments = np.zeros((2, c.length), np.int64)
        tokens[:used], segments[:used] = letters[stream.integers(len(letters), used)], 1
        products = itertools.accumulate(tokens[:used].tolist(), lambda f, g: table[f, g])
        targets = np.zeros(c.length, np.int64)
        targets[:used] = list(products)
        return {"tokens": tokens, "targets": targets, "weights": segments, "segments": segments}

    def solve(self, row: Arrays) -> np.ndarray:
        """By permutations, or sums, without the table."""
        group, out = self.config.group, np.zeros(len(row["tokens"]), np.int64)
        if group[0] == "Z":
            return row["tokens"].cumsum() % int(group[1:])
        elements = np.array(permutations(group))
        index, state = {tuple(p): i for i, p in enumerate(elements.tolist())}, np.arange(elements.shape[1])
        for t, g in enumerate(row["tokens"]):
            state = state[elements[g]]
            out[t] = index[tuple(state.tolist())]
        return out

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        tokens, letters = row["tokens"].copy(), self.config.letters()
        at = stream.integer(int(row["segments"].sum()))
        which = int(np.flatnonzero(letters == tokens[at])[0])
        tokens[at] = letters[other_than(stream, which, 0, len(letters))]
        return {**row, "tokens": tokens}

    def answers(self) -> int | None:
        return self.config.ids if self.config.generators == "all" else None

    def slices(self, rows: Arrays) -> Slices:
        """By how many elements are multiplied, and at the row's end."""
        c = self.config
        count = np.where(rows["weights"] > 0, np.arange(1, c.length + 1), 0)
        end = count == (rows["segments"] > 0).sum(1, keepdims=True)
        return {"elements": buckets(count, c.length, least=1), "at": (["before_the_end", "the_end"], end.astype(int))}
