"""From logical axes to mesh axes: the mesh, the rules and the shardings that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab.batch import Spec
from attnlab.errors import ConfigError
from attnlab.train.config import MeshConfig

# Logical axis of a parameter -> mesh axes; what is not named is not split.
PARAMETER_RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
BATCH_AXES = ("data", "fsdp")

# Logical axis of an activation -> mesh axes.
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "seq": ("context",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(config: MeshConfig, batch: int, devices: Sequence[Any] | None = None, *, length: int = 0) -> Mesh:
    """The mesh of all devices, or where every axis has a size of its own, of the first so many.

    Args:
      config: sizes of the axes.
      batch: sequences that are processed at a time, over all devices.
      devices: those to use; None: all that this program runs on.
      length: positions of a sequence.

    Raises:
      ConfigError: there are not so many devices, or they cannot be shared out, or the batch or its positions cannot.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes()
    fixed = math.prod(s for s in sizes.values() if s != -1)
    shown = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
    free = -1 in sizes.values()
    if fixed > len(devices) or (free and len(devices) % fixed):
        allowed = f"a divisor of {len(devices)}" if free else f"at most {len(devices)}"
        raise ConfigError(f"{shown} ask for {fixed} of {len(devices)} devices; allowed: a product of {allowed}")
    sizes = {axis: len(devices) // fixed if s == -1 else s for axis, s in sizes.items()}
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    if batch % shards:
        raise ConfigError(
            f"data.batch / train.accumulate = {batch} sequences cannot be split over {shards} devices "
            f"({shown}); allowed: multiples of {shards}"
        )
    if length % sizes["context"]:
        raise ConfigError(
            f"mesh.context = {sizes['context']} does not divide data.length = {length}; allowed: divisors of it"
        )
    without = {d.process_index for d in devices}
    devices = devices[: math.prod(sizes.values())]
    without -= {d.process_index for d in devices}
    if without:
        raise ConfigError(
            f"{shown} leave no device to process {', '.join(map(str, sorted(without)))}; "
            "allowed: all devices of all processes"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        order = mesh_utils.create_device_mesh(list(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(order, tuple(sizes), axis_types=kinds)
    if sizes[config.slices] % slices:
        raise ConfigError(
            f"mesh.{config.slices} = {sizes[config.slices]} goes over {slices} slices "
            f"(mesh.slices = {config.slices!r}); allowed: multiples of {slices}, or another axis in mesh.slices"
        )
    across = {axis: slices if axis == config.slices else 1 for axis in sizes}
    within = [sizes[axis] // across[axis] for axis in sizes]
    order = mesh_utils.create_hybrid_device_mesh(within, list(across.values()), devices, allow_split_physical_axes=True)
    return Mesh(order, tuple(sizes), axis_types=kinds)


def rows_of_process(mesh: Mesh, batch: int, process: int | None = None) -> list[int]:
    """Which of a batch's rows a process's devices hold, ascending.

    On a pod they need not be consecutive: the order of chips in the mesh follows their network. Processes that split
    positions or heads of the same rows hold the same ones.

    Args:
      mesh: of `make_mesh`.
      batch: rows of all processes together.
      process: its index; None: this one.
    """
    held = _shards_of(mesh, process)
    size = batch // _shards(mesh)
    return [row for shard in held for row in range(shard * size, (shard + 1) * size)]


def _shards(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _shards_of(mesh: Mesh, process: int | None) -> list[int]:
    process = jax.process_index() if process is None else process
    by_shard = mesh.devices.reshape(_shards(mesh), -1)
    return [i for i, devices in enumerate(by_shard) if any(d.process_index == process for d in devices)]


def logical_axes(params: nnx.State) -> Any:
    """Pure dict like the parameters; each leaf a tuple of the parameter's logical axes, without the stack of layers."""
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
        spec: list[tuple[str, ...] | None] = [None] * stack
        for name, size in zip(names, leaf.shape[stack:], strict=True):
            over = tuple(axis for axis in PARAMETER_RULES.get(name, ()) if mesh.shape[axis] > 1)
            ways = math.prod(mesh.shape[axis] for axis in over)
            if size % ways:
                raise ConfigError(
                    f"{' x '.join(f'mesh.{axis}' for axis in over)} = {ways} does not divide {size}, "
                    f"the axis {name!r} of parameter {jax.tree_util.keystr(path, simple=True, separator='.')}; "
                    f"allowed: divisors of {size}"
                )
            spec.append(over or None)
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


def batch_sharding(mesh: Mesh, axes: tuple[str | None, ...] = ("seq",)) -> NamedSharding:
    """Of an array of a batch, by the logical axes of its rows."""
    rules = ACTIVATION_RULES
    return NamedSharding(mesh, PartitionSpec(rules["batch"], *(rules.get(axis) if axis else None for axis in axes)))


def put_batch(batch: Mapping[str, Any], mesh: Mesh, spec: Spec) -> dict[str, jax.Array]:
    """Global arrays from this process's rows (`rows_of_process`), of which it has all positions."""
    held = len(_shards_of(mesh, None))
    whole = lambda v: (v.shape[0] // held * _shards(mesh), *v.shape[1:])
    place = lambda k, v: jax.make_array_from_process_local_data(batch_sharding(mesh, spec[k].axes), v, whole(v))
    return {k: place(k, v) for k, v in batch.items()}
