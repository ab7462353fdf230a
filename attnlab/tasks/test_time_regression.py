"""Test-time regression: keys and values of a function that is linear in parts, and the value of every key to be told.

A row is P pairs in n segments. c_1 .. c_n are orthonormal at random, W_1 .. W_n have entries of variance 1/d. Keys of
segment i are uniform on the part of the unit sphere where c_i . k is the largest (n = 1: on all of it), values
W_i k + noise. Every pair takes two positions: (k, 0), where W_i k is to be told, and (k, v).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.regression import RegressionTask, RegressionTaskConfig
from attnlab.tasks.streams import Stream


@dataclasses.dataclass(frozen=True)
class TestTimeRegressionConfig(RegressionTaskConfig):
    """Test-time regression."""

    __test__ = False  # pytest: it is no test

    length: int = knob(256, "T, two positions a pair", other=(64,), least=4)
    d: int = knob(8, "numbers of a key and of a value", other=(6,), least=2)
    segments: int = knob(1, "linear parts, visited one after the other; at most d", other=(2, 4), least=1)
    noise: float = knob(0.1, "deviation of what is added to every value", other=(0.2,), above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.segments <= self.d, "data.segments", self.segments, f"at most data.d = {self.d}")
        need(self.length % (2 * self.segments) == 0, "data.length", self.length, f"multiples of {2 * self.segments}")

    @property
    def widths(self) -> tuple[int, int]:
        return 2 * self.d, self.d


@register("test_time_regression")
class TestTimeRegression(RegressionTask):
    """`inputs` [T, 2 d]: `(k, 0)`, then `(k, v)`, for every pair; targets at the first are values without noise."""

    __test__ = False

    Config = TestTimeRegressionConfig
    title = "fitting a function that changes on the way"
    source = "after Zuo et al. 2025, Local Linear Attention, arXiv:2510.01450"

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        each = c.length // (2 * c.segments)
        directions = np.linalg.qr(stream.normal(c.d, c.d))[0][: c.segments]
        maps = stream.normal(c.segments, c.d, c.d) / np.sqrt(c.d)
        keys = np.concatenate([self._keys(stream, directions, i, each) for i in range(c.segments)])
        clean = np.einsum("tij,tj->ti", np.repeat(maps, each, axis=0), keys)
        values = clean + c.noise * stream.normal(*clean.shape)
        inputs, targets = np.zeros((c.length, 2 * c.d)), np.zeros((c.length, c.d))
        inputs[0::2, : c.d] = inputs[1::2, : c.d] = keys
        inputs[1::2, c.d :], targets[0::2] = values, clean
        return {"inputs": inputs, "targets": targets, "weights": np.arange(c.length) % 2 == 0}

    @staticmethod
    def _keys(stream: Stream, directions: np.ndarray, region: int, count: int) -> np.ndarray:
        """`count` keys of a region, by drawing from the whole sphere until there are enough."""
        found = np.empty((0, directions.shape[1]))
        while len(found) < count:
            keys = stream.normal(2 * len(directions) * count, directions.shape[1])
            keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
            found = np.concatenate([found, keys[(keys @ directions.T).argmax(-1) == region]])
        return found[:count]

    def seen(self) -> np.ndarray:
        """Pairs of the same segment before each position."""
        c = self.config
        return np.arange(c.length) // 2 % (c.length // (2 * c.segments))

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """Every value that is told has the other sign."""
        inputs = row["inputs"].copy()
        inputs[:, self.config.d :] *= -1
        return {**row, "inputs": inputs}

    def baselines(self, rows: Arrays) -> dict[str, np.ndarray]:
        """`zero`; `ridge`, of all pairs before; `bayes`, of those of the same segment: the mean given these."""
        c = self.config
        keys, values = (rows["inputs"][:, 1::2, part].astype(np.float64) for part in (slice(c.d), slice(c.d, None)))
        each = keys.shape[1] // c.segments
        split = lambda x: x.reshape(-1, each, c.d)
        whole = lambda x: np.repeat(x, 2, axis=1)
        bayes = self._ridge(split(keys), split(values)).reshape(values.shape)
        zero = np.zeros(rows["targets"].shape)
        return {"zero": zero, "ridge": whole(self._ridge(keys, values)), "bayes": whole(bayes)}

    def _ridge(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Predictions [B, P, d] from the pairs before, with the penalty of W's variance 1/d and the noise's."""
        c = self.config
        before = lambda terms: np.cumsum(terms, axis=1) - terms
        gram = before(keys[..., :, None] * keys[..., None, :]) + c.d * c.noise**2 * np.eye(c.d)
        moment = before(keys[..., :, None] * values[..., None, :])
        return np.einsum("btij,bti->btj", np.linalg.solve(gram, moment), keys)
