"""Sinusoidal codes of places in the plane and of boxes, and the boxes by which places are told anew."""

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
    return _waves([y, x], _frequencies(width, 4, base), base)


def box_code(box: jax.Array, width: int, base: float = 1e4) -> jax.Array:
    """`[sin(z w), cos(z w)]` of the four numbers z of a box, one after the other: its middle, and log of its sides.

    Frequencies are `w_f = base^(-f / (width / 8))`. It is our reading of what tells a transformer of objects where one
    is and how large (after Fang et al. 2024, OAT, arXiv:2407.13335): such codes go through an MLP and are added to the
    object's embedding.

    Args:
      box: [..., 4], x and y of the middle, width and height, in any unit. Without a width and a height above 0 there is
        no box.
      width: of the code, a multiple of 8.
      base: above 1.

    Returns:
      [..., width] in float32, or float64 where boxes are; 0 where there is no box.

    Raises:
      UserError: `width` is no positive multiple of 8, or `base` not above 1.
    """
    frequencies = _frequencies(width, 8, base)
    box = jnp.asarray(box)
    there = is_box(box)[..., None]
    sides = jnp.log(jnp.where(there, box[..., 2:], 1))
    code = _waves([box[..., 0], box[..., 1], sides[..., 0], sides[..., 1]], frequencies, base)
    return jnp.where(there, code, 0)


def relation_code(box_BTc: jax.Array, other_BSc: jax.Array, frequencies: int, base: float = 1e4) -> jax.Array:
    """Sines and cosines of how each other box lies to each box: the same where all boxes are moved or scaled together.

    Of a box (x, y, w, h) and another (x', y', w', h') the numbers are `(x' - x) / w`, `(y' - y) / h`, `log(w' / w)` and
    `log(h' / h)`, frequencies `w_f = base^(-f / frequencies)`.

    Args:
      box_BTc, other_BSc: [B, T, 4] and [B, S, 4], as `box_code` has them.
      frequencies: 1 or more.
      base: above 1.

    Returns:
      [B, T, S, 8 * frequencies] in float32, or float64 where boxes are; of pairs of which one is no box, any finite
      numbers.
    """
    sides = lambda box: jnp.where(is_box(box)[..., None], box[..., 2:], 1)
    own, others = sides(box_BTc)[:, :, None], sides(other_BSc)[:, None]
    away = (other_BSc[:, None, :, :2] - box_BTc[:, :, None, :2]) / own
    ratio = jnp.log(others) - jnp.log(own)
    return _waves([away[..., 0], away[..., 1], ratio[..., 0], ratio[..., 1]], frequencies, base)


def is_box(box: jax.Array) -> jax.Array:
    """Which of boxes [..., 4] have a width and a height above 0, bool [...]."""
    return jnp.all(box[..., 2:] > 0, axis=-1)


def _frequencies(width: int, columns: int, base: float) -> int:
    """How many a code of that width has, of which each takes so many columns; UserError where it cannot be."""
    if width < columns or width % columns:
        raise UserError(f"width = {width}; allowed: a multiple of {columns}")
    if base <= 1:
        raise UserError(f"base = {base}; allowed: above 1")
    return width // columns


def _waves(numbers: list[jax.Array], count: int, base: float) -> jax.Array:
    """Sines, then cosines, of each of the numbers [...] at so many frequencies: [..., 2 * count * len(numbers)]."""
    numbers = [jnp.asarray(z) for z in numbers]
    dtype = jnp.result_type(jnp.float32, *(z.dtype for z in numbers))
    frequencies = jnp.exp(jnp.arange(count, dtype=dtype) * (-jnp.log(jnp.asarray(base, dtype)) / count))
    angles = (z.astype(dtype)[..., None] * frequencies for z in numbers)
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
