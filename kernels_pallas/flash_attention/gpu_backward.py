"""The backward kernel for Hopper: a block owns keys, loops over the rows that see them, and makes dk, dv and dq.

Scores are transposed, [keys, rows], so that weights and their gradients are operands in registers. dq is added up in
float32 by TMA, in no fixed order; without it (`dq=None`) the kernel is the first half of the deterministic form, whose
other half is `gpu_backward_rows`. Where heads are wider than 128 (`wide`) both warpgroups make all scores of a block,
and each owns half of the width. Of packed rows a block goes through those tiles alone that read its key head.

Shapes: as in `gpu_forward`; M rows of a tile, N keys of a block, G = H / K.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, masks
from kernels_pallas.flash_attention import gpu_forward, gpu_pattern
from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.hopper import COLUMNS, ROWS, by_column, by_row

HIDDEN = -1e30  # what the accumulator of a hidden score starts at: exp2 of it is 0, whatever the product adds


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes: rows of a tile, keys of a block. Two tiles of rows are in flight."""

    rows: int = 64
    keys: int = 128


def statistics(lse2: jax.Array, delta: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    """[B, H, 2, T]: what the accumulators of the scores and of dp start at, of rows with this log-sum-exp and delta.

    With a cap, what the capped score starts at, in log2 units.
    """
    return jnp.stack([-lse2 if soft_cap is not None else lse2 * (-1 / (scale * LOG2E)), -delta], 2)


def row_ranges(
    bounds: tuple[jax.Array, jax.Array],
    blocks: Blocks,
    keys: int,
    heads: int = 1,
    heads_BN: jax.Array | None = None,
) -> jax.Array:
    """For each block of keys its tiles of rows, [B, blocks, 4]: (first, end), and (full, full_end) of the first run of
    tiles whose rows see all of it. Of packed rows for the blocks of each key head in turn, [B, K * blocks, 4]."""
    kinds = masks.tile_kinds(masks.tile_ranges(*bounds, blocks.rows, blocks.keys), keys // blocks.keys)
    kinds = kinds.swapaxes(1, 2)
    if heads_BN is not None:
        own = gpu_forward.key_heads(heads_BN, kinds.shape[2])[:, None] == jnp.arange(heads)[:, None]
        kinds = jnp.where(own[:, :, None], kinds[:, None], masks.EMPTY)  # [B, K, blocks, tiles]
        kinds = kinds.reshape(kinds.shape[0], -1, kinds.shape[3])
    met, whole = kinds != masks.EMPTY, kinds == masks.FULL
    count = met.shape[-1]
    i = jnp.arange(count)
    end = jnp.where(met, i + 1, 0).max(-1)
    first = jnp.minimum(jnp.where(met, i, count).min(-1), end)
    full = jnp.clip(jnp.where(whole, i, count).min(-1), first, end)
    gap = (i >= full[..., None]) & ~whole
    full_end = jnp.clip(jnp.where(gap, i, count).min(-1), full, end)
    return jnp.stack([first, end, full, full_end], -1).astype(jnp.int32)


def backward(
    device: hopper.Device,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    stats: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    bias: jax.Array | None,
    heads_BN: jax.Array | None,
    dq: Any,
    mask: gpu_pattern.Arrays | None = None,
    *,
    scale: float,
    soft_cap: float | None,
    blocks: Blocks,
    wide: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """dk, dv, and dbias [B, K, S] (None without a bias); adds to the Ref `dq`, float32, what is to be scaled.

    stats: from `statistics`. bias: [B, K or 1, S] float32, log2 units; its gradient
    is that of the logit. heads_BN: see `gradient`; with it there are bounds. mask: with lists of the tiles of M rows of
    each block of keys (`gpu_pattern.lists_of_keys`); there are then no bounds.
    """
    (B, T, H, d), (S, K, e) = q.shape, v.shape[1:]
    fused, packed = dq is not None, heads_BN is not None
    listed = mask is not None and gpu_pattern.many_heads(mask.layout.heads, H, K)
    group = 1 if packed or listed else H // K
    launch = _Backward(device, blocks, group, T, scale, soft_cap, d, e, q.dtype, fused, wide, packed)
    dbias = None if bias is None else jax.ShapeDtypeStruct((B, K, S), jnp.float32)
    options = dict(
        out_type=[*(jax.ShapeDtypeStruct(x.shape, q.dtype) for x in (k, v)), dbias],
        scratch_types=launch.scratch(bounds is not None, bias is not None, mask),
        grid=(S // blocks.keys, K, B),
        grid_names=("j", "h", "b"),
        num_threads=2,
        thread_name="wg",
    )
    name = gpu_forward.kernel_name("backward", packed, mask)
    if fused:
        run = device.kernel_into(dq, name, launch.body, **options)
    else:
        run = device.kernel(f"{name}_keys", launch.body, **options)
    tiles = None if bounds is None else row_ranges(bounds, blocks, S, K, heads_BN)
    intervals = None if bounds is None else jnp.stack(bounds, 1)
    return run(q, k, v, do, stats, intervals, tiles, bias, mask)


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What a launch's code is made from."""

    device: hopper.Device
    blocks: Blocks
    group: int
    length: int
    scale: float
    soft_cap: float | None
    d: int
    e: int
    dtype: Any
    fused: bool
    wide: bool
    packed: bool

    @property
    def own(self) -> tuple[int, int, int]:
        """Keys, and the widths of dk and dv, of a warpgroup."""
        if self.wide:
            return self.blocks.keys, self.d // 2, self.e // 2
        return self.blocks.keys // 2, self.d, self.e

    @property
    def shape(self) -> tuple[int, int]:
        return self.own[0], self.blocks.rows

    @property
    def dq_tile(self) -> tuple[int, int]:
        """Of dq that a warpgroup makes at once: 64 columns of all rows, or, in narrow heads, half of the rows."""
        return (self.blocks.rows, 64) if self.d >= 128 else (self.blocks.rows // 2, self.d)

    def scratch(self, masked: bool, biased: bool, mask: gpu_pattern.Arrays | None) -> dict[str, Any]:
        b, tiles, bars = self.blocks, hopper.tiles, hopper.barriers
        bounds, copies = 2, masked
        if mask is not None:
            masked, bounds, copies = True, mask.bounds.shape[2], 1 + mask.copies
        return {
            "k_s": tiles((b.keys, self.d), self.dtype),
            "v_s": tiles((b.keys, self.e), self.dtype),
            "q_s": tiles((2, b.rows, self.d), self.dtype),
            "do_s": tiles((2, b.rows, self.e), self.dtype),
            "stats_s": plgpu.SMEM((2, 2, b.rows), jnp.float32),
            "intervals_s": plgpu.SMEM((2, bounds, b.rows), jnp.int32) if masked else None,
            **gpu_pattern.scratch(mask, 2, b.keys, b.keys // gpu_pattern.TILE[1], b.rows),
            "ds_s": tiles((2, b.keys, b.rows), self.dtype) if self.fused else None,
            "dq_s": tiles((2, *self.dq_tile), jnp.float32) if self.fused else None,
            "dbias_s": plgpu.SMEM((2, self.own[0]), jnp.float32) if biased else None,
            "keys_here": bars(1 if self.wide else 2, 2),
            "rows_here": bars(2, 3 + copies),
            "meeting": bars(1, 2),
        }

    def body(self, q, k, v, do, stats, intervals, tiles, bias, mask, *rest: Any, **scratch: Any) -> None:
        dq, dk, dv, dbias = rest if self.fused else (None, *rest)
        j, h, b, wg = (lax.axis_index(name) for name in ("j", "h", "b", "wg"))
        shared = lambda x: b if x is None or x.shape[0] > 1 else b & 0
        first, end = 0, self.length // self.blocks.rows
        block = h * (k.shape[1] // self.blocks.keys) + j if self.packed else j
        walk = None
        if mask is not None:  # what goes from `first` to `end` are places in the list
            walk = gpu_pattern.Walk(mask, b, h, k.shape[2], j)
            first, end = h & 0, walk.count
        if tiles is not None:
            first, end = tiles[shared(tiles), block, 0], tiles[shared(tiles), block, 1]
        keys, part = self.own[0], pl.ds(wg * self.own[0], self.own[0])
        t = types.SimpleNamespace(
            q=q, k=k, v=v, do=do, stats=stats, intervals=intervals, tiles=tiles, bias=bias, mask=mask, dq=dq, dk=dk,
            dv=dv, dbias=dbias, block=block, h=h, b=b, wg=wg, walk=walk, first=first, end=end, row=shared(intervals),
            part=part, j=j, first_key=j * self.blocks.keys + (0 if self.wide else wg * keys), **scratch,
        )  # fmt: skip
        t.ks, t.vs = (t.k_s, t.v_s) if self.wide else (t.k_s.at[part], t.v_s.at[part])
        self.compute(t)

    def slot(self, t: Any, g: Any, i: Any) -> jax.Array:
        """Which of two places tile i of the group's g-th head has: that of an even or an odd number of tiles before."""
        return (g * (t.end - t.first) + i - t.first) & 1

    def fetch(self, t: Any, g: Any, i: jax.Array) -> None:
        """Copies tile i of the group's g-th head, with its statistics and intervals."""
        at, (number, head) = self.slot(t, g, i), self.tile_at(t, g, i)
        rows = pl.ds(number * self.blocks.rows, self.blocks.rows)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.rows_here.at[at])
        copy(t.q.at[t.b, rows, head], t.q_s)
        copy(t.stats.at[t.b, head, :, rows], t.stats_s)
        if t.intervals is not None:
            copy(t.intervals.at[t.row, :, rows], t.intervals_s)
        if t.walk is not None:
            heads, parts = t.q.shape[2], self.blocks.keys // gpu_pattern.TILE[1]
            copy(t.mask.bounds.at[*gpu_pattern.own(t.mask.bounds, t.b, head, heads), :, rows], t.intervals_s)
            keys, tiles = pl.ds(t.j * self.blocks.keys, self.blocks.keys), pl.ds(t.j * parts, parts)
            gpu_pattern.fetch(t, head, heads, keys, tiles, rows, at, t.rows_here.at[at])
        copy(t.do.at[t.b, rows, head], t.do_s)

    def tile_at(self, t: Any, g: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tile of rows, and the query head, that is i-th for the group's g-th head."""
        if t.walk is None:
            return i, g if self.packed else t.h * self.group + g
        entry = t.walk.entry(i)
        own = g if self.group > 1 else gpu_pattern.head_of(entry)
        return gpu_pattern.tile_of(entry), t.h * (t.q.shape[2] // t.k.shape[2]) + own

    def meet(self, t: Any) -> None:
        plgpu.barrier_arrive(t.meeting)
        plgpu.barrier_wait(t.meeting)

    def compute(self, t: Any) -> None:
        """A warpgroup."""
        keys, d, e = self.own
        here = t.keys_here.at[0 if self.wide else t.wg]

        @pl.when((t.wg == 0) | (not self.wide))
        def _() -> None:
            for source, target in ((t.k, t.ks), (t.v, t.vs)):
                plgpu.copy_gmem_to_smem(source.at[t.b, pl.ds(t.first_key, keys), t.h], target, here)

        pl.when((t.wg == 0) & (t.end > t.first))(lambda: self.fetch(t, jnp.int32(0), t.first))
        t.key_bias = None
        if t.bias is not None:
            row = t.bias.at[t.b, t.h if t.bias.shape[1] > 1 else t.h & 0, pl.ds(t.first_key, keys)]
            t.key_bias = self.device.load(row, ROWS, optimized=False)
        if t.tiles is not None:
            batch = t.b if t.tiles.shape[0] > 1 else t.b & 0
            t.full, t.full_end = t.tiles[batch, t.block, 2], t.tiles[batch, t.block, 3]
        plgpu.barrier_wait(here)
        if self.fused:
            self.meet(t)  # dq reads the other's keys too
        zeros = self.device.zeros
        carry = zeros(keys, d), zeros(keys, e), None if t.bias is None else self.device.full(keys, 0.0)
        head = lambda g, carry: lax.fori_loop(t.first, t.end, lambda i, c: self.tile(t, g, i, c), carry)
        self.finish(t, *lax.fori_loop(0, self.group, head, carry))

    def tile(self, t: Any, g: jax.Array, i: jax.Array, carry: Any) -> Any:
        dk, dv, dbias = carry
        start = self.device.start
        return self.device.state(lambda refs: self.step(t, g, i, *refs))((start(dk), start(dv), dbias))

    def step(self, t: Any, g: jax.Array, i: jax.Array, dk: Any, dv: Any, dbias: Any) -> None:
        """The products of a tile of rows with the block's keys: scores, dp, and what they add to dv, dk and dq."""
        device, at = self.device, self.slot(t, g, i)
        q, do = t.q_s.at[at], t.do_s.at[at]
        own = lambda x, width: x.at[:, pl.ds(t.wg * width, width)] if self.wide else x
        entry = None if t.walk is None else t.walk.entry(i)
        plgpu.barrier_wait(t.rows_here.at[at])
        dp, slope, weights = self.scores(t, i, at, q, do, entry)
        device.wgmma(dv, weights, own(do, self.own[2]))
        slope = slope.astype(jnp.float32) * dp
        if dbias is not None:
            grad = slope if self.soft_cap is None else weights.astype(jnp.float32) * dp
            dbias[...] = dbias[...] + grad.sum(axis=1)
        ds = slope.astype(self.dtype)
        if self.fused:
            shared = t.ds_s.at[at]  # one of two, so that one meeting a step is enough
            shared.at[t.part][...] = ds
            plgpu.commit_smem()
        plgpu.barrier_arrive(t.meeting)
        device.wgmma(dk, ds, own(q, self.own[1]))
        plgpu.barrier_wait(t.meeting)  # both are done with the tile before, and with ds
        last = (i + 1 == t.end).astype(jnp.int32)
        following = lambda: self.fetch(t, g + last, i + 1 - last * (t.end - t.first))
        pl.when((t.wg == 0) & (g + last < self.group))(following)
        if self.fused:
            self.add_dq(t, *self.tile_at(t, g, i), shared)
        else:
            device.wgmma_wait(0)
            plgpu.commit_smem()  # orders the plain reads of statistics and intervals before the next copy over them

    def scores(
        self, t: Any, i: jax.Array, at: jax.Array, q: Any, do: Any, entry: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """dp less delta, by what it makes the gradient of the product `k . q` (less the scale), and the weights."""
        device, shape, cap = self.device, self.shape, self.soft_cap
        factor = self.scale * LOG2E if cap is None else 1.0
        statistic = lambda x: by_column(device.load(t.stats_s.at[at, x], COLUMNS), shape)
        # Less the log-sum-exp, less delta, hidden: the accumulators start so, and nothing is left to do afterwards.
        start = statistic(0) if cap is None else device.zeros(*shape)
        if t.key_bias is not None and cap is None:
            start = start + by_row(t.key_bias * (1 / factor), shape)
        if t.intervals is not None:

            def hidden() -> jax.Array:
                key = device.iota(shape, 0)
                load = lambda x: device.load(t.intervals_s.at[at, x], COLUMNS)
                low, high = (by_column(load(x) - t.first_key, shape) for x in (0, 1))
                return jnp.where((key >= low) & (key < high), start, HIDDEN)

            start = lax.cond((i < t.full) | (i >= t.full_end), hidden, lambda: start)
        if t.walk is not None:

            def masked() -> jax.Array:
                key, load = device.iota(shape, 0) + t.first_key, device.load
                part = t.wg * 0 if self.wide else t.wg
                of_row = lambda n: by_column(load(t.intervals_s.at[at, n], COLUMNS), shape)
                of_key = lambda n: by_row(load(t.mask_keys_s.at[at, n, pl.ds(part * shape[0], shape[0])], ROWS), shape)
                of_word = lambda n: by_column(load(t.mask_words_s.at[at, part, n], COLUMNS), shape)
                return jnp.where(gpu_pattern.seen(t.mask, key, of_row, of_key, of_word), start, HIDDEN)

            start = lax.cond(gpu_pattern.is_full(entry), lambda: start, masked)

        keys, values = t.ks, t.vs
        if not self.wide and (t.tiles is not None or t.walk is not None):
            # The minimum is 0, which no compiler knows: it would keep every operand's address in registers otherwise.
            part = pl.ds((t.wg + lax.min(i if entry is None else entry, 0)) * shape[0], shape[0])
            keys, values = t.k_s.at[part], t.v_s.at[part]

        def products(refs: Any) -> None:
            s, dp, slope, weights = refs
            device.wgmma(s, keys, q.T)
            device.wgmma(dp, values, do.T)
            s = device.read(s, 1)
            if cap is None:
                p = jnp.exp2(s * factor)
                found = p.astype(self.dtype), p.astype(self.dtype)
            else:
                capped = jnp.tanh(s * (self.scale / cap))
                logit = capped * (cap * LOG2E) + statistic(0)
                p = jnp.exp2(logit if t.key_bias is None else logit + by_row(t.key_bias, shape))
                if t.intervals_s is not None:
                    p = jnp.where(s > HIDDEN / 2, p, 0.0)
                found = (p * (1.0 - capped * capped)).astype(self.dtype), p.astype(self.dtype)
            slope[...], weights[...] = lax.optimization_barrier(found)

        empty = device.zeros(*shape).astype(self.dtype)
        states = device.start(start), device.start(statistic(1)), empty, empty
        _, dp, slope, weights = device.state(products)(states)
        return dp, slope, weights

    def add_dq(self, t: Any, i: jax.Array, head: jax.Array, ds: Any) -> None:
        """This warpgroup's half of the tile's dq."""
        rows, width = self.dq_tile
        halves = self.d // 2 // width if self.d >= 128 else 1
        for part in range(halves):
            columns = pl.ds((t.wg * halves + part) * width, width)

            def product(acc: Any, columns: Any = columns) -> jax.Array:
                if self.d >= 128:
                    self.device.wgmma(acc, ds.T, t.k_s.at[:, columns])
                else:
                    self.device.wgmma(acc, ds.at[:, pl.ds(t.wg * rows, rows)].T, t.k_s)
                return self.device.read(acc)

            dq = self.device.scoped(product, (rows, width))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            t.dq_s.at[t.wg][...] = dq
            plgpu.commit_smem()
            if self.d >= 128:
                target = t.dq.at[t.b, pl.ds(i * rows, rows), head, columns]
            else:
                target = t.dq.at[t.b, pl.ds(i * self.blocks.rows + t.wg * rows, rows), head]
            self.device.add(t.dq_s.at[t.wg], target)

    def finish(self, t: Any, dk: jax.Array, dv: jax.Array, dbias: jax.Array | None) -> None:
        """Stores dk and dv, by way of the memory of k and v."""
        keys, d, e = self.own
        self.meet(t)  # neither reads k and v any more
        for grad, memory, width, factor in ((dk, t.ks, d, self.scale), (dv, t.vs, e, 1.0)):
            mine = memory.at[:, pl.ds(t.wg * width, width)] if self.wide else memory
            mine[...] = (grad * factor).astype(self.dtype)
        if dbias is not None:
            t.dbias_s.at[t.wg][...] = dbias
        plgpu.commit_smem()
        if self.wide:
            self.meet(t)  # TMA does not take half the columns of a tile: each warpgroup stores one whole result
        at = pl.ds(t.first_key, keys)
        for owner, (source, target) in enumerate(((t.ks, t.dk), (t.vs, t.dv))):
            store = lambda source=source, target=target: plgpu.copy_smem_to_gmem(source, target.at[t.b, at, t.h])
            pl.when(t.wg == owner)(store) if self.wide else store()
        if dbias is not None:
            store = lambda: plgpu.copy_smem_to_gmem(t.dbias_s.at[t.wg], t.dbias.at[t.b, t.h, at])
            pl.when(t.wg == 0)(store) if self.wide else store()
        plgpu.wait_smem_to_gmem(0)
