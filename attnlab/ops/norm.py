"""Normalisation."""

import jax
import jax.numpy as jnp

from attnlab.ops.linear import per_channel


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, in fp32 (fp64 for fp64 inputs).

    Args:
      x: [..., D].
      scale: [D].
      epsilon: added to the mean square.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, eq. 4.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(dtype)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return per_channel(scale.astype(dtype), y).astype(x.dtype)
