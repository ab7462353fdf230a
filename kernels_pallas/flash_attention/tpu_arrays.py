"""Arrays as the TPU kernels want them: whole tiles, heads before positions; and how many keys fast memory holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import tuning
from kernels_pallas.flash_attention import tpu_forward
from kernels_pallas.flash_attention.call import NOTHING, Call
from kernels_pallas.flash_attention.pattern import Pattern

_WIDTH = 16  # head widths are padded to multiples of it


def forward_tiles(
    call: Call,
    q,
    k,
    v,
    bias: bool = False,
    rest: int = tuning.FORWARD_REST,
    kernels: str = "flash",
    pattern: Pattern | None = None,
) -> tuple[tuning.ForwardBlocks, int]:
    """Tiles, and how many keys are in fast memory at a time, in two buffers, beside `rest` bytes of other things."""
    T, S, d, e = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    blocks = _given(call, "forward") or tuning.forward_blocks(call.kind, T, S, kernels)
    blocks = blocks if pattern is None else tuning.in_tiles(blocks, *pattern.tile)
    tuning.check(blocks)
    each = 2 * (rounded(d, 128) + rounded(e, _WIDTH) + tpu_forward.ONES) * q.dtype.itemsize + 64 * bias
    each += _mask_bytes(pattern)
    return blocks, tuning.resident_keys(call.kind, each, S, blocks.keys, rest)


def backward_tiles(
    call: Call,
    q,
    k,
    v,
    bias: bool = False,
    rest: int = tuning.BACKWARD_REST,
    kernels: str = "flash",
    pattern: Pattern | None = None,
) -> tuple[tuning.BackwardBlocks, int]:
    """Tiles, and how many keys are in fast memory at a time with their gradients, in two buffers, and float32 sums."""
    T, S, d, e = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    blocks = _given(call, "backward") or tuning.backward_blocks(call.kind, T, S, kernels)
    blocks = blocks if pattern is None else tuning.in_tiles(blocks, *pattern.tile)
    tuning.check(blocks)
    each = 4 * (rounded(d, 128) + rounded(e, 128)) * q.dtype.itemsize + 4 * (rounded(d, _WIDTH) + rounded(e, _WIDTH))
    each += 128 * bias + _mask_bytes(pattern)
    return blocks, tuning.resident_keys(call.kind, each, S, blocks.keys, rest)


def _mask_bytes(pattern: Pattern | None) -> int:
    """Of a key in fast memory, in two buffers: whole registers of coordinates, and a word for each row of a tile."""
    if pattern is None:
        return 0
    terms = pattern.layout().terms
    grouped = sum(t.grouped for t in terms)
    coordinates = sum(t.axes for t in terms) + grouped
    rows, keys = pattern.tile
    return 2 * 4 * (rounded(coordinates, 8) + grouped * -(-rows // keys))


def _given(call: Call, name: str) -> Any:
    """Tiles that the caller gave."""
    if call.blocks is not None and not isinstance(call.blocks, tuning.Blocks):
        raise ValueError(f"blocks={call.blocks!r}; allowed on TPU: None or tuning.Blocks(...)")
    return None if call.blocks is None else getattr(call.blocks, name)


def rounded(n: int, to: int) -> int:
    return -(-n // to) * to


def heads(x_BTHd: jax.Array, length: int) -> jax.Array:
    """[B, H, length, width], zeros behind, the width a multiple of `_WIDTH`."""
    x = x_BTHd.swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, -x.shape[3] % _WIDTH)))


def padded_bounds(call: Call, bounds, length: int, keys: int, rows: int, whole: int):
    """The intervals of padded rows, which see nothing, and which ends of them are to be looked at."""
    if bounds is None and whole == keys:
        return None, False, False
    if bounds is None:
        bounds = jnp.zeros((1, length), jnp.int32), jnp.full((1, length), keys, jnp.int32)
    behind = ((0, 0), (0, rows - length))
    return tuple(jnp.pad(x, behind) for x in bounds), call.low, call.high or whole != keys


def key_block(n, keys: int, k, v, bounds, bias=None):
    """Block `n` of so many keys: its keys, values, intervals and bias."""
    cut = lambda x: None if x is None else lax.dynamic_slice_in_dim(x, n * keys, keys, 2)
    own = None if bounds is None else tuple(jnp.clip(x - n * keys, 0, keys) for x in bounds)
    return cut(k), cut(v), own, cut(bias)


def block_lse2(lse2: jax.Array, own) -> jax.Array:
    """The log-sum-exp [B, H, T] that gives rows of a block's intervals weights of 0 where they see none of its keys.

    The block's tiles are masked for what its rows see, not for rows that see nothing.
    """
    return lse2 if own is None else jnp.where((own[1] > own[0])[:, None], lse2, NOTHING)
