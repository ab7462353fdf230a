"""What `parallax_attention` computes, with all T x S scores: the judge of its kernels in tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import masks


def definition(
    q: jax.Array,
    probe: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """`kernels_pallas.parallax_attention.parallax_attention`, in any dtype; statistics in float32, or float64."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    (T, H, d), (S, K) = q.shape[1:], k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    seen = masks.visible(starts, ends, T, S)
    by_any = seen.any(1)[..., None, None]
    # Keys and values that no row sees are replaced: 0 * NaN is NaN.
    heads = lambda x: jnp.repeat(jnp.where(by_any, x.astype(dtype), 0), H // K, axis=2)
    scores = lambda x: jnp.einsum("bthd,bshd->bhts", x.astype(dtype), heads(k), precision="highest")
    # Hidden logits are the lowest, and their weights 0 even where no logit is seen.
    seen = seen[:, None]
    p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores(q) * scale, jnp.finfo(dtype).min), -1), 0)
    tilts = scores(probe)
    weights = p * (1 - (tilts - (p * tilts).sum(-1, keepdims=True)))
    return jnp.einsum("bhts,bshe->bthe", weights, heads(v), precision="highest").astype(q.dtype)
