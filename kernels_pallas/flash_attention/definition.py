"""What `flash_attention` computes, with all T x S scores: the judge of its kernels in tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import masks


def definition(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    sinks: jax.Array | None = None,
    gate: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.flash_attention.flash_attention`, in any dtype; statistics in float32, or float64 for float64."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    (T, H, d), (S, K) = q.shape[1:], k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    seen = masks.visible(starts, ends, T, S)
    by_any = seen.any(1)[..., None, None]
    # Keys and values that no row sees are replaced: 0 * NaN is NaN.
    heads = lambda x: jnp.repeat(jnp.where(by_any, x.astype(dtype), 0), H // K, axis=2)
    logits = jnp.einsum("bthd,bshd->bhts", q.astype(dtype), heads(k), precision="highest") * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if key_bias is not None:
        bias = key_bias[:, None] if key_bias.ndim == 2 else jnp.repeat(key_bias, H // K, axis=1)
        logits += bias.astype(dtype)[:, :, None]
    seen = seen[:, None]
    highest = jnp.where(seen, logits, jnp.finfo(dtype).min).max(-1, keepdims=True)
    if sinks is not None:
        highest = jnp.maximum(highest, sinks.astype(dtype)[:, None, None])
    highest = jax.lax.stop_gradient(highest)
    # Hidden logits are replaced before exp too: exp of a hidden large one would be inf, and its gradient NaN.
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - highest, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks.astype(dtype)[:, None, None] - highest)
    some = total > 0
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, highest + jnp.log(total), -jnp.inf)[..., 0].swapaxes(1, 2)
    o = jnp.einsum("bhts,bshe->bthe", weights / total, heads(v), precision="highest")
    if gate is not None:
        o *= jax.nn.sigmoid(gate.astype(dtype))
    return o.astype(q.dtype), lse
