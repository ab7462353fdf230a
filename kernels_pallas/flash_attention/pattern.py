"""Masks that are more than an interval of keys, as the kernels take them.

A term shows a row the keys of an interval whose coordinates lie in intervals of its own, and whose group's bit is set;
a pattern is one term, or the union of two. Which tiles are empty, full or neither comes with it: empty ones are in no
list, and the mask is evaluated in those that are not full.

Shapes: `b` is B or 1; `h` is 1, the key heads or the query heads; `A` coordinates of a term; `nq`, `nk` tiles of rows
and keys. int32 unless said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.masks import EMPTY, FULL

_FULL_BIT = 30  # of an entry of a list, which is a tile's number besides


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a pattern.

    Attributes:
      bounds: [b, h, 2 + 2 A, T]: the interval's first key and end, then the same of each coordinate.
      keys: [b, h, A, S], the coordinates; None where A is 0.
      words: [b, h, nk, T], the bits of a tile's groups, its first group lowest; None where groups say nothing.
      local: [b, h, S], of each key its group, counted from its tile's first, 0 to 31; -1: no row sees it.
    """

    bounds: jax.Array
    keys: jax.Array | None = None
    words: jax.Array | None = None
    local: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pattern:
    """A mask of T rows and S keys in tiles of `tile` rows and keys.

    Attributes:
      kinds: int8 [b, h, nq, nk], `EMPTY`, `PARTIAL` or `FULL`; a tile is called full only where all its rows see all
        its keys, which there are.
      terms: one or two.
      most: tiles that are not empty, at most, of a row tile. Static.
      tile: rows and keys of a tile. Static.
    """

    kinds: jax.Array
    terms: tuple[Term, ...]
    most: int = dataclasses.field(metadata={"static": True})
    tile: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def padded(self, rows: int, keys: int) -> Pattern:
        """Of so many rows and keys, whole tiles: those behind see nothing and are seen by none."""

        def along(x: jax.Array | None, size: int, fill: int) -> jax.Array | None:
            behind = [(0, 0)] * (0 if x is None else x.ndim - 1)
            return None if x is None else jnp.pad(x, [*behind, (0, size - x.shape[-1])], constant_values=fill)

        of_rows, tiles = (n // size - have for n, size, have in zip((rows, keys), self.tile, self.kinds.shape[2:]))
        more = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, tiles), (0, 0)))
        terms = tuple(
            Term(
                along(t.bounds, rows, 0),
                along(t.keys, keys, 0),
                None if t.words is None else more(along(t.words, rows, 0)),
                along(t.local, keys, -1),
            )
            for t in self.terms
        )
        kinds = jnp.pad(self.kinds, ((0, 0), (0, 0), (0, of_rows), (0, tiles)), constant_values=EMPTY)
        return dataclasses.replace(self, kinds=kinds, terms=terms)

    def block(self, n: jax.Array, keys: int) -> Pattern:
        """Block `n` of so many keys, whole tiles, as a pattern of these keys."""
        tiles = keys // self.tile[1]
        cut = lambda x, size: None if x is None else lax.dynamic_slice_in_dim(x, n * size, size, x.ndim - 1)

        def of_term(t: Term) -> Term:
            bounds = jnp.concatenate([t.bounds[:, :, :2] - n * keys, t.bounds[:, :, 2:]], 2)
            words = None if t.words is None else lax.dynamic_slice_in_dim(t.words, n * tiles, tiles, 2)
            return Term(bounds, cut(t.keys, keys), words, cut(t.local, keys))

        terms = tuple(map(of_term, self.terms))
        return Pattern(cut(self.kinds, tiles), terms, min(self.most, tiles), self.tile)

    def layout(self) -> Layout:
        """What is static of it in a kernel."""
        b, h, nq, _ = self.kinds.shape
        terms, rows, keys = [], 0, 0
        for t in self.terms:
            axes = 0 if t.keys is None else t.keys.shape[2]
            terms.append(TermLayout(rows, keys, axes, t.words is not None))
            rows, keys = rows + 2 + 2 * axes, keys + axes + (t.words is not None)
        return Layout(b, h, nq, self.most, tuple(terms))


@dataclasses.dataclass(frozen=True)
class TermLayout:
    """Where a term's rows stand in the stacked arrays: its bounds, its coordinates and, last of these, its groups."""

    row: int
    key: int
    axes: int
    grouped: bool


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is static of a pattern; `batch` and `heads` are those of its lists of tiles."""

    batch: int
    heads: int
    tiles: int
    most: int
    terms: tuple[TermLayout, ...]

    def list_of(self, b: Any, h: Any, i: Any, heads: int) -> Any:
        """Where the table holds the list of row tile `i` of query head `h` of `heads`: how many tiles, then these."""
        at = b if self.batch > 1 else 0
        return ((at * self.heads + own_head(h, heads, self.heads)) * self.tiles + i) * (1 + self.most)


def own_head(h: Any, heads: int, own: int) -> Any:
    """The index of query head `h` of `heads` in an array of `own` heads."""
    if own == 1:
        return 0
    return h if own == heads else lax.div(h, jnp.int32(heads // own))


def tile_lists(kinds: jax.Array, most: int, number: Callable[[Any], Any] = lambda place: place) -> jax.Array:
    """[..., 1 + most], of kinds [..., tiles]: how many are not empty, then their `entry`s, ascending by their places.

    number: of a place, what the entry has as the tile's number.
    """
    kinds = kinds.astype(jnp.int32)
    count = (kinds > EMPTY).sum(-1, keepdims=True, dtype=jnp.int32)
    order = jnp.argsort(kinds == EMPTY, axis=-1, stable=True)[..., :most].astype(jnp.int32)
    full = jnp.take_along_axis(kinds, order, -1) == FULL
    return jnp.concatenate([count, number(order) | (full.astype(jnp.int32) << _FULL_BIT)], -1)


def entry(value: Any) -> tuple[Any, Any]:
    """Of an entry of a list: the tile's number, and whether it is full."""
    return value & ((1 << _FULL_BIT) - 1), (value >> _FULL_BIT) == 1


def terms_see(
    terms: tuple[TermLayout, ...],
    key: Any,
    of_row: Callable[[int], Any],
    of_key: Callable[[int], Any],
    of_word: Callable[[int], Any],
) -> Any:
    """Which pairs of rows and keys see each other, in a kernel.

    Args:
      key: numbers of the keys, of the shape of the result.
      of_row, of_key: by their places in `TermLayout`, bounds of the rows, coordinates and local groups of the keys; of
        shapes that broadcast with `key`.
      of_word: by the number of a term that has groups, the rows' words of the tile.
    """
    found = None
    for n, term in enumerate(terms):
        out = (key >= of_row(term.row)) & (key < of_row(term.row + 1))
        for a in range(term.axes):
            own = of_key(term.key + a)
            out &= (own >= of_row(term.row + 2 + 2 * a)) & (own < of_row(term.row + 3 + 2 * a))
        if term.grouped:
            word, local = of_word(n), of_key(term.key + term.axes)
            shift = jnp.broadcast_to(jnp.maximum(local, 0), key.shape)
            bit = lax.shift_right_logical(jnp.broadcast_to(word, key.shape), shift) & 1
            out &= (bit == 1) & (local >= 0)
        found = out if found is None else found | out
    return found


def stacked(parts: list[jax.Array]) -> jax.Array:
    """[b, h, n, size] side by side over n."""
    b, h = (max(x.shape[axis] for x in parts) for axis in (0, 1))
    return jnp.concatenate([jnp.broadcast_to(x, (b, h, *x.shape[2:])) for x in parts], 2).astype(jnp.int32)


def stacked_keys(pattern: Pattern) -> jax.Array | None:
    """Coordinates and local groups of the keys of all terms, `stacked`; None where there is neither."""
    parts = [x for t in pattern.terms for x in (t.keys, None if t.local is None else t.local[:, :, None])]
    parts = [x for x in parts if x is not None]
    return stacked(parts) if parts else None
