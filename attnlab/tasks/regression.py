"""Tasks of vectors: inputs [T, D], targets [T, E] to be told with a small squared error where the weight is 1."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from attnlab import batch as batch_lib
from attnlab.data.base import Arrays
from attnlab.tasks.base import Task, TaskConfig
from attnlab.tasks.streams import Stream


@dataclasses.dataclass(frozen=True)
class RegressionTaskConfig(TaskConfig):
    """What tasks of vectors share."""

    @property
    @abc.abstractmethod
    def widths(self) -> tuple[int, int]:
        """Numbers of an input and of a target."""

    def batch_spec(self) -> batch_lib.Spec:
        inputs, targets = self.widths
        return {
            "inputs": batch_lib.Field((self.length, inputs), "float32", ("seq", None)),
            "targets": batch_lib.Field((self.length, targets), "float32", ("seq", None)),
            "weights": batch_lib.Field((self.length,), "float32", ("seq",)),
        }

    def fitting(self) -> dict[str, Any]:
        inputs, targets = self.widths
        return {"name": "regression", "inputs": inputs, "outputs": targets}


class RegressionTask(Task):
    """Base class of tasks of vectors; they know what others predict, among them `zero` and the best, `bayes`."""

    @abc.abstractmethod
    def baselines(self, rows: Arrays) -> dict[str, np.ndarray]:
        """What others predict: by name, float64 of the form of `targets`."""

    @abc.abstractmethod
    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """The row's inputs with what predictions hang on replaced: the best prediction is another."""

    @abc.abstractmethod
    def seen(self) -> np.ndarray:
        """int [T]: how many examples of the task come before each position of a row."""

    def facts(self, batches: Callable[[], Iterator[Arrays]]) -> dict[str, Any]:
        """`seen` [T]; `baselines`: by name, float64 [T], weighted squared errors of what others predict."""
        totals: dict[str, np.ndarray] = {}
        for rows in batches():
            for name, predicted in self.baselines(rows).items():
                error = ((predicted - rows["targets"]) ** 2).sum(-1) * rows["weights"]
                totals[name] = totals.get(name, 0) + error.sum(0, dtype=np.float64)
        return {"seen": self.seen(), "baselines": totals}
