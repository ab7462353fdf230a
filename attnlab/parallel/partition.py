"""Where a program being traced will run: the mesh, which mesh axes split which logical axis, and the platform.

Models, mixers and ops name logical axes; the tables from those to mesh axes are the trainer's
(`attnlab.train.sharding`). Outside `use` there is no mesh: nothing is constrained and the platform is jax's default.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]  # a logical axis, or None for one that is never split, for each axis of an array


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh, and for each logical axis of activations the mesh axes that split it."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]

    def spec(self, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        """The PartitionSpec of an array; an axis that the mesh does not divide stays whole."""
        parts = []
        for size, axis in zip(shape, axes, strict=True):
            names = tuple(n for n in self.rules.get(axis, ()) if self.mesh.shape[n] > 1) if axis else ()
            whole = not names or size % math.prod(self.mesh.shape[n] for n in names)
            parts.append(None if whole else names)
        return PartitionSpec(*parts)


_current: contextvars.ContextVar[Partition | None] = contextvars.ContextVar("partition", default=None)
_inside: contextvars.ContextVar[Mapping[str, Split]] = contextvars.ContextVar(
    "inside", default=types.MappingProxyType({})
)
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_device_kind: contextvars.ContextVar[str | None] = contextvars.ContextVar("device_kind", default=None)


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """What is traced inside runs on `mesh`, its activations split by `rules`; None: on one device."""
    partition = None if mesh is None or mesh.size == 1 else Partition(mesh, rules)
    tokens = [(_current, _current.set(partition))]
    if mesh is not None:
        device = mesh.devices.flat[0]
        tokens.append((_platform, _platform.set(device.platform)))
        tokens.append((_device_kind, _device_kind.set(device.device_kind)))
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)


def platform() -> str:
    """Platform of the devices that the program will run on, e.g. "cpu"; not always that of this process."""
    return _platform.get() or jax.default_backend()


def by_platform(*arrays: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """`cpu(*arrays)` where the program will run on CPUs, else `default(*arrays)`: what is not run is not traced."""
    return (cpu if platform() == "cpu" else default)(*arrays)


def device_kind() -> str:
    """What jax calls the devices that the program will run on, e.g. "TPU v5p"."""
    return _device_kind.get() or jax.devices()[0].device_kind


def ways(axis: str) -> int:
    """Over how many devices a logical axis is split."""
    partition = _current.get()
    if partition is None:
        return 1
    return math.prod(partition.mesh.shape[n] for n in partition.rules.get(axis, ()))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid over the mesh by its logical axes, one for each axis of the array; as it is where there is no mesh."""
    partition = _current.get()
    if partition is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, partition.spec(x.shape, axes)))


def local(fn: Callable[..., Any], arrays: tuple[Any, ...], axes: tuple[Any, ...], out_axes: Any) -> Any:
    """`fn(*arrays)`, computed by each device on its own part of the arrays.

    Right only where `fn` treats the split axes one element like another, as batch and heads, or asks `here` what is
    split and exchanges what it must (`sequence_parallel`). Kernels, which XLA cannot split itself, and loops, which it
    splits badly, run so.

    Args:
      fn: from local arrays to a local array, or a tuple of them.
      arrays: each an array or None.
      axes: for each array its logical axes (`Axes`). An axis is split only if the mesh divides it in every array.
      out_axes: `Axes` of the output, or a list of them for a tuple.
    """
    partition = _current.get()
    if partition is None:
        with _alone({}):  # what a device has is whole to an op within an op
            return fn(*arrays)
    whole, split = set(), set()
    for array, names in zip(arrays, axes, strict=True):
        if array is not None:
            for axis, size, part in zip(names, array.shape, partition.spec(array.shape, names)):
                if part is not None:
                    split.add(axis)
                elif size != 1:  # what has one element is the same for all parts of the others
                    whole.add(axis)
    kept = Partition(partition.mesh, {k: v for k, v in partition.rules.items() if k in split - whole})
    given = [(a, n) for a, n in zip(arrays, axes, strict=True) if a is not None]
    in_specs = tuple(kept.spec(a.shape, n) for a, n in given)

    def named(names: Axes) -> PartitionSpec:
        return PartitionSpec(*(kept.rules.get(n) if n else None for n in names))

    out_specs = tuple(named(n) for n in out_axes) if isinstance(out_axes, list) else named(out_axes)

    over = {axis: tuple(n for n in names if kept.mesh.shape[n] > 1) for axis, names in kept.rules.items()}
    inside = {axis: Split(names, math.prod(kept.mesh.shape[n] for n in names)) for axis, names in over.items() if names}

    def on_device(*parts: Any) -> Any:
        rest = iter(parts)
        with _alone(inside):
            return fn(*(None if a is None else next(rest) for a in arrays))

    run = jax.shard_map(on_device, mesh=kept.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(*(a for a, _ in given))


@dataclasses.dataclass(frozen=True)
class Split:
    """How a logical axis is split in the arrays that a device sees: over `count` devices, along mesh axes `names`."""

    names: tuple[str, ...]
    count: int


def here(axis: str) -> Split | None:
    """Inside `local`: how its arrays are split along a logical axis; None where they are whole."""
    return _inside.get().get(axis)


@contextlib.contextmanager
def _alone(inside: Mapping[str, Split]) -> Iterator[None]:
    """No mesh is left to lay anything over; what the arrays are parts of is known."""
    tokens = [(_current, _current.set(None)), (_inside, _inside.set(inside))]
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)


def traced(fn: Callable[..., Any], mesh: Mesh | None, rules: Mapping[str, tuple[str, ...]]) -> Callable[..., Any]:
    """`fn`, traced inside `use(mesh, rules)`."""

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        with use(mesh, rules):
            return fn(*args, **kwargs)

    return run
