"""The contract of a model: the batch that it takes, its loss, its evaluation, its cost.

Training, evaluation and compilation know models by this alone. A kind of model is one file in this package: a config,
and an `Objective` under `@register(name)`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from flax import nnx

from attnlab import batch as batch_lib
from attnlab.errors import UserError
from attnlab.mixers import MixerOutput
from attnlab.registry import Registry

Batch = Mapping[str, jax.Array]
DEFAULT = "lm"  # what a config's `model` without a name is


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """A loss, summed over a batch. Gradients and figures are sums over all micro-batches and devices, then divided.

    Attributes:
      total: what is differentiated.
      weight: what `total`, `losses` and `metrics` are divided by: tokens, say.
      tokens: positions that are not padding, for speed.
      losses: parts of the total by name; `loss` is the first.
      metrics: what else is logged, times the weight.
    """

    total: jax.Array
    weight: jax.Array
    tokens: jax.Array
    losses: dict[str, jax.Array]
    metrics: dict[str, jax.Array]

    @classmethod
    def of(
        cls, losses: dict[str, jax.Array], out: MixerOutput, *, weight: jax.Array, tokens: jax.Array | None = None
    ) -> Sums:
        """Of a model's own losses, already sums, and the means that its layers report.

        Raises:
          ValueError: a layer reports under a name that is taken.
        """
        names = [*losses, *out.losses, *out.metrics]
        require_own(name for name in names if names.count(name) > 1)
        first = losses["loss"]
        more = [value for name, value in losses.items() if name != "loss"]
        total = first + sum(more) + weight * sum(out.losses.values())
        weighted = lambda group: {name: weight * value.astype(first.dtype) for name, value in group.items()}
        tokens = weight if tokens is None else tokens
        return cls(total, weight, tokens, losses | weighted(out.losses), weighted(out.metrics))


def require_own(taken: Any) -> None:
    """Raises ValueError if names are taken."""
    if taken := sorted(set(taken)):
        raise ValueError(f"losses and metrics need names of their own; taken: {', '.join(taken)}")


class Figures(Protocol):
    """What an evaluation came to."""

    @property
    def loss(self) -> float:
        """What the best checkpoint has the least of."""

    def record(self) -> dict[str, float]:
        """For metrics.jsonl, by name: `heldout_loss`, and others that begin with `heldout_`."""

    def summary(self) -> dict[str, Any]:
        """All of it as one JSON object."""

    def line(self) -> str:
        """In words, while training."""

    def lines(self) -> list[str]:
        """In words, for `attnlab eval`."""

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, columns and rows."""


class Objective(nnx.Module):
    """Base class of models.

    Attributes:
      Config: a frozen dataclass; of a stack of layers: a `StackConfig`.
      name: the registered name.
      options: fields of the config's `train` that the loss reads.
      distills: what of a teacher it can be matched to (`attnlab.models.distillation.Matching`); nothing by default.
      decodes: whether it continues sequences of tokens (`init_state`, `extend`, `logits`).
      counts: whether its loss reads the number of the training step.
    """

    Config: ClassVar[type]
    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    distills: ClassVar[tuple[str, ...]] = ()
    decodes: ClassVar[bool] = False
    counts: bool = False

    @abc.abstractmethod
    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        """Makes the parameters."""

    @classmethod
    @abc.abstractmethod
    def batch_spec(cls, config: Any, length: int) -> batch_lib.Spec:
        """The arrays of a batch whose rows have `length` positions."""

    @abc.abstractmethod
    def loss(self, batch: Batch, key: jax.Array | None, options: Mapping[str, Any]) -> Sums:
        """The loss of a batch.

        Args:
          batch: arrays of `batch_spec`.
          key: of what is random (dropout), where the config `draws`; None: nothing is.
          options: values of `options`, and `step`, the number of the training step, where it `counts`.
        """

    def distill(
        self, teacher: Objective, batch: Batch, key: jax.Array | None, options: Mapping[str, Any], matching: Any
    ) -> Sums:
        """The loss of a student of `teacher`, a model of its own class to which no gradient goes.

        Args:
          teacher: with parameters of its own.
          batch, key, options: as of `loss`; the key is the student's alone.
          matching: what is matched, of `distills`, once `Matching.resolved`.

        Raises:
          UserError: it has nothing that could be matched.
        """
        raise UserError(f"model.name = {self.name!r} has nothing that a teacher's could be matched with")

    @abc.abstractmethod
    def evaluate(self, batch: Batch, options: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Sums over a held-out batch, which add up over batches."""

    @classmethod
    @abc.abstractmethod
    def summarize(cls, sums: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Figures:
        """Figures from the sums of all held-out batches (float64) and what the data knows of these."""

    @classmethod
    @abc.abstractmethod
    def cost(cls, config: Any, length: int) -> Any:
        """`attnlab.models.cost.ModelCost` of sequences of `length` positions."""


MODELS: Registry[Objective] = Registry("model", ["attnlab.models"], DEFAULT)
register, names, config_from_node = MODELS.register, MODELS.names, MODELS.config_from_node


def of(config: Any) -> type[Objective]:
    """The Objective that a config is of."""
    return MODELS.get(config.node_name)
