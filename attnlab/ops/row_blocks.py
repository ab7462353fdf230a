"""Attention that is more than a softmax of scores: block after block of rows, each with the keys that it can see.

What a block computes is formed again in the backward pass, so that memory grows with T and not with T x T.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnlab.ops.blockwise import BODIES, Span, plan_blocks, take
from attnlab.ops.masks import Mask
from attnlab.parallel import partition

ROWS = 128  # of a block


def over_row_blocks(
    block: Callable[[Span, Span], jax.Array], T: int, S: int, mask: Mask, rows: int = ROWS
) -> jax.Array:
    """Results [B, T, ...] of `block(rows, keys)`, [B, r, ...] each.

    Args:
      block: of r rows, of which no row sees a key outside of `keys`; both are first (which may be traced) and size.
      T, S: how many rows and keys there are.
      mask: of which the static part says what keys a block is given.
      rows: r; of the last block what is left.
    """
    static, parts = Mask(causal=mask.causal, window=mask.window), []
    for blocks in plan_blocks(T, S, static, min(rows, T), BODIES):

        @jax.checkpoint
        def one(i, blocks=blocks):
            return block(blocks.rows_of(i), (blocks.origin_of(i, S), blocks.keys))

        if blocks.count == 1:
            parts.append(one(0))
            continue
        many = jnp.moveaxis(jax.lax.map(one, jnp.arange(blocks.count, dtype=jnp.int32)), 0, 1)
        parts.append(many.reshape(many.shape[0], -1, *many.shape[3:]))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def by_key_heads(q_BrHd: jax.Array, k_BLKd: jax.Array) -> jax.Array:
    """Products q . k [B, K, G, r, L] of query heads with their key heads, in fp32 or wider."""
    B, r, H, d = q_BrHd.shape
    wide = jnp.promote_types(q_BrHd.dtype, jnp.float32)
    q = q_BrHd.reshape(B, r, k_BLKd.shape[2], -1, d)
    return _product("brkgd,blkd->bkgrl", q, k_BLKd, wide)


def weighted(weights_BKGrL: jax.Array, v_BLKe: jax.Array) -> jax.Array:
    """Sums of values [B, r, H, e], in the dtype of the weights."""
    p = weights_BKGrL.astype(v_BLKe.dtype)
    o = _product("bkgrl,blke->brkge", p, v_BLKe, weights_BKGrL.dtype)
    return o.reshape(*o.shape[:2], -1, o.shape[-1])


def _product(axes: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sums in `dtype`. On CPU the operands are widened first: jaxlib 0.10 refuses to run some bf16 products with wider
    sums (`Unsupported element type for DotThunk`), such as those of a piece of a stream with a cache."""
    if partition.platform() == "cpu":
        a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(axes, a, b, preferred_element_type=dtype)


def head_axes(H: int, K: int, together: int = 1) -> tuple[str | None, str | None]:
    """Logical axes of query heads and of key heads: groups that share a key head, or stand `together`, stay whole."""
    n = partition.ways("heads")
    if H % n or (H // n) % together or (K % n and K > 1):
        return None, None
    return "heads", None if K == 1 else "kv_heads"


def bounds_of(mask: Mask, T: int, S: int, rows: Span) -> tuple[jax.Array, jax.Array]:
    """First key, and one past the last, of each of some rows: [B or 1, 1, 1, r, 1] beside `by_key_heads`."""
    return tuple(take(x, rows, 1)[:, None, None, :, None] for x in mask.interval(T, S))


def softmax_of_seen(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax over the last axis of what is seen; rows that see nothing are 0, with zero gradients."""
    highest = jnp.where(seen, scores, jnp.finfo(scores.dtype).min).max(-1, keepdims=True)
    # Hidden scores are replaced before exp: of a large one it would be inf, and its gradient NaN.
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - jax.lax.stop_gradient(highest), 0)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)
