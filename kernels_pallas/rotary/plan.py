"""What is static of a call, and how many positions a step of the grid takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kernels_pallas import tuning

_ROWS = (512, 256, 128, 64, 32, 16)
_SLACK = 4 * 2**20  # bytes of fast memory for the compiler's own


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call.

    Attributes:
      shape: B, T, H, d.
      width: channels of a head that are turned.
      norm: whether heads are normalised before.
      rows: positions of a step.
      kind: of the devices (`kernels_pallas.tuning.kind`).
    """

    shape: tuple[int, int, int, int]
    width: int
    norm: bool
    epsilon: float
    rows: int
    kind: str
    interpret: Any


def rows_of(length: int, heads: int, width: int, itemsize: int, kind: str) -> int | None:
    """Positions of a step: all heads of them, three arrays in two buffers, and float32 values of a few heads; None
    where fast memory does not hold the fewest."""
    needed = lambda rows: rows * width * (6 * heads * itemsize + 16 * 4) + _SLACK
    fits = [n for n in _ROWS if needed(n) <= tuning.vmem_limit(kind)]
    return next((n for n in reversed(fits) if n >= length), fits[0]) if fits else None
