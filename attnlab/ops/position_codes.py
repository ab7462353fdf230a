"""Sinusoidal codes of places in the plane."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.errors import UserError


def plane_code(y: jax.Array, x: jax.Array, width: int, base: float = 1e4) -> jax.Array:
    """`[sin(y w), cos(y w), sin(x w), cos(x w)]` with frequencies `w_f = base^(-f / (width / 4))`.

    One code for patches, at the rows and columns of their centres, and for any place between them, such as where a
    gaze rests (Kansal et al. 2025, DiffEye, corresponding positional embedding): that of a place at a centre is the
    patch's. The product of two codes depends on the difference of their places alone.

    Args:
      y, x: [...], in units of patches, of any float or integer type.
      width: of the code, a multiple of 4.
      base: above 1.

    Returns:
      [..., width] in float32, or float64 where y or x is.

    Raises:
      UserError: `width` is no positive multiple of 4, or `base` not above 1.
    """
    if width < 4 or width % 4:
        raise UserError(f"width = {width}; allowed: a multiple of 4")
    if base <= 1:
        raise UserError(f"base = {base}; allowed: above 1")
    y, x = jnp.asarray(y), jnp.asarray(x)
    dtype = jnp.promote_types(jnp.promote_types(y.dtype, x.dtype), jnp.float32)
    count = width // 4
    frequencies = jnp.exp(jnp.arange(count, dtype=dtype) * (-jnp.log(jnp.asarray(base, dtype)) / count))
    angles = (z.astype(dtype)[..., None] * frequencies for z in (y, x))
    return jnp.concatenate([wave(z) for z in angles for wave in (jnp.sin, jnp.cos)], axis=-1)
