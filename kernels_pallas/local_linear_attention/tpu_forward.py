"""The forward on TPU: softmax weights of a tile of rows, their systems solved, and the output.

A tile's logits are made once and stay in fast memory; their statistics, the weights and the mean key take two passes,
an iteration of conjugate gradients one, the output one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.tpu_plan import LOWEST, Plan, Tiles, tile_table
from kernels_pallas.local_linear_attention import plan as plan_lib
from kernels_pallas.local_linear_attention.plan import Solver
from kernels_pallas.local_linear_attention.solver import (
    CENTRE,
    COUNT,
    TOP,
    TOTAL,
    RowTile,
    over_rows,
    pieces,
    scratch,
    turn_keys,
)
from kernels_pallas.mosaic import Slots, product


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


class Output(NamedTuple):
    """o [B, H, T, e]; x [B, H, d, T], the solutions, float32; of each row [B, H, T], float32, the log-sum-exp in log2
    units, the residual, the iterations that changed its solution, and those that its tile ran."""

    o: jax.Array
    x: jax.Array
    lse2: jax.Array
    residual: jax.Array
    iterations: jax.Array
    turns: jax.Array


def row_specs(blocks: plan_lib.Blocks, group: int, shared: bool):
    """Block specs on the grid (sequences, key heads, query heads of each, tiles of rows): of [B, H, T, width], of
    [B, H, height, T], of a key head's [B, K, ...], and of the intervals."""
    row = lambda width: pl.BlockSpec((None, None, blocks.rows, width), lambda b, h, g, i, *_: (b, h * group + g, i, 0))
    column = lambda n: pl.BlockSpec((None, None, n, blocks.rows), lambda b, h, g, i, *_: (b, h * group + g, 0, i))
    keys = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, h, g, i, *_: (b, h, *(0 for _ in shape)))
    intervals = pl.BlockSpec((None, 8, blocks.rows), lambda b, h, g, i, *_: (0 if shared else b, 0, i))
    return row, column, keys, intervals


def stacked(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Intervals as [B, 8, T]."""
    return jnp.pad(jnp.stack(bounds, 1), ((0, 0), (0, 6), (0, 0)))


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
    blocks, (B, H, T, d), (K, S, e) = plan.blocks, q_BHTd.shape, v_BKSe.shape[1:]
    group, key_tiles, dtype = H // K, S // blocks.keys, q_BHTd.dtype
    tiles, table = tile_table(plan, bounds, T, S, group, None)
    row, column, keys, intervals = row_specs(blocks, group, bounds is None or bounds[0].shape[0] == 1)
    slots = Slots()
    slots.input("q", q_BHTd, row(d))
    slots.input("k", k_BKSd, keys(S, d))
    slots.input("v", v_BKSe, keys(S, e))
    slots.input("ridge", ridge_BHT[:, :, None], column(1))
    if bounds is not None:
        slots.input("bounds", stacked(bounds), intervals)
    slots.output("o", (B, H, T, e), dtype, row(e))
    slots.output("x", (B, H, d, T), jnp.float32, column(d))
    slots.output("numbers_out", (B, H, 4, T), jnp.float32, column(4))
    scratch(slots, plan, key_tiles, d, dtype)
    slots.scratch("v_t", (key_tiles, e, blocks.keys), dtype)
    slots.scratch("out", (e, blocks.rows), jnp.float32)
    wide = (d + e) * dtype.itemsize + 4 * d
    found = slots.call(
        functools.partial(_kernel, plan, solver, slots.names(), tiles),
        table.reshape(-1),
        grid=(B, K, group, T // blocks.rows),
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        name=plan_lib.FORWARD,
        scope="local_linear_attention",
        vmem=vmem,
        interpret=interpret,
        cost=plan_lib.cost(plan_lib.FORWARD, plan, solver, q_BHTd, k_BKSd, v_BKSe, bounds, 5, wide),
    )
    numbers = found["numbers_out"]
    return Output(found["o"], found["x"], *(numbers[:, :, n] for n in range(4)))
