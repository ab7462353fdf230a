"""Rotary position embedding."""

import jax
import jax.numpy as jnp


def rope(x_BTHd: jax.Array, positions_BT: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotates the pairs (i, i + d/2) of every head by the angle position * base^(-2i/d).

    Args:
      x_BTHd: queries or keys, d even.
      positions_BT: position of each token in its document.
      base: longest wavelength / 2 pi, in positions.

    Returns:
      An array like `x_BTHd`; angles and the rotation are computed in fp32 (fp64 for fp64 inputs).

    Source: Su et al. 2021, RoFormer, eq. 15 and 34, in the half-split order of pairs of GPT-NeoX.
    """
    d = x_BTHd.shape[-1]
    dtype = jnp.promote_types(x_BTHd.dtype, jnp.float32)
    inverse_wavelength_F = base ** (-jnp.arange(0, d, 2, dtype=dtype) / d)
    angle_BTF = positions_BT[..., None].astype(dtype) * inverse_wavelength_F
    cos_BT1F, sin_BT1F = jnp.cos(angle_BTF)[:, :, None], jnp.sin(angle_BTF)[:, :, None]
    a, b = jnp.split(x_BTHd.astype(dtype), 2, axis=-1)
    out = jnp.concatenate([a * cos_BT1F - b * sin_BT1F, b * cos_BT1F + a * sin_BT1F], axis=-1)
    return out.astype(x_BTHd.dtype)
