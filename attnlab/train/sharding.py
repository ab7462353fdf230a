"""From logical axes to mesh axes: the mesh, the rules and the shardings that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab.errors import ConfigError
from attnlab.train.config import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis; what is not named is not split.
PARAMETER_RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
BATCH_AXES = ("data", "fsdp")

# Logical axis of an activation -> mesh axes.
ACTIVATION_RULES = {"batch": BATCH_AXES, "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",)}


def make_mesh(config: MeshConfig, batch: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or where every axis has a size of its own, of the first so many.

    Args:
      config: sizes of the axes.
      batch: sequences that are processed at a time, over all devices.
      devices: those to use; None: all that this program runs on.

    Raises:
      ConfigError: there are not so many devices, or they cannot be shared out, or the batch cannot.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    fixed = math.prod(s for s in sizes if s != -1)
    shown = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(MESH_AXES, sizes))
    if fixed > len(devices) or (-1 in sizes and len(devices) % fixed):
        allowed = f"a divisor of {len(devices)}" if -1 in sizes else f"at most {len(devices)}"
        raise ConfigError(f"{shown} ask for {fixed} of {len(devices)} devices; allowed: a product of {allowed}")
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    shards = sizes[0] * sizes[1]
    if batch % shards:
        raise ConfigError(
            f"data.batch / train.accumulate = {batch} sequences cannot be split over {shards} devices "
            f"({shown}); allowed: multiples of {shards}"
        )
    return jax.make_mesh(
        tuple(sizes),
        MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
        devices=devices[: math.prod(sizes)],
    )


def logical_axes(params: nnx.State) -> Any:
    """Pure dict like the parameters; each leaf the tuple of the parameter's logical axes, without the stack of layers."""
    return nnx.to_pure_dict(jax.tree.map(lambda v: v.axes, params, is_leaf=lambda v: isinstance(v, nnx.Variable)))


def parameter_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """A NamedSharding per parameter.

    Args:
      mesh: of `make_mesh`.
      axes: of `logical_axes`.
      shapes: pure dict of arrays or ShapeDtypeStructs; a leaf may have a leading axis for the stack of layers.

    Raises:
      ConfigError: an axis of a parameter is not divisible by the mesh axis that splits it.
    """

    def one(path: Any, names: tuple[str, ...], leaf: Any) -> NamedSharding:
        stack = len(leaf.shape) - len(names)
        spec: list[str | None] = [None] * stack
        for name, size in zip(names, leaf.shape[stack:], strict=True):
            axis = PARAMETER_RULES.get(name)
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide {size}, the axis {name!r} of parameter "
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}; allowed: divisors of {size}"
                )
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def optimizer_shardings(mesh: Mesh, tx: optax.GradientTransformation, shapes: Any, shardings: Any) -> Any:
    """Shardings of `tx.init(params)`: moments like their parameter, the rest (and factored moments) on every device."""
    # By path: an optimizer's moments end in the path of their parameter, whatever wraps them.
    replicated = NamedSharding(mesh, PartitionSpec())
    leaves = jax.tree_util.tree_leaves_with_path
    of_parameter = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(leaves(shapes), jax.tree.leaves(shardings), strict=True)
    }

    def one(path: Any, leaf: Any) -> NamedSharding:
        tails = (path[i:] for i in range(len(path)))
        shape, sharding = next((of_parameter[tail] for tail in tails if tail in of_parameter), (None, replicated))
        return sharding if leaf.shape == shape else replicated

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(tx.init, shapes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T]."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from this process's rows."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
