"""Vertical slash: columns that all see, and bands along the diagonal."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.masks.base import MaskConfig, register
from attnlab.masks.patterns import NOTHING, Band, Columns, HeadMask, Pattern, PatternMask, axis_of
from attnlab.ops.mask_algebra import either, packed_bits
from attnlab.ops.masks import Array, Groups, Mask


@dataclasses.dataclass(frozen=True)
class VerticalSlashConfig(MaskConfig):
    """Knobs of columns and bands."""

    columns: tuple[int, ...] = knob(
        (0, 1, 2, 3), "positions of a document that all its later ones see, counted from 0", other=((0, 5),)
    )
    slashes: tuple[tuple[int, ...], ...] = knob(
        ((0, 256),), "bands of distances, [first, end) each; 0 is the own position", other=(((0, 2), (5, 6)),)
    )
    block: int = knob(
        0, "positions of a block, counted from where the document begins: a block of rows sees a block of keys whole "
        "where a band meets it; 0: bands are exact, which goes with one band, or two without columns",
        other=(4,), least=0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = all(at >= 0 for at in self.columns) and len(set(self.columns)) == len(self.columns)
        config_lib.require(ok, "columns", self.columns, "different positions, each 0 or more")
        ok = all(len(band) == 2 and 0 <= band[0] < band[1] for band in self.slashes)
        config_lib.require(ok, "slashes", self.slashes, "pairs (first, end), 0 <= first < end")
        config_lib.require(
            bool(self.columns or self.slashes), "slashes", self.slashes, "a band, where columns has none"
        )
        sayable = self.block > 0 or len(bands(self)) <= (1 if self.columns else 2)
        allowed = (
            "where block is 0 one band apart from others, or two where columns has none; any, where block is above 0"
        )
        config_lib.require(sayable, "slashes", self.slashes, allowed)


@register("vertical_slash")
class VerticalSlash(PatternMask, HeadMask):
    """A position sees the columns, and the positions whose distance back lies in a band.

    With `block` 0 it is exact. With several bands it goes by blocks, columns apart, which stay exact: whatever block of
    keys a band meets is seen whole, up to the row itself.
    """

    Config = VerticalSlashConfig
    paper = "Jiang et al. 2024, MInference 1.0: ... Dynamic Sparse Attention, arXiv:2407.02490"
    extension = (
        "columns and bands are given, not estimated of the last queries; the blocks of bands lie on a grid; exact bands"
    )

    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern(),)

    def pattern(self) -> Pattern:
        c, found = self.config, bands(self.config)
        config_lib.require(c.block == 0, "block", c.block, "0: patterns of single heads are exact")
        if len(found) == 2:
            return Pattern(*found)
        return Pattern(found[0] if found else NOTHING, columns(c))

    def narrowed(self, interval: Mask, rows: Array, keys: Array) -> Mask:
        c = self.config
        if not c.block:
            return super().narrowed(interval, rows, keys)
        kept = dataclasses.replace(interval, axes=(axis_of((columns(c),), rows, keys),), documents=False)
        return either(dataclasses.replace(interval, groups=self._groups(rows, keys), documents=False), kept)

    def span(self, length: int, *, causal: bool) -> float:
        c = self.config
        if not c.block:
            return super().span(length, causal=causal)
        row = np.arange(length)
        own, sees = row // c.block, self._table(-(-length // c.block))
        before = np.tril(sees, -1)
        first, seen = own * c.block, np.diagonal(sees)[own]  # of the own block
        of_rows = lambda x: columns(c).before(row, x)
        in_block = np.diff(columns(c).before(row, np.arange(len(sees) + 1) * c.block))
        hidden = of_rows(first) - (before @ in_block)[own] + np.where(seen, 0, of_rows(row + 1) - of_rows(first))
        return float((before.sum(1)[own] * c.block + np.where(seen, row + 1 - first, 0) + hidden).mean())

    def _groups(self, rows: Array, keys: Array) -> Groups:
        size = self.config.block
        own, group = rows // size, (keys // size).astype(np.int32)
        if isinstance(rows, np.ndarray) and isinstance(keys, np.ndarray):
            return Groups(group, packed_bits(self._table(-(-keys.shape[1] // size)))[None, None], rows=size, size=size)
        return Groups(group, jnp.asarray(packed_bits(self._table(-(-keys.shape[1] // size))))[own][:, None])

    def _table(self, blocks: int) -> np.ndarray:
        """Which block of rows a band leads to which block of keys, bool [blocks, blocks]."""
        size, apart = self.config.block, np.arange(blocks)[:, None] - np.arange(blocks)
        found = np.zeros((blocks, blocks), bool)
        for band in bands(self.config):
            found |= (apart * size + size > band.first) & (apart * size - size + 1 < band.end)
        return found & (apart >= 0)


def columns(config: VerticalSlashConfig) -> Columns:
    """The columns in order."""
    return Columns(tuple(sorted(config.columns)))


def bands(config: VerticalSlashConfig) -> tuple[Band, ...]:
    """The bands in order, those that meet joined."""
    found: list[Band] = []
    for first, end in sorted(config.slashes):
        if found and first <= found[-1].end:
            found[-1] = Band(found[-1].first, max(end, found[-1].end))
        else:
            found.append(Band(first, end))
    return tuple(found)
