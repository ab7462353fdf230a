"""In-context linear regression: every row is a problem of its own, whose weights only its examples tell.

w ~ N(0, I/d); x_l ~ N(0, C), C_ij = rho^|i-j|; y_l = w.x_l + N(0, noise), as in Garg et al. 2022 (What Can Transformers
Learn In-Context?) with the noise of Pan et al.'s ICL_linear. A position is a vector of d + 1 numbers: an example
(x_l, y_l), or a query (x_l, 0), where y_l is to be predicted.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.regression import RegressionTask, RegressionTaskConfig
from attnlab.tasks.streams import Stream


@dataclasses.dataclass(frozen=True)
class IclRegressionConfig(RegressionTaskConfig):
    """In-context linear regression."""

    length_field: ClassVar[str] = "examples"

    d: int = knob(5, "numbers of an x", other=(4,), least=1)
    examples: int = knob(40, "before the last query, L", other=(10,), least=1)
    noise: float = knob(0.1, "variance of what is added to every y", other=(0.2, 0.0), least=0)
    rho: float = knob(0.0, "correlation of neighbours in x; 0: none", other=(0.3,), above=-1, below=1)
    queries: str = knob(
        "every",
        "last: asks once, after all examples (T = L + 1), as published; every: asks for every y before it is told, too "
        "(T = 2 L + 2), which gives the error for each number of examples",
        other=("last",),
        choices=("every", "last"),
    )

    @property
    def length(self) -> int:
        return 2 * self.examples + 2 if self.queries == "every" else self.examples + 1

    @property
    def widths(self) -> tuple[int, int]:
        return self.d + 1, 1


@register("icl_regression")
class IclRegression(RegressionTask):
    """`inputs` [T, d + 1], `targets` [T, 1], `weights` [T]: 1 at queries, 0 elsewhere."""

    Config = IclRegressionConfig
    title = "linear regression on examples in the context"
    source = "Garg et al. 2022, What Can Transformers Learn In-Context?, with the noise of Pan et al.'s ICL_linear"

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        w = stream.normal(c.d) / np.sqrt(c.d)
        x, steps = stream.normal(c.examples + 1, c.d), np.sqrt(1 - c.rho**2)
        for i in range(1, c.d if c.rho else 1):
            x[:, i] = c.rho * x[:, i - 1] + steps * x[:, i]
        y = x @ w + np.sqrt(c.noise) * stream.normal(c.examples + 1)
        inputs, targets = np.zeros((c.length, c.d + 1)), np.zeros((c.length, 1))
        queries = self._queries()
        if c.queries == "every":
            inputs[0::2, :-1] = inputs[1::2, :-1] = x
            inputs[1::2, -1] = y
            targets[queries, 0] = y
        else:
            inputs[:, :-1] = x
            inputs[:-1, -1] = y[:-1]
            targets[-1, 0] = y[-1]
        return {"inputs": inputs, "targets": targets, "weights": queries}

    def _queries(self) -> np.ndarray:
        """bool [T]."""
        place = np.arange(self.config.length)
        return place % 2 == 0 if self.config.queries == "every" else place == self.config.length - 1

    def seen(self) -> np.ndarray:
        place = np.arange(self.config.length)
        return place // 2 if self.config.queries == "every" else place

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """Every y that is told has the other sign."""
        inputs = row["inputs"].copy()
        inputs[:, -1] *= -1
        return {**row, "inputs": inputs}

    def baselines(self, rows: Arrays) -> dict[str, np.ndarray]:
        """`zero`; `step`: that of `step_rate` from zero; `bayes`: the mean of y given the examples before it, ridge
        regression with penalty noise * d."""
        c = self.config
        x, y = rows["inputs"][..., :-1].astype(np.float64), rows["inputs"][..., -1].astype(np.float64)
        told = ~self._queries()
        before = lambda terms: np.cumsum(terms * told.reshape(-1, *(1,) * (terms.ndim - 2)), axis=1)
        moments, seen = before(x * y[..., None]), np.maximum(self.seen(), 1)
        rate = step_rate(seen, c.d, c.noise)
        step = (rate / seen)[:, None] * (moments * x).sum(-1, keepdims=True)
        gram = before(x[..., :, None] * x[..., None, :])
        penalty = max(c.noise * c.d, 1e-9) * np.eye(c.d)
        weights = np.linalg.solve(gram + penalty, moments[..., None])[..., 0]
        bayes = (weights * x).sum(-1, keepdims=True)
        return {"zero": np.zeros_like(bayes), "step": step, "bayes": bayes}


def step_rate(examples: np.ndarray | int, d: int, noise: float) -> np.ndarray | float:
    """The rate r of the step of gradient descent from zero, `r sum_l y_l x_l / examples`, whose risk is least where the
    numbers of x are independent: 1 / (1 + (d + 1 + noise d) / examples)."""
    return 1 / (1 + (d + 1 + noise * d) / examples)


def step_risk(rate: float, examples: int, d: int, noise: float) -> float:
    """The expected squared error of such a step at any rate: `1 + noise - 2 r + r^2 (1 + (d + 1 + noise d) / L)`."""
    return 1 + noise - 2 * rate + rate**2 / step_rate(examples, d, noise)
