"""What is static of a call, which tiles it takes, and how a tile's parts go by.

Shapes: `N` rows, `D` width, a multiple of 128, `V` columns of the embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import lax

from kernels_pallas import tuning
from kernels_pallas.tuning import LANES

_PART = 256  # rows, or columns, of one product of a tile, at most
_SLACK = 6 * 2**20  # bytes of fast memory for the compiler's own
# Tiles that are tried, the best first: (rows, columns) of the forward, then of the backward.
_FORWARD = (1024, 512), (512, 512), (256, 512), (256, 256), (128, 128)
_BACKWARD = (512, 1024), (512, 512), (256, 512), (256, 256), (128, 128)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tiles of logits, all multiples of 128.

    Attributes:
      rows, columns: of the forward, whose rows stand in fast memory while the embedding goes by.
      backward_rows, backward_columns: of the backward, whose columns stand there while the rows go by.
    """

    rows: int = 1024
    columns: int = 512
    backward_rows: int = 512
    backward_columns: int = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call.

    Attributes:
      shape: N, D and V.
      gradient: dtype of the embedding's gradient.
      kind: of the devices (`kernels_pallas.tuning.kind`).
      interpret: as in the public function.
    """

    shape: tuple[int, int, int]
    gradient: str
    sizes: Sizes
    kind: str
    interpret: Any
    platform = "tpu"

    @property
    def forward_tiles(self) -> tuple[int, int]:
        """How many, of rows and of columns."""
        return -(-self.shape[0] // self.sizes.rows), -(-self.shape[2] // self.sizes.columns)

    @property
    def backward_tiles(self) -> tuple[int, int]:
        """How many, of columns and of rows."""
        return -(-self.shape[2] // self.sizes.backward_columns), -(-self.shape[0] // self.sizes.backward_rows)


def sizes(rows: int, width: int, columns: int, itemsize: int, kind: str) -> Sizes | None:
    """Tiles for such a call; None: not even the least fit into fast memory."""
    limit = tuning.vmem_limit(kind)

    def fitting(tried, needed):
        fitted = ((min(r, _whole(rows)), min(c, _whole(columns))) for r, c in tried)
        return next((tile for tile in fitted if needed(*tile, width, itemsize) <= limit), None)

    forward, backward = fitting(_FORWARD, forward_bytes), fitting(_BACKWARD, backward_bytes)
    return None if forward is None or backward is None else Sizes(*forward, *backward)


def forward_bytes(rows: int, columns: int, width: int, itemsize: int) -> int:
    """Of fast memory: windows in two buffers, a row tile's sum and statistics, and logits of two parts."""
    windows = 2 * width * itemsize * (2 * rows + columns)
    return windows + 4 * rows * (width + 4 * LANES) + 24 * part(rows) * columns + _SLACK


def backward_bytes(rows: int, columns: int, width: int, itemsize: int) -> int:
    """As `forward_bytes`; the sum is of a tile of columns, which stands there turned, too."""
    windows = 2 * width * (itemsize * (rows + columns) + 4 * columns)
    return windows + width * columns * (4 + itemsize) + 24 * rows * part(columns) + _SLACK


def part(size: int) -> int:
    """Rows, or columns, of one product, of a tile that has so many."""
    return _PART if size % _PART == 0 else LANES


def two_by_two(size: int, ask: Callable[[Any], Any], finish: Callable[[Any, Any], None]) -> None:
    """`finish` of what `ask` says, for each part of a tile's `size` rows or columns, given the part's first.

    Two are asked before one is finished: the product of one runs beside what is made of the other's.
    """
    each, count = part(size), size // part(size)
    pair = 2 if count % 2 == 0 else 1

    def turn(n, carry):
        first = [n * pair * each + m * each for m in range(pair)]
        for at, asked in zip(first, [ask(at) for at in first], strict=True):
            finish(at, asked)
        return carry

    lax.fori_loop(0, count // pair, turn, 0)


def _whole(size: int) -> int:
    return -(-size // LANES) * LANES
