"""Softmax attention of queries appended to a cache, whose layout lets a single query read it without a copy."""

import jax
import jax.numpy as jnp

from attnlab.ops.attention import attention
from attnlab.ops.dispatch import Implementation, choose
from attnlab.ops.masks import Mask


def cached_attention(
    q_BTHd: jax.Array,
    k_NSd: jax.Array,
    v_NSe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """`attnlab.ops.attention` over keys and values laid out as a cache: head `k` of sequence `b` is row `b * K + k`.

    A single query (T = 1) takes all its scores at once, unless `impl` names an implementation; more queries go through
    `attention`. See there for the arguments, the result o_BTHe, and what is raised.
    """
    if q_BTHd.shape[1] == 1 and impl == "auto":
        spec = f"one query, cache {list(k_NSd.shape)} {k_NSd.dtype}"
        choose("cached_attention", impl, {"xla": Implementation(_one_query)}, spec, ("xla",))
        scale = q_BTHd.shape[-1] ** -0.5 if scale is None else scale
        return _one_query(q_BTHd[:, 0], k_NSd, v_NSe, mask, scale, soft_cap, sinks_H)[:, None]
    k_BSKd, v_BSKe = (x.reshape(q_BTHd.shape[0], -1, *x.shape[1:]).swapaxes(1, 2) for x in (k_NSd, v_NSe))
    return attention(q_BTHd, k_BSKd, v_BSKe, mask, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H, impl=impl)


def _one_query(q_BHd, k_NSd, v_NSe, mask: Mask, scale: float, soft_cap: float | None, sinks_H) -> jax.Array:
    B, H, d = q_BHd.shape
    N, S, _ = k_NSd.shape
    dtype = jnp.promote_types(q_BHd.dtype, jnp.float32)
    # The axis of the G heads that share a key head is left out where G = 1: a product without it is faster on CPU.
    group, g = ((), "") if H * B == N else ((H * B // N,), "g")
    scores = jnp.einsum(f"n{g}d,nsd->n{g}s", q_BHd.reshape(N, *group, d), k_NSd, preferred_element_type=dtype) * scale
    scores = scores.reshape(B, H, S)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    visible = mask.visible(1, S)
    highest = jnp.where(visible, scores, jnp.finfo(dtype).min).max(-1, keepdims=True)
    if sinks_H is not None:
        sinks_H1 = sinks_H.astype(dtype)[:, None]
        highest = jnp.maximum(highest, sinks_H1)
    highest = jax.lax.stop_gradient(highest)
    # Hidden scores are replaced before exp too: exp of a hidden large one would be inf, and its gradient NaN.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - highest, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    if sinks_H is not None:
        total += jnp.exp(sinks_H1 - highest)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(v_NSe.dtype).reshape(N, *group, S)
    o = jnp.einsum(f"n{g}s,nse->n{g}e", weights, v_NSe, preferred_element_type=dtype)
    return o.reshape(B, H, -1).astype(q_BHd.dtype)
