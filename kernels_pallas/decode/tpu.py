"""Attention over a cache on TPU.

A step of the grid is a block of slots of all key heads; their queries (T tokens of G heads) are the rows of its scores.
Heads do not wait for each other. Blocks that no query sees are behind the last that one does: they take a step of the
grid, and are not read.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import masks
from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.flash_attention.tpu_plan import HIDDEN, LOWEST, in_bounds
from kernels_pallas.mosaic import Slots, product

_ROWS = 16  # rows are padded to multiples of it


def run(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSe: jax.Array,
    bounds: tuple[jax.Array, jax.Array],
    *,
    scale: float,
    cap: float | None,
    block: int,
    splits: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Of each part of the slots o [P, B, T, H, e], float32, and the log-sum-exp in log2 units [P, B, T, H]."""
    (B, T, H, d), (K, S, e) = q_BTHd.shape, v_BKSe.shape[1:]
    G, blocks = H // K, -(-S // block)
    rows = -(-T * G // _ROWS) * _ROWS
    packed = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, rows - T * G), (0, 0)))
    q = packed(q_BTHd.reshape(B, T, K, G, d).swapaxes(1, 2).reshape(B, K, T * G, d))
    starts, ends = (jnp.pad(jnp.repeat(x, G, 1), ((0, 0), (0, rows - T * G))) for x in bounds)
    ranges = masks.tile_ranges(starts, ends, rows, block)[:, 0]
    batched = ranges.shape[0] > 1
    each = -(-blocks // splits)

    def slots_at(b, part, j, ranges):
        first, _, _, end = _range(ranges, b if batched else 0, part, splits)
        return b, 0, lax.max(lax.min(first + j, end - 1), 0), 0

    of_batch = lambda width: pl.BlockSpec((None, None, K, rows, width), lambda b, part, j, *_: (part, b, 0, 0, 0))
    slots = Slots()
    slots.input("q", q, pl.BlockSpec((None, K, rows, d), lambda b, part, j, *_: (b, 0, 0, 0)))
    slots.input("k", k_BKSd, pl.BlockSpec((None, K, block, d), slots_at))
    slots.input("v", v_BKSe, pl.BlockSpec((None, K, block, e), slots_at))
    columns = jnp.pad(jnp.stack([starts, ends], -1), ((0, 0), (0, 0), (0, 126)))
    bound_spec = pl.BlockSpec((None, rows, 128), lambda b, part, j, *_: (b if batched else 0, 0, 0))
    slots.input("bounds", columns, bound_spec)
    slots.output("o", (splits, B, K, rows, e), jnp.float32, of_batch(e))
    slots.output("lse", (splits, B, K, rows, 128), jnp.float32, of_batch(128))
    slots.scratch("qs", (K, rows, d), q.dtype)
    slots.scratch("m", (K, rows, 128), jnp.float32)
    slots.scratch("l", (K, rows, 128), jnp.float32)
    slots.scratch("acc", (K, rows, e), jnp.float32)
    fold = scale * LOG2E if cap is None else scale / cap
    found = slots.call(
        functools.partial(
            _kernel, slots.names(), block, each, splits, batched, fold, None if cap is None else cap * LOG2E
        ),
        ranges.reshape(-1),
        grid=(B, splits, each),
        semantics=("parallel", "parallel", "arbitrary"),
        name="decode_attention",
        scope="decode",
        checked=True,
        vmem=None,
        interpret=interpret,
    )
    plain = lambda x: x[:, :, :, : T * G].reshape(splits, B, K, T, G, -1).swapaxes(2, 3).reshape(splits, B, T, H, -1)
    return plain(found["o"]), plain(found["lse"][..., :1])[..., 0]


def _range(ranges, b, part, splits: int):
    """(first, full, full_end, end) of one part's blocks."""
    first, full, full_end, end = (ranges[4 * b + n] for n in range(4))
    if splits == 1:
        return first, full, full_end, end
    share = lax.div(end - first + (splits - 1), jnp.int32(splits))
    own = first + part * share
    return own, full, full_end, lax.min(own + share, end)


def _kernel(
    names: tuple[str, ...], block: int, steps: int, splits: int, batched: bool, fold: float, cap: float | None,
    ranges, *refs,
) -> None:  # fmt: skip
    b, part, j = (pl.program_id(axis) for axis in range(3))
    r = dict(zip(names, refs, strict=True))
    first, full, full_end, end = _range(ranges, b if batched else 0, part, splits)
    at = first + j

    @pl.when(j == 0)
    def _():
        r["qs"][...] = (r["q"][...].astype(jnp.float32) * fold).astype(r["qs"].dtype)
        r["m"][...] = jnp.full_like(r["m"], LOWEST)
        r["l"][...] = jnp.zeros_like(r["l"])
        r["acc"][...] = jnp.zeros_like(r["acc"])

    whole = (at >= full) & (at < full_end)
    pl.when((at < end) & whole)(lambda: _block(r, block, at, cap, False))
    pl.when((at < end) & ~whole)(lambda: _block(r, block, at, cap, True))

    @pl.when(j == steps - 1)
    def _():
        total = jnp.maximum(r["l"][...], 1e-30)
        r["lse"][...] = jnp.where(r["l"][...] > 0, r["m"][...] + jnp.log2(total), HIDDEN)
        r["o"][...] = r["acc"][...] / total[:, :, :1]


def _block(r: dict[str, Any], block: int, at, cap: float | None, masked: bool) -> None:
    """Adds a block of slots, head by head."""
    if masked:
        slot = at * block + lax.broadcasted_iota(jnp.int32, (r["q"].shape[1], block), 1)
        seen = in_bounds(slot, r["bounds"][:, 0:1], r["bounds"][:, 1:2])
        by_any = jnp.max(jnp.where(seen, 1.0, 0.0), 0, keepdims=True)
        by_any = jnp.broadcast_to(by_any, (8, block)).T[:, 0:1] > 0
    for head in range(r["q"].shape[0]):
        logits = product(r["qs"][head], r["k"][head], 1, 1)
        values = r["v"][head]
        if cap is not None:
            logits = jnp.tanh(logits) * cap
        if masked:  # of the values, too: 0 * NaN of a slot that no row sees is NaN
            logits = jnp.where(seen, logits, HIDDEN)
            values = jnp.where(by_any, values.astype(jnp.float32), 0).astype(values.dtype)
        old = r["m"][head]
        new = jnp.maximum(old, jnp.max(logits, 1, keepdims=True))
        p = jnp.exp2(logits - new[:, :1])
        shrink = jnp.exp2(old - new)
        r["m"][head] = new
        r["l"][head] = r["l"][head] * shrink + jnp.sum(p, 1, keepdims=True)
        r["acc"][head] = r["acc"][head] * shrink[:, :1] + product(p.astype(values.dtype), values, 1, 0)


def merged(o: jax.Array, lse2: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """o and the natural lse of all parts [P, ...] together, and of sinks [H]."""
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32) * LOG2E, lse2.shape[1:])
        o, lse2 = jnp.concatenate([o, jnp.zeros_like(o[:1])]), jnp.concatenate([lse2, sink[None]])
    top = lse2.max(0)
    weight = jnp.exp2(lse2 - top)
    total = weight.sum(0)
    return (o * (weight / total)[..., None]).sum(0), (top + jnp.log2(total)) / LOG2E
