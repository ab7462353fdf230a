"""What the Hopper kernels of a matrix that learns (depth 1) share: a group's tile, its pairs, and what is stored of it.

A warpgroup owns E = 64 of a head's outputs; what it learns of them does not depend on the others. Rows of a tile that
are not of the group may hold anything finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.hopper import COLUMNS, LAYOUT, by_column, by_row, product, put
from kernels_pallas.neural_memory.gpu_numbers import (
    CHUNK,
    EARLY,
    FIRST,
    KEPT,
    MOVED,
    NUMBERS,
    ORIGIN,
    READ,
    ROWS,
    TAKEN,
    TILE,
)

E = 64  # columns of a warpgroup
SLOTS = 2  # tiles in fast memory
PAIRS = (ROWS, ROWS)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What kernels are made from.

    Attributes:
      d: width of a head; inputs and outputs of its matrix.
      chunk: positions whose gradients are taken at the same weights.
      rate: of the steps, relative to theta.
      read_after_write: whether a position reads what it writes.
      epsilon: of the norm over the memory's outputs (`gpu_norm`); None: there is none.
      dtype: of operands.
    """

    device: hopper.Device
    d: int
    chunk: int
    rate: float
    read_after_write: bool
    epsilon: float | None
    dtype: Any

    @property
    def chunks(self) -> int:
        """Of a whole group."""
        return ROWS // self.chunk

    @property
    def normed(self) -> bool:
        return self.epsilon is not None

    @property
    def several(self) -> bool:
        """Whether a group has more chunks than one."""
        return self.chunks > 1

    def tile(self, *lead: int, width: int = E) -> Any:
        """Memory for operands of so many columns."""
        return hopper.tiles((*lead, ROWS, width), self.dtype)

    def states(self, *lead: int) -> Any:
        """For W and S."""
        return hopper.tiles((*lead, 2, self.d, E), self.dtype)


def columns(j: Any) -> Any:
    """The j-th of a head's tiles of outputs."""
    return pl.ds(j * E, E)


def numbers_memory(*lead: int) -> Any:
    return plgpu.SMEM((*lead, NUMBERS, ROWS), jnp.float32)


class Group:
    """A group: the row of its table, and its numbers in fast memory.

    zero: 0, but not for the compiler (`hopper.hidden_zero`): what follows from it is made again for each group.
    offset: 0, or as `zero`: numbers are read again, too.
    """

    def __init__(self, shape: Shape, table: Any, b: Any, n: Any, numbers: Any, zero: Any = 0, offset: Any = 0):
        self.shape, self.device, self.numbers, self.zero, self.offset = shape, shape.device, numbers, zero, offset
        self.of = lambda which: table[b, n, which]
        self.first, self.taken = self.of(FIRST), self.of(TAKEN)
        self.rows = pl.ds(self.of(TILE), ROWS)
        self.last = self.first + self.taken - 1

    def row(self, which: int) -> jax.Array:
        """Numbers of positions, [64]."""
        return self.device.load(self.numbers.at[which + self.offset], hopper.ROWS)

    def per_row(self, which: int, width: int = E) -> jax.Array:
        return by_row(self.row(which), (ROWS, width))

    def per_column(self, which: int) -> jax.Array:
        return by_column(self.device.load(self.numbers.at[which + self.offset], COLUMNS), PAIRS)

    def of_last(self, which: int) -> jax.Array:
        """A number of the group's last position."""
        return self.numbers[which, self.last]

    def index(self, axis: int, shape: tuple[int, int] = PAIRS) -> jax.Array:
        """Rows of a tile, or columns."""
        return self.device.iota(shape, axis) + self.zero

    def here(self, shape: tuple[int, int]) -> jax.Array:
        """Which rows are of the group."""
        row = self.index(0, shape)
        return (row >= self.first) & (row <= self.last)

    def masked(self, x: jax.Array) -> jax.Array:
        return jnp.where(self.here(x.shape), x, 0.0)

    def moved(self) -> jax.Array:
        """What is left at a position (row) of the momentum of another (column)."""
        row, col = self.index(0), self.index(1)
        seen = self.here(PAIRS) & (col <= row) & (col >= self.per_row(ORIGIN).astype(jnp.int32))
        return jnp.where(seen, jnp.exp2(self.per_row(MOVED) - self.per_column(MOVED)), 0.0)

    def kept(self, *, early: bool) -> jax.Array:
        """What is left of the weights of a position (column) where another (row) reads, or takes its gradient."""
        row, col = self.index(0), self.index(1)
        seen = self.here(PAIRS) & (col >= self.per_row(ORIGIN).astype(jnp.int32))
        if early:
            seen &= col < self.per_row(CHUNK).astype(jnp.int32)
        else:
            seen &= (col <= row) if self.shape.read_after_write else (col < row)
        return jnp.where(seen, jnp.exp2(self.per_row(EARLY if early else READ) - self.per_column(KEPT)), 0.0)

    def kappa(self, moved_s: Any, *, early: bool) -> jax.Array:
        """kappa where a position reads, or takes its gradient, times the rate; `moved_s` holds `moved`."""
        kept = self.kept(early=early).astype(self.shape.dtype)
        return product(self.device, kept, moved_s, PAIRS) * self.shape.rate

    def near(self, moved_s: Any, scored: jax.Array, *, early: bool) -> jax.Array:
        """What steps of the group (columns) take off what a position (row) reads, in the dtype of products."""
        return (-self.kappa(moved_s, early=early) * scored).astype(self.shape.dtype)

    def store(self, memory: Any, target: Any) -> None:
        """Copies the group's rows of plain memory [64, w] to rows of main memory [T, w]: no others."""
        whole = self.taken == ROWS
        pl.when(whole)(lambda: plgpu.copy_smem_to_gmem(memory, target.at[self.rows]))

        @pl.when(~whole)
        def _() -> None:
            @pl.loop(0, self.taken)
            def _(i: jax.Array) -> None:
                at = pl.ds(self.first + i, 1)
                plgpu.copy_smem_to_gmem(memory.at[at], target.at[pl.ds(self.of(TILE) + self.first + i, 1)])


def each_state(copy: Callable[[Any, Any], None], source: Any, target: Any) -> None:
    """Copies W and S [2, d, E]: both at once have more axes than a copy may."""
    for i in range(2):
        copy(source.at[i], target.at[i])


def load(shape: Shape, memory: Any) -> jax.Array:
    """[64, w] from memory of operands, float32."""
    return shape.device.load(memory, LAYOUT).astype(jnp.float32)


__all__ = ["E", "PAIRS", "SLOTS", "Group", "Shape", "columns", "each_state", "load", "numbers_memory", "product", "put"]
