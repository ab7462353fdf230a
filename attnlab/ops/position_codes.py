"""Sinusoidal codes of places in the plane, and the boxes by which places are told anew."""

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


def in_common_boxes(
    cell_BTn: jax.Array, image_BT: jax.Array, subject_BT: jax.Array, counted_BT: jax.Array, side: float
) -> jax.Array:
    """Cells of a subject, told by where they lie in the box around it: `(cell - first) / size * side`.

    A subject of an image is the positions of one number; its box goes from its `first` row and column over as many as
    lie between that and its last, `size`. A subject that is moved has the same places, and so has one that is n times
    as large, at every n-th row and column. This is our reading of how He et al. 2024 (... with Isolation and Reposition
    Attention) reposition subjects: boxes of several images are resampled to one.

    Args:
      cell_BTn: [B, T, n], row and column.
      image_BT, subject_BT: int32 [B, T], any numbers: cells of one subject agree in both.
      counted_BT: bool [B, T], which positions are cells of a subject. Others keep their cell.
      side: of the common box, above 0.

    Returns:
      [B, T, n] in float32, or float64 where the cells are.

    Raises:
      UserError: `side` is not above 0.
    """
    if side <= 0:
        raise UserError(f"side = {side}; allowed: above 0")
    dtype = jnp.promote_types(cell_BTn.dtype, jnp.float32)

    def of_row(cell, image, subject, counted):
        order = jnp.lexsort((subject, image, ~counted))  # subjects side by side, the rest behind
        keys = jnp.stack([image, subject, counted], axis=-1)[order]
        begins = jnp.any(keys[1:] != keys[:-1], axis=-1)
        box = jnp.zeros(len(cell), jnp.int32).at[order[1:]].set(jnp.cumsum(begins, dtype=jnp.int32))
        first, last = (of(cell, box, len(cell))[box] for of in (jax.ops.segment_min, jax.ops.segment_max))
        place = (cell - first).astype(dtype) / (last - first + 1).astype(dtype) * side
        return jnp.where(counted[:, None], place, cell.astype(dtype))

    return jax.vmap(of_row)(cell_BTn, image_BT, subject_BT, counted_BT)
