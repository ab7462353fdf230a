"""What a single head sees, said so that heads of one layer may differ: a band of distances, and something beside it.

Each of the two is an interval of one coordinate of the keys, which each head may choose for itself: the mask of any
number of heads is one union of two terms.
"""

from __future__ import annotations

import abc
import dataclasses
from types import ModuleType
from typing import NamedTuple

import numpy as np

from attnlab.masks.base import MaskBuilder, Sequence, offsets
from attnlab.ops.mask_algebra import either
from attnlab.ops.masks import Array, Axis, Mask, numpy_if


class Coordinate(abc.ABC):
    """An integer that every position has, and the interval of it that a position sees of those before it."""

    def key(self, offset: Array, xp: ModuleType) -> Array:
        """Of positions of a document, int32."""
        return offset

    @abc.abstractmethod
    def interval(self, offset: Array) -> tuple[Array, Array]:
        """What positions see, `lo <= key < hi`."""

    @abc.abstractmethod
    def before(self, row: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How many positions of [0, end) each row sees, `end` at most one past the row's own."""


@dataclasses.dataclass(frozen=True)
class Band(Coordinate):
    """Positions `first` to `end - 1` back; 0 is the own one."""

    first: int
    end: int

    def interval(self, offset: Array) -> tuple[Array, Array]:
        return offset - self.end + 1, offset - self.first + 1

    def before(self, row: np.ndarray, end: np.ndarray) -> np.ndarray:
        lo, hi = self.interval(row)
        return np.maximum(0, np.minimum(end, hi) - np.maximum(lo, 0))


@dataclasses.dataclass(frozen=True)
class First(Coordinate):
    """The first `count` positions of the document."""

    count: int

    def interval(self, offset: Array) -> tuple[Array, Array]:
        return 0 * offset, 0 * offset + self.count

    def before(self, row: np.ndarray, end: np.ndarray) -> np.ndarray:
        return np.minimum(end, self.count)


@dataclasses.dataclass(frozen=True)
class Columns(Coordinate):
    """These positions of the document, in order."""

    at: tuple[int, ...]

    def key(self, offset: Array, xp: ModuleType) -> Array:
        last = max(self.at, default=-1) + 1
        other = np.ones(last + 1, np.int32)
        other[list(self.at)] = 0
        return xp.asarray(other)[xp.minimum(offset, last)]

    def interval(self, offset: Array) -> tuple[Array, Array]:
        return 0 * offset, 0 * offset + 1

    def before(self, row: np.ndarray, end: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.at, end)


@dataclasses.dataclass(frozen=True)
class Residue(Coordinate):
    """Positions `phase` behind a multiple of `stride` away."""

    stride: int
    phase: int

    def key(self, offset: Array, xp: ModuleType) -> Array:
        return offset % self.stride

    def interval(self, offset: Array) -> tuple[Array, Array]:
        wanted = (offset + self.phase) % self.stride
        return wanted, wanted + 1

    def before(self, row: np.ndarray, end: np.ndarray) -> np.ndarray:
        return np.maximum(0, (end - 1 - self.interval(row)[0]) // self.stride + 1)


NOTHING = Band(0, 0)


class Pattern(NamedTuple):
    """A position sees, of its document up to itself, what lies in a band, and what lies beside it."""

    band: Band
    beside: Coordinate

    def span(self, length: int) -> float:
        """Mean number of keys that a position of a document of `length` positions sees."""
        row = np.arange(length)
        lo, hi = (np.clip(x, 0, row + 1) for x in self.band.interval(row))
        hi = np.maximum(lo, hi)
        beside = self.beside.before(row, row + 1) - self.beside.before(row, hi) + self.beside.before(row, lo)
        return float((hi - lo + beside).mean())


class HeadMask(MaskBuilder):
    """Masks that are a `Pattern` where mixing is causal, so that single heads may have them."""

    @abc.abstractmethod
    def pattern(self) -> Pattern:
        """What a head sees. Raises ConfigError where the knobs are those of a mask that is none."""


class PatternMask(MaskBuilder):
    """Masks made of patterns: one for all heads, or one for each."""

    @abc.abstractmethod
    def patterns(self) -> tuple[Pattern, ...]:
        """Of all heads, or of each."""

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        return self.narrowed(seq.mask(causal=causal), offsets(seq), offsets(seq))

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return (offsets(seq).astype(np.int32),)

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        return self.narrowed(interval, seq.offsets, stored[0])

    def span(self, length: int, *, causal: bool) -> float:
        return float(np.mean([pattern.span(length) for pattern in self.patterns()]))

    def narrowed(self, interval: Mask, rows: Array, keys: Array) -> Mask:
        """Of rows over keys, given by where in their documents they stand, [B, T] and [B, S]."""
        terms = (
            dataclasses.replace(interval, axes=(axis_of(coordinates, rows, keys),), documents=False)
            for coordinates in zip(*self.patterns())
        )
        return either(*terms)


def axis_of(coordinates: tuple[Coordinate, ...], rows: Array, keys: Array) -> Axis:
    """The coordinates of the heads as one axis: of rows over keys, given by where in their documents they stand."""
    xp = numpy_if(isinstance(rows, np.ndarray) and isinstance(keys, np.ndarray))
    stacked = lambda each: xp.stack(list(each), axis=1).astype(xp.int32)
    lo, hi = (stacked(side) for side in zip(*(c.interval(rows) for c in coordinates)))
    alike = all(isinstance(c, (Band, First)) for c in coordinates)  # then one array is that of all heads
    key = keys.astype(xp.int32) if alike else stacked(c.key(keys, xp) for c in coordinates)
    return Axis(key, lo, hi, name="pattern")
