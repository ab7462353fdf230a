"""Neighbourhood attention, with strides and dilation: boxes around each cell of a line, an image or a video."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.errors import UserError
from attnlab.masks.base import MaskBuilder, MaskConfig, Sequence, offsets, register
from attnlab.ops.documents import document_ends
from attnlab.ops.mask_algebra import either, reordered
from attnlab.ops.masks import NEVER, Array, Axis, Mask, numpy_if

_EACH = "window", "stride", "dilation", "causal_axes"  # knobs of every dimension


@dataclasses.dataclass(frozen=True)
class NeighborhoodConfig(MaskConfig):
    """Knobs of neighbourhoods: each a number per dimension of `shape`, or one for all; of a line one."""

    window: tuple[int, ...] = knob((7,), "cells of a neighbourhood along each dimension", other=((3,),))
    stride: tuple[int, ...] = knob(
        (1,), "neighbouring cells that share a neighbourhood, at most window: window, and it is blocked", other=((2,),)
    )
    dilation: tuple[int, ...] = knob((1,), "distance of a neighbourhood's cells", other=((2,),))
    causal_axes: tuple[bool, ...] = knob(
        (False,), "dimensions along which a cell sees only itself and those before; causal mixing needs the first",
        other=((True,),),
    )  # fmt: skip
    shape: tuple[int, ...] | None = knob(
        None, "cells of a document along each dimension; none: each document is a line, as long as it is",
        other=((5, 2),),
    )  # fmt: skip
    order: str = knob(
        "raster", "in which attention takes cells: as they stand, raster, or partition: box by box, so that a tile of "
        "rows meets other tiles of keys; the output is the same",
        other=("partition",), choices=("raster", "partition"),
    )  # fmt: skip
    tile: tuple[int, ...] = knob((8,), "cells of such a box along each dimension, of partition", other=((2,),))

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        for name in ("window", "stride", "dilation", "shape", "tile"):
            value = getattr(self, name)
            if value is not None:
                good = len(value) >= 1 and all(n >= 1 for n in value)
                need(good, name, value, "one number or more, each 1 or more")
        dimensions = len(self.shape or (1,))
        allowed = "one value where shape is none: a line"
        if self.shape is not None:
            allowed = f"one value, or {dimensions}, as many as shape = {self.shape} has"
        for name in (*_EACH, "tile"):
            value = getattr(self, name)
            need(len(value) in (1, dimensions), name, value, allowed)
        for cells, window, stride, dilation, _ in self.dimensions(NEVER):
            need(stride <= window, "stride", self.stride, f"at most window = {self.window}")
            allowed = f"window * dilation at most the cells of shape = {self.shape}; dilation = {self.dilation}"
            need(window * dilation <= cells, "window", self.window, allowed)
        need(self.order == "raster" or self.shape is not None, "order", self.order, "raster where shape is none")
        default = type(self).tile
        boxes = self.order == "partition" or self.tile == default
        need(boxes, "tile", self.tile, f"{default}, the default, where order is raster")

    @property
    def cells(self) -> int | None:
        """Cells of a document; None: of a line, as many as it has positions."""
        return None if self.shape is None else math.prod(self.shape)

    @property
    def raster(self) -> bool:
        """Whether no cell sees one behind it in raster order."""
        return all(self.causal_axes)

    def dimensions(self, line: Array | int) -> list[tuple[Array | int, int, int, int, bool]]:
        """Of each dimension cells, window, stride, dilation, and whether it is causal; a line's cells are `line`."""
        shape = self.shape or (line,)
        return list(zip(shape, *(self.each(name) for name in _EACH)))

    def each(self, name: str) -> tuple:
        """A knob's value for each dimension."""
        value = getattr(self, name)
        return value * len(self.shape or (1,)) if len(value) == 1 else value


@register("neighborhood")
class Neighborhood(MaskBuilder):
    """A cell sees the `window` cells nearest to it along each dimension; at an edge the box moves inside.

    With `stride` s runs of s cells share the box around their middle cell; s = window is blocked attention. With
    `dilation` a cell sees cells of its own residue only. Each document of a row has its own cells. Without `shape` they
    are a line, all positions of the document, and where it is shorter than a window a cell sees all of its residue.
    With `shape` the last positions are the cells, in raster order; those before them (a class token) see all and are
    seen by all. A document of fewer positions has the first of the cells; what would be seen of the others is not.

    Causal mixing goes with `causal_axes` whose first is true, and with a stride along a line of 1: how long it is, by
    which a last, shorter run is placed, no stream knows. The first positions of a document are then its cells, and
    those behind see all before them. Where each dimension is causal a stream is cut anywhere; else a cell sees later
    ones of its own step of the first dimension, a loss must not count what they make known, and a stream is cut
    between steps.
    """

    Config = NeighborhoodConfig
    paper = "Hassani et al. 2025, Generalized Neighborhood Attention, arXiv:2504.16922"
    extension = (
        "positions beside the cells; documents with cells of their own, also where fewer than a window or `shape` are "
        "there; causal mixing and streams"
    )
    bidirectional = True

    @property
    def streaming(self) -> str:
        return "any" if self.config.raster else "closed"

    @classmethod
    def unserved(cls, config: NeighborhoodConfig, *, causal: bool) -> str:
        if not causal or (config.each("causal_axes")[0] and (config.shape is not None or config.stride == (1,))):
            return ""
        return (
            f"mask {cls.name} goes with causal mixing where causal_axes = {config.causal_axes} begins with true, and "
            f"stride = {config.stride} is 1 or shape is given"
        )

    def require_length(self, length: int) -> None:
        c = self.config
        if c.cells is not None:
            config_lib.require(c.cells <= length, "mask.shape", c.shape, f"cells of one row, of {length} positions")
            return
        allowed = f"window * dilation at most the {length} positions of a row; dilation = {c.dilation}"
        config_lib.require(c.window[0] * c.dilation[0] <= length, "mask.window", c.window, allowed)

    def require(self, seq: Sequence, *, causal: bool) -> None:
        super().require(seq, causal=causal)
        if seq.grid is not None and seq.grid != self.config.shape:
            raise UserError(
                f"mask {self.name!r}: shape = {self.config.shape} of rows whose images are {seq.grid} "
                f"(Sequence.grid); allowed: {seq.grid}"
            )

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        length, offset, cells = seq.positions.shape[1], offsets(seq), self.config.cells
        self.require_length(length)
        interval = seq.mask(causal=causal and self.config.raster)
        start, end = seq.mask(causal=False).interval(length, length)
        size, before = end - start, 0
        if cells is not None and cells < length and not causal:
            before = numpy_if(isinstance(size, np.ndarray)).maximum(size - cells, 0)
        own = self._cells(offset - before)
        if causal and not self.config.raster:
            interval = Mask(start, self._reach(own, offset, np.arange(length, dtype=np.int32)[None], end))
        mask = dataclasses.replace(interval, axes=self._axes(own, own, size), documents=False)
        if not isinstance(before, int):
            mask = either(mask, Mask(start, start + before))
        return mask if (order := self.order(seq)) is None else reordered(mask, order)

    def order(self, seq: Sequence) -> np.ndarray | None:
        """Of images that stand one after another at the end of a row; of others it is another order, no less right."""
        if self.config.order == "raster":
            return None
        length, cells = seq.positions.shape[1], self.config.cells
        boxes = partitioned(self.config.shape, self.config.each("tile"))
        images = range(length % cells, length, cells)
        return np.concatenate([np.arange(length % cells), *(first + boxes for first in images)])

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        """How many positions of its document are before it: where its cell lies follows."""
        return (offsets(seq).astype(np.int32),)

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        own, keys = self._cells(seq.offsets), self._cells(stored[0])
        axes = self._axes(own, keys, seq.offsets + 1)
        if self.config.raster:
            return dataclasses.replace(interval, axes=axes)
        start, index = interval.k_start, interval.k_end - 1
        behind = document_ends(seq.offsets) - np.arange(seq.offsets.shape[1], dtype=np.int32)
        end = self._reach(own, seq.offsets, index, index + behind)
        return Mask(start, jnp.where(start <= index, end, start), axes=axes)  # padding sees nothing

    def span(self, length: int, *, causal: bool) -> float:
        self.require_length(length)
        cells = length if self.config.cells is None else self.config.cells
        seen = [np.subtract(*bounds(np.arange(facts[0]), *facts)[::-1]) for facts in self.config.dimensions(length)]
        in_box, beside = math.prod(float(x.mean()) for x in seen), length - cells
        if causal:
            return (cells * in_box + beside * (cells + length + 1) / 2) / length
        return (beside * length + cells * (beside + in_box)) / length

    def _cells(self, place: Array) -> Array:
        """The number in raster order of the cell at each place among a document's cells; -1 where there is none."""
        cells = self.config.cells
        if cells is None:
            return place
        return numpy_if(isinstance(place, np.ndarray)).where((place >= 0) & (place < cells), place, -1)

    def _reach(self, own: Array, offset: Array, index: Array, end: Array) -> Array:
        """One past the last key that a row sees by where it stands: of a cell that of its step of the first dimension.

        Args:
          own: `_cells` of the rows.
          offset: positions of the document before each.
          index: of the rows.
          end: one past the document's last.
        """
        xp = numpy_if(all(isinstance(x, np.ndarray) for x in (own, offset, index, end)))
        step = math.prod(self.config.shape[1:])
        last = index - offset + (own // step + 1) * step
        return xp.where(own < 0, index + 1, xp.minimum(last, end)).astype(np.int32)

    def _axes(self, own: Array, keys: Array, line: Array) -> tuple[Axis, ...]:
        """Of rows and keys of these `_cells`; `line` is how many cells a row's line has, where it is one."""
        axes, step = [], self.config.cells or 1
        for i, (cells, window, stride, dilation, causal) in enumerate(self.config.dimensions(line)):
            step = step if self.config.shape is None else step // cells
            along = lambda x: x // step if i == 0 else x // step % cells
            at, key = along(own), along(keys)
            lo, hi = bounds(at, cells, window, stride, dilation, causal)
            axes.append(_axis(own, keys, key // dilation, lo, hi, f"dimension {i}"))
            if dilation > 1:
                residue = at % dilation
                axes.append(_axis(own, keys, key % dilation, residue, residue + 1, f"residue {i}"))
        return tuple(axes)


def bounds(at: Array, cells: Array | int, window: int, stride: int, dilation: int, causal: bool) -> tuple[Array, Array]:
    """First cell that each cell `at` of a dimension of so many sees, and one past the last: among those of its residue.

    Where a residue has fewer cells than a window, all of them.
    """
    xp = numpy_if(isinstance(at, np.ndarray) and isinstance(cells, int | np.ndarray))
    q, residue = at // dilation, at % dilation
    count = (cells - residue + dilation - 1) // dilation  # cells of the residue
    if causal:
        leader = xp.minimum(q // stride * stride + stride - 1, count - 1)
        return xp.maximum(leader - window + 1, 0), q + 1
    leader = xp.minimum(q // stride * stride + stride // 2, count - 1)
    first = xp.clip(leader - window // 2, 0, xp.maximum(count - window, 0))
    return first, xp.minimum(first + window, count)


def tiles_met(builder: Neighborhood, query_tile: tuple[int, ...], key_tile: tuple[int, ...]) -> tuple[float, float]:
    """Mean number of tiles of keys that a tile of queries meets, and how many there are, for cells cut into boxes.

    Of undilated neighbourhoods with a `shape`: what a tiling and a stride would cost, without a mask being made.
    """
    met, of = 1.0, 1
    for (size, window, stride, dilation, causal), bq, bk in zip(builder.config.dimensions(0), query_tile, key_tile):
        if dilation != 1:
            raise UserError(f"tiles_met: dilation {dilation} is not allowed; allowed: 1")
        lo, hi = bounds(np.arange(size), size, window, stride, dilation, causal)
        first = np.arange(0, size, bq)
        low, high = np.minimum.reduceat(lo, first), np.maximum.reduceat(hi, first)
        met *= float((-(-high // bk) - low // bk).mean())
        of *= -(-size // bk)
    return met, of


def partitioned(shape: tuple[int, ...], tile: tuple[int, ...]) -> np.ndarray:
    """The cells in the order of tiles, row by row within each: position in raster order of each, [cells]."""
    cell = np.unravel_index(np.arange(math.prod(shape)), shape)
    return np.lexsort([c for c in (*(c // t for c, t in zip(cell, tile)), *(c % t for c, t in zip(cell, tile)))][::-1])


def _axis(own: Array, keys: Array, key: Array, lo: Array, hi: Array, name: str) -> Axis:
    """Where a position that is no cell (-1 of `own` and `keys`) is in no box, and its own box is everything."""

    def filled(cells: Array, x: Array, fill: int) -> Array:
        xp = numpy_if(isinstance(cells, np.ndarray) and isinstance(x, np.ndarray))
        return xp.where(cells < 0, fill, x).astype(np.int32)

    return Axis(filled(keys, key, -1), filled(own, lo, -1), filled(own, hi, NEVER), name=name)
