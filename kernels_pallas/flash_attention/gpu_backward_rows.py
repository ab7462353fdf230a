"""dq for Hopper, by blocks of rows that loop over the keys they see: always the same bits.

With `gpu_backward` without dq it is the deterministic form of the gradient, and that of heads wider than 128: seven
products in place of five. `wide`: both warpgroups make all scores of 64 rows, and each owns half of the width.

Shapes: as in `gpu_forward`.
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
from kernels_pallas.flash_attention.gpu_backward import HIDDEN
from kernels_pallas.hopper import COLUMNS, ROWS, by_column, by_row

_ROWS, _W = 64, gpu_forward.WARPGROUPS


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes: keys of a tile, tiles of keys in flight."""

    keys: int = 64
    stages: int = 2


def block_rows(wide: bool) -> int:
    """Rows of a block of threads."""
    return _ROWS if wide else _W * _ROWS


def backward_rows(
    device: hopper.Device,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    stats: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    bias: jax.Array | None,
    heads_BN: jax.Array | None,
    mask: gpu_pattern.Arrays | None = None,
    *,
    scale: float,
    soft_cap: float | None,
    blocks: Blocks,
    wide: bool,
) -> jax.Array:
    """dq. The arguments are those of `gpu_backward.backward`; the lists of a mask are those of `block_rows` rows."""
    (B, T, H, d), (S, K, e) = q.shape, v.shape[1:]
    packed = heads_BN is not None
    launch = _Rows(device, blocks, H // K, S, scale, soft_cap, d, e, q.dtype, wide, packed)
    run = device.kernel(
        gpu_forward.kernel_name("backward_rows", packed, mask),
        launch.body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=launch.scratch(bias is not None, mask),
        grid=(H, T // block_rows(wide), B),
        grid_names=("h", "i", "b"),
        num_threads=_W + 1,
        thread_name="wg",
    )
    tiles = None
    if bounds is not None and wide:
        first, full, full_end, end = jnp.moveaxis(masks.tile_ranges(*bounds, _ROWS, blocks.keys), -1, 0)
        own = [] if heads_BN is None else [gpu_forward.key_heads(heads_BN, first.shape[1])]
        tiles = jnp.stack([first, end, full, full_end, *own], -1).astype(jnp.int32)
    elif bounds is not None:
        tiles = gpu_forward.ranges(bounds, _ROWS, blocks.keys, heads_BN)
    return run(q, k, v, do, stats, *(bounds or (None, None)), tiles, bias, mask)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a launch's code is made from."""

    device: hopper.Device
    blocks: Blocks
    group: int
    keys: int
    scale: float
    soft_cap: float | None
    d: int
    e: int
    dtype: Any
    wide: bool
    packed: bool

    def scratch(self, biased: bool, mask: gpu_pattern.Arrays | None) -> dict[str, Any]:
        N, stages, count = self.blocks.keys, self.blocks.stages, 1 if self.wide else _W
        of_rows = None if mask is None else plgpu.SMEM((count, mask.bounds.shape[2], _ROWS), jnp.int32)
        of_tiles = 0 if mask is None else mask.copies
        return {
            "q_s": hopper.tiles((count, _ROWS, self.d), self.dtype),
            "do_s": hopper.tiles((count, _ROWS, self.e), self.dtype),
            "k_s": hopper.tiles((stages, N, self.d), self.dtype),
            "v_s": hopper.tiles((stages, N, self.e), self.dtype),
            "bias_s": plgpu.SMEM((stages, N), jnp.float32) if biased else None,
            "mask_rows_s": of_rows,
            **gpu_pattern.scratch(mask, stages, N, 1, count * _ROWS),
            "rows_here": hopper.barriers(count, 2 + (mask is not None)),
            "k_here": hopper.barriers(stages, 1 + biased + of_tiles),
            "v_here": hopper.barriers(stages),
            "k_free": hopper.barriers(stages, _W),
            "v_free": hopper.barriers(stages, _W),
            "meeting": hopper.barriers(1, _W) if self.wide else None,
        }

    def body(self, q, k, v, do, stats, starts, ends, tiles, bias, mask, dq, **scratch: Any) -> None:
        h, i, b, wg = (lax.axis_index(name) for name in ("h", "i", "b", "wg"))
        shared = lambda x: b if x is None or x.shape[0] > 1 else b & 0
        first, end = 0, self.keys // self.blocks.keys
        walk = None
        if mask is not None:  # what goes from `first` to `end` are places in the list
            i = mask.lists.shape[2] - 1 - i
            walk = gpu_pattern.Walk(mask, b, h, q.shape[2], i)
            first, end = h & 0, walk.count
        if tiles is not None:
            i = tiles.shape[1] - 1 - i  # as in the forward
            first, end = tiles[shared(tiles), i, 0], tiles[shared(tiles), i, 1]
        t = types.SimpleNamespace(
            q=q, k=k, v=v, do=do, stats=stats, starts=starts, ends=ends, tiles=tiles, bias=bias, mask=mask, dq=dq, h=h,
            i=i, b=b, wg=wg, walk=walk, first=first, end=end, row=shared(starts), **scratch,
        )  # fmt: skip
        t.slot = lambda j: lax.rem(j - first, self.blocks.stages)
        pl.when(wg < _W)(lambda: self.compute(t))
        pl.when(wg == _W)(lambda: self.copy(t))

    def copy(self, t: Any) -> None:
        """The third warpgroup: fills the rings of keys and values."""
        self.device.set_registers(hopper.REGISTERS[1], action="decrease")
        kh, N, stages = gpu_forward.key_head(t, self.group, self.packed), self.blocks.keys, self.blocks.stages

        @pl.loop(t.first, t.end)
        def _(j: jax.Array) -> None:
            number = j if t.walk is None else gpu_pattern.tile_of(t.walk.entry(j))
            at, keys = t.slot(j), pl.ds(number * N, N)
            for source, target, here, free in ((t.k, t.k_s, t.k_here, t.k_free), (t.v, t.v_s, t.v_here, t.v_free)):
                pl.when(j - t.first >= stages)(lambda free=free: plgpu.barrier_wait(free.at[at]))
                plgpu.copy_gmem_to_smem(source.at[t.b, keys, kh], target.at[at], here.at[at])
                if source is t.k and t.bias is not None:
                    bias = t.bias.at[t.b, kh if t.bias.shape[1] > 1 else kh & 0, keys]
                    plgpu.copy_gmem_to_smem(bias, t.bias_s.at[at], here.at[at])
                if source is t.k and t.walk is not None:
                    size = _ROWS * (1 if self.wide else _W)
                    rows = pl.ds(t.i * size, size)
                    gpu_pattern.fetch(t, t.h, t.q.shape[2], keys, pl.ds(number, 1), rows, at, here.at[at])

        @pl.loop(lax.max(t.first, t.end - stages), t.end)
        def _(j: jax.Array) -> None:
            plgpu.barrier_wait(t.k_free.at[t.slot(j)])
            plgpu.barrier_wait(t.v_free.at[t.slot(j)])

    def compute(self, t: Any) -> None:
        """A computing warpgroup."""
        device = self.device
        device.set_registers(hopper.REGISTERS[0], action="increase")
        place = t.wg * 0 if self.wide else t.wg
        mine = pl.ds(((1 if self.wide else _W) * t.i + place) * _ROWS, _ROWS)
        t.qs, t.dos, here = t.q_s.at[place], t.do_s.at[place], t.rows_here.at[place]

        @pl.when((t.wg == 0) | (not self.wide))
        def _() -> None:
            plgpu.copy_gmem_to_smem(t.q.at[t.b, mine, t.h], t.qs, here)
            plgpu.copy_gmem_to_smem(t.do.at[t.b, mine, t.h], t.dos, here)
            if t.walk is not None:
                bounds = t.mask.bounds.at[*gpu_pattern.own(t.mask.bounds, t.b, t.h, t.q.shape[2]), :, mine]
                plgpu.copy_gmem_to_smem(bounds, t.mask_rows_s.at[place], here)

        vector = lambda ref: device.load(ref, ROWS, optimized=False)
        t.lse, t.delta = (vector(t.stats.at[t.b, t.h, x, mine]) for x in (0, 1))
        if t.starts is not None:
            t.low, t.high = vector(t.starts.at[t.row, mine]), vector(t.ends.at[t.row, mine])
            batch = t.b if t.tiles.shape[0] > 1 else t.b & 0
            t.full, t.full_end = (t.tiles[batch, t.i, x + 2 * place] for x in (2, 3))
        plgpu.barrier_wait(here)
        width = self.d // 2 if self.wide else self.d
        acc = lax.fori_loop(t.first, t.end, lambda j, acc: self.step(t, j, acc, width), device.zeros(_ROWS, width))
        if self.wide:
            self.meet(t)  # neither reads q any more
        out = t.qs.at[:, pl.ds(t.wg * width, width)] if self.wide else t.qs
        out[...] = (acc * self.scale).astype(self.dtype)
        plgpu.commit_smem()
        if self.wide:
            self.meet(t)  # TMA does not take half the columns of a tile: the first stores all

        @pl.when((t.wg == 0) | (not self.wide))
        def _() -> None:
            plgpu.copy_smem_to_gmem(t.qs, t.dq.at[t.b, mine, t.h])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def meet(self, t: Any) -> None:
        plgpu.barrier_arrive(t.meeting)
        plgpu.barrier_wait(t.meeting)

    def step(self, t: Any, j: jax.Array, acc: jax.Array, width: int) -> jax.Array:
        """What a tile of keys adds to dq."""
        device, at = self.device, t.slot(j)
        entry = None if t.walk is None else t.walk.entry(j)
        plgpu.barrier_wait(t.k_here.at[at])
        plgpu.barrier_wait(t.v_here.at[at])
        ds = self.scores(t, j, at, entry)
        keys = t.k_s.at[at].at[:, pl.ds(t.wg * width, width)] if self.wide else t.k_s.at[at]
        acc = device.state(lambda acc: device.wgmma(acc, ds, keys))(device.start(acc))
        if t.bias is not None or t.walk is not None and t.mask.copies:
            plgpu.commit_smem()  # orders the plain reads before the copy that overwrites what was read
        plgpu.barrier_arrive(t.k_free.at[at])
        return acc

    def scores(self, t: Any, j: jax.Array, at: jax.Array, entry: Any) -> jax.Array:
        """The gradient of the product `q . k`, less the scale."""
        device, cap, N = self.device, self.soft_cap, self.blocks.keys
        shape, factor = (_ROWS, N), self.scale * LOG2E
        biased = t.bias is not None
        bias = lambda: by_column(device.load(t.bias_s.at[at], COLUMNS), shape)
        start = device.zeros(*shape) if cap is not None else by_row(t.lse, shape)
        if biased and cap is None:
            start = start + bias() * (1 / factor)
        if t.starts is not None:

            def hidden() -> jax.Array:
                column = device.iota(shape, 1)
                low, high = (by_row(x - j * N, shape) for x in (t.low, t.high))
                return jnp.where((column >= low) & (column < high), start, HIDDEN)

            start = lax.cond((j < t.full) | (j >= t.full_end), hidden, lambda: start)
        if t.walk is not None:
            place, load = t.wg * 0 if self.wide else t.wg, device.load

            def masked() -> jax.Array:
                key = device.iota(shape, 1) + gpu_pattern.tile_of(entry) * N
                of_row = lambda n: by_row(load(t.mask_rows_s.at[place, n], ROWS), shape)
                of_key = lambda n: by_column(load(t.mask_keys_s.at[at, n], COLUMNS), shape)
                of_word = lambda n: by_row(load(t.mask_words_s.at[at, 0, n, pl.ds(place * _ROWS, _ROWS)], ROWS), shape)
                return jnp.where(gpu_pattern.seen(t.mask, key, of_row, of_key, of_word), start, HIDDEN)

            start = lax.cond(gpu_pattern.is_full(entry), lambda: start, masked)

        def products(refs: Any) -> None:
            s, dp, slope = refs
            device.wgmma(s, t.qs, t.k_s.at[at].T)
            device.wgmma(dp, t.dos, t.v_s.at[at].T)
            s = device.read(s, 1)
            if cap is None:
                found = jnp.exp2(s * factor)
            else:
                capped = jnp.tanh(s * (self.scale / cap))
                logit = capped * (cap * LOG2E) + by_row(t.lse, shape)
                p = jnp.exp2(logit + bias() if biased else logit)
                found = jnp.where(s > HIDDEN / 2, p * (1.0 - capped * capped), 0.0)
            slope[...] = lax.optimization_barrier(found)

        states = device.start(start), device.start(by_row(t.delta, shape)), device.zeros(*shape)
        _, dp, slope = device.state(products)(states)
        plgpu.barrier_arrive(t.v_free.at[at])
        return (slope * dp).astype(self.dtype)
