"""The contract of a generated task: every example is a function of the task, split, seed and the example's index alone.

A task is one class in this package, under `@register(name)`. It is data of the ordinary trainer; what it adds is that
it can be solved from its inputs (`oracle`), that guessing has a known score (`chance`), and that it knows what an
answer hangs on (`corrupt`). `tests/tasks/test_laws.py` holds every registered task to these.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data import base as data_base
from attnlab.data.base import Arrays, Data
from attnlab.data.loader import Loader, entries_of
from attnlab.errors import ConfigError
from attnlab.registry import Registry
from attnlab.tasks.streams import Stream, stream_key

SPLITS = ("train", "valid", "test")
_BATCHES_AHEAD = 8
_FEW = 10**9  # of fewer different examples than this, each belongs to one split by its content
_TRIES = 10_000


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What all tasks share.

    Attributes:
      length_field: the field that longer examples are made by; see `longer`.
      version: of the stream of examples.
    """

    node_name: ClassVar[str]
    free: ClassVar[tuple[str, ...]] = ("workers",)
    version: ClassVar[int] = 1
    length_field: ClassVar[str] = "length"

    batch: int = knob(64, "rows per step over all devices and hosts, B", least=1)
    seed: int = knob(
        0,
        "of the examples; the run's own seed draws parameters only: runs that differ in it see the same",
        other=(1,),
        least=0,
    )
    heldout: int = knob(1024, "held-out examples", least=1)
    split: str = knob(
        "valid", "which examples are held out: valid, to choose by, or test, to report", choices=SPLITS[1:]
    )
    train_examples: int | None = knob(
        None, "different training examples, in the same order again and again; none: never the same one twice", least=1
    )
    workers: int = knob(0, "processes that make batches; 0: threads of this one. The batches are the same", least=0)

    def __post_init__(self) -> None:
        config_lib.require_knobs(self, "data.")

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Positions of an example, T."""

    @abc.abstractmethod
    def batch_spec(self) -> batch_lib.Spec:
        """The arrays of a training batch."""

    @abc.abstractmethod
    def fitting(self) -> dict[str, Any]:
        """Keys of a model's node that fit these batches: its name, and the sizes of both ends."""

    def longer(self, multiple: int) -> TaskConfig:
        """The same task at `multiple` times the length: the ids mean the same."""
        return dataclasses.replace(self, **{self.length_field: multiple * getattr(self, self.length_field)})

    def different(self) -> float:
        """At most how many different examples there are, where they may be few."""
        return float("inf")

    def identity(self) -> dict[str, Any]:
        """What an example depends on besides split and index."""
        other = {f.name for f in dataclasses.fields(TaskConfig)} - {"seed"}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in other}
        return {"task": self.node_name, "version": self.version, **fields}


class Task(Data):
    """Base class of tasks.

    Attributes:
      title: what it tests, in a few words.
      source: title, authors and year of where it comes from; what is ours is said.
      variants: fields that the laws are tried with besides each knob's `other` alone: the last of a variant must make a
        difference to the others.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()

    @abc.abstractmethod
    def example(self, stream: Stream, split: str) -> Arrays:
        """One row, drawn from a stream: the arrays of `batch_spec`, of which the base class fills in what it can.

        The split is for tasks whose held-out examples follow another law than those trained on.
        """

    @abc.abstractmethod
    def facts(self, batches: Callable[[], Iterator[Arrays]]) -> dict[str, Any]:
        """What a model's figures need to know of held-out batches, of which all processes' rows are given."""

    def rows(self, split: str, indices: Sequence[int]) -> Arrays:
        """The examples of a split (train, valid or test) by index, as a batch."""
        key, spec = stream_key([self.config.identity(), split]), self.config.batch_spec()
        made = [self._row(Stream(key, index), split) for index in indices]
        return {name: np.stack([row[name] for row in made]).astype(spec[name].dtype) for name in spec}

    def marks(self, rows: Arrays) -> Arrays:
        """Arrays that held-out batches have besides."""
        return {}

    def filled(self, row: Arrays, split: str) -> Arrays:
        """A row with what `example` may leave out."""
        return row

    def _row(self, stream: Stream, split: str) -> Arrays:
        if self.config.different() > _FEW:
            return self.filled(self.example(stream, split), split)
        for _ in range(_TRIES):
            row = self.filled(self.example(stream, split), split)
            if split_of(row) == split:
                return row
        raise ConfigError(
            f"data.name = {self.name!r} has at most {self.config.different():.0f} different examples with "
            f"these fields: too few to hold any out for {split}; allowed: longer ones"
        )

    def training(self, *, seed: int, rows: Sequence[int] | None = None) -> Loader:
        c = self.config
        identity = {"batch": c.batch, "train_examples": c.train_examples, **c.identity()}
        words = {
            **{key: f"data.{key}" for key in identity},
            "task": "data.name",
            "version": "the version of the task",
        }
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


def split_of(row: Arrays) -> str:
    """The split of a row by its content, where there are few different ones: a quarter is valid, a quarter test."""
    inputs = {name: np.asarray(row[name]).tolist() for name in sorted(row) if name not in ("targets", "weights")}
    return {0: "valid", 1: "test"}.get(int(stream_key(inputs)[0] % np.uint64(4)), "train")


TASKS: Registry[Task] = Registry("task", ["attnlab.tasks"])
names, get = TASKS.names, TASKS.get


def register(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: makes a task known by `name` to configs, the command line and the battery of laws."""

    def add(cls: type[Task]) -> type[Task]:
        shared = {f.name for f in dataclasses.fields(TaskConfig)}
        cls.names_other = (*(f.name for f in dataclasses.fields(cls.Config) if f.name not in shared), "seed")
        return TASKS.register(name)(data_base.register(name)(cls))

    return add


class _Batches:
    """The batches of one process by step, for grain to read."""

    def __init__(self, task: Task, entries: Sequence[int]):
        self._task, self._entries = task, entries
        self.ahead = _BATCHES_AHEAD

    def __len__(self) -> int:
        return sys.maxsize // self._task.config.batch

    def __getitem__(self, step: int) -> Arrays:
        c = self._task.config
        indices = [step * c.batch + i for i in self._entries]
        return self._task.rows("train", [i % c.train_examples for i in indices] if c.train_examples else indices)


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
        rows = self._task.rows(self._task.config.split, indices)
        rows["weights"] = rows["weights"] * (np.asarray(indices) < self._task.config.heldout)[:, None]
        return rows | self._task.marks(rows)

    def facts(self) -> dict[str, Any]:
        """What the model's figures need to know of all processes' batches, see `Task.facts`."""
        return self._facts

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        everyone = range(self._task.config.batch)
        return self._task.facts(lambda: (self._batch(batch, everyone) for batch in range(self._batches)))
