"""ListOps: the value of a nested expression of digits, read as `[MAX 4 [MED 1 8 3 ] 2 ]`.

A node at depth below `depth` is a digit with probability 3/4, else an operator with 2 to `args` arguments; expressions
of more than `least` and fewer than `most` tokens are kept. Ids: 0 to 9 digits, then MIN, MAX, MED, SM, `]`, and the
marker of the class. MED is the integer part of the median, SM the sum modulo 10.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig

LEAF = 0.75
END, CLASS = 14, 15


def median(values: list[int]) -> int:
    """The integer part of the median."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


OPERATORS: dict[int, Callable[[list[int]], int]] = {10: min, 11: max, 12: median, 13: lambda values: sum(values) % 10}
WORDS = ("MIN", "MAX", "MED", "SM")


@dataclasses.dataclass(frozen=True)
class ListopsConfig(TokenTaskConfig):
    """ListOps."""

    length_field: ClassVar[str] = "most"

    depth: int = knob(5, "of an expression, at most", other=(4,), least=2)
    args: int = knob(5, "of an operator, at most", other=(4,), least=2)
    least: int = knob(20, "an expression has more tokens", other=(10,), least=1)
    most: int = knob(
        120, "an expression has fewer tokens; T, with the class marker where read = cls", other=(60,), least=8
    )
    read: str = knob("last", "where the value is told: last, of the expression; cls, a marker before it that sees all",
                     other=("cls",), choices=("last", "cls"))  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.least < self.most - 4, "data.least", self.least, f"less than data.most - 4 = {self.most - 4}")
        largest = (self.args**self.depth - 1) // (self.args - 1) * 2  # nodes but for leaves, two tokens each
        need(
            self.least < largest // 4, "data.least", self.least, "less, or a larger depth or args: too few are so long"
        )

    @property
    def length(self) -> int:
        return self.most

    @property
    def ids(self) -> int:
        return CLASS + 1

    @property
    def bidirectional(self) -> bool:
        return self.read == "cls"


@register("listops")
class Listops(TokenTask):
    """The value of an expression, told at its end, or before it where every position sees all."""

    Config = ListopsConfig
    title = "nested lists: hierarchy at length"
    source = "Nangia and Bowman 2018, ListOps, arXiv:1804.06028, as in Tay et al. 2020, arXiv:2011.04006"
    commonest = True

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        draws = _draws(stream)
        while True:
            # A digit alone is never long enough: the root is an operator.
            text: list[int] = []
            value = self._node(draws, 1, text, root=True)
            if c.least < len(text) < c.most - c.bidirectional:
                break
        tokens, targets, weights, segments = np.zeros((4, c.length), np.int64)
        text = [CLASS, *text] if c.bidirectional else text
        tokens[: len(text)], segments[: len(text)] = text, 1
        at = 0 if c.bidirectional else len(text) - 1
        targets[at], weights[at] = value, 1
        return {"tokens": tokens, "targets": targets, "weights": weights, "segments": segments}

    def _node(self, draws: Iterator[float], depth: int, text: list[int], root: bool = False) -> int:
        """Adds the tokens of a random expression; its value. One that is too long already is not finished."""
        c = self.config
        if len(text) >= c.most or depth >= c.depth or (not root and next(draws) < LEAF):
            text.append(int(10 * next(draws)))
            return text[-1]
        operator = 10 + int(4 * next(draws))
        text.append(operator)
        count = 2 + int((c.args - 1) * next(draws))
        value = OPERATORS[operator]([self._node(draws, depth + 1, text) for _ in range(count)])
        text.append(END)
        return value

    def solve(self, row: Arrays) -> np.ndarray:
        """By a stack."""
        stack: list[list[int]] = [[]]
        for token in row["tokens"][row["segments"] > 0].tolist():
            if token < 10:
                stack[-1].append(token)
            elif token in OPERATORS:
                stack.append([token])
            elif token == END:
                operator, *values = stack.pop()
                stack[-1].append(OPERATORS[operator](values))
        return np.full(len(row["tokens"]), stack[0][-1])

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """A digit or an operator becomes another with which the value is another."""
        value = self.solve(row)[0]
        places = np.flatnonzero((row["tokens"] < END) & (row["segments"] > 0))
        for at in places[stream.permutation(len(places))]:
            for other in range(10) if row["tokens"][at] < 10 else OPERATORS:
                tokens = row["tokens"].copy()
                tokens[at] = other
                if self.solve({**row, "tokens": tokens})[0] != value:
                    return {**row, "tokens": tokens}
        return row

    def slices(self, rows: Arrays) -> Slices:
        """By the outermost operator, and by how deep the expression is."""
        c = self.config
        step = np.isin(rows["tokens"], list(OPERATORS)).astype(int) - (rows["tokens"] == END)
        deep = np.where(rows["segments"] > 0, step.cumsum(1), 0).max(1)
        root = rows["tokens"][:, int(c.bidirectional)]
        return {"operator": (list(WORDS), root - 10), "depth": ([str(i) for i in range(1, c.depth)], deep - 1)}


def _draws(stream: Stream) -> Iterator[float]:
    while True:
        yield from stream.uniform(256).tolist()
