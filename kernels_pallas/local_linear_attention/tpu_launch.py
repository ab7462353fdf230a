"""What both directions on TPU are launched with: the grid, windows, and what stays on chip of a tile of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.tpu_plan import Plan, tile_table
from kernels_pallas.local_linear_attention import plan as plan_lib
from kernels_pallas.local_linear_attention.plan import Solver
from kernels_pallas.mosaic import Slots


class Launch:
    """On the grid (sequences, key heads, query heads of each, tiles of rows); `slots` have what both directions have.

    Arrays are of whole tiles; `bounds` is None where every row sees all keys.
    """

    def __init__(
        self,
        plan: Plan,
        solver: Solver,
        q_BHTd: jax.Array,
        k_BKSd: jax.Array,
        v_BKSe: jax.Array,
        ridge_BHT: jax.Array,
        bounds: tuple[jax.Array, jax.Array] | None,
    ):
        self.plan, self.solver, self.bounds = plan, solver, bounds
        self.arrays = q_BHTd, k_BKSd, v_BKSe
        (_, H, T, d), (K, S, e) = q_BHTd.shape, v_BKSe.shape[1:]
        self.group, self.key_tiles = H // K, S // plan.blocks.keys
        self.tiles, self.table = tile_table(plan, bounds, T, S, H, K, None)
        self.slots = Slots()
        self.slots.input("q", q_BHTd, self.row(d))
        self.slots.input("k", k_BKSd, self.keys(S, d))
        self.slots.input("v", v_BKSe, self.keys(S, e))
        self.slots.input("ridge", ridge_BHT[:, :, None], self.column(1))
        if bounds is not None:
            shared = bounds[0].shape[0] == 1
            spec = pl.BlockSpec((None, 8, plan.blocks.rows), lambda b, h, g, i, *_: (0 if shared else b, 0, i))
            self.slots.input("bounds", jnp.pad(jnp.stack(bounds, 1), ((0, 0), (0, 6), (0, 0))), spec)
        self.scratch(d, q_BHTd.dtype)

    def scratch(self, width: int, dtype: Any) -> None:
        """Weights, fits of two key tiles, vectors, and numbers of rows."""
        blocks, slots = self.plan.blocks, self.slots
        slots.scratch("weights", (self.key_tiles, blocks.keys, blocks.rows), jnp.float32)
        slots.scratch("fits", (2, blocks.keys, blocks.rows), jnp.float32)
        slots.scratch("k_t", (self.key_tiles, width, blocks.keys), dtype)
        slots.scratch("qs", (blocks.rows, width), dtype)
        slots.scratch("direction", (width, blocks.rows), dtype)
        for name in ("mean", "residual", "solution", "image"):
            slots.scratch(name, (width, blocks.rows), jnp.float32)
        slots.scratch("numbers", (8, blocks.rows), jnp.float32)

    def row(self, width: int) -> pl.BlockSpec:
        """Of an array [B, H, T, width]."""
        rows, group = self.plan.blocks.rows, self.group
        return pl.BlockSpec((None, None, rows, width), lambda b, h, g, i, *_: (b, h * group + g, i, 0))

    def column(self, height: int) -> pl.BlockSpec:
        """Of an array [B, H, height, T]."""
        rows, group = self.plan.blocks.rows, self.group
        return pl.BlockSpec((None, None, height, rows), lambda b, h, g, i, *_: (b, h * group + g, 0, i))

    def keys(self, *shape: int) -> pl.BlockSpec:
        """Of an array [B, K, *shape]: a key head's."""
        return pl.BlockSpec((None, None, *shape), lambda b, h, g, i, *_: (b, h, *(0 for _ in shape)))

    def call(
        self, kernel: Callable[..., None], name: str, numbers: int, wide: int, *, vmem: int, interpret: Any
    ) -> dict[str, jax.Array]:
        """The outputs of `kernel(plan, solver, names, tiles, table, *refs)`; `numbers` and `wide` as in `plan.cost`."""
        plan, (q, k, v) = self.plan, self.arrays
        return self.slots.call(
            functools.partial(kernel, plan, self.solver, self.slots.names(), self.tiles),
            self.table.reshape(-1),
            grid=(q.shape[0], k.shape[1], self.group, q.shape[2] // plan.blocks.rows),
            semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            name=name,
            scope="local_linear_attention",
            vmem=vmem,
            interpret=interpret,
            cost=plan_lib.cost(name, plan, self.solver, q, k, v, self.bounds, numbers, wide),
        )
