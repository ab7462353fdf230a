"""Copies of large arrays between types and orders of axes, at about the speed of the memory.

The numbers of a checkpoint are read once: widened, shifted and turned on the way, block by block, straight to where
they stay.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

_LINE = 64  # bytes; the CPU backend takes arrays that begin at such a multiple without a copy
_BLOCK = (128, 256)  # rows and columns that a core's cache holds, as they are and turned


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that a device of this host takes as it is."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _LINE, np.uint8)
    first = -room.ctypes.data % _LINE
    return room[first : first + size].view(dtype).reshape(shape)


def copy(source: np.ndarray, target: np.ndarray, shift: float = 0.0, factor: float = 1.0) -> None:
    """`target = (source + shift) * factor`, in float32 or what is wider of the target's type.

    Args:
      source: of the target's shape.
      target: on its memory axes may lie in another order than on the source's.
    """
    dtype = np.promote_types(target.dtype, np.float32)
    if target.ndim < 2:
        _copy(source, target, dtype, shift, factor)
        return
    rows, columns = _BLOCK
    if target.flags.c_contiguous:
        rows, columns = max(1, rows * columns // max(1, math.prod(target.shape[1:]))), target.shape[1]
    for r in range(0, target.shape[0], rows):
        for c in range(0, target.shape[1], columns):
            at = slice(r, r + rows), slice(c, c + columns)
            _copy(source[at], target[at], dtype, shift, factor)


def _copy(source: np.ndarray, target: np.ndarray, dtype: np.dtype, shift: float, factor: float) -> None:
    wide = _widened(source, dtype)
    if shift:
        wide = wide + np.asarray(shift, dtype)
    if factor != 1:
        wide = wide * np.asarray(factor, dtype)
    target[...] = wide


def _widened(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """bfloat16 by integers: its own cast is slower, and lets no other thread run."""
    if array.dtype != jnp.bfloat16 or dtype != np.float32:
        return array.astype(dtype, copy=False)
    bits = array.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)
