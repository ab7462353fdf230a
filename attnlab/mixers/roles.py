"""What a parameter is to its layer, said where it is made: optimizers decide by it, not by shapes.

An array of two axes may be a matrix, a bias per head and gate, or the taps of a convolution; only who makes it knows.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Role(enum.StrEnum):
    """What a parameter is. Only matrices are decayed, and only they are orthogonalised by Muon.

    matrix: of a linear map, [..., in, out]; leading axes are maps side by side. Narrow ones (gates, routers) count.
    embedding: rows looked up by id. Not decayed: rare rows would shrink while nothing teaches them.
    output: the language model's head; as the embedding, with which it may be tied.
    bias: added to activations or logits: biases of gates, constant gates, attention sinks.
    scale: multiplies activations, as in norms; decay would pull it to 0, not to 1.
    taps: of a depthwise convolution: a filter per channel, which maps no channel to another.
    positions: tables of biases by position (not decayed in Swin either).
    tokens: learned rows in place of queries, keys or values: agents, persistent tokens (as a class token in ViT).
    decay_rate: how fast a head forgets: log A and the bias of its time steps (not decayed in Mamba either).
    memory: initial weights of a memory that learns while it reads: a state, which the layer's own gates forget.
    average: a moving average of what training sees. Its gradient is what to average (`attnlab.mixers.averages`), so
        that no optimizer sees it: it is neither decayed nor clipped, and has no learning rate.
    """

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    OUTPUT = "output"
    BIAS = "bias"
    SCALE = "scale"
    TAPS = "taps"
    POSITIONS = "positions"
    TOKENS = "tokens"
    DECAY_RATE = "decay_rate"
    MEMORY = "memory"
    AVERAGE = "average"

    @property
    def decayed(self) -> bool:
        """Whether weight decay is applied."""
        return self is Role.MATRIX

    @property
    def orthogonalised(self) -> bool:
        """Whether Muon updates it; what else an optimizer sees gets AdamW then."""
        return self is Role.MATRIX


@dataclasses.dataclass(frozen=True)
class Fused:
    """Which matrices lie in the output axis of one kernel: `groups` times all parts, one behind the other.

    A group is what is split over devices, a head usually.

    Attributes:
      parts: names and columns per group, e.g. (("q", 64), ("k", 64), ("v", 64)).
      groups: how often they repeat.
    """

    parts: tuple[tuple[str, int], ...]
    groups: int = 1

    @property
    def width(self) -> int:
        """Of the whole axis."""
        return self.groups * sum(size for _, size in self.parts)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """The parts [..., in, groups * size] of x [..., in, out], in order."""
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        ends = [sum(size for _, size in self.parts[: i + 1]) for i in range(len(self.parts) - 1)]
        return [part.reshape(*x.shape[:-1], -1) for part in jnp.split(grouped, ends, axis=-1)]

    def join(self, parts: list[jax.Array]) -> jax.Array:
        """The inverse of `split`."""
        grouped = [part.reshape(*part.shape[:-1], self.groups, -1) for part in parts]
        return jnp.concatenate(grouped, axis=-1).reshape(*parts[0].shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Usage:
    """What optimizers know of a parameter.

    Attributes:
      role: what it is.
      fused: the matrices in it, where they are several.
      keep: of a moving average, its share that an update keeps; None of others.
    """

    role: Role
    fused: Fused | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        if (self.keep is not None) != (self.role is Role.AVERAGE):
            raise ValueError(
                f"keep = {self.keep} of a parameter that is {self.role.value}; averages have one, no others"
            )


@dataclasses.dataclass(frozen=True)
class Draw:
    """How a parameter's first value is drawn: `make(key, *args)`.

    A model draws each of its parameters anew, with a key of the parameter's own (`attnlab.models.initial`).
    """

    make: Callable[..., jax.Array]
    args: tuple[Any, ...]

    def __call__(self, key: jax.Array) -> jax.Array:
        return self.make(key, *self.args)


def drawn(
    rngs: nnx.Rngs, make: Callable[..., jax.Array], *args: Any,
    axes: tuple[str, ...], role: Role, fused: Fused | None = None, keep: float | None = None,
) -> nnx.Param:  # fmt: skip
    """A parameter whose first value is random.

    Args:
      rngs: stream `params`.
      make: `make(key, *args)` is the value; a function of a module, so that equal layers say the same.
      args: hashable.
      axes, role, fused, keep: of `param`.
    """
    draw = Draw(make, args)
    return param(draw(_next_key(rngs.params)), axes=axes, role=role, fused=fused, draw=draw, keep=keep)


def _next_key(stream: nnx.RngStream) -> jax.Array:
    """`stream()`; flax's own, of a count that is traced, asks for a sharding that it lacks, and an error is written out
    and dropped at every parameter: a fifth of the time to build a model."""
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return key


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, deviation: float) -> jax.Array:
    """Normal with mean 0, for `drawn`."""
    return deviation * jax.random.normal(key, shape, dtype)


def param(
    value: jax.Array, *, axes: tuple[str, ...], role: Role,
    fused: Fused | None = None, draw: Draw | None = None, keep: float | None = None,
) -> nnx.Param:  # fmt: skip
    """A parameter of a layer whose first value is the same for every seed; `drawn` makes the others.

    Args:
      value: at first.
      axes: logical axes, one for each of the array's, by which it is split over devices.
      role: what it is to the layer, by which optimizers decide.
      fused: the matrices that lie side by side in a matrix's last axis; Muon orthogonalises each by itself.
      draw: how the value was drawn, if it was.
      keep: of a moving average, its share that an update keeps.

    Raises:
      ValueError: these do not go together.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"a parameter {list(value.shape)} has {value.ndim} axes, {axes} names {len(axes)}")
    if not isinstance(role, Role):
        allowed = ", ".join(f"Role.{name}" for name in Role.__members__)
        raise ValueError(f"role {role!r} of the parameter {axes} is unknown; allowed: {allowed}")
    if role is Role.MATRIX and value.ndim < 2:
        raise ValueError(f"a matrix has two axes or more, [..., in, out]; this parameter has {axes}")
    if fused is not None and role is not Role.MATRIX:
        raise ValueError(f"only a matrix has fused parts; this parameter {axes} is {role.value}")
    if fused is not None and fused.width != value.shape[-1]:
        raise ValueError(f"{fused} is {fused.width} wide, the parameter {list(value.shape)} is not")
    Usage(role, fused, keep)
    return nnx.Param(value, axes=axes, role=role, fused=fused, draw=draw, keep=keep)


def usages(params: nnx.State) -> Any:
    """Pure dict like the parameters; each leaf a `Usage`.

    Raises:
      ValueError: a parameter states no role.
    """

    def one(path: Any, variable: nnx.Variable) -> Usage:
        metadata = variable.get_metadata()
        if "role" not in metadata:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"parameter {name} states no role; make it with attnlab.mixers.roles.param(value, axes=..., role=...)"
            )
        return Usage(metadata["role"], metadata["fused"], metadata["keep"])

    is_variable = lambda v: isinstance(v, nnx.Variable)
    return nnx.to_pure_dict(jax.tree_util.tree_map_with_path(one, params, is_leaf=is_variable))
