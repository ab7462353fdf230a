"""Bags: a few instances tell the class, the others tell nothing, and there is no order (multiple-instance learning).

Every class has patterns of its own, orthogonal directions fixed by the task's seed. A bag of a class has some instances
near its patterns, common ones more often than rare ones, among instances that are near no pattern at all.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, other_than

_NEAR = 0.25  # of an instance of a pattern: its squared distance is below this times d; of others it is not


@dataclasses.dataclass(frozen=True)
class BagsConfig(TokenTaskConfig):
    """Bags."""

    length: int = knob(64, "most instances of a bag, T", other=(32,), least=1)
    shortest: int = knob(32, "fewest of them", other=(16,), least=1)
    d: int = knob(32, "numbers of an instance", other=(24,), least=16)
    classes: int = knob(4, "of bags", other=(3,), least=2)
    patterns: int = knob(4, "of each class; classes times patterns is at most d", other=(3,), least=1)
    fewest: int = knob(1, "instances of a pattern in a bag, at least", other=(2,), least=1)
    most: int = knob(4, "and at most", other=(2,), least=1)
    zipf: float = knob(1.0, "pattern p of a class comes with probability ~ p^-zipf", other=(0.0,), least=0)
    eps: float = knob(0.3, "of the noise on them: (pattern + eps noise) / sqrt(1 + eps^2)", other=(0.1,), least=0,
                      below=0.45)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.shortest <= self.length, "data.shortest", self.shortest, f"at most data.length = {self.length}")
        need(self.most <= self.shortest, "data.most", self.most, f"at most data.shortest = {self.shortest}")
        need(self.fewest <= self.most, "data.fewest", self.fewest, f"at most data.most = {self.most}")
        room = self.d // self.classes
        need(self.patterns <= room, "data.patterns", self.patterns, f"at most {room}, data.d / data.classes")

    @property
    def ids(self) -> int:
        return self.classes

    def batch_spec(self) -> batch_lib.Spec:
        one = batch_lib.Field((1,), "float32", (None,))
        return {
            "inputs": batch_lib.Field((self.length, self.d), "float32", ("seq", None)),
            "segments": batch_lib.Field((self.length,), "int32", ("seq",)),
            "targets": dataclasses.replace(one, dtype="int32", ids=self.classes, said="data.classes"),
            "weights": one,
        }

    def fitting(self) -> dict[str, Any]:
        return {"name": "bags", "inputs": self.d, "classes": self.classes}


@register("bags")
class Bags(TokenTask):
    """`inputs` [T, d], `segments` 1 for the bag's instances, and one target: the class."""

    Config = BagsConfig
    inputs = ("inputs", "segments")
    title = "the class of a bag of which few instances tell it"
    source = "after Zhang et al. 2024, ACMIL, arXiv:2311.07125; the bags are drawn here"

    @functools.cached_property
    def _patterns(self) -> np.ndarray:
        """[classes * patterns, d], orthogonal, as long as an instance of independent numbers is on average."""
        c = self.config
        drawn = Stream(["patterns of bags", c.seed, c.classes, c.patterns, c.d], 0).normal(c.d, c.d)
        return np.linalg.qr(drawn)[0][: c.classes * c.patterns] * np.sqrt(c.d)

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        size = c.shortest + stream.integer(c.length - c.shortest + 1)
        keys, label = c.fewest + stream.integer(c.most - c.fewest + 1), stream.integer(c.classes)
        share = np.cumsum(np.arange(1, c.patterns + 1) ** -c.zipf)
        which = np.searchsorted(share / share[-1], stream.uniform(keys), side="right")
        noise = stream.normal(keys, c.d)
        noise *= np.sqrt(c.d) / np.linalg.norm(noise, axis=1, keepdims=True)
        inputs = np.zeros((c.length, c.d))
        inputs[:size] = self._others(stream, size)
        inputs[stream.distinct(keys, size)] = (self._of(label)[which] + c.eps * noise) / np.sqrt(1 + c.eps**2)
        one = {"targets": np.array([label]), "weights": np.ones(1)}
        return {"inputs": inputs, "segments": np.arange(c.length) < size, **one}

    def _of(self, label: int) -> np.ndarray:
        return self._patterns.reshape(self.config.classes, self.config.patterns, -1)[label]

    def _others(self, stream: Stream, count: int) -> np.ndarray:
        """Instances of independent normal numbers, drawn until there are enough that are near no pattern."""
        found = np.empty((0, self.config.d))
        while len(found) < count:
            drawn = stream.normal(count, self.config.d)
            found = np.concatenate([found, drawn[self._distances(drawn).min(1) >= _NEAR * self.config.d]])
        return found[:count]

    def _distances(self, inputs: np.ndarray) -> np.ndarray:
        """[T, patterns], squared."""
        return ((inputs[:, None] - self._patterns) ** 2).sum(-1)

    def _found(self, row: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Which instances are of a pattern, and which pattern of all that is."""
        away = self._distances(row["inputs"].astype(np.float64))
        near = np.flatnonzero((away.min(1) < _NEAR * self.config.d) & (row["segments"] > 0))
        return near, away[near].argmin(1)

    def solve(self, row: Arrays) -> np.ndarray:
        """The class of the patterns that are there."""
        return self._found(row)[1][:1] // self.config.patterns

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """Another class's patterns in their place."""
        near, _ = self._found(row)
        inputs, c = row["inputs"].copy(), self.config
        label = other_than(stream, row["targets"][0], 0, c.classes)
        inputs[near] = self._of(label)[stream.integers(c.patterns, len(near))]
        return {**row, "inputs": inputs}

    def answers(self) -> int:
        return self.config.classes

    def slices(self, rows: Arrays) -> Slices:
        """By the commonest pattern that is there, from 1, and by how many instances are of one."""
        c, found = self.config, []
        for inputs, segments in zip(rows["inputs"], rows["segments"]):
            near, which = self._found({"inputs": inputs, "segments": segments})
            found.append((which.min() % c.patterns, len(near) - c.fewest))
        pattern, keys = np.array(found).T
        named = [str(i) for i in range(c.fewest, c.most + 1)]
        return {"pattern": ([str(i + 1) for i in range(c.patterns)], pattern), "instances": (named, keys)}
