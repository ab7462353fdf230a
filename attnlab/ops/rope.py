"""Rotary position embedding."""

import jax
import jax.numpy as jnp

from attnlab.ops.rope_scaling import Scaling


def rope(
    x_BTHd: jax.Array,
    positions_BT: jax.Array,
    base: float = 10_000.0,
    width: int | None = None,
    scaling: Scaling | None = None,
) -> jax.Array:
    """Rotates the pairs (i, i + r/2) of every head's first r channels by the angle position * base^(-2i/r).

    Args:
      x_BTHd: queries or keys.
      positions_BT: position of each token in its document.
      base: longest wavelength / 2 pi, in positions.
      width: r, even; the channels behind stay as they are. None: d.
      scaling: other frequencies than these, and a factor on what is rotated.

    Returns:
      An array like `x_BTHd`; angles and the rotation are computed in fp32 (fp64 for fp64 inputs).

    Source: Su et al. 2021, RoFormer, eq. 15 and 34, in the half-split order of pairs of GPT-NeoX, whose code also has
    r below d.
    """
    if width is not None and width < x_BTHd.shape[-1]:
        turned = rope(x_BTHd[..., :width], positions_BT, base, None, scaling)
        return jnp.concatenate([turned, x_BTHd[..., width:]], axis=-1)
    d = x_BTHd.shape[-1]
    dtype = jnp.promote_types(x_BTHd.dtype, jnp.float32)
    inverse_wavelength_F = base ** (-jnp.arange(0, d, 2, dtype=dtype) / d)
    factor = 1.0
    if scaling is not None:
        frequencies, factor = scaling.of(base, d)
        inverse_wavelength_F = jnp.asarray(frequencies, dtype)
    angle_BTF = positions_BT[..., None].astype(dtype) * inverse_wavelength_F
    angle_BT1d = jnp.concatenate([angle_BTF, angle_BTF], axis=-1)[:, :, None]
    cos, sin = jnp.cos(angle_BT1d), jnp.sin(angle_BT1d)
    return _rotate(x_BTHd, cos, sin) if factor == 1 else _rotate(x_BTHd, factor * cos, factor * sin)


# Pairs are exchanged in the input's own type: XLA for TPU would else keep, and lay out anew, wide copies of q and k.
# Its transpose would add two rounded halves; the rotation back rounds once.
@jax.custom_vjp
def _rotate(x, cos, sin):
    a, b = jnp.split(x, 2, axis=-1)
    exchanged = jnp.concatenate([-b, a], axis=-1)
    return (x.astype(cos.dtype) * cos + exchanged.astype(cos.dtype) * sin).astype(x.dtype)


_rotate.defvjp(
    lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)), lambda r, g: (_rotate(g, r[0], -r[1]), None, None)
)
