"""Normalisation."""

import jax
import jax.numpy as jnp

from attnlab.ops.linear import per_channel


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, in fp32 (fp64 for fp64 inputs).

    Args:
      x: [..., D].
      scale: [D], or [H, D] where x is [..., H, D].
      epsilon: added to the mean square.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, eq. 4.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(dtype)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return per_channel(scale.astype(dtype), y).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """`(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over the last axis, in fp32 (fp64 for fp64 inputs).

    Args:
      x: [..., D].
      scale, bias: [D].
      epsilon: added to the variance.

    Source: Ba et al. 2016, Layer Normalization, arXiv:1607.06450, eq. 4.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(dtype)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (per_channel(scale.astype(dtype), y) + bias.astype(dtype)).astype(x.dtype)


def unit(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x [..., D] divided by its length `sqrt(x . x + epsilon)`; in fp32 or wider, and so returned."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + epsilon)
