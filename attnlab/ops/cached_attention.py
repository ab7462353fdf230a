"""Softmax attention of queries appended to a cache, whose layout lets one query read it without a copy."""

import jax
import jax.numpy as jnp

from attnlab.ops.attention import attention
from attnlab.ops.masks import Mask


def cached_attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """`attnlab.ops.attention` of keys and values that stand key head by key head, as a cache keeps them.

    A single query (T = 1) takes all its scores at once, unless `impl` names an implementation; more go through
    `attention`, which see for the arguments, the result o_BTHe, and what it raises.
    """
    if q_BTHd.shape[1] == 1 and impl == "auto":
        scale = q_BTHd.shape[-1] ** -0.5 if scale is None else scale
        return _one_query(q_BTHd[:, 0], k_BKSd, v_BKSe, mask, scale, soft_cap, sinks_H)[:, None]
    k_BSKd, v_BSKe = k_BKSd.swapaxes(1, 2), v_BKSe.swapaxes(1, 2)
    return attention(q_BTHd, k_BSKd, v_BSKe, mask, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H, impl=impl)


def _one_query(q_BHd, k_BKSd, v_BKSe, mask: Mask, scale: float, soft_cap: float | None, sinks_H) -> jax.Array:
    B, H, d = q_BHd.shape
    K, S = k_BKSd.shape[1:3]
    dtype = jnp.promote_types(q_BHd.dtype, jnp.float32)
    # Without groups the axis is left out: XLA on CPU takes a slow path for products with an axis of size 1.
    group = () if H == K else (H // K,)
    g = "g" * len(group)
    q = q_BHd.reshape(B, K, *group, d)
    scores = jnp.einsum(f"bk{g}d,bksd->bk{g}s", q, k_BKSd, preferred_element_type=dtype) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    visible = jnp.expand_dims(mask.visible(1, S)[:, 0], tuple(range(1, scores.ndim - 1)))
    highest = jnp.where(visible, scores, jnp.finfo(dtype).min).max(-1, keepdims=True)
    if sinks_H is not None:
        sinks = sinks_H.astype(dtype).reshape(K, *group, 1)
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(highest)
    # As in attention's definition: hidden scores are replaced before exp too, for the sake of its gradient.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - highest, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    if sinks_H is not None:
        total += jnp.exp(sinks - highest)
    o = jnp.einsum(f"bk{g}s,bkse->bk{g}e", weights.astype(v_BKSe.dtype), v_BKSe, preferred_element_type=dtype)
    return (o / jnp.where(total > 0, total, 1)).reshape(B, H, -1).astype(q_BHd.dtype)
