"""Masks that are more than intervals of keys, as the Hopper kernels read them.

The lists of tiles stand in global memory: every warpgroup of a block reads its numbers from there. What says the mask
goes by TMA with the tiles of keys, or of rows, that it belongs to.

Shapes: as in `kernels_pallas.flash_attention.pattern`. int32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.pattern import (
    Layout,
    Pattern,
    entry,
    own_head,
    stacked,
    stacked_keys,
    terms_see,
    tile_lists,
)
from kernels_pallas.masks import EMPTY, FULL, PARTIAL

TILE = 64, 64  # rows and keys of a tile of a pattern: those of a product, of which blocks have several
MOST_AXES = 8  # coordinates of all terms, for which shared memory is left with heads of any width
_HEAD_BIT = 20  # of an entry of a list of several query heads' tiles of rows, which is the head's number in its group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrays:
    """A pattern for a kernel; in the kernel Refs.

    Attributes:
      lists: [b, h, blocks, 1 + L], of each block how many tiles it goes through, then these.
      bounds: [b, h, n, T], of all terms; keys: [b, h, m, S], or None; words: [b, h, nk, g, T], of g terms, or None.
      layout: what stands where. Static.
    """

    lists: jax.Array
    bounds: jax.Array
    keys: jax.Array | None
    words: jax.Array | None
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def copies(self) -> int:
        """Of those that belong to a tile: of keys with their coordinates, of pairs with their words."""
        return (self.keys is not None) + (self.words is not None)


def numbers(pattern: Pattern) -> int:
    """What shared memory holds of a mask for a tile: of each row and key, and words of a row for two tiles of keys."""
    terms = pattern.layout().terms
    return sum(2 + 2 * term.axes + term.axes + 3 * term.grouped for term in terms)


def of_rows(pattern: Pattern, rows: int) -> Arrays:
    """For a kernel of blocks of so many rows, which each goes through tiles of keys."""
    return _arrays(pattern, lists_of_rows(pattern, rows))


def of_keys(pattern: Pattern, keys: int, rows: int, heads: int, key_heads: int) -> Arrays:
    """For a kernel of blocks of so many keys, which each goes through tiles of so many rows."""
    return _arrays(pattern, lists_of_keys(pattern, keys, rows, heads, key_heads))


def _arrays(pattern: Pattern, lists: jax.Array) -> Arrays:
    words = None
    if parts := [t.words.astype(jnp.int32) for t in pattern.terms if t.words is not None]:
        b, h = (max(x.shape[axis] for x in parts) for axis in (0, 1))
        words = jnp.stack([jnp.broadcast_to(x, (b, h, *x.shape[2:])) for x in parts], 3)
    return Arrays(lists, stacked([t.bounds for t in pattern.terms]), stacked_keys(pattern), words, pattern.layout())


def lists_of_rows(pattern: Pattern, rows: int) -> jax.Array:
    """For each block of so many rows its tiles of keys. None is empty, as a ring that nobody fills would be waited for:
    a block that sees nothing has a tile in which all is hidden."""
    parts = rows // pattern.tile[0]
    lists = tile_lists(_together(pattern.kinds, parts, 1), min(parts * pattern.most, pattern.kinds.shape[3]))
    return lists.at[..., 0].max(1)


def lists_of_keys(pattern: Pattern, keys: int, rows: int, heads: int, key_heads: int) -> jax.Array:
    """For each block of so many keys the tiles of so many rows that see it; where query heads have masks of their own,
    those of all that share the block, one head after the other."""
    kinds = _together(pattern.kinds, rows // pattern.tile[0], keys // pattern.tile[1]).swapaxes(2, 3)
    b, h, blocks, tiles = kinds.shape
    if not many_heads(h, heads, key_heads):
        return tile_lists(kinds, tiles)
    group = heads // key_heads
    kinds = jnp.moveaxis(kinds.reshape(b, key_heads, group, blocks, tiles), 2, 3)
    kinds = kinds.reshape(b, key_heads, blocks, group * tiles)
    return tile_lists(kinds, group * tiles, lambda n: n % tiles + (n // tiles << _HEAD_BIT))


def many_heads(own: int, heads: int, key_heads: int) -> bool:
    """Whether query heads that share a key head have lists of their own."""
    return own == heads > key_heads


def _together(kinds: jax.Array, rows: int, keys: int) -> jax.Array:
    """The kinds of blocks of so many tiles each way."""
    b, h, nq, nk = kinds.shape
    parts = kinds.reshape(b, h, nq // rows, rows, nk // keys, keys)
    least, most = parts.min((3, 5)), parts.max((3, 5))
    return jnp.where(most == EMPTY, EMPTY, jnp.where(least == FULL, FULL, PARTIAL))


# In a kernel.


def scratch(mask: Arrays | None, stages: int, keys: int, tiles: int, rows: int) -> dict[str, Any]:
    """Memory for what belongs to tiles in flight, of so many keys in so many tiles of a pattern, and rows."""
    of_keys = of_pairs = None
    if mask is not None and mask.keys is not None:
        of_keys = plgpu.SMEM((stages, mask.keys.shape[2], keys), jnp.int32)
    if mask is not None and mask.words is not None:
        of_pairs = plgpu.SMEM((stages, tiles, mask.words.shape[3], rows), jnp.int32)
    return {"mask_keys_s": of_keys, "mask_words_s": of_pairs}


def own(x: Any, b: jax.Array, h: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """The indices of sequence b and head h of so many in an array of the mask."""
    head = h & 0 if x.shape[1] == 1 else own_head(h, heads, x.shape[1])
    return (b if x.shape[0] > 1 else b & 0), head


def fetch(t: Any, h: jax.Array, heads: int, keys: Any, tiles: Any, rows: Any, at: Any, here: Any) -> None:
    """Copies what belongs to a tile to its place: coordinates of keys, and words of rows for tiles of the pattern."""
    m = t.mask
    if m.keys is not None:
        plgpu.copy_gmem_to_smem(m.keys.at[*own(m.keys, t.b, h, heads), :, keys], t.mask_keys_s.at[at], here)
    if m.words is not None:
        source = m.words.at[*own(m.words, t.b, h, heads), tiles, :, rows]
        plgpu.copy_gmem_to_smem(source, t.mask_words_s.at[at], here)


class Walk:
    """The list of a block.

    Attributes:
      count: tiles of it.
    """

    def __init__(self, mask: Arrays, b: jax.Array, h: jax.Array, heads: int, block: jax.Array):
        self.lists, self.at = mask.lists, (*own(mask.lists, b, h, heads), block)
        self.count = self.lists[*self.at, 0]

    def entry(self, n: jax.Array) -> jax.Array:
        """The n-th, for `tile_of`, `is_full` and `head_of`."""
        return self.lists[*self.at, n + 1]


def tile_of(value: jax.Array) -> jax.Array:
    """The tile's number."""
    return value & ((1 << _HEAD_BIT) - 1)


def is_full(value: jax.Array) -> jax.Array:
    """Whether all its rows see all its keys."""
    return entry(value)[1]


def head_of(value: jax.Array) -> jax.Array:
    """The number of a query head in its group."""
    return entry(value)[0] >> _HEAD_BIT


def seen(
    mask: Arrays,
    key: jax.Array,
    of_row: Callable[[int], Any],
    of_key: Callable[[int], Any],
    of_word: Callable[[int], Any],
) -> jax.Array:
    """`terms_see`; `of_word` is given a place in `Arrays.words`."""
    terms = mask.layout.terms
    place = lambda n: sum(term.grouped for term in terms[:n])
    return terms_see(terms, key, of_row, of_key, lambda n: of_word(place(n)))
