"""k-hop induction: the follower of the last time that this token stood before, and so on, k times.

A row starts with a token that names k, then x_1 .. x_T. `hop_1(t)` is the largest j <= t with x_(j-1) = x_t, `hop_k` is
hop_1 of hop_(k-1), and at t the answer is x at hop_k(t), or a token for none.
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


@dataclasses.dataclass(frozen=True)
class KhopConfig(TokenTaskConfig):
    """k-hop induction."""

    vocab: int = knob(4, "V; with more than T/20 many answers are that there is none", other=(6,), least=2)
    length: int = knob(100, "T, the token that names k among them", other=(80,), least=4)
    fewest_hops: int = knob(1, "least k", other=(2,), least=1)
    hops: int = knob(4, "largest k, each as likely", other=(3,), least=1, below=17)
    score_from: float = knob(
        0.5, "share of the row before the first answer that counts", other=(0.0,), least=0, below=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        most = f"at most data.hops = {self.hops}"
        config_lib.require(self.fewest_hops <= self.hops, "data.fewest_hops", self.fewest_hops, most)

    @property
    def ids(self) -> int:
        return self.vocab + 1 + 16


@register("khop")
class Khop(TokenTask):
    """Ids: V letters, V for none, then the names of k = 1 to 16."""

    Config = KhopConfig
    title = "induction of induction, k deep"
    source = "Sanford et al. 2024, Transformers, Parallel Computation, and Logarithmic Depth, arXiv:2402.09268"

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        k = c.fewest_hops + stream.integer(c.hops - c.fewest_hops + 1)
        x = stream.integers(c.vocab, c.length - 1)
        reached = self._hop_once(x)
        # Index len(x) is nowhere, and from nowhere no hop leads anywhere.
        reached, at = np.append(reached, len(x)), np.arange(len(x))
        for _ in range(k):
            at = reached[at]
        targets = np.append(x, c.vocab)[at]
        weights = np.arange(c.length) >= max(1, c.score_from * c.length)
        tokens = np.concatenate([[c.vocab + k], x])
        return {"tokens": tokens, "targets": np.concatenate([[0], targets]), "weights": weights}

    def _hop_once(self, x: np.ndarray) -> np.ndarray:
        """hop_1 of every position; len(x): none."""
        place = np.arange(len(x))
        out = np.full(len(x), len(x))
        for letter in range(self.config.vocab):
            here = np.flatnonzero(x == letter)
            out[here[1:]] = place[here[:-1]] + 1
        return out

    def solve(self, row: Arrays) -> np.ndarray:
        """By search, from the definition."""
        x = row["tokens"][1:].tolist()
        reached = [self._reached(row, t) for t in range(len(x))]
        return np.array([0, *(self.config.vocab if at is None else x[at] for at in reached)])

    def _reached(self, row: Arrays, t: int) -> int | None:
        """hop_k(t), counted from x_1 as 0; None: none."""
        x, at = row["tokens"][1:].tolist(), t
        for _ in range(int(row["tokens"][0]) - self.config.vocab):
            at = next((j for j in range(at, 0, -1) if x[j - 1] == x[at]), None)
            if at is None:
                return None
        return at

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """What is reached from one position becomes another letter, where that does not end the way there."""
        for t in np.flatnonzero(row["weights"])[::-1] - 1:
            if (at := self._reached(row, t)) is None:
                continue
            tokens = row["tokens"].copy()
            tokens[at + 1] = other_than(stream, tokens[at + 1], 0, self.config.vocab)
            if self._reached({"tokens": tokens}, t) == at:
                return {**row, "tokens": tokens}
        return row

    def slices(self, rows: Arrays) -> Slices:
        """By k."""
        c = self.config
        labels = [str(k) for k in range(c.fewest_hops, c.hops + 1)]
        return {"hops": (labels, rows["tokens"][:, 0] - c.vocab - c.fewest_hops)}
