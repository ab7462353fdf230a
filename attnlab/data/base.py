"""The contract of data: what a data node's config opens into. Training and evaluation know data by this alone.

A kind of data is one file in this package: a config, and a `Data` under `@register(name)`.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from attnlab import batch as batch_lib
from attnlab.registry import Registry

Arrays = dict[str, np.ndarray]
DEFAULT = "text"  # what a config's `data` without a name is


class Training(Protocol):
    """Batches without end, each a function of the step."""

    def __next__(self) -> Arrays:
        """The next batch: this process's rows of it."""

    def get_state(self) -> dict[str, Any]:
        """Where it stands, for JSON, and what the batch at a step depends on."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state; UserError if that is of other batches."""

    def summary(self) -> dict[str, Any]:
        """Figures of the data, for a run's metadata."""

    def close(self) -> None:
        """Stops what reads ahead."""


class Heldout(Protocol):
    """Held-out batches in order; every iteration starts anew."""

    def __len__(self) -> int:
        """Batches."""

    def __iter__(self) -> Iterator[Arrays]:
        """This process's rows of each batch."""

    def facts(self) -> dict[str, Any]:
        """What is known of all processes' batches and no model can sum: bytes of text, what others score."""


class Data:
    """Opened data.

    Attributes:
      Config: a frozen dataclass with `batch` (rows a step), `length` (positions a row; a field or a property),
        `batch_spec()`, `longer(multiple)` (the same data in rows of so many times the length), and in `free` the names
        of fields that change no batch.
      name: the registered name.
      names_other: fields of the config that name other data than a model was trained on.
      tokenizer: of text; None where there is none.
    """

    Config: ClassVar[type]
    name: ClassVar[str]
    names_other: ClassVar[tuple[str, ...]] = ()
    tokenizer: Any = None

    def __init__(self, config: Any):
        self.config = config

    def resized(self, batch: int) -> Data:
        """The same data in batches of other rows: micro-batches, which evaluation, like training, holds at a time."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, batch=batch)
        return other

    def batch_spec(self) -> batch_lib.Spec:
        """The arrays of a batch."""
        return self.config.batch_spec()

    @abc.abstractmethod
    def training(self, *, seed: int, rows: Sequence[int] | None = None) -> Training:
        """The training batches of one process.

        Args:
          seed: of the run.
          rows: which of a batch's rows this process gets, ascending; None: all.
        """

    @abc.abstractmethod
    def heldout(self, *, batches: int | None = None, rows: Sequence[int] | None = None) -> Heldout:
        """The held-out batches of one process: all, or the first `batches`."""

    def vocabulary_fingerprint(self) -> str | None:
        """A digest of what token ids mean, equal where they mean the same; None where they are of no text."""
        return None if self.tokenizer is None else self.tokenizer.fingerprint()

    def references(self) -> dict[str, float]:
        """Figures that no model changes (what guessing scores), which metrics.jsonl has once, at step 1."""
        return {}

    @abc.abstractmethod
    def describe(self, summary: Mapping[str, Any]) -> str:
        """A summary in one line, for people."""

    def require_readable(self, trained_on: Mapping[str, Any], who: str, *, named: bool) -> list[str]:
        """What to know of a model's figures on this data that can be told before any of it is read.

        Args:
          trained_on: `Training.get_state` of its training.
          who: the checkpoint, for messages.
          named: whether whoever asks has named other data.

        Raises:
          UserError: the model cannot be run on it.
        """
        return []

    def require_heldout(self, heldout: Any, trained_on: Mapping[str, Any], who: str, *, named: bool) -> list[str]:
        """What to know of figures on these held-out batches; arguments and errors as `require_readable`."""
        return []


KINDS: Registry[Data] = Registry("data", ["attnlab.data", "attnlab.tasks"], DEFAULT)
register, names, config_from_node = KINDS.register, KINDS.names, KINDS.config_from_node


def open_data(config: Any) -> Data:
    """Opens the data of a config.

    Raises:
      UserError: what it needs (a tokenizer) cannot be read.
    """
    return KINDS.get(config.node_name)(config)


def names_other(config: Any) -> tuple[str, ...]:
    """`Data.names_other` of a config."""
    return KINDS.get(config.node_name).names_other
