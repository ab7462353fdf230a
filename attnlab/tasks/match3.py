"""Match2 and Match3: does a position have partners in the row with which it adds up to 0?

x_i is uniform on 0 to M - 1, and position i is to tell whether there are j, k with x_i + x_j + x_k = 0 mod M (order
3), or a j with x_i + x_j = 0 (order 2). Ids: 0 no, 1 yes, then the M numbers.
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
from attnlab.tasks.tokens import TokenTask, TokenTaskConfig

NUMBERS = 2


@dataclasses.dataclass(frozen=True)
class Match3Config(TokenTaskConfig):
    """Match2 and Match3. Longer examples keep the modulus, and so have more matches."""

    length: int = knob(16, "n, numbers of a row", other=(12,), least=4)
    order: int = knob(3, "numbers that add up: 3, or 2, which is easy", other=(2,), least=2, below=4)
    distinct: bool = knob(False, "whether j and k must differ from i and from each other", other=(True,))
    modulus: int | None = knob(None, "M; none: such that about half of the positions match", other=(64,), least=3)

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.order == 3 or not self.distinct
        config_lib.require(fits, "data.distinct", self.distinct, "false where data.order = 2")

    @property
    def numbers(self) -> int:
        """M. A row has n(n+1)/2 pairs j, k (distinct: (n-1)(n-2)/2), each of which matches with probability 1/M."""
        n = self.length
        pairs = n if self.order == 2 else (n - 1) * (n - 2) / 2 if self.distinct else n * (n + 1) / 2
        return max(3, round(pairs / math.log(2))) if self.modulus is None else self.modulus

    @property
    def ids(self) -> int:
        return NUMBERS + self.numbers

    @property
    def bidirectional(self) -> bool:
        return True

    def longer(self, multiple: int) -> Match3Config:
        modulus = self.modulus if multiple == 1 else self.numbers
        return dataclasses.replace(self, length=multiple * self.length, modulus=modulus)


@register("match3")
class Match3(TokenTask):
    """Whether two others (order 2: one) of the row add up to 0 with a position's number, modulo M."""

    Config = Match3Config
    title = "triples: what needs attention of third order"
    source = "Sanford et al. 2023, Representational Strengths and Limitations of Transformers, arXiv:2306.02896"
    commonest = True

    def example(self, stream: Stream, split: str) -> Arrays:
        c, M = self.config, self.config.numbers
        x = stream.integers(M, c.length)
        if c.order == 2:
            found = np.isin(-x % M, x)
        elif not c.distinct:
            found = np.isin(-x % M, (x[:, None] + x) % M)
        else:
            pair = ((x[:, None] + x + x[:, None, None]) % M == 0) & ~self._together(c.length)
            found = pair.any((1, 2))
        return {"tokens": NUMBERS + x, "targets": found.astype(int), "weights": np.ones(c.length)}

    @staticmethod
    def _together(n: int) -> np.ndarray:
        """[i, j, k]: two of them are the same position."""
        i, j, k = np.ogrid[:n, :n, :n]
        return (i == j) | (i == k) | (j == k)

    def solve(self, row: Arrays) -> np.ndarray:
        """By trying all partners."""
        c, x = self.config, (row["tokens"] - NUMBERS).tolist()
        n, M, out = len(x), self.config.numbers, []
        for i in range(n):
            if c.order == 2:
                out.append(any((x[i] + y) % M == 0 for y in x))
            elif c.distinct:
                others = x[:i] + x[i + 1 :]
                out.append(any((x[i] + y + z) % M == 0 for j, y in enumerate(others) for z in others[j + 1 :]))
            else:
                out.append(any((x[i] + y + z) % M == 0 for j, y in enumerate(x) for z in x[j:]))
        return np.array(out, int)

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """A position without a match gets one; where all have one, some number changes until one has none."""
        tokens, M, c = row["tokens"].copy(), self.config.numbers, self.config
        x = tokens - NUMBERS
        without = np.flatnonzero(row["targets"] == 0)
        if len(without):
            i = int(without[0])
            j, k = [place for place in range(3) if place != i][:2]
            tokens[j] = NUMBERS + (-x[i] - (x[k] if c.order == 3 else 0)) % M
            return {**row, "tokens": tokens}
        for number in stream.permutation(M):
            tokens[0] = NUMBERS + number
            if not self.solve({"tokens": tokens}).all():
                break
        return {**row, "tokens": tokens}
