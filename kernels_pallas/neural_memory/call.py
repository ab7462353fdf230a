"""What the kernels of the neural memory are told, and how much of the chip a grid step takes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from kernels_pallas import tuning

LOG2E = math.log2(math.e)
_MOST_HEADS = {"forward": 8, "backward": 2}
_MOST_ROWS = 128  # of a group, where two chunks are not more
_SEGMENT = 512  # positions between saved states, about
_REST = 8 * 2**20  # bytes beside what is counted: what the compiler spills


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static.

    Attributes:
      kind: of the devices (`kernels_pallas.tuning.kind`).
      widths: of the memory's layers: d, hidden ones, d.
      chunk, residual_norm, rates, epsilon, read_after_write: see `neural_memory`.
      decayed: gradients are taken at what forgetting has left of the chunk's first weights.
      group: chunks whose steps are kept apart from the weights; W and S are written once a group.
      segment: positions of a grid step; the state before each is saved for the backward.
      carried: whether rows may begin inside a document.
    """

    kind: str
    batch: int
    length: int
    heads: int
    widths: tuple[int, ...]
    dtype: str
    chunk: int
    residual_norm: bool
    rates: tuple[float, ...]
    epsilon: float
    read_after_write: bool
    decayed: bool
    group: int
    segment: int
    carried: bool
    interpret: Any = False

    @property
    def rows(self) -> int:
        """Positions of a group."""
        return self.chunk * self.group

    @property
    def segments(self) -> int:
        return -(-self.length // self.segment)

    @property
    def depth(self) -> int:
        return len(self.widths) - 1

    @property
    def stores(self) -> int:
        """States that a segment's backward keeps: groups that continue a document, see `plan`."""
        return self.segment // self.rows + 3

    def flat(self) -> bool:
        """Whether heads lie side by side in a row; else each has its rows, as widths must be whole lanes there."""
        return self.widths[0] % tuning.LANES == 0

    def narrow(self) -> Any:
        """Dtype between the products of hidden layers: that of the products where vectors can be."""
        return jnp.dtype(self.dtype if self.kind in ("v6e", "tpu7x") else jnp.float32)

    def shapes(self) -> list[tuple[int, int]]:
        """Of each layer's weights and momentum, in one array: below each other for the first, whose products add up,
        side by side for the others, whose rows of coefficients then come on the narrow side."""
        pairs = list(zip(self.widths[:-1], self.widths[1:]))
        return [(2 * i, o) if index == 0 else (i, 2 * o) for index, (i, o) in enumerate(pairs)]

    def state_bytes(self) -> int:
        """Of W and S of a head in float32, as they lie in fast memory."""
        return sum(4 * _round(i, 8) * _round(o, tuning.LANES) for i, o in self.shapes())

    def step_bytes(self, direction: str, heads: int) -> int:
        """Fast memory of a grid step with so many heads."""
        wide, itemsize = _round(self.widths[0], tuning.LANES), jnp.dtype(self.dtype).itemsize
        positions = self.segment + 2 * self.rows
        hidden = 4 * self.rows * sum(_round(w, tuning.LANES) for w in self.widths)
        arrays, windows, copies = {"forward": (4, 4, 0.5), "backward": (7, 7, self.stores + 2)}[direction]
        each = positions * wide * (2 * arrays * itemsize + 4 * windows) + int((1 + copies) * self.state_bytes())
        each += hidden * {"forward": 4, "backward": 16}[direction]
        return heads * each + 6 * 4 * positions * _round(3 * heads + 1, tuning.LANES) + _REST

    def heads_of_step(self, direction: str) -> int:
        """The most heads that divide all of them and fit; 0: none does."""
        fits = lambda n: self.step_bytes(direction, n) <= tuning.vmem_limit(self.kind)
        most = min(self.heads, _MOST_HEADS[direction])
        return next((n for n in range(most, 0, -1) if self.heads % n == 0 and fits(n)), 0)


def group_of(chunk: int) -> int:
    """Chunks of a group."""
    return max(_MOST_ROWS // 2 // chunk, 2)


def segment_of(length: int, rows: int) -> int:
    """Positions between saved states: whole groups, about as many as there are segments at 4096 positions."""
    return min(-(-length // rows), max(_SEGMENT // rows, 1)) * rows


def _round(n: int, to: int) -> int:
    return -(-n // to) * to
