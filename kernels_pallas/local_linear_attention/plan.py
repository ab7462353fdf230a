"""Tiles of local linear attention's kernels, and what they cost: FLOPs, bytes of main memory, and fast memory."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl

from kernels_pallas import tuning
from kernels_pallas.flash_attention.tpu_plan import Plan

_REST = 12 * 2**20  # bytes of fast memory beside what belongs to keys: vectors of rows, and scores of two key tiles
_START, _NARROW = 48, 4 / 3  # rows that a tile's start costs as much as; what a row costs more in products of 128
FORWARD, BACKWARD = "local_linear_forward", "local_linear_backward"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tiles; each a multiple of 128.

    Attributes:
      rows: whose systems are solved together.
      keys: of a tile.
      sub_rows, sub_keys: of what is one matrix product; they divide `rows` and `keys`.
    """

    rows: int = 512
    keys: int = 512
    sub_rows: int = 256
    sub_keys: int = 256


@dataclasses.dataclass(frozen=True)
class Solver:
    """When a system is done: at a residual of `tolerance` times its right side, or after so many iterations."""

    iterations: int
    tolerance: float


class Output(NamedTuple):
    """o [B, H, T, e]; x [B, H, d, T], the solutions, float32; of each row [B, H, T], float32, the log-sum-exp in log2
    units, the residual, the iterations that changed its solution, and those that its tile ran."""

    o: jax.Array
    x: jax.Array
    lse2: jax.Array
    residual: jax.Array
    iterations: jax.Array
    turns: jax.Array


class Gradients(NamedTuple):
    """Of q [B, H, T, d], of keys [B, K, S, d] and values [B, K, S, e], in their dtypes; of the ridge [B, H, T],
    float32."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dridge: jax.Array


def blocks(kind: str, queries: int, keys: int, width: int, value_width: int, itemsize: int) -> Blocks | None:
    """Tiles for these lengths and widths; None where the keys of a head do not fit into fast memory."""
    tile = min(Blocks.keys, -(-keys // 128) * 128)
    sub_keys = Blocks.sub_keys if tile % Blocks.sub_keys == 0 else 128

    def cost(rows: int) -> float:
        return -(-queries // rows) * (rows + _START) * (1 if rows >= Blocks.sub_rows else _NARROW)

    for rows in sorted((512, 256, 128), key=cost):
        if keys <= most_keys(kind, rows, width, value_width, itemsize):
            return Blocks(rows, tile, min(rows, Blocks.sub_rows), sub_keys)
    return None


def most_keys(kind: str, rows: int, width: int, value_width: int, itemsize: int) -> int:
    """How many keys the backward, which needs more than the forward, has room for beside tiles of so many rows.

    Of each key there are in fast memory windows of the key, the value and both gradients, each in two buffers, the key
    turned, float32 sums of the gradients, and of each row of the tile a weight and a slope.
    """
    lanes = lambda n: -(-n // 128) * 128
    windows = 2 * 2 * (lanes(width) + lanes(value_width)) * itemsize
    each = windows + width * itemsize + 4 * (width + value_width) + 2 * 4 * rows
    return (tuning.vmem_limit(kind) - _REST) // each // Blocks.keys * Blocks.keys


def widths(iterations: int, width: int, value_width: int) -> dict[str, int]:
    """By kernel, the widths of all products over pairs of a row and a key that it sees, added up.

    Forward: scores, mean key, two an iteration, the fit at the keys; values. Backward: scores, mean key, right side,
    two an iteration, two fits, dq, three of dk; slopes, dv. Products that take several passes count once.
    """
    return {
        FORWARD: (3 + 2 * iterations) * width + value_width,
        BACKWARD: (9 + 2 * iterations) * width + 2 * value_width,
    }


def cost(
    name: str, plan: Plan, solver: Solver, q: jax.Array, k: jax.Array, v: jax.Array, bounds: Any, rows: int, wide: int
) -> pl.CostEstimate:
    """Of a kernel on whole tiles, every row against every key, and `solver.iterations` iterations.

    Args:
      rows: numbers of each row and head that are read or written, beside queries and what is like them.
      wide: bytes of each row and head that are read or written.
    """
    (B, H, T, d), (K, S, e) = q.shape, v.shape[1:]
    keys = (1 if name == FORWARD else 2) * B * K * S * (d + e) * k.dtype.itemsize
    intervals = 0 if bounds is None else 8 * 4
    return pl.CostEstimate(
        flops=2 * B * H * T * S * widths(solver.iterations, d, e)[name],
        bytes_accessed=keys + B * H * T * (wide + 4 * rows + intervals),
        transcendentals=B * H * T * S * (2 if name == FORWARD else 1),
    )
