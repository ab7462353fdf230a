"""Generated data: every example is a function of the task, the split, the seed and the example's index alone."""

from __future__ import annotations

import abc
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.data.base import Arrays, Data
from attnlab.data.loader import Loader, entries_of
from attnlab.data.streams import Stream

_BATCHES_AHEAD = 8


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What all tasks share.

    Attributes:
      batch: rows per step over all devices and hosts, B.
      seed: of the examples; the run's own seed draws parameters only, so that runs which differ in it see the same.
      heldout: held-out examples.
      workers: processes that make batches; 0: threads of this one. The batches are the same.
    """

    node_name: ClassVar[str]
    free: ClassVar[tuple[str, ...]] = ("workers",)
    version: ClassVar[int] = 1  # of the stream of examples

    batch: int = 64
    seed: int = 0
    heldout: int = 1024
    workers: int = 0

    def __post_init__(self) -> None:
        for key, least in (("batch", 1), ("seed", 0), ("heldout", 1), ("workers", 0)):
            value = getattr(self, key)
            config_lib.require(value >= least, f"data.{key}", value, f"{least} or more")

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Positions of an example."""

    @abc.abstractmethod
    def batch_spec(self) -> batch_lib.Spec:
        """The arrays of a batch."""

    def identity(self) -> dict[str, Any]:
        """What an example depends on besides split and index."""
        other = {f.name for f in dataclasses.fields(TaskConfig)} - {"seed"}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in other}
        return {"task": self.node_name, "version": self.version, **fields}


class Task(Data):
    """Base class of tasks: they say what an example is."""

    @abc.abstractmethod
    def example(self, stream: Stream) -> Arrays:
        """One row, drawn from a stream."""

    @abc.abstractmethod
    def baselines(self, rows: Arrays) -> dict[str, np.ndarray]:
        """What others predict: by name, float64 of the form of `targets`."""

    @abc.abstractmethod
    def seen(self) -> np.ndarray:
        """int [T]: how many examples of the task come before each position of a row."""

    def rows(self, split: str, indices: Sequence[int]) -> Arrays:
        """The examples of a split ("train" or "valid") by index."""
        identity = [self.config.identity(), split]
        made = [self.example(Stream(identity, index)) for index in indices]
        spec = self.batch_spec()
        return {name: np.stack([row[name] for row in made]).astype(spec[name].dtype) for name in spec}

    def training(self, *, seed: int, rows: Sequence[int] | None = None) -> Loader:
        c = self.config
        words = {
            "batch": "data.batch",
            **{key: f"data.{key}" for key in c.identity() if key not in ("task", "version")},
            "task": "data.name",
            "version": "the version of the task",
        }
        identity = {"batch": c.batch, **c.identity()}
        return Loader(_Batches(self, entries_of(c, rows)), c.workers, identity, c.identity(), words)

    def heldout(self, *, batches: int | None = None, rows: Sequence[int] | None = None) -> HeldoutExamples:
        return HeldoutExamples(self, batches, entries_of(self.config, rows))

    def describe(self, summary: Mapping[str, Any]) -> str:
        fields = ", ".join(f"{key} {value}" for key, value in summary.items() if key not in ("task", "version"))
        return f"data: {summary['task']}: {fields}; held out {self.config.heldout:,} examples"

    def require_heldout(self, heldout: Any, trained_on: Mapping[str, Any], who: str, *, named: bool) -> list[str]:
        now = self.config.identity()
        other = [f"data.{k} {trained_on.get(k)} -> {now[k]}" for k in now if trained_on.get(k) != now[k]]
        return [f"on other data than it was trained on ({', '.join(other)})"] if other else []


class _Batches:
    """The batches of one process by step, for grain to read."""

    def __init__(self, task: Task, entries: Sequence[int]):
        self._task, self._entries = task, entries
        self.ahead = _BATCHES_AHEAD

    def __len__(self) -> int:
        return sys.maxsize // self._task.config.batch

    def __getitem__(self, step: int) -> Arrays:
        return self._task.rows("train", [step * self._task.config.batch + i for i in self._entries])


class HeldoutExamples:
    """The held-out examples in order; the last batch is filled up with rows of weight 0."""

    def __init__(self, task: Task, batches: int | None, entries: Sequence[int]):
        self._task, self._entries = task, entries
        full = -(-task.config.heldout // task.config.batch)
        self._batches = full if batches is None else min(batches, full)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Arrays]:
        for batch in range(self._batches):
            yield self._batch(batch, self._entries)

    def _batch(self, batch: int, entries: Sequence[int]) -> Arrays:
        indices = [batch * self._task.config.batch + i for i in entries]
        rows = self._task.rows("valid", indices)
        rows["weights"] = rows["weights"] * (np.asarray(indices) < self._task.config.heldout)[:, None]
        return rows

    def facts(self) -> dict[str, Any]:
        """`seen` [T], see `Task`; `baselines`: by name, float64 [T], weighted squared errors of what others predict."""
        return {"seen": self._task.seen(), "baselines": self._errors}

    @functools.cached_property
    def _errors(self) -> dict[str, np.ndarray]:
        totals: dict[str, np.ndarray] = {}
        for batch in range(self._batches):
            rows = self._batch(batch, range(self._task.config.batch))
            for name, predicted in self._task.baselines(rows).items():
                error = ((predicted - rows["targets"]) ** 2).sum(-1) * rows["weights"]
                totals[name] = totals.get(name, 0) + error.sum(0, dtype=np.float64)
        return totals
