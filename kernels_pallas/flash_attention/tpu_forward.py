"""The forward on TPU.

Scores are transposed, keys by rows, so that maxima and sums over keys are plain operations on registers and the
statistics of a row take one lane. Keys and values of a head stay in fast memory. A row tile walks its key tiles from
the last to the first in steps that ask for the scores of one tile while they finish the one before: nothing in a step
waits for anything else in it. Only partial tiles are masked, as their scores are made. Logits are in log2 units, their
scale folded into q.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.flash_attention.tpu_plan import (
    HIDDEN,
    LOWEST,
    Plan,
    Slots,
    Tiles,
    fold8,
    in_bounds,
    product,
    tile_table,
)

ONES = 16  # rows of ones under v^T: what bfloat16 tiles are made of


class RowTile:
    """One row tile's walk over its key tiles. Step `t` is of key tile `end - 1 - t`; slots 0 and 1 hold scores."""

    def __init__(self, plan: Plan, refs: dict[str, Any], bounds: tuple):
        self.plan, self.refs = plan, refs
        self.first, self.full, self.full_end, self.end = bounds
        blocks = plan.blocks
        self.row_parts = [slice(r, r + blocks.sub_rows) for r in range(0, blocks.rows, blocks.sub_rows)]
        self.key_parts = [slice(c, c + blocks.sub_keys) for c in range(0, blocks.keys, blocks.sub_keys)]

    def tile(self, t):
        return self.end - 1 - t

    def begin(self, sink) -> None:
        """Statistics of no keys; a sink is a key whose value is 0."""
        plan, r = self.plan, self.refs
        q = r["q"][...]
        r["qs"][...] = (q.astype(jnp.float32) * plan.fold).astype(q.dtype)
        r["acc"][...] = jnp.zeros_like(r["acc"])
        total = jnp.zeros((8, plan.blocks.rows), jnp.float32)
        if not plan.bounded:
            r["m"][...] = jnp.full_like(r["m"], LOWEST)
        if sink is not None:
            sink = jnp.full_like(r["m"], sink)
            r["m"][...] = jnp.maximum(sink, LOWEST)
            total = jnp.exp2(sink - r["m"][...])
        if plan.blocks.ones:
            width = r["acc"].shape[0] - ONES
            r["acc"][width : width + 8, :] = total
        else:  # eight partial sums, the sink in one of them
            r["l"][...] = jnp.where(lax.broadcasted_iota(jnp.int32, total.shape, 0) == 0, total, 0.0)

    def hidden(self, scores, tile, keys: slice, rows: slice):
        """Scores [keys, rows] with those out of a row's interval hidden."""
        bounds, plan = self.refs["bounds"], self.plan
        key = tile * plan.blocks.keys + keys.start + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        low, high = bounds[0:1, rows] if plan.low else None, bounds[1:2, rows] if plan.high else None
        return jnp.where(in_bounds(key, low, high), scores, HIDDEN)

    def scores(self, t, slot: int, masked: bool = False) -> None:
        """Asks for the scores of a tile, and their maxima by registers."""
        plan, r, tile = self.plan, self.refs, self.tile(t)
        for rows in self.row_parts:
            top = None
            for keys in self.key_parts:
                at = pl.multiple_of(tile * plan.blocks.keys + keys.start, plan.blocks.sub_keys)
                s = product(r["k"][pl.ds(at, plan.blocks.sub_keys), :], r["qs"][rows, :], 1, 1)
                if plan.cap is not None:
                    s = jnp.tanh(s) * plan.cap
                if "bias" in r:
                    s += r["bias"][tile, :, keys].T[:, 0:1]
                if masked:
                    s = self.hidden(s, tile, keys, rows)
                r["s"][slot, keys, rows] = s
                if not plan.bounded:
                    part = fold8(s, jnp.max)
                    top = part if top is None else jnp.maximum(top, part)
            if not plan.bounded:
                r["top"][slot, :, rows] = top

    def finish(self, t, slot: int) -> None:
        """Adds a tile's weighted values to the output."""
        plan, r, tile = self.plan, self.refs, self.tile(t)
        for rows in self.row_parts:
            if not plan.bounded:
                old = r["m"][0:1, rows]
                new = jnp.maximum(old, r["top"][slot, :, rows].max(0, keepdims=True))
                r["m"][:, rows] = jnp.broadcast_to(new, (8, plan.blocks.sub_rows))
                shrink = jnp.exp2(old - new)
            out, total = None, None
            for keys in self.key_parts:
                s = r["s"][slot, keys, rows]
                p = jnp.exp2(s if plan.bounded else s - new)
                if not plan.blocks.ones:
                    part = fold8(p, jnp.sum)
                    total = part if total is None else total + part
                part = product(r["v"][tile, :, keys], p.astype(r["v"].dtype), 1, 0)
                out = part if out is None else out + part
            r["acc"][:, rows] = r["acc"][:, rows] * shrink + out if not plan.bounded else r["acc"][:, rows] + out
            if not plan.blocks.ones:
                r["l"][:, rows] = r["l"][:, rows] * shrink + total if not plan.bounded else r["l"][:, rows] + total

    def ask(self, t, slot: int, then: Callable[[], None] = lambda: None, valid=True) -> None:
        """The scores of step `t` where `valid`, masked if its tile is partial; in one block of code with `then`."""

        def with_scores(masked: bool) -> None:
            self.scores(t, slot, masked)
            then()

        tile = self.tile(t)
        whole = (tile >= self.full) & (tile < self.full_end)
        if not (self.plan.low or self.plan.high):
            pl.when(valid)(lambda: with_scores(False))
        else:
            pl.when(whole & valid)(lambda: with_scores(False))
            pl.when(~whole & valid)(lambda: with_scores(True))

    def walk(self) -> None:
        """All tiles: two steps to a turn of the loop, so that slots are constants; the last asks for nothing more."""
        count = self.end - self.first

        def turn(u, carry):
            t = 2 * u
            self.ask(t + 1, 1, lambda: self.finish(t, 0))
            self.ask(t + 2, 0, lambda: self.finish(t + 1, 1), valid=t + 2 < count)
            return carry

        self.ask(0, 0, valid=count > 0)
        lax.fori_loop(0, count >> 1, turn, 0)
        for slot in (0, 1):
            pl.when((count > 0) & (count & 1 == 1 - slot))(lambda slot=slot: self.finish(count - 1, slot))

    def finish_rows(self) -> None:
        """Writes the output, gated, and the log-sum-exp."""
        r, plan = self.refs, self.plan
        width = r["o"].shape[1]
        if plan.blocks.ones:
            inner = r["acc"].shape[0] - ONES
            total = r["acc"][inner : inner + 1, :]
        else:
            total = r["l"][...].sum(0, keepdims=True)
        total = jnp.maximum(total, 1e-30)
        out = (r["acc"][:width, :] * (1 / total)).T
        if "raw" in r:
            r["raw"][...] = out.astype(r["raw"].dtype)
        if "gate" in r:
            # The logistic function: tanh is one operation of the unit that has it, exp and a division are two.
            out *= 0.5 + 0.5 * jnp.tanh(0.5 * r["gate"][...].astype(jnp.float32))
        r["o"][...] = out.astype(r["o"].dtype)
        lse = jnp.log2(total)
        r["lse"][...] = lse if plan.bounded else lse + r["m"][0:1, :]


def _kernel(plan: Plan, names: tuple[str, ...], tiles: Tiles, table, *refs) -> None:
    b, h, i = (pl.program_id(axis) for axis in range(3))
    refs = dict(zip(names, refs, strict=True))
    at = tiles.at(b, i)
    row_tile = RowTile(plan, refs, tuple(table[at + n] for n in range(4)))
    row_tile.begin(refs["sinks"][h] if "sinks" in refs else None)
    row_tile.walk()
    row_tile.finish_rows()


def run(
    plan: Plan,
    q_BHTd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSe: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    sinks_H: jax.Array | None,
    gate_BHTe: jax.Array | None,
    bias_BKS: jax.Array | None,
    heads_BN: jax.Array | None = None,
    *,
    keep: bool,
    out_dtype: Any,
    vmem: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """o [B, H, T, e], o before the gate where `keep` (else None) and the log-sum-exp in log2 units [B, H, T].

    T and S are whole tiles; `bounds` is None where every row sees all keys. `heads_BN` is the key head of each tile
    of packed rows, for which H is 1; None: query heads share key heads evenly.
    """
    blocks, (B, H, T, d), (K, S, e) = plan.blocks, q_BHTd.shape, v_BKSe.shape[1:]
    key_tiles = S // blocks.keys
    tiles, table = tile_table(bounds, blocks, T, S, H // K, heads_BN)
    height = e + ONES if blocks.ones else e
    v = jnp.pad(v_BKSe, ((0, 0),) * 3 + ((0, height - e),), constant_values=1)
    v = v.reshape(B, K, key_tiles, blocks.keys, height).swapaxes(3, 4)

    row = lambda width: pl.BlockSpec((None, None, blocks.rows, width), lambda b, h, i, *_: (b, h, i, 0))
    keys = lambda *shape: pl.BlockSpec(
        (None, None, *shape), lambda b, h, i, table: (b, tiles.key_head(b, h, i, table), *(0 for _ in shape))
    )
    slots = Slots()
    slots.input("q", q_BHTd, row(d))
    slots.input("k", k_BKSd, keys(S, d))
    slots.input("v", v, keys(key_tiles, height, blocks.keys))
    if bounds is not None:
        stacked = jnp.pad(jnp.stack(bounds, 1), ((0, 0), (0, 6), (0, 0)))
        spec = pl.BlockSpec((None, 8, blocks.rows), lambda b, h, i, *_: (b if stacked.shape[0] > 1 else 0, 0, i))
        slots.input("bounds", stacked, spec)
    if sinks_H is not None:
        slots.input("sinks", sinks_H.astype(jnp.float32) * LOG2E, pl.BlockSpec(memory_space=pltpu.SMEM))
    if gate_BHTe is not None:
        slots.input("gate", gate_BHTe, row(e))
    if bias_BKS is not None:
        tiled = (bias_BKS.astype(jnp.float32) * LOG2E).reshape(B, K, key_tiles, 1, blocks.keys)
        tiled = jnp.broadcast_to(tiled, (B, K, key_tiles, 8, blocks.keys))
        slots.input("bias", tiled, keys(key_tiles, 8, blocks.keys))
    slots.output("o", (B, H, T, e), out_dtype, row(e))
    if keep and gate_BHTe is not None:
        slots.output("raw", (B, H, T, e), out_dtype, row(e))
    lse_spec = pl.BlockSpec((None, None, 1, blocks.rows), lambda b, h, i, *_: (b, h, 0, i))
    slots.output("lse", (B, H, 1, T), jnp.float32, lse_spec)
    slots.scratch("qs", (blocks.rows, d), q_BHTd.dtype)
    slots.scratch("acc", (height, blocks.rows), jnp.float32)
    slots.scratch("s", (2, blocks.keys, blocks.rows), jnp.float32)
    if not plan.bounded:
        slots.scratch("m", (8, blocks.rows), jnp.float32)
        slots.scratch("top", (2, 8, blocks.rows), jnp.float32)
    if not blocks.ones:
        slots.scratch("l", (8, blocks.rows), jnp.float32)
    found = slots.call(
        functools.partial(_kernel, plan, slots.names(), tiles),
        table,
        grid=(B, H, T // blocks.rows),
        semantics=("parallel", "parallel", "arbitrary"),
        name="routed_forward" if tiles.packed else "flash_forward",
        vmem=vmem,
        interpret=interpret,
    )
    return found["o"], found.get("raw"), found["lse"][:, :, 0]
