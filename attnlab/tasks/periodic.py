"""Periodic recall: a few facts told once and asked for again and again, each in its own rhythm.

Ids of a vocabulary V: 0 is filler, keys are 1 to V/2 - 1, values V/2 to V - 1. Facts `k v` stand at the row's start;
fact j is asked for every `periods[j]` positions (round and round through the periods), where its value is to be told.
Pairs that nobody asks for stand in between.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, buckets, other_than


@dataclasses.dataclass(frozen=True)
class PeriodicRecallConfig(TokenTaskConfig):
    """Periodic recall."""

    facts: int = knob(4, "facts of a row", other=(3,), least=1)
    periods: tuple[int, ...] = knob((16, 32, 64), "positions between two questions for a fact", other=((16, 48),))
    length: int = knob(512, "T", other=(256,), least=8)
    distractors: int = knob(8, "pairs that nobody asks for", other=(2,), least=0)
    vocab: int = knob(128, "V: half are keys and the filler, half values; even", other=(64,), least=8)

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.vocab % 2 == 0, "data.vocab", self.vocab, "an even number")
        pairs, most = self.facts + self.distractors, self.vocab // 2 - 1
        need(
            pairs <= most,
            "data.distractors",
            self.distractors,
            f"at most {most - self.facts} with data.vocab = {self.vocab}",
        )
        good = bool(self.periods) and all(p >= 2 * self.facts for p in self.periods)
        need(good, "data.periods", self.periods, f"numbers of {2 * self.facts} or more, twice the facts")
        asked = sum(1 + self.length // p for p in (self.periods[j % len(self.periods)] for j in range(self.facts)))
        least = max(2 * self.facts + max(self.periods) + 1, 3 * asked + 4 * pairs)
        need(self.length >= least, "data.length", self.length, f"{least} or more with these facts and periods")

    @property
    def ids(self) -> int:
        return self.vocab

    def period(self, fact: int) -> int:
        """Of a fact, by its place in the row."""
        return self.periods[fact % len(self.periods)]


@register("periodic_recall")
class PeriodicRecall(TokenTask):
    """`k v k v ..`, then each key again and again: its value is to be told every time."""

    Config = PeriodicRecallConfig
    title = "recall in a rhythm: what a cache must not evict"
    source = "ours, for the claim of Zhang et al. 2025, LazyEviction, arXiv:2506.15969"

    def example(self, stream: Stream, split: str) -> Arrays:
        c, half = self.config, self.config.vocab // 2
        pairs = c.facts + c.distractors
        keys, values = 1 + stream.distinct(pairs, half - 1), half + stream.distinct(pairs, half)
        tokens, targets, weights = np.zeros((3, c.length), np.int64)
        start = 2 * c.facts
        tokens[0:start:2], tokens[1:start:2] = keys[: c.facts], values[: c.facts]
        for j in range(c.facts):
            for t in range(start + stream.integer(c.period(j)), c.length, c.period(j)):
                while t < c.length and weights[t]:  # the next place that is free
                    t += 1
                if t < c.length:
                    tokens[t], targets[t], weights[t] = keys[j], values[j], 1
        free = (weights == 0) & (np.arange(c.length) >= start)
        room = np.flatnonzero(free[:-1] & free[1:])
        for i, order in enumerate(self._apart(room[stream.permutation(len(room))])):
            tokens[order], tokens[order + 1] = keys[c.facts + i], values[c.facts + i]
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def _apart(self, places: np.ndarray) -> list[int]:
        """The first places, in this order, of pairs that do not overlap."""
        taken: list[int] = []
        for at in places.tolist():
            if len(taken) == self.config.distractors:
                break
            if all(abs(at - other) > 1 for other in taken):
                taken.append(at)
        return taken

    def solve(self, row: Arrays) -> np.ndarray:
        tokens, start = row["tokens"], 2 * self.config.facts
        told = dict(zip(tokens[0:start:2].tolist(), tokens[1:start:2].tolist()))
        return np.array([told.get(token, 0) for token in tokens.tolist()])

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        tokens, half = row["tokens"].copy(), self.config.vocab // 2
        asked = tokens[np.flatnonzero(row["weights"])[0]]
        at = np.flatnonzero(tokens == asked)[0] + 1
        tokens[at] = other_than(stream, tokens[at], half, half)
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return self.config.vocab // 2

    def slices(self, rows: Arrays) -> Slices:
        """By period, and by how often the fact was asked for so far; the first time nothing tells when it comes."""
        c = self.config
        periods, times = np.full((2, *rows["tokens"].shape), -1)
        found = sorted({c.period(j) for j in range(c.facts)})
        for i, tokens in enumerate(rows["tokens"]):
            for j in range(c.facts):
                at = np.flatnonzero((tokens == tokens[2 * j]) & (rows["weights"][i] > 0))
                periods[i, at], times[i, at] = found.index(c.period(j)), 1 + np.arange(len(at))
        most = c.length // min(found) + 1
        return {"period": ([str(p) for p in found], periods), "time": buckets(times, most, least=1)}
