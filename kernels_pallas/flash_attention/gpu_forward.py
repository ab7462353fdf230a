"""The forward kernel for Hopper: two warpgroups compute 64 rows each, a third copies keys and values to them.

A step has two products in flight, the scores of its own tile and the values of the tile before, and makes its softmax
under the second (Shah et al. 2024, arXiv:2407.08608). Compiled code decides whether that overlap is real; the comments
say which lines it hangs on.

Packed rows (H is 1) read one key head a block of W R rows, which the block's table names; blocks whose rows see nothing
end before they start.

Shapes: B batch, T rows, H query heads, S keys, K key heads, d and e widths; W = 2 warpgroups of R rows, N keys of a
tile. T is a multiple of W R, S of N.
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
from kernels_pallas.flash_attention import gpu_pattern
from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.hopper import COLUMNS, LAYOUT, ROWS, by_column, by_row

WARPGROUPS = 2
# The first maximum of a row, in log2 units, and what a hidden score becomes: so far below that a row without keys needs
# no guard, its weights are exp2(-3e38 + 1e30) = 0.
_LOWEST, HIDDEN = -1e30, -3e38


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes: rows of a warpgroup, keys of a tile, tiles of keys in flight.

    pingpong: whether the warpgroups take turns at the tensor cores.
    """

    rows: int = 64
    keys: int = 128
    stages: int = 2
    pingpong: bool = False


def softmax_step(s, bias, highest, total, *, scale: float, soft_cap: float | None, keep=None, hide=lambda s: s):
    """One tile [R, N] of scores for rows with a running maximum and sum [R], in log2 units.

    Args:
      s: `q . k`.
      bias: log2 units, of the shape of s, or None.
      keep: which scores are not hidden; None: all.
      hide: puts `HIDDEN` for scores that are hidden, before they are scaled.

    Returns:
      weights, the new maximum and sum, and by what the old weights are to be scaled.
    """
    if soft_cap is not None:
        s, scale = jnp.tanh(s * (scale / soft_cap)), soft_cap
    scale = scale * LOG2E
    if bias is not None:
        s, scale = s * scale + bias, 1.0
    if keep is not None:
        s, scale = jnp.where(keep, s * scale, HIDDEN), 1.0
    s = hide(s)
    new = jnp.maximum(highest, s.max(axis=1) * scale)
    decay = jnp.exp2(highest - new)
    weights = jnp.exp2(s * scale - by_row(new, s.shape))
    return weights, new, total * decay + weights.sum(axis=1), decay


def ranges(bounds: tuple[jax.Array, jax.Array], rows: int, keys: int, heads_BN: jax.Array | None = None) -> jax.Array:
    """For each block of W x `rows` rows its tiles of keys, [B, blocks, 2 + 2 W]: (first, end), then (full, full_end) of
    each warpgroup.

    Never empty, as a ring of tiles that nobody fills would be waited for, but for packed rows: there the key head comes
    last, and blocks without tiles are left out.
    """
    block = masks.tile_ranges(*bounds, WARPGROUPS * rows, keys)
    first, end = block[..., 0], block[..., 3]
    if heads_BN is None:
        end = jnp.maximum(end, first + 1)
    own = masks.tile_ranges(*bounds, rows, keys).reshape(*first.shape, WARPGROUPS, 4)
    full = jnp.clip(own[..., 1], first[..., None], end[..., None])
    full_end = jnp.clip(own[..., 2], full, end[..., None])
    parts = jnp.stack([full, full_end], -1).reshape(*first.shape, 2 * WARPGROUPS)
    found = [first[..., None], end[..., None], parts]
    if heads_BN is not None:
        found.append(key_heads(heads_BN, first.shape[1])[..., None])
    return jnp.concatenate(found, -1).astype(jnp.int32)


def key_heads(heads_BN: jax.Array, blocks: int) -> jax.Array:
    """The key head of each of so many blocks of packed rows, [B, blocks], from those of tiles of whole blocks."""
    return jnp.repeat(heads_BN, blocks // heads_BN.shape[1], axis=1)


def forward(
    device: hopper.Device,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    sinks: jax.Array | None,
    gate: jax.Array | None,
    bias: jax.Array | None,
    heads_BN: jax.Array | None,
    mask: gpu_pattern.Arrays | None = None,
    *,
    scale: float,
    soft_cap: float | None,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, e] and the log-sum-exp [B, H, T] in log2 units.

    bounds: starts and ends [B or 1, T]. bias: [B, K or 1, S] float32, log2 units. sinks: [H] float32, log2 units.
    heads_BN: see `gradient`; with it there are bounds, and nothing is written for blocks whose rows see nothing.
    mask: with lists of the tiles of W R rows; there are then no bounds, and N is that of the tiles.
    """
    (B, T, H, d), (S, K, e) = q.shape, v.shape[1:]
    packed = heads_BN is not None
    launch = _Forward(device, blocks, H // K, S, scale, soft_cap, d, e, q.dtype, packed)
    o = jax.ShapeDtypeStruct((B, T, H, e), q.dtype)
    lse = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    run = device.kernel(
        kernel_name("forward", packed, mask),
        launch.body,
        out_type=[o, lse],
        scratch_types=launch.scratch(gate is not None, bias is not None, mask),
        grid=(H, T // (WARPGROUPS * blocks.rows), B),
        grid_names=("h", "i", "b"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
    )
    tiles = None if bounds is None else ranges(bounds, blocks.rows, blocks.keys, heads_BN)
    starts, ends = bounds or (None, None)
    return run(q, k, v, starts, ends, tiles, sinks, gate, bias, mask)


def kernel_name(part: str, packed: bool, mask: Any) -> str:
    """What a kernel is called in programs and profiles."""
    return f"{'routed' if packed else 'flash' if mask is None else 'masked'}_{part}"


def key_head(t: Any, group: int, packed: bool) -> jax.Array:
    """Of the block of rows that `t` describes."""
    if packed:
        return t.tiles[t.b if t.tiles.shape[0] > 1 else t.b & 0, t.i, t.tiles.shape[2] - 1]
    return lax.div(t.h, jnp.int32(group))


@dataclasses.dataclass(frozen=True)
class _Forward:
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
    packed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.rows, self.blocks.keys

    @property
    def own_gate(self) -> bool:
        """Whether the gate has memory of its own; else it takes that of the output."""
        return max(self.d, self.e) <= 128

    def scratch(self, gated: bool, biased: bool, mask: gpu_pattern.Arrays | None) -> dict[str, Any]:
        (R, N), stages, W = self.shape, self.blocks.stages, WARPGROUPS
        of_rows = None if mask is None else plgpu.SMEM((W, mask.bounds.shape[2], R), jnp.int32)
        of_tiles = 0 if mask is None else mask.copies
        ring = lambda arrivals=1: hopper.barriers(stages, arrivals)
        return {
            "q_s": hopper.tiles((W, R, self.d), self.dtype),
            "k_s": hopper.tiles((stages, N, self.d), self.dtype),
            "v_s": hopper.tiles((stages, N, self.e), self.dtype),
            "o_s": None if self.d == self.e else hopper.tiles((W, R, self.e), self.dtype),
            "gate_s": hopper.tiles((W, R, self.e), self.dtype) if gated and self.own_gate else None,
            "bias_s": plgpu.SMEM((stages, N), jnp.float32) if biased else None,
            "lse_s": plgpu.SMEM((W, R), jnp.float32),
            "mask_rows_s": of_rows,
            **gpu_pattern.scratch(mask, stages, N, 1, W * R),
            "q_here": hopper.barriers(W, 1 + (mask is not None)),
            "k_here": ring(1 + biased + of_tiles),
            "v_here": ring(),
            "k_free": ring(W),
            "v_free": ring(W),
            "gate_here": hopper.barriers(W) if gated else None,
            "turns": hopper.barriers(1, W) if self.blocks.pingpong else None,
        }

    def body(self, q, k, v, starts, ends, tiles, sinks, gate, bias, mask, o, lse, **scratch: Any) -> None:
        h, i, b, wg = (lax.axis_index(name) for name in ("h", "i", "b", "wg"))
        shared = lambda x, b=b: b if x is None or x.shape[0] > 1 else b & 0
        walk = None
        if mask is not None:  # what goes from `first` to `end` are places in the list
            i = mask.lists.shape[2] - 1 - i
            walk = gpu_pattern.Walk(mask, b, h, q.shape[2], i)
            first, end = h & 0, walk.count
        elif tiles is None:
            first, end = 0, self.keys // self.blocks.keys
        else:
            i = tiles.shape[1] - 1 - i  # of a causal mask the longest first, so that the last to begin end soon
            first, end = tiles[shared(tiles), i, 0], tiles[shared(tiles), i, 1]
        t = types.SimpleNamespace(
            q=q, k=k, v=v, starts=starts, ends=ends, tiles=tiles, sinks=sinks, gate=gate, bias=bias, mask=mask, o=o,
            lse=lse, h=h, i=i, b=b, wg=wg, walk=walk, first=first, end=end, row=shared(starts), **scratch,
        )  # fmt: skip
        t.slot = lambda j: lax.rem(j - first, self.blocks.stages)

        def run() -> None:
            pl.when(wg < WARPGROUPS)(lambda: self.compute(t))
            pl.when(wg == WARPGROUPS)(lambda: self.copy(t))

        pl.when(end > first)(run) if self.packed else run()

    def copy(self, t: Any) -> None:
        """The third warpgroup: fills the rings of keys and values."""
        self.device.set_registers(hopper.REGISTERS[1], action="decrease")
        kh, N, stages = key_head(t, self.group, self.packed), self.blocks.keys, self.blocks.stages

        def tile(j: jax.Array, reused: bool) -> None:
            number = j if t.walk is None else gpu_pattern.tile_of(t.walk.entry(j))
            at, keys = t.slot(j), pl.ds(number * N, N)
            if reused:
                plgpu.barrier_wait(t.k_free.at[at])
            plgpu.copy_gmem_to_smem(t.k.at[t.b, keys, kh], t.k_s.at[at], t.k_here.at[at])
            if t.walk is not None:
                rows = pl.ds(t.i * WARPGROUPS * self.blocks.rows, WARPGROUPS * self.blocks.rows)
                gpu_pattern.fetch(t, t.h, t.q.shape[2], keys, pl.ds(number, 1), rows, at, t.k_here.at[at])
            if t.bias is not None:
                bias = t.bias.at[t.b, kh if t.bias.shape[1] > 1 else kh & 0, keys]
                plgpu.copy_gmem_to_smem(bias, t.bias_s.at[at], t.k_here.at[at])
            if reused:
                plgpu.barrier_wait(t.v_free.at[at])
            plgpu.copy_gmem_to_smem(t.v.at[t.b, keys, kh], t.v_s.at[at], t.v_here.at[at])

        filled = lax.min(t.first + stages, t.end)
        pl.loop(t.first, filled)(lambda j: tile(j, False))
        pl.loop(filled, t.end)(lambda j: tile(j, True))

        @pl.loop(lax.max(t.first, t.end - stages), t.end)  # costs nothing; the interpreter wants every arrival seen
        def _(j: jax.Array) -> None:
            plgpu.barrier_wait(t.k_free.at[t.slot(j)])
            plgpu.barrier_wait(t.v_free.at[t.slot(j)])

    def compute(self, t: Any) -> None:
        """A computing warpgroup: its R rows against the tiles from `first` to `end`."""
        device, R, W = self.device, self.blocks.rows, WARPGROUPS
        device.set_registers(hopper.REGISTERS[0], action="increase")
        t.mine = pl.ds((W * t.i + t.wg) * R, R)
        t.qs = t.q_s.at[t.wg]
        t.out = t.qs if t.o_s is None else t.o_s.at[t.wg]
        plgpu.copy_gmem_to_smem(t.q.at[t.b, t.mine, t.h], t.qs, t.q_here.at[t.wg])
        if t.walk is not None:
            bounds = t.mask.bounds.at[*gpu_pattern.own(t.mask.bounds, t.b, t.h, t.q.shape[2]), :, t.mine]
            plgpu.copy_gmem_to_smem(bounds, t.mask_rows_s.at[t.wg], t.q_here.at[t.wg])
        if t.gate is not None and self.own_gate:
            plgpu.copy_gmem_to_smem(t.gate.at[t.b, t.mine, t.h], t.gate_s.at[t.wg], t.gate_here.at[t.wg])
        highest, total = device.full(R, _LOWEST), device.full(R, 0.0)
        if t.sinks is not None:
            highest, total = device.full(R, 0.0) + t.sinks[t.h], device.full(R, 1.0)
        masked = t.starts is not None
        if masked:
            bound = lambda x: device.load(x.at[t.row, t.mine], ROWS, optimized=False)
            t.start_row, t.end_row = bound(t.starts), bound(t.ends)
            tile = t.tiles.at[t.b if t.tiles.shape[0] > 1 else t.b & 0, t.i]
            full, full_end = tile[2 + 2 * t.wg], tile[3 + 2 * t.wg]
        plgpu.barrier_wait(t.q_here.at[t.wg])
        carry = self.first_scores(t, highest, total, masked)
        run = lambda low, high, carry, masked: lax.fori_loop(low, high, lambda j, c: self.step(t, j, c, masked), carry)
        if masked:
            full = lax.max(full, t.first + 1)
            full_end = lax.max(full_end, full)
            carry = run(t.first + 1, full, carry, True)
            carry = run(full, full_end, carry, False)
            carry = run(full_end, t.end, carry, True)
        else:
            carry = run(t.first + 1, t.end, carry, False)
        self.finish(t, *carry)

    def turn(self, t: Any) -> None:
        if self.blocks.pingpong:
            plgpu.barrier_arrive(t.turns)
            plgpu.barrier_wait(t.turns)

    def softmax(
        self, t: Any, s: jax.Array, j: jax.Array, highest: jax.Array, total: jax.Array, masked: bool, entry: Any
    ) -> Any:
        keep = bias = None
        N = self.blocks.keys
        if masked:
            column = self.device.iota(self.shape, 1)
            low, high = (by_row(x - j * N, self.shape) for x in (t.start_row, t.end_row))
            keep = (column >= low) & (column < high)
        if t.bias is not None:
            bias = by_column(self.device.load(t.bias_s.at[t.slot(j)], COLUMNS), self.shape)
        hide = {} if t.walk is None else {"hide": lambda s: self.hide(t, s, j, entry)}
        return softmax_step(s, bias, highest, total, scale=self.scale, soft_cap=self.soft_cap, keep=keep, **hide)

    def hide(self, t: Any, s: jax.Array, j: jax.Array, entry: jax.Array) -> jax.Array:
        """The scores of a tile in a list, hidden ones `HIDDEN`."""
        at, (R, N), load = t.slot(j), self.shape, self.device.load

        def masked() -> jax.Array:
            key = self.device.iota(self.shape, 1) + gpu_pattern.tile_of(entry) * N
            of_row = lambda n: by_row(load(t.mask_rows_s.at[t.wg, n], ROWS), self.shape)
            of_key = lambda n: by_column(load(t.mask_keys_s.at[at, n], COLUMNS), self.shape)
            of_word = lambda n: by_row(load(t.mask_words_s.at[at, 0, n, pl.ds(t.wg * R, R)], ROWS), self.shape)
            return jnp.where(gpu_pattern.seen(t.mask, key, of_row, of_key, of_word), s, HIDDEN)

        return lax.cond(gpu_pattern.is_full(entry), lambda: s, masked)

    def late(self, t: Any) -> bool:
        """Whether what lies with a tile's keys is read after their product."""
        return t.bias is not None or t.walk is not None and t.mask.copies > 0

    def release_keys(self, t: Any, slot: jax.Array) -> None:
        if self.late(t):
            plgpu.commit_smem()  # orders the plain reads before the copy that overwrites what was read
        plgpu.barrier_arrive(t.k_free.at[slot])

    def first_scores(self, t: Any, highest: jax.Array, total: jax.Array, masked: bool) -> Any:
        """The weights of the first tile, nothing accumulated."""
        at = t.slot(t.first)
        entry = None if t.walk is None else t.walk.entry(t.first)
        plgpu.barrier_wait(t.k_here.at[at])

        if self.blocks.pingpong:
            pl.when(t.wg == 1)(lambda: self.turn(t))

        def product(s: Any) -> jax.Array:
            self.device.wgmma(s, t.qs, t.k_s.at[at].T)
            return self.device.read(s)

        s = self.device.scoped(product, self.shape)
        if not self.late(t):
            self.release_keys(t, at)
        weights, highest, total, _ = self.softmax(t, s, t.first, highest, total, masked, entry)
        if self.late(t):
            self.release_keys(t, at)
        acc = self.device.zeros(self.blocks.rows, self.e)
        return lax.optimization_barrier((acc, highest, total, weights.astype(self.dtype)))

    def step(self, t: Any, j: jax.Array, carry: Any, masked: bool) -> Any:
        """The scores of tile j, and the values of tile j - 1 by their weights, which the carry holds."""
        device = self.device
        acc, highest, total, weights = carry
        at, before = t.slot(j), t.slot(j - 1)
        entry = None if t.walk is None else t.walk.entry(j)  # asked for here, needed after the product
        # The minimum is 0, which no compiler knows: it would keep every operand's address in registers otherwise.
        q = t.q_s.at[t.wg + lax.min(j if entry is None else entry, 0)]
        plgpu.barrier_wait(t.k_here.at[at])
        plgpu.barrier_wait(t.v_here.at[before])
        self.turn(t)

        def products(refs: Any) -> None:
            acc, *new = refs

            def issue(s: Any) -> jax.Array:
                device.wgmma(s, q, t.k_s.at[at].T)
                device.wgmma(acc, weights, t.v_s.at[before])
                return device.read(s, 1)

            s = device.scoped(issue, self.shape)
            self.turn(t)
            if not self.late(t):
                self.release_keys(t, at)
            found = lax.optimization_barrier(self.softmax(t, s, j, highest, total, masked, entry))
            # A store that needs every exp2 keeps ptxas from sinking them below the wait for the second product.
            t.lse_s.at[t.wg][...] = found[2]
            if self.late(t):
                self.release_keys(t, at)
            for ref, x in zip(new, found):
                ref[...] = x

        empty = device.zeros(*self.shape)
        start = device.start(acc), empty, highest, total, highest
        acc, new_weights, highest, total, decay = device.state(products)(start)
        # Not before: while the product runs, its operand's registers must not be written.
        new_weights = lax.optimization_barrier(new_weights.astype(self.dtype))
        plgpu.barrier_arrive(t.v_free.at[before])
        return acc * by_row(decay, acc.shape), highest, total, new_weights

    def finish(self, t: Any, acc: jax.Array, highest: jax.Array, total: jax.Array, weights: jax.Array) -> None:
        """The last tile's values, then normalisation, the gate, and what is stored."""
        device, at = self.device, t.slot(t.end - 1)
        if self.blocks.pingpong:
            pl.when(t.wg == 0)(lambda: self.turn(t))
        plgpu.barrier_wait(t.v_here.at[at])
        acc = device.state(lambda acc: device.wgmma(acc, weights, t.v_s.at[at]))(device.start(acc))
        plgpu.barrier_arrive(t.v_free.at[at])
        acc = acc * by_row(1.0 / (total + 1e-30), acc.shape)  # not 1e-38, which is subnormal: flushed to 0
        t.lse_s.at[t.wg][...] = highest + jnp.log2(total)
        if t.gate is not None:
            acc = self.gated(t, acc)
        t.out[...] = acc.astype(self.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(t.out, t.o.at[t.b, t.mine, t.h])
        plgpu.copy_smem_to_gmem(t.lse_s.at[t.wg], t.lse.at[t.b, t.h, t.mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def gated(self, t: Any, acc: jax.Array) -> jax.Array:
        gate = t.gate_s.at[t.wg] if self.own_gate else t.out
        if not self.own_gate:
            plgpu.copy_gmem_to_smem(t.gate.at[t.b, t.mine, t.h], gate, t.gate_here.at[t.wg])
        plgpu.barrier_wait(t.gate_here.at[t.wg])
        return acc / (1.0 + jnp.exp2(self.device.load(gate, LAYOUT).astype(jnp.float32) * -LOG2E))
