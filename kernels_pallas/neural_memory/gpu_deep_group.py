"""What the Hopper kernels of a memory of two layers share: its shape, products with W and S, and GELU.

W and S of both layers are squares [64, 64] of 64 hidden units, in the order of `SQUARES`. In float32 they stay in
shared memory; tensor cores read copies in the dtype of products. Rows of a tile that are not of the group may hold
anything in what is loaded; in what is learned of them they are 0.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.hopper import put
from kernels_pallas.neural_memory.gpu_group import E, Group, Shape
from kernels_pallas.neural_memory.gpu_numbers import RHO_EARLY

F32 = jnp.float32
SQUARES = W1, S1, W2, S2 = range(4)
SQUARE = (E, E)
_GELU, _CUBIC = math.sqrt(2 / math.pi), 0.044715


@dataclasses.dataclass(frozen=True)
class DeepShape(Shape):
    """As `Shape`, whose `rate` is 1. rates: of both layers, relative to theta."""

    rates: tuple[float, float] = (1.0, 1.0)

    def masters(self) -> Any:
        """Memory for W and S of both layers, float32."""
        return hopper.tiles((4, *SQUARE), F32)


def placed(t: Any, memory: Any, names: tuple[str, ...], group: Group) -> Any:
    """`t` for a group, with names for tiles of one memory: a thread has the same addresses in all of these."""
    tiles = {name: memory.at[group.zero + i] for i, name in enumerate(names) if name}
    return types.SimpleNamespace(**vars(t) | tiles | {"group": group, "z": group.zero, "phase": 0})


def renewed(t: Any, step: Any = 0) -> Group:
    """The group for one step more: nothing that the compiler made of it before lives on in registers."""
    t.phase += 1
    zero = lax.min(t.n + step + t.phase, t.zero)
    return Group(t.group.shape, t.table, t.b, t.n, t.group.numbers, zero, zero)


def replace(memory: Any, x: jax.Array) -> None:
    """`put`, where products have read the memory: other warps' may not be done."""
    plgpu.commit_smem()
    put(memory, x)


def fill(source: Any, index: tuple[Any, ...], target: Any, here: Any) -> None:
    """Loads W and S [..., 4, 64, 64] from main memory, and waits for them."""
    plgpu.commit_smem()  # orders what was read before the copies over it
    for which in SQUARES:
        plgpu.copy_gmem_to_smem(source.at[(*index, which)], target.at[which], here)
    plgpu.barrier_wait(here)


def keep(source: Any, target: Any, index: tuple[Any, ...]) -> None:
    """Copies W and S to main memory; what is in shared memory was committed."""
    for which in SQUARES:
        plgpu.copy_smem_to_gmem(source.at[which], target.at[(*index, which)])


def scaled(group: Group, x: jax.Array, kept: int, moved: int) -> list[jax.Array]:
    """Rows times what is left of W where they read, and times what has come of S, in the dtype of products; the latter
    only if anything has."""
    found = [x * jnp.exp2(group.per_row(kept))]
    if moved != RHO_EARLY or group.shape.several:
        found.append(x * group.per_row(moved))
    return [y.astype(group.shape.dtype) for y in found]


def far(group: Group, x: jax.Array, kept: int, moved: int, state: Any, layer: int, *, back: bool = False) -> list:
    """Factors whose products add up to what rows x read of a layer, or give back through it."""
    squares = [state.at[group.zero + 2 * layer + i] for i in range(2)]
    return [(a, b.T if back else b) for a, b in zip(scaled(group, x, kept, moved), squares)]


def gelu(z: jax.Array) -> jax.Array:
    """In its tanh form."""
    return 0.5 * z * (1 + jnp.tanh(z * (_GELU + _GELU * _CUBIC * (z * z))))


def gelu_slope(z: jax.Array) -> jax.Array:
    """Its derivative."""
    square_ = z * z
    t = jnp.tanh(z * (_GELU + _GELU * _CUBIC * square_))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * (_GELU + 3 * _GELU * _CUBIC * square_)


def gelu_bend(z: jax.Array) -> jax.Array:
    """Its second derivative."""
    square_ = z * z
    t = jnp.tanh(z * (_GELU + _GELU * _CUBIC * square_))
    inner = _GELU + 3 * _GELU * _CUBIC * square_
    return (1 - t * t) * (inner + z * (3 * _GELU * _CUBIC * z - t * inner * inner))
