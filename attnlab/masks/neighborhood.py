"""Neighbourhood attention, with strides and dilation: boxes around each cell of a line, an image or a video."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.errors import UserError
from attnlab.masks.base import MaskBuilder, MaskConfig, Sequence, register
from attnlab.ops.mask_algebra import either
from attnlab.ops.masks import NEVER, Axis, Mask


@dataclasses.dataclass(frozen=True)
class NeighborhoodConfig(MaskConfig):
    """Knobs of neighbourhoods: each a number per dimension, or one for all."""

    window: tuple[int, ...] = knob((7,), "cells of a neighbourhood along each dimension", other=((3,),))
    stride: tuple[int, ...] = knob(
        (1,), "neighbouring cells that share a neighbourhood, at most window: window, and it is blocked", other=((2,),)
    )
    dilation: tuple[int, ...] = knob((1,), "distance of a neighbourhood's cells", other=((2,),))
    causal_axes: tuple[bool, ...] = knob(
        (False,), "dimensions along which a cell sees only itself and those before", other=((True,),)
    )
    shape: tuple[int, ...] | None = knob(
        None, "cells along each dimension, the last positions of a row; none: Sequence.grid, or a line", other=((5, 2),)
    )
    order: str = knob(
        "raster", "in which attention takes cells: as they stand, raster, or partition: box by box, so that a tile of "
        "rows meets other tiles of keys; the output is the same",
        other=("partition",), choices=("raster", "partition"),
    )  # fmt: skip
    tile: tuple[int, ...] = knob((8,), "cells of such a box along each dimension, of partition", other=((2,),))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "stride", "dilation", "shape", "tile"):
            value = getattr(self, name)
            if value is not None:
                good = len(value) >= 1 and all(n >= 1 for n in value)
                config_lib.require(good, name, value, "one number or more, each 1 or more")
        config_lib.require(len(self.causal_axes) >= 1, "causal_axes", self.causal_axes, "one truth value or more")
        default = type(self).tile
        boxes = self.order == "partition" or self.tile == default
        config_lib.require(boxes, "tile", self.tile, f"{default}, the default, where order is raster")


@register("neighborhood")
class Neighborhood(MaskBuilder):
    """A cell sees the `window` cells nearest to it along each dimension; at an edge the box moves inside.

    With `stride` s runs of s cells share the box around their middle cell; s = window is blocked attention. With
    `dilation` a cell sees cells of its own residue only. Positions before the cells (a class token) see all and are
    seen by all.
    """

    Config = NeighborhoodConfig
    paper = "Hassani et al. 2025, Generalized Neighborhood Attention, arXiv:2504.16922"
    extension = "positions before the cells"
    causal, bidirectional, packed, streaming = False, True, False, "no"

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        length = seq.positions.shape[1]
        shape = self.shape(length, seq.grid)
        before = length - math.prod(shape)
        cell = np.stack(np.unravel_index(np.arange(length - before), shape), -1)
        if (order := self.order(seq)) is not None:
            cell = cell[order[before:] - before]
        axes = []
        for i, (size, window, stride, dilation, ahead) in enumerate(self.dimensions(shape)):
            lo, hi = bounds(size, window, stride, dilation, ahead)
            at = cell[:, i]
            axes.append(_axis(at // dilation, lo[at], hi[at], before, f"dimension {i}"))
            if dilation > 1:
                axes.append(_axis(at % dilation, at % dilation, at % dilation + 1, before, f"residue {i}"))
        boxes = Mask(axes=tuple(axes))
        if not before:
            return boxes
        return either(boxes, Mask(None, np.full((1, length), before, np.int32)))

    def order(self, seq: Sequence) -> np.ndarray | None:
        if self.config.order == "raster":
            return None
        length = seq.positions.shape[1]
        shape = self.shape(length, seq.grid)
        tile = self._each("tile", len(shape))
        before = length - math.prod(shape)
        return np.concatenate([np.arange(before), before + partitioned(shape, tile)])

    def span(self, length: int, *, causal: bool) -> float:
        shape = self.shape(length, None)
        before = length - math.prod(shape)
        seen = [np.subtract(*bounds(*facts)[::-1]) for facts in self.dimensions(shape)]
        in_box = math.prod(float(x.mean()) for x in seen)
        return (before * length + (length - before) * (before + in_box)) / length

    def shape(self, length: int, grid: tuple[int, int] | None) -> tuple[int, ...]:
        """Cells along each dimension, of a row of so many positions."""
        shape = self.config.shape or grid or (length,)
        if math.prod(shape) > length:
            raise UserError(f"mask 'neighborhood': {math.prod(shape)} cells {shape}, but {length} positions")
        return shape

    def dimensions(self, shape: tuple[int, ...]) -> list[tuple[int, int, int, int, bool]]:
        """Of each dimension cells, window, stride, dilation, and whether it is causal."""
        each = functools.partial(self._each, dimensions=len(shape))
        found = list(zip(shape, each("window"), each("stride"), each("dilation"), each("causal_axes")))
        for size, window, stride, dilation, _ in found:
            if window * dilation > size or stride > window:
                raise UserError(
                    f"mask 'neighborhood': window {window}, stride {stride}, dilation {dilation} along {size} cells; "
                    "allowed: window * dilation <= cells, stride <= window"
                )
        return found

    def _each(self, name: str, dimensions: int) -> tuple:
        """A knob's value for each dimension."""
        value = getattr(self.config, name)
        if len(value) not in (1, dimensions):
            where = f"for {dimensions} dimensions; allowed: 1 value, or {dimensions}"
            raise UserError(f"mask 'neighborhood': {name} = {value} {where}")
        return value * dimensions if len(value) == 1 else value


def bounds(size: int, window: int, stride: int, dilation: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """First cell that each cell of a dimension sees, and one past the last: among those of its residue, [size]."""
    at = np.arange(size)
    q, residue = at // dilation, at % dilation
    count = (size - residue + dilation - 1) // dilation  # cells of the residue
    if causal:
        leader = np.minimum(q // stride * stride + stride - 1, count - 1)
        return np.maximum(leader - window + 1, 0), q + 1
    leader = np.minimum(q // stride * stride + stride // 2, count - 1)
    half, odd = window // 2, window % 2
    centre = np.clip(leader, half, count - 1 - (half + odd - 1))
    return centre - half, centre + half + odd


def tiles_met(
    builder: Neighborhood, shape: tuple[int, ...], query_tile: tuple[int, ...], key_tile: tuple[int, ...]
) -> tuple[float, float]:
    """Mean number of tiles of keys that a tile of queries meets, and how many there are, for cells cut into boxes.

    Of undilated neighbourhoods: it says what a tiling and a stride would cost, without a mask being made.
    """
    met, of = 1.0, 1
    for (size, window, stride, dilation, causal), bq, bk in zip(builder.dimensions(shape), query_tile, key_tile):
        if dilation != 1:
            raise UserError(f"tiles_met: dilation {dilation} is not allowed; allowed: 1")
        lo, hi = bounds(size, window, stride, dilation, causal)
        first = np.arange(0, size, bq)
        low, high = np.minimum.reduceat(lo, first), np.maximum.reduceat(hi, first)
        met *= float((-(-high // bk) - low // bk).mean())
        of *= -(-size // bk)
    return met, of


def partitioned(shape: tuple[int, ...], tile: tuple[int, ...]) -> np.ndarray:
    """The cells in the order of tiles, row by row within each: position in raster order of each, [cells]."""
    cell = np.unravel_index(np.arange(math.prod(shape)), shape)
    return np.lexsort([c for c in (*(c // t for c, t in zip(cell, tile)), *(c % t for c, t in zip(cell, tile)))][::-1])


def _axis(key: np.ndarray, lo: np.ndarray, hi: np.ndarray, before: int, name: str) -> Axis:
    """With positions before the cells, which are in no box and whose own box is everything."""
    array = lambda x, fill: np.concatenate([np.full(before, fill), x]).astype(np.int32)[None]
    return Axis(array(key, -1), array(lo, -1), array(hi, NEVER), name=name)
