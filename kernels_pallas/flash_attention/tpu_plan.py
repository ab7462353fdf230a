"""What forward and backward on TPU share: the static facts of a call, and which key tiles a row tile meets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import masks
from kernels_pallas.flash_attention import tpu_pattern
from kernels_pallas.flash_attention.call import LOG2E, Call
from kernels_pallas.flash_attention.pattern import Layout, Pattern, entry
from kernels_pallas.mosaic import Slots

HIDDEN = -1e30  # of a hidden logit
LOWEST = -1e20  # where a row's maximum begins: above HIDDEN, so that a row that sees nothing has weights of 0
_BOUNDED_CAP = 60.0  # up to it exp of a capped logit is far from float32's ends, summed over any number of keys


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of one call of a kernel.

    Attributes:
      blocks: tiles, which divide the padded rows and keys.
      scale: of the logits.
      fold: what q is multiplied with, so that its product with k is a logit in log2 units, or what tanh is of.
      cap: the soft cap in log2 units, or None.
      low, high: whether rows may begin after the first key, end before the last.
      bounded: whether logits are known to be so small that exp of them needs no maximum taken off.
      pattern: of a mask that is more than an interval, which then says all of it; None: there is none.
    """

    blocks: Any
    scale: float
    fold: float
    cap: float | None
    low: bool
    high: bool
    bounded: bool
    pattern: Layout | None = None

    @classmethod
    def of(cls, call: Call, blocks: Any, low: bool, high: bool, added: bool, pattern: Layout | None = None) -> Plan:
        """`added`: whether anything is added to capped logits, or beside them."""
        cap = None if call.soft_cap is None else call.soft_cap * LOG2E
        fold = call.scale * LOG2E if call.soft_cap is None else call.scale / call.soft_cap
        bounded = call.soft_cap is not None and call.soft_cap <= _BOUNDED_CAP and not added
        return cls(blocks, call.scale, fold, cap, low, high, bounded and pattern is None, pattern)

    @property
    def masks(self) -> bool:
        """Whether a tile may be masked."""
        return self.low or self.high or self.pattern is not None

    def can_halve(self) -> bool:
        """Whether half of the rows of a tile are whole parts, and some tiles may be of use to the second half alone."""
        return self.high and self.pattern is None and self.blocks.rows % (2 * self.blocks.sub_rows) == 0


def fold8(x, combine: Callable[..., Any]):
    """[n, m] to [8, m] by whole registers."""
    return combine(x.reshape(x.shape[0] // 8, 8, x.shape[1]), 0)


def in_bounds(key, low, high):
    """Which keys are in [low, high); None: no bound, not both."""
    if low is None:
        return key < high
    return key >= low if high is None else (key >= low) & (key < high)


class Walk:
    """The key tiles that a row tile meets, one after the other: tile `t` of `count`, and whether it is whole.

    Attributes:
      halved: whether the second half of the rows alone sees one more tile, number `end`.
    """

    def __init__(self, first, full, full_end, end, halved, *, backwards: bool):
        self.first, self.full, self.full_end, self.end = first, full, full_end, end - halved
        self.halved, self.backwards, self.count = halved, backwards, end - halved - first

    def tile(self, t):
        return self.end - 1 - t if self.backwards else self.first + t

    def whole(self, t):
        tile = self.tile(t)
        return (tile >= self.full) & (tile < self.full_end)


class PatternWalk:
    """As `Walk`, over the list of a pattern."""

    halved = None

    def __init__(self, table, at):
        self.table, self.at, self.count = table, at + 1, table[at]

    def tile(self, t):
        return entry(self.table[self.at + t])[0]

    def whole(self, t):
        return entry(self.table[self.at + t])[1]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Where a kernel finds in scalar memory which key tiles a row tile meets, and, if rows are packed, its key head.

    Attributes:
      count: row tiles of a sequence.
      shared: whether all sequences have the same.
      group: query heads that share a key head; 0: rows are packed.
      heads: query heads.
    """

    count: int
    shared: bool
    group: int
    heads: int
    numbers: ClassVar[int] = 5

    @property
    def packed(self) -> bool:
        """Whether a tile's key head is in the table."""
        return self.group == 0

    def at(self, b, i):
        """Where the table holds tile `i` of sequence `b`: the numbers of `masks.tile_ranges`, and `masks.halved`."""
        return ((0 if self.shared else b * self.count) + i) * (self.numbers + self.packed)

    def key_head(self, b, h, i, table):
        """Key head of a tile of query head `h`."""
        if self.packed:
            return table[self.at(b, i) + self.numbers]
        return lax.div(h, jnp.int32(self.group))  # not //: its sign rule asks for a TPU while tracing

    def begins(self, b, i, table):
        """Of packed rows: whether the tile is the first of its key head."""
        before = table[self.at(b, jnp.maximum(i - 1, 0)) + self.numbers]
        return (i == 0) | (before != table[self.at(b, i) + self.numbers])

    def ends(self, b, i, table):
        """Of packed rows: whether the tile is the last of its key head."""
        after = table[self.at(b, jnp.minimum(i + 1, self.count - 1)) + self.numbers]
        return (i == self.count - 1) | (after != table[self.at(b, i) + self.numbers])


def tile_table(
    plan: Plan,
    bounds: tuple[jax.Array, jax.Array] | None,
    rows: int,
    keys: int,
    heads: int,
    key_heads: int,
    heads_BN: jax.Array | None,
    pattern: Pattern | None = None,
) -> tuple[Tiles, jax.Array]:
    """The table for scalar memory, and what is where in it; without bounds every row sees all keys."""
    blocks = plan.blocks
    if pattern is not None:
        return Tiles(rows // blocks.rows, True, heads // key_heads, heads), tpu_pattern.table(pattern)
    if bounds is not None:
        ranges = masks.tile_ranges(*bounds, blocks.rows, blocks.keys)
    else:
        tiles = keys // blocks.keys
        ranges = jnp.broadcast_to(jnp.asarray([0, 0, tiles, tiles], jnp.int32), (1, rows // blocks.rows, 4))
    halved = jnp.zeros(ranges.shape[:2], jnp.int32)
    if plan.can_halve() and bounds is not None:
        halved = masks.halved(ranges, bounds, blocks.rows, blocks.keys)
    table = jnp.concatenate([ranges, halved[..., None]], -1)
    if heads_BN is None:
        return Tiles(table.shape[1], table.shape[0] == 1, heads // key_heads, heads), table
    table = jnp.broadcast_to(table, (*heads_BN.shape, Tiles.numbers))
    packed = jnp.concatenate([table, heads_BN[..., None].astype(jnp.int32)], -1)
    return Tiles(table.shape[1], table.shape[0] == 1, 0, heads), packed


def mask_inputs(
    slots: Slots,
    plan: Plan,
    bounds: tuple[jax.Array, jax.Array] | None,
    pattern: Pattern | None,
    heads: int,
    at: Callable[..., tuple[Any, Any, Any]],
) -> None:
    """What says the mask in tiles that are not whole; `at` is of the grid's indices, to (b, h, i)."""
    if bounds is not None:
        stacked = jnp.pad(jnp.stack(bounds, 1), ((0, 0), (0, 6), (0, 0)))
        several = stacked.shape[0] > 1
        place = lambda *grid: (at(*grid)[0] if several else 0, 0, at(*grid)[2])
        slots.input("bounds", stacked, pl.BlockSpec((None, 8, plan.blocks.rows), place))
    if pattern is not None:
        tpu_pattern.add_inputs(slots, pattern, heads, at)


def kernel_name(tiles: Tiles, pattern: Any, probe: Any, part: str) -> str:
    """What the kernel of a call is called in programs and profiles."""
    kinds = ("parallax", probe is not None), ("routed", tiles.packed), ("masked", pattern is not None), ("flash", True)
    return f"{next(kind for kind, is_so in kinds if is_so)}_{part}"
