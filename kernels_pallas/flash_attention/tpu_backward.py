"""The backward on TPU: one sweep of five products, with a probe of eight.

Scores are rows by keys. Row tiles are outside, key tiles inside; the gradients of a head's keys and values are
accumulated transposed, in float32, over all rows of all heads that read it, and turned when the last of them is done.

With a probe, `keep = 1 - (t - mean t)` and `c = do . v - sum p do . v`. The gradient of a logit is
`p (c keep - delta)`, that of a tilt `-p c`, and values take part with weights `p keep`. The sums of a row are known
before the sweep: `do` times the mean of values, and `delta = sum p c keep`, that is `do` times the output less it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention import tpu_pattern
from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.flash_attention.pattern import Pattern
from kernels_pallas.flash_attention.tpu_plan import (
    HIDDEN,
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

# Rows of the statistics, and places of their columns; the last two with a probe alone: sum p do . v, and 1 + mean t.
LSE, DELTA, MEAN_SLOPE, KEEP = range(4)
SUMS = "dk_sum", "dv_sum", "dbias_sum"
ROW_SUMS = "acc", "acc_probe"


class RowTile:
    """One row tile against its key tiles; the last of an interval as in the forward's."""

    def __init__(self, plan: Plan, refs: dict[str, Any], walk: Walk | PatternWalk):
        self.plan, self.refs, self.walked = plan, refs, walk
        blocks = plan.blocks
        self.row_parts = [slice(r, r + blocks.sub_rows) for r in range(0, blocks.rows, blocks.sub_rows)]
        self.key_parts = [slice(c, c + blocks.sub_keys) for c in range(0, blocks.keys, blocks.sub_keys)]

    def begin(self) -> None:
        """The row tile's queries, scaled, and its statistics and bounds as columns, over all lanes."""
        plan, r = self.plan, self.refs
        q = r["q"][...]
        r["qs"][...] = (q.astype(jnp.float32) * plan.fold).astype(q.dtype)
        r["q_t"][...], r["do_t"][...] = q.T, r["do"][...].T
        if "probe" in r:
            r["probe_t"][...] = r["probe"][...].T
        for name in ROW_SUMS:
            if name in r:
                r[name][...] = jnp.zeros_like(r[name])
        columns = r["statistics"][...].T
        for n in range(r["columns"].shape[0]):
            r["columns"][n] = jnp.broadcast_to(columns[:, n : n + 1], r["columns"].shape[1:])
        for name in ("bounds", "mask_bounds"):
            if name in r:
                r[f"{name}_t"][...] = r[name][...].T

    def ask(self, tile, rows: slice, keys: slice, masked: bool):
        """A block's logits in log2 units, what tanh was (with a cap, else None), `do . v`, and tilts (or None)."""
        plan, r = self.plan, self.refs
        at = self.at(tile, keys)
        logits = product(r["qs"][rows, :], r["k"][at, :], 1, 1)
        dp = product(r["do"][rows, :], r["v"][at, :], 1, 1)
        tilts = product(r["probe"][rows, :], r["k"][at, :], 1, 1) if "probe" in r else None
        tanh = None
        if plan.cap is not None:
            tanh = jnp.tanh(logits)
            logits = tanh * plan.cap
        if "bias" in r:
            logits += r["bias"][tile, 0:1, keys]
        if masked:
            logits = jnp.where(self.seen(tile, rows, keys), logits, HIDDEN)
        return logits, tanh, dp, tilts

    def seen(self, tile, rows: slice, keys: slice):
        """Which scores a row sees, [rows, keys]."""
        plan, r = self.plan, self.refs
        shape = plan.blocks.sub_rows, plan.blocks.sub_keys
        key = tile * plan.blocks.keys + keys.start + lax.broadcasted_iota(jnp.int32, shape, 1)
        if plan.pattern is not None:
            return tpu_pattern.seen(plan.pattern, r, key, tile, keys, rows, turned=False)
        bounds = r["bounds_t"]
        low, high = bounds[rows, 0:1] if plan.low else None, bounds[rows, 1:2] if plan.high else None
        return in_bounds(key, low, high)

    def at(self, tile, keys: slice):
        return pl.ds(
            pl.multiple_of(tile * self.plan.blocks.keys + keys.start, self.plan.blocks.sub_keys),
            self.plan.blocks.sub_keys,
        )

    def key_tile(self, tile, masked: bool, row_parts: list[slice]) -> None:
        """All gradients from one tile. The next block is asked for before one is finished."""
        plan, r = self.plan, self.refs
        blocks = [(rows, keys) for rows in row_parts for keys in self.key_parts]
        wide = lambda n, rows: jnp.tile(r["columns"][n, rows, :], (1, plan.blocks.sub_keys // 128))
        sums: dict[tuple[str, int], Any] = {}

        def add(name: str, at: slice, x) -> None:
            sums[name, at.start] = sums[name, at.start] + x if (name, at.start) in sums else x

        asked = self.ask(tile, *blocks[0], masked)
        for n, (rows, keys) in enumerate(blocks):
            logits, tanh, dp, tilts = asked
            if n + 1 < len(blocks):
                asked = self.ask(tile, *blocks[n + 1], masked)
            p = jnp.exp2(logits - wide(LSE, rows))
            if tilts is None:
                ds = p * (dp - wide(DELTA, rows))
            else:
                c, keep = dp - wide(MEAN_SLOPE, rows), wide(KEEP, rows) - tilts
                ds, less = p * (c * keep - wide(DELTA, rows)), (p * c).astype(r["k"].dtype)
                p *= keep
            if "bias" in r:
                add("dbias", keys, fold8(ds, jnp.sum))
            if tanh is not None:
                ds *= 1 - tanh * tanh
            dtype = r["k"].dtype
            p, ds = p.astype(dtype), ds.astype(dtype)
            add("dv", keys, product(r["do_t"][:, rows], p, 1, 0))
            dk = product(r["q_t"][:, rows], ds, 1, 0)
            if tilts is not None:
                dk = dk * plan.scale - product(r["probe_t"][:, rows], less, 1, 0)
                add("less_dprobe", rows, product(less, r["k"][self.at(tile, keys), :], 1, 0))
            add("dk", keys, dk)
            add("dq", rows, product(ds, r["k"][self.at(tile, keys), :], 1, 0))
        for keys in self.key_parts:
            for name in ("dv", "dk", "dbias"):
                if f"{name}_sum" in r:
                    r[f"{name}_sum"][tile, :, keys] += sums[name, keys.start]
        for rows in row_parts:
            r["acc"][rows, :] += sums["dq", rows.start]
            if "probe" in r:
                r["acc_probe"][rows, :] -= sums["less_dprobe", rows.start]

    def walk(self) -> None:
        """All tiles."""
        walked, parts = self.walked, self.row_parts

        def turn(t, carry):
            tile, whole = walked.tile(t), walked.whole(t)
            if not self.plan.masks:
                self.key_tile(tile, False, parts)
                return carry
            pl.when(whole)(lambda: self.key_tile(tile, False, parts))
            pl.when(~whole)(lambda: self.key_tile(tile, True, parts))
            return carry

        lax.fori_loop(0, walked.count, turn, 0)
        if self.plan.can_halve():
            pl.when(walked.halved == 1)(lambda: self.key_tile(walked.end, True, parts[len(parts) // 2 :]))


def _turned(plan: Plan, refs: dict[str, Any]) -> None:
    """What has been summed of keys and values, in their own order and dtype."""
    scale = 1.0 if "probe" in refs else plan.scale  # with a probe it is in the sums

    def turn(tile, carry):
        at = pl.ds(pl.multiple_of(tile * plan.blocks.keys, plan.blocks.keys), plan.blocks.keys)
        refs["dk"][at, :] = (refs["dk_sum"][tile] * scale).T.astype(refs["dk"].dtype)
        refs["dv"][at, :] = refs["dv_sum"][tile].T.astype(refs["dv"].dtype)
        return carry

    lax.fori_loop(0, refs["dk_sum"].shape[0], turn, 0)


def _kernel(plan: Plan, names: tuple[str, ...], tiles: Tiles, table, *refs) -> None:
    b, h, g, i = (pl.program_id(axis) for axis in range(4))
    refs = dict(zip(names, refs, strict=True))

    @pl.when(tiles.begins(b, i, table) if tiles.packed else (g == 0) & (i == 0))
    def _():
        for name in SUMS:
            if name in refs:
                refs[name][...] = jnp.zeros_like(refs[name])

    if plan.pattern is not None:
        walk = PatternWalk(table, plan.pattern.list_of(b, h * tiles.group + g, i, tiles.heads))
    else:
        at = tiles.at(b, i)
        walk = Walk(*(table[at + n] for n in range(tiles.numbers)), backwards=False)
    row_tile = RowTile(plan, refs, walk)
    row_tile.begin()
    row_tile.walk()
    refs["dq"][...] = (refs["acc"][...] * plan.scale).astype(refs["dq"].dtype)
    if "probe" in refs:
        refs["dprobe"][...] = refs["acc_probe"][...].astype(refs["dprobe"].dtype)
    done = tiles.ends(b, i, table) if tiles.packed else (g == tiles.group - 1) & (i == tiles.count - 1)
    pl.when(done)(lambda: _turned(plan, refs))


class Probe(NamedTuple):
    """Probes [B, H, T, d], and of each row, [B, H, T], `do` times the mean of values, and 1 more than the mean tilt."""

    probe: jax.Array
    mean_slope: jax.Array
    keep: jax.Array


class Gradients(NamedTuple):
    """Of q and the probe, [B, H, T, d]; of keys [B, K, S, d] and values [B, K, S, e], in their dtypes; of the bias
    [B, K, S], float32."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dbias: jax.Array | None
    dprobe: jax.Array | None


def run(
    plan: Plan,
    q_BHTd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSe: jax.Array,
    do_BHTe: jax.Array,
    lse2_BHT: jax.Array,
    delta_BHT: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    bias_BKS: jax.Array | None,
    heads_BN: jax.Array | None = None,
    probe: Probe | None = None,
    pattern: Pattern | None = None,
    *,
    out_dtype: Any,
    vmem: int,
    interpret: Any,
) -> Gradients:
    """All gradients, those of rows in `out_dtype`. With a probe there is no bias.

    T and S are whole tiles; `bounds` is None where every row sees all keys. The scale is in dq and dk. `heads_BN` as in
    `tpu_forward.run`, each head's tiles side by side; what is returned for a key head that has none means nothing.
    `pattern` as there.
    """
    blocks, (B, H, T, d), (K, S, e) = plan.blocks, q_BHTd.shape, v_BKSe.shape[1:]
    G, key_tiles = H // K, S // blocks.keys
    tiles, table = tile_table(plan, bounds, T, S, H, K, heads_BN, pattern)
    rows = [lse2_BHT, delta_BHT, *(() if probe is None else probe[1:])]
    statistics = jnp.pad(jnp.stack(rows, 2), ((0, 0), (0, 0), (0, 8 - len(rows)), (0, 0)))

    row = lambda width: pl.BlockSpec((None, None, blocks.rows, width), lambda b, h, g, i, *_: (b, h * G + g, i, 0))
    column = lambda width: pl.BlockSpec((None, None, width, blocks.rows), lambda b, h, g, i, *_: (b, h * G + g, 0, i))
    head = lambda b, h, i, table: tiles.key_head(b, h, i, table) if tiles.packed else h
    keys = lambda *shape: pl.BlockSpec(
        (None, None, *shape), lambda b, h, g, i, table: (b, head(b, h, i, table), *(0 for _ in shape))
    )
    slots = Slots()
    slots.input("q", q_BHTd, row(d))
    slots.input("k", k_BKSd, keys(S, d))
    slots.input("v", v_BKSe, keys(S, e))
    slots.input("do", do_BHTe, row(e))
    slots.input("statistics", statistics, column(8))
    mask_inputs(slots, plan, bounds, pattern, H, lambda b, h, g, i, *_: (b, h * G + g, i))
    slots.output("dq", (B, H, T, d), out_dtype, row(d))
    for name, width, dtype in (("dk", d, k_BKSd.dtype), ("dv", e, v_BKSe.dtype)):
        slots.output(name, (B, K, S, width), dtype, keys(S, width))
        slots.scratch(f"{name}_sum", (key_tiles, width, blocks.keys), jnp.float32)
    if bias_BKS is not None:
        tiled = (bias_BKS.astype(jnp.float32) * LOG2E).reshape(B, K, key_tiles, 1, blocks.keys)
        slots.input("bias", tiled, keys(key_tiles, 1, blocks.keys))
        slots.output("dbias_sum", (B, K, key_tiles, 8, blocks.keys), jnp.float32, keys(key_tiles, 8, blocks.keys))
    if probe is not None:
        slots.input("probe", probe.probe, row(d))
        slots.output("dprobe", (B, H, T, d), out_dtype, row(d))
    _scratch(slots, blocks.rows, len(rows))
    found = slots.call(
        functools.partial(_kernel, plan, slots.names(), tiles),
        table.reshape(-1),
        grid=(B, 1, 1, T // blocks.rows) if tiles.packed else (B, K, G, T // blocks.rows),
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        name=kernel_name(tiles, pattern, probe, "backward"),
        scope="flash_attention",
        checked=tiles.packed,
        vmem=vmem,
        interpret=interpret,
    )
    dbias = found["dbias_sum"].sum(3).reshape(B, K, S) if bias_BKS is not None else None
    return Gradients(found["dq"], found["dk"], found["dv"], dbias, found.get("dprobe"))


def _scratch(slots: Slots, rows: int, statistics: int) -> None:
    """What a row tile keeps: its arrays scaled or turned, its statistics as columns, and the sums of its gradients."""
    q, do = slots.inputs["q"][0], slots.inputs["do"][0]
    d, e = q.shape[3], do.shape[3]
    slots.scratch("qs", (rows, d), q.dtype)
    slots.scratch("q_t", (d, rows), q.dtype)
    slots.scratch("do_t", (e, rows), do.dtype)
    slots.scratch("columns", (statistics, rows, 128), jnp.float32)
    for name in ("bounds", "mask_bounds"):
        if name in slots.inputs:
            slots.scratch(f"{name}_t", (rows, slots.inputs[name][0].shape[-2]), jnp.int32)
    slots.scratch("acc", (rows, d), jnp.float32)
    if "probe" in slots.inputs:
        slots.scratch("probe_t", (d, rows), q.dtype)
        slots.scratch("acc_probe", (rows, d), jnp.float32)
