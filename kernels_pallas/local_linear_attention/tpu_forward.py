"""The forward on TPU: softmax weights of a tile of rows, their systems solved, and the output.

A tile's logits are made once and stay in fast memory; their statistics, the weights and the mean key take two passes,
an iteration of conjugate gradients one, the output one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.tpu_plan import LOWEST, Plan, Tiles
from kernels_pallas.local_linear_attention import plan as plan_lib
from kernels_pallas.local_linear_attention.plan import Output, Solver
from kernels_pallas.local_linear_attention.solver import (
    CENTRE,
    COUNT,
    TOP,
    TOTAL,
    RowTile,
    over_rows,
    pieces,
    turn_keys,
)
from kernels_pallas.local_linear_attention.tpu_launch import Launch
from kernels_pallas.mosaic import product


class Forward(RowTile):
    """One tile of rows."""

    def run(self) -> None:
        r = self.refs
        self.begin()
        rows = self.plan.blocks.rows
        self.keep(TOP, jnp.full((1, rows), LOWEST, jnp.float32))
        self.keep(TOTAL, jnp.zeros((1, rows), jnp.float32))
        self.each(self.statistics)
        lse = self.number(TOP) + jnp.log2(jnp.maximum(self.number(TOTAL), 1e-30))
        self.each(functools.partial(self.weigh, lse))
        r["residual"][...] = r["q"][...].astype(jnp.float32).T - r["mean"][...]
        turns = self.solve()
        self.output()
        r["x"][...] = r["solution"][...]
        turns = jnp.full((1, rows), turns.astype(jnp.float32))
        for n, x in enumerate((lse, self.relative_residual(), self.number(COUNT), turns)):
            r["numbers_out"][n : n + 1, :] = x

    def statistics(self, tile, rows: slice) -> None:
        """Logits of a tile, and the largest and the sum of their exponentials so far."""
        r = self.refs
        before = top = self.number(TOP, rows)
        for keys in self.key_parts:
            s = self.logits(tile, keys, rows)
            r["weights"][tile, keys, rows] = s
            top = jnp.maximum(top, s.max(0, keepdims=True))
        total = self.number(TOTAL, rows) * jnp.exp2(before - top)
        for keys in self.key_parts:
            total += over_rows(jnp.exp2(r["weights"][tile, keys, rows] - top))
        self.keep(TOP, top, rows)
        self.keep(TOTAL, total, rows)

    def weigh(self, lse, tile, rows: slice) -> None:
        """Weights in place of logits, and their mean key."""
        r = self.refs

        def weights(keys: slice):
            p = jnp.exp2(r["weights"][tile, keys, rows] - lse[:, rows])
            r["weights"][tile, keys, rows] = p
            return p

        self.add_of_keys("mean", tile, rows, weights)

    def output(self) -> None:
        r = self.refs
        x = r["solution"][...]
        self.keep(CENTRE, over_rows(r["mean"][...] * x) - 1.0)
        vectors = pieces(x, r["k"].dtype)

        def ask(tile, slot: int, keys: slice, rows: slice) -> None:
            r["fits"][slot, keys, rows] = self.along(tile, keys, [y[:, rows] for y in vectors])

        def finish(tile, slot: int, keys: slice, rows: slice):
            tilt = r["fits"][slot, keys, rows] - self.number(CENTRE, rows)
            weights = r["weights"][tile, keys, rows] * tilt
            return product(r["v_t"][tile, :, keys], weights.astype(r["v_t"].dtype), 1, 0)

        self.sweep("out", ask, finish)
        r["o"][...] = r["out"][...].astype(r["o"].dtype).T


def _kernel(plan: Plan, solver: Solver, names: tuple[str, ...], tiles: Tiles, table, *refs) -> None:
    b, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    refs = dict(zip(names, refs, strict=True))
    pl.when((g == 0) & (i == 0))(lambda: turn_keys(refs, {"k": "k_t", "v": "v_t"}))
    at = tiles.at(b, i)
    Forward(plan, solver, refs, tuple(table[at + n] for n in range(tiles.numbers))).run()


def run(
    plan: Plan,
    solver: Solver,
    q_BHTd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSe: jax.Array,
    ridge_BHT: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    vmem: int,
    interpret: Any,
) -> Output:
    """Of whole tiles; `bounds` is None where every row sees all keys. Rows that see nothing have q = 0."""
    launch = Launch(plan, solver, q_BHTd, k_BKSd, v_BKSe, ridge_BHT, bounds)
    slots, (B, H, T, d), e, dtype = launch.slots, q_BHTd.shape, v_BKSe.shape[3], q_BHTd.dtype
    slots.output("o", (B, H, T, e), dtype, launch.row(e))
    slots.output("x", (B, H, d, T), jnp.float32, launch.column(d))
    slots.output("numbers_out", (B, H, 4, T), jnp.float32, launch.column(4))
    slots.scratch("v_t", (launch.key_tiles, e, plan.blocks.keys), dtype)
    slots.scratch("out", (e, plan.blocks.rows), jnp.float32)
    wide = (d + e) * dtype.itemsize + 4 * d
    found = launch.call(_kernel, plan_lib.FORWARD, 5, wide, vmem=vmem, interpret=interpret)
    numbers = found["numbers_out"]
    return Output(found["o"], found["x"], *(numbers[:, :, n] for n in range(4)))
