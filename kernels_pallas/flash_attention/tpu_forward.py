"""The forward on TPU.

Scores are transposed, keys by rows, so that maxima and sums over keys are plain operations on registers and the
statistics of a row take one lane. Keys and values of a head stay in fast memory. A row tile walks its key tiles from
the last to the first in steps that ask for the scores of one tile while they finish the one before: nothing in a step
waits for anything else in it. Only partial tiles are masked, as their scores are made. Logits are in log2 units, their
scale folded into q.

With a probe r for each row, tilts `t = r . k` beside the logits, what leaves is `sum p (1 - (t - mean t)) v`, its mean
of values and of tilts too. The mean tilt is not known before the last tile, so values are summed twice, with weights p
and p t; t is taken from its mean over what the row sees of the tile, so that rounding p t does not lose what tilts
have in common. The matrix unit sums both weights, rounded as they are for values: those of a row then add up to 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention import tpu_pattern
from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.flash_attention.pattern import Pattern
from kernels_pallas.flash_attention.tpu_plan import (
    HIDDEN,
    LOWEST,
    PatternWalk,
    Plan,
    Tiles,
    Walk,
    fold8,
    in_bounds,
    kernel_name,
    mask_inputs,
    tile_table,
)
from kernels_pallas.mosaic import Slots, product

ONES = 16  # rows of ones under v^T: what bfloat16 tiles are made of
SUMS = "acc", "acc_tilted"  # of values by weights, and by weights times tilts


class RowTile:
    """One row tile's walk over its key tiles, of an interval from the last to the first. Slots 0 and 1 hold scores.

    Where only the second half of its rows sees the last tile, as under a causal mask, that tile is computed for them
    alone (`halved`), before the others. What opens a row tile is in one block of code with the first scores, what
    closes it with the last values.
    """

    def __init__(self, plan: Plan, refs: dict[str, Any], walk: Walk | PatternWalk, sink):
        self.plan, self.refs, self.sink, self.walked = plan, refs, sink, walk
        blocks = plan.blocks
        self.row_parts = [slice(r, r + blocks.sub_rows) for r in range(0, blocks.rows, blocks.sub_rows)]
        self.key_parts = [slice(c, c + blocks.sub_keys) for c in range(0, blocks.keys, blocks.sub_keys)]
        self.second_half = self.row_parts[len(self.row_parts) // 2 :]

    def begin(self, rows: slice) -> None:
        """Statistics of no keys; a sink is a key whose value is 0."""
        plan, r = self.plan, self.refs
        q = r["q"][rows, :]
        r["qs"][rows, :] = (q.astype(jnp.float32) * plan.fold).astype(q.dtype)
        for name in SUMS:
            if name in r:
                r[name][:, rows] = jnp.zeros((r[name].shape[0], plan.blocks.sub_rows), jnp.float32)
        total = jnp.zeros((8, plan.blocks.sub_rows), jnp.float32)
        top = jnp.full_like(total, LOWEST)
        if self.sink is not None:
            top = jnp.full_like(total, jnp.maximum(self.sink, LOWEST))
            total = jnp.exp2(jnp.full_like(total, self.sink) - top)
        if not plan.bounded:
            r["m"][:, rows] = top
        if plan.blocks.ones:
            width = r["acc"].shape[0] - ONES
            r["acc"][width : width + 8, rows] = total
        else:  # eight partial sums, the sink in one of them
            r["l"][:, rows] = jnp.where(lax.broadcasted_iota(jnp.int32, total.shape, 0) == 0, total, 0.0)

    def bounds(self, rows: slice):
        """Lower and upper, [1, rows]; None where rows have none."""
        bounds, plan = self.refs["bounds"], self.plan
        return bounds[0:1, rows] if plan.low else None, bounds[1:2, rows] if plan.high else None

    def seen(self, tile, keys: slice, rows: slice):
        """Which scores a row sees, [keys, rows]."""
        blocks = self.plan.blocks
        shape = blocks.sub_keys, blocks.sub_rows
        key = tile * blocks.keys + keys.start + lax.broadcasted_iota(jnp.int32, shape, 0)
        if self.plan.pattern is not None:
            return tpu_pattern.seen(self.plan.pattern, self.refs, key, tile, keys, rows, turned=True)
        return in_bounds(key, *self.bounds(rows))

    def tilts(self, tile, slot: int, rows: slice, masked: bool) -> None:
        """Asks for the tilts of a tile, and for their mean over what a row sees of it."""
        r, blocks = self.refs, self.plan.blocks
        total = None
        for keys in self.key_parts:
            t = product(r["k"][self.at(tile, keys), :], r["probe"][rows, :], 1, 1)
            if masked:
                t = jnp.where(self.seen(tile, keys, rows), t, 0.0)
            r["t"][slot, keys, rows] = t
            part = fold8(t, jnp.sum)
            total = part if total is None else total + part
        share = 1 / blocks.keys
        if masked:
            low, high = self.bounds(rows)
            start, end = tile * blocks.keys, (tile + 1) * blocks.keys
            end = end if high is None else jnp.minimum(high, end)
            count = end - (start if low is None else jnp.maximum(low, start))
            share = 1 / jnp.maximum(count, 1).astype(jnp.float32)
        r["t_mean"][slot, :, rows] = jnp.broadcast_to(total.sum(0, keepdims=True) * share, total.shape)

    def at(self, tile, keys: slice):
        """Where those keys of a tile are."""
        blocks = self.plan.blocks
        return pl.ds(pl.multiple_of(tile * blocks.keys + keys.start, blocks.sub_keys), blocks.sub_keys)

    def scores(self, tile, slot: int, masked: bool, row_parts: list[slice], opens: bool) -> None:
        """Asks for the scores of a tile, and their maxima by registers."""
        plan, r = self.plan, self.refs
        for rows in row_parts:
            if opens:
                self.begin(rows)
            top = None
            for keys in self.key_parts:
                s = product(r["k"][self.at(tile, keys), :], r["qs"][rows, :], 1, 1)
                if plan.cap is not None:
                    s = jnp.tanh(s) * plan.cap
                if "bias" in r:
                    s += r["bias"][tile, :, keys].T[:, 0:1]
                if masked:
                    s = jnp.where(self.seen(tile, keys, rows), s, HIDDEN)
                r["s"][slot, keys, rows] = s
                if not plan.bounded:
                    part = fold8(s, jnp.max)
                    top = part if top is None else jnp.maximum(top, part)
            if not plan.bounded:
                r["top"][slot, :, rows] = top
            if "probe" in r:
                self.tilts(tile, slot, rows, masked)

    def finish(self, tile, slot: int, row_parts: list[slice], closes: bool = False) -> None:
        """Adds a tile's weighted values to the output; where it closes, the output is written."""
        plan, r = self.plan, self.refs
        closing: list[tuple] = []
        for rows in row_parts:
            acc, total, new = r["acc"][:, rows], None if plan.blocks.ones else r["l"][:, rows], None
            tilted = r["acc_tilted"][:, rows] if "probe" in r else None
            if not plan.bounded:
                old = r["m"][0:1, rows]
                new = jnp.maximum(old, r["top"][slot, :, rows].max(0, keepdims=True))
                shrink = jnp.exp2(old - new)
                acc, total, tilted = (None if x is None else x * shrink for x in (acc, total, tilted))
            for keys in self.key_parts:
                s = r["s"][slot, keys, rows]
                p = jnp.exp2(s if plan.bounded else s - new)
                if total is not None:
                    total += fold8(p, jnp.sum)
                values = r["v"][tile, :, keys]
                more = product(values, p.astype(values.dtype), 1, 0)
                acc += more
                if tilted is not None:
                    mean = r["t_mean"][slot, 0:1, rows]
                    tilts = r["t"][slot, keys, rows] - mean
                    tilted += product(values, (p * tilts).astype(values.dtype), 1, 0) + more * mean
            if closes:  # when all parts' products have been asked for
                closing.append((rows, acc, total, new, tilted))
                continue
            r["acc"][:, rows] = acc
            if tilted is not None:
                r["acc_tilted"][:, rows] = tilted
            if total is not None:
                r["l"][:, rows] = total
            if new is not None:
                r["m"][:, rows] = jnp.broadcast_to(new, (8, plan.blocks.sub_rows))
        for part in closing:
            self.write(*part)

    def write(self, rows: slice, acc, total, top, tilted=None) -> None:
        """Writes the output of some rows, gated, and their log-sum-exp; with a probe also what it is made of."""
        r = self.refs
        if total is None:
            inner = acc.shape[0] - ONES
            total = acc[inner : inner + 1, :]
        else:
            total = total.sum(0, keepdims=True)
        total = jnp.maximum(total, 1e-30)
        if tilted is not None:
            inner, wide = acc.shape[0] - ONES, r["o"].shape[1]
            mean_tilt = tilted[inner : inner + 1, :] / total
            r["mean_tilt"][:, rows] = mean_tilt
            r["mean"][rows, :] = (acc[:wide, :] * (1.0 / total)).astype(r["mean"].dtype).T
            acc = acc * (1 + mean_tilt) - tilted
        gated = "gate" in r
        out = (acc[: r["o"].shape[1], :] * ((0.5 if gated else 1.0) / total)).astype(r["o"].dtype).T
        if gated:  # the logistic function by tanh, one operation of the unit where exp and a division are two
            out = out.astype(jnp.float32)
            out += out * jnp.tanh(0.5 * r["gate"][rows, :].astype(jnp.float32))
        r["o"][rows, :] = out.astype(r["o"].dtype)
        lse = jnp.log2(total)
        r["lse"][:, rows] = lse if top is None else lse + top

    def ask(self, t, slot: int, then: Callable[[], None] | None = None, valid=True) -> None:
        """The scores of tile `t` where `valid`, masked if it is partial; in one block of code with `then`.

        Without `then` they are the first, and open the row tile.
        """
        tile, whole = self.walked.tile(t), self.walked.whole(t)

        def block(masked: bool) -> None:
            self.scores(tile, slot, masked, self.row_parts, opens=then is None)
            if then is not None:
                then()

        if not self.plan.masks:
            pl.when(valid)(lambda: block(False))
        else:
            pl.when(whole & valid)(lambda: block(False))
            pl.when(~whole & valid)(lambda: block(True))

    def walk(self) -> None:
        """All tiles: two steps to a turn of the loop, so that slots are constants; the last asks for nothing more."""
        count = self.walked.count
        finish = lambda t, slot, closes=False: self.finish(self.walked.tile(t), slot, self.row_parts, closes)

        def turn(u, carry):
            t = 2 * u
            self.ask(t + 1, 1, lambda: finish(t, 0))
            self.ask(t + 2, 0, lambda: finish(t + 1, 1), valid=t + 2 < count)
            return carry

        cold = count > 0
        if self.plan.can_halve():
            pl.when(self.walked.halved == 1)(self.open_halved)
            cold &= self.walked.halved == 0
        self.ask(0, 0, valid=cold)
        lax.fori_loop(0, count >> 1, turn, 0)
        for slot in (0, 1):
            pl.when((count > 0) & (count & 1 == 1 - slot))(lambda slot=slot: finish(count - 1, slot, True))
        pl.when(count == 0)(self.nothing)

    def open_halved(self) -> None:
        """The tile that the second half of the rows sees alone, and the scores of the next, which is there."""
        end = self.walked.end
        self.scores(end, 1, True, self.second_half, opens=True)
        for rows in self.row_parts[: -len(self.second_half)]:
            self.begin(rows)
        self.scores(end - 1, 0, True, self.row_parts, opens=False)
        self.finish(end, 1, self.second_half)

    def nothing(self) -> None:
        """The output of rows that see no tile."""
        r = self.refs
        for rows in self.row_parts:
            self.begin(rows)
            total = None if self.plan.blocks.ones else r["l"][:, rows]
            sums = [r[name][:, rows] if name in r else None for name in SUMS]
            self.write(rows, sums[0], total, None if self.plan.bounded else r["m"][0:1, rows], sums[1])


def _kernel(plan: Plan, names: tuple[str, ...], tiles: Tiles, table, *refs) -> None:
    b, h, i = (pl.program_id(axis) for axis in range(3))
    refs = dict(zip(names, refs, strict=True))
    sink = refs["sinks"][h] if "sinks" in refs else None
    if plan.pattern is not None:
        walk = PatternWalk(table, plan.pattern.list_of(b, h, i, tiles.heads))
    else:
        at = tiles.at(b, i)
        walk = Walk(*(table[at + n] for n in range(tiles.numbers)), backwards=True)
    RowTile(plan, refs, walk, sink).walk()


class Output(NamedTuple):
    """Of `run`: o [B, H, T, e] and the log-sum-exp in log2 units [B, H, T]; with a probe the means of values, like o,
    and of tilts [B, H, T]."""

    o: jax.Array
    lse2: jax.Array
    mean: jax.Array | None
    mean_tilt: jax.Array | None


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
    probe_BHTd: jax.Array | None = None,
    pattern: Pattern | None = None,
    *,
    out_dtype: Any,
    vmem: int,
    interpret: Any,
) -> Output:
    """Attention of whole row tiles over whole key tiles.

    `bounds` is None where every row sees all keys. `heads_BN` is the key head of each tile of packed rows, for which H
    is 1; None: query heads share key heads evenly. `probe_BHTd` is like q; with it there are neither sinks nor a bias,
    and `plan.blocks.ones` is so. `pattern`, of as many rows and keys, is that of `plan.pattern`, and then all the mask.
    """
    blocks, (B, H, T, d), (K, S, e) = plan.blocks, q_BHTd.shape, v_BKSe.shape[1:]
    key_tiles = S // blocks.keys
    tiles, table = tile_table(plan, bounds, T, S, H, K, heads_BN, pattern)
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
    mask_inputs(slots, plan, bounds, pattern, H, lambda b, h, i, *_: (b, h, i))
    if sinks_H is not None:
        slots.input("sinks", sinks_H.astype(jnp.float32) * LOG2E, pl.BlockSpec(memory_space=pltpu.SMEM))
    if gate_BHTe is not None:
        slots.input("gate", gate_BHTe, row(e))
    if bias_BKS is not None:
        tiled = (bias_BKS.astype(jnp.float32) * LOG2E).reshape(B, K, key_tiles, 1, blocks.keys)
        tiled = jnp.broadcast_to(tiled, (B, K, key_tiles, 8, blocks.keys))
        slots.input("bias", tiled, keys(key_tiles, 8, blocks.keys))
    slots.output("o", (B, H, T, e), out_dtype, row(e))
    lse_spec = pl.BlockSpec((None, None, 1, blocks.rows), lambda b, h, i, *_: (b, h, 0, i))
    slots.output("lse", (B, H, 1, T), jnp.float32, lse_spec)
    if probe_BHTd is not None:
        slots.input("probe", probe_BHTd, row(d))
        slots.output("mean", (B, H, T, e), out_dtype, row(e))
        slots.output("mean_tilt", (B, H, 1, T), jnp.float32, lse_spec)
    _scratch(slots, plan, height, d)
    found = slots.call(
        functools.partial(_kernel, plan, slots.names(), tiles),
        table.reshape(-1),
        grid=(B, H, T // blocks.rows),
        semantics=("parallel", "parallel", "arbitrary"),
        name=kernel_name(tiles, pattern, probe_BHTd, "forward"),
        scope="flash_attention",
        checked=tiles.packed,
        vmem=vmem,
        interpret=interpret,
    )
    mean_tilt = found["mean_tilt"][:, :, 0] if probe_BHTd is not None else None
    return Output(found["o"], found["lse"][:, :, 0], found.get("mean"), mean_tilt)


def _scratch(slots: Slots, plan: Plan, height: int, width: int) -> None:
    """What a row tile keeps: its queries, sums of so many rows, and the scores of two key tiles."""
    blocks = plan.blocks
    slots.scratch("qs", (blocks.rows, width), slots.inputs["q"][0].dtype)
    slots.scratch("acc", (height, blocks.rows), jnp.float32)
    slots.scratch("s", (2, blocks.keys, blocks.rows), jnp.float32)
    if not plan.bounded:
        slots.scratch("m", (8, blocks.rows), jnp.float32)
        slots.scratch("top", (2, 8, blocks.rows), jnp.float32)
    if not blocks.ones:
        slots.scratch("l", (8, blocks.rows), jnp.float32)
    if "probe" in slots.inputs:
        slots.scratch("acc_tilted", (height, blocks.rows), jnp.float32)
        slots.scratch("t", (2, blocks.keys, blocks.rows), jnp.float32)
        slots.scratch("t_mean", (2, 8, blocks.rows), jnp.float32)
