"""What the Hopper kernels of the delta rule share: chunks of 64 positions, their numbers per position, and products.

Shapes: B sequences, N chunks of C = 64 positions, H heads, d and e widths of keys and values, multiples of 64. Arrays
of positions lie as [B, N C, H, w]. A sequential kernel owns E = 64 of a head's values, and a chunk of them is a tile.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.hopper import COLUMNS, ROWS, by_column, by_row

C = E = 64
SLOTS = 2  # chunks in fast memory
# Rows of numbers per position, [B, H, N, NUMBERS, C] float32: what a state before the chunk weighs, what a position
# weighs in the state after it, strengths, sums of decays from the document's first position of the chunk on (log2), and
# that first position, counted from the chunk's.
READ, WRITE, BETA, TOTAL, BEGIN = range(5)
NUMBERS = 5


def chunk(n: Any) -> Any:
    """Positions of chunk n."""
    return pl.ds(n * C, C)


def values(j: Any) -> Any:
    """The j-th of a head's tiles of values."""
    return pl.ds(j * E, E)


def numbers_memory(*lead: int) -> Any:
    return plgpu.SMEM((*lead, NUMBERS, C), jnp.float32)


def sweep_memory(d: int, dtype: Any, rows: str, state: str, tiles: tuple[str, ...]) -> dict[str, Any]:
    """Of a kernel that goes from chunk to chunk: slots for what it fetches, `rows` of values' width among them, the
    state as an operand, and `tiles` of its own."""
    ring = lambda width: hopper.tiles((SLOTS, C, width), dtype)
    return {
        "q_s": ring(d), "k_s": ring(d), rows: ring(E), "inverse_s": ring(C), "p_s": ring(C),
        "numbers_s": numbers_memory(SLOTS), state: hopper.tiles((d, E), dtype),
        **{name: hopper.tiles((C, E), dtype) for name in tiles}, "here": hopper.barriers(SLOTS, 6),
    }  # fmt: skip


def product(device: hopper.Device, a: Any, b: Any, shape: tuple[int, int] = (C, C)) -> jax.Array:
    """a b, done."""
    return hopper.product(device, a, b, shape)


def per_row(device: hopper.Device, numbers: Any, which: int, width: int = E) -> jax.Array:
    """Numbers of positions over [C, width]."""
    return by_row(device.load(numbers.at[which], ROWS), (C, width))


def per_column(device: hopper.Device, numbers: Any, which: int) -> jax.Array:
    """Numbers of positions as columns of [C, C]."""
    return by_column(device.load(numbers.at[which], COLUMNS), (C, C))


def pair_weights(device: hopper.Device, numbers: Any, documents: bool) -> jax.Array:
    """What is left at a position (row) of what another (column), itself included, writes: 0 for those behind it."""
    row, col = device.iota((C, C), 0), device.iota((C, C), 1)
    seen = row >= col
    if documents:
        seen &= col >= per_row(device, numbers, BEGIN, C).astype(jnp.int32)
    passed = per_row(device, numbers, TOTAL, C) - per_column(device, numbers, TOTAL)
    return jnp.where(seen, jnp.exp2(passed), 0.0)
