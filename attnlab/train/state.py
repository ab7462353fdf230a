"""What a training step reads and replaces."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab import models
from attnlab.mixers import roles
from attnlab.models import initial
from attnlab.train import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays of a run.

    Attributes:
      step: int32, updates done or skipped.
      params: nested dict of arrays.
      opt_state: optax's state.
      key: uint32 key data; each step's randomness is folded from it and the step.
      nonfinite: int32, steps in a row whose gradients were not finite.
      skipped: int32, all such steps.
      ema: averaged parameters, fp32 or wider, where `train.ema` says so; else None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    nonfinite: jax.Array
    skipped: jax.Array
    ema: Any = None


@dataclasses.dataclass(frozen=True)
class Model:
    """A model taken apart: what is static, and how its parameters look.

    Attributes:
      objective: the class of its config's name.
      graphdef: with parameters it merges into an `Objective`.
      shapes: nnx.State of ShapeDtypeStructs.
      axes: pure dict of logical axes.
      usages: pure dict of what optimizers know of each parameter.
    """

    config: Any
    objective: type[models.Objective]
    graphdef: Any
    shapes: nnx.State
    axes: Any
    usages: Any

    @classmethod
    def of(cls, config: Any) -> Model:
        """Traces the construction; no array is made."""
        objective = models.of(config)
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: objective(config, rngs=nnx.Rngs(0))), nnx.Param)
        return cls(config, objective, graphdef, shapes, sharding.logical_axes(shapes), roles.usages(shapes))

    def merge(self, params: Any) -> Any:
        """The module with these parameters (a pure dict)."""
        state = jax.tree.map(lambda x: x, self.shapes)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graphdef, state)

    def init(self, seed: Any) -> Any:
        """Fresh parameters, a pure dict, each drawn by its path; the seed is an integer, traced or not."""
        key = jax.random.key(seed)
        return initial.by_path(self.objective(self.config, rngs=nnx.Rngs(key)), key)

    @property
    def entries(self) -> dict[str, list[initial.Entry]]:
        """What each parameter's array holds, by its dotted path."""
        return initial.entries(nnx.merge(self.graphdef, self.shapes))

    @property
    def pure_shapes(self) -> Any:
        """Pure dict of ShapeDtypeStructs."""
        return nnx.to_pure_dict(self.shapes)


def state_shardings(mesh: Mesh, model: Model, tx: optax.GradientTransformation, ema: bool = False) -> TrainState:
    """A NamedSharding for every array of the state; `ema`: whether it has averaged parameters."""
    params = sharding.parameter_shardings(mesh, model.axes, model.pure_shapes)
    scalar = NamedSharding(mesh, PartitionSpec())
    moments = sharding.optimizer_shardings(mesh, tx, model.pure_shapes, params)
    return TrainState(scalar, params, moments, scalar, scalar, scalar, params if ema else None)


def init_state(model: Model, tx: optax.GradientTransformation, seed: Any, ema: bool = False) -> TrainState:
    """The state before the first step; jit it with `out_shardings=state_shardings(...)`."""
    return first_state(model.init(seed), tx, seed, ema)


def first_state(params: Any, tx: optax.GradientTransformation, seed: Any, ema: bool = False) -> TrainState:
    """The state before the first step of a run that starts from these parameters."""
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
    # Three arrays, not one three times, and copies: each is donated on its own.
    zero = lambda: jnp.zeros((), jnp.int32)
    wide = lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32), copy=True)
    averaged = jax.tree.map(wide, params) if ema else None
    return TrainState(zero(), params, tx.init(params), key, zero(), zero(), averaged)


def flat(tree: Any) -> dict[str, Any]:
    """A pure dict's leaves by dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
