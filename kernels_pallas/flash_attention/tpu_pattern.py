"""Masks that are more than an interval of keys, as the TPU kernels read them.

A term shows a row the keys of an interval whose coordinates lie in intervals of its own, and whose group's bit is set;
a pattern is one term, or the union of two. Which tiles are empty, full or neither comes with it: empty ones are in no
list, and the mask is evaluated in those that are not full.

Shapes: `b` is B or 1; `h` is 1, the key heads or the query heads; `A` coordinates of a term; `nq`, `nk` tiles of rows
and keys. int32 unless said.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.masks import EMPTY, FULL
from kernels_pallas.mosaic import Slots

_SUBLANES = 8
_FULL_BIT = 30  # of an entry of the list, which is a tile's number besides


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

        tiles = keys // self.tile[1] - self.kinds.shape[-1]
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
        kinds = jnp.pad(self.kinds, ((0, 0), (0, 0), (0, 0), (0, tiles)), constant_values=EMPTY)
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


def entry(table: Any, at: Any) -> tuple[Any, Any]:
    """Of a place in the table: the tile's number, and whether it is full."""
    value = table[at]
    return value & ((1 << _FULL_BIT) - 1), (value >> _FULL_BIT) == 1


def table(pattern: Pattern) -> jax.Array:
    """The lists for scalar memory, flat: of each row tile a count and `most` entries. A few zeros follow the last."""
    kinds = pattern.kinds.astype(jnp.int32)
    count = (kinds > EMPTY).sum(-1, keepdims=True, dtype=jnp.int32)
    order = jnp.argsort(kinds == EMPTY, axis=-1, stable=True)[..., : pattern.most].astype(jnp.int32)
    full = jnp.take_along_axis(kinds, order, -1) == FULL
    entries = order | (full.astype(jnp.int32) << _FULL_BIT)
    lists = jnp.concatenate([count, entries], -1).reshape(-1)
    return jnp.pad(lists, (0, 3))  # the walk looks two places ahead


def add_inputs(slots: Slots, pattern: Pattern, heads: int, at: Any) -> None:
    """The arrays of the mask, for a kernel of `heads` query heads.

    Args:
      at: of the grid's indices, to (b, h, i): sequence, query head and row tile.
    """
    bq, bk = pattern.tile
    bounds = _stacked([t.bounds for t in pattern.terms])
    slots.input("mask_bounds", bounds, _spec(bounds, (bounds.shape[2], bq), heads, at, lambda i: (0, i)))
    keys = [x for t in pattern.terms for x in (t.keys, None if t.local is None else t.local[:, :, None])]
    keys = [x for x in keys if x is not None]
    if keys:
        stacked = _stacked(keys)
        b, h, rows, S = stacked.shape
        stacked = stacked.reshape(b, h, rows, S // bk, bk).swapaxes(2, 3)
        slots.input("mask_keys", stacked, _spec(stacked, stacked.shape[2:], heads, at, lambda i: (0, 0, 0)))
    for n, term in enumerate(pattern.terms):
        if term.words is not None:
            words = jnp.pad(term.words, ((0, 0), (0, 0), (0, -term.words.shape[2] % _SUBLANES), (0, 0)))
            spec = _spec(words, (words.shape[2], bq), heads, at, lambda i: (0, i))
            slots.input(f"mask_words_{n}", words.astype(jnp.int32), spec)


def _stacked(parts: list[jax.Array]) -> jax.Array:
    """[b, h, n, size] side by side over n, which is filled up to whole registers."""
    b, h = (max(x.shape[axis] for x in parts) for axis in (0, 1))
    x = jnp.concatenate([jnp.broadcast_to(x, (b, h, *x.shape[2:])) for x in parts], 2).astype(jnp.int32)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _SUBLANES), (0, 0)))


def _spec(x: jax.Array, block: tuple[int, ...], heads: int, at: Any, rest: Any) -> pl.BlockSpec:
    def index(*grid_and_table: Any) -> tuple[Any, ...]:
        b, h, i = at(*grid_and_table)
        return (b if x.shape[0] > 1 else 0, own_head(h, heads, x.shape[1]), *rest(i))

    return pl.BlockSpec((None, None, *block), index)


def seen(layout: Layout, refs: dict[str, Any], key: Any, tile: Any, keys: slice, rows: slice, *, turned: bool) -> Any:
    """Which pairs of some rows of a row tile and some keys of a key tile see each other.

    Args:
      key: numbers of the keys, of the shape of the result: [keys, rows], or, not `turned`, [rows, keys].
      refs: those of `add_inputs`; not `turned`, with `mask_bounds_t`, the bounds of the row tile as columns.
    """
    coordinates = refs["mask_keys"][tile, :, keys] if "mask_keys" in refs else None
    if turned and coordinates is not None:
        coordinates = coordinates.T

    def of_key(n: int) -> Any:
        return coordinates[:, n : n + 1] if turned else coordinates[n : n + 1, :]

    def of_row(n: int) -> Any:
        return refs["mask_bounds"][n : n + 1, rows] if turned else refs["mask_bounds_t"][rows, n : n + 1]

    found = None
    for n, term in enumerate(layout.terms):
        out = (key >= of_row(term.row)) & (key < of_row(term.row + 1))
        for a in range(term.axes):
            own = of_key(term.key + a)
            out &= (own >= of_row(term.row + 2 + 2 * a)) & (own < of_row(term.row + 3 + 2 * a))
        if term.grouped:
            word = refs[f"mask_words_{n}"][pl.ds(tile, 1), rows]
            if not turned:
                word = jnp.broadcast_to(word, (_SUBLANES, word.shape[1])).T[:, 0:1]
            local = of_key(term.key + term.axes)
            shift = jnp.broadcast_to(jnp.maximum(local, 0), key.shape)
            bit = lax.shift_right_logical(jnp.broadcast_to(word, key.shape), shift) & 1
            out &= (bit == 1) & (local >= 0)
        found = out if found is None else found | out
    return found
