"""Lists of tiles, and the mask, as the TPU kernels read them: the lists in scalar memory, the rest in blocks of rows.

Shapes: as in `kernels_pallas.flash_attention.pattern`. int32 unless said.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.pattern import (
    Layout,
    Pattern,
    own_head,
    stacked,
    stacked_keys,
    terms_see,
    tile_lists,
)
from kernels_pallas.mosaic import Slots

_SUBLANES = 8


def table(pattern: Pattern) -> jax.Array:
    """The lists for scalar memory, flat: of each row tile a count and `most` entries. A few zeros follow the last."""
    return jnp.pad(tile_lists(pattern.kinds, pattern.most).reshape(-1), (0, 3))  # the walk looks two places ahead


def add_inputs(slots: Slots, pattern: Pattern, heads: int, at: Any) -> None:
    """The arrays of the mask, for a kernel of `heads` query heads.

    Args:
      at: of the grid's indices, to (b, h, i): sequence, query head and row tile.
    """
    bq, bk = pattern.tile
    bounds = _whole_registers(stacked([t.bounds for t in pattern.terms]))
    slots.input("mask_bounds", bounds, _spec(bounds, (bounds.shape[2], bq), heads, at, lambda i: (0, i)))
    keys = stacked_keys(pattern)
    if keys is not None:
        keys = _whole_registers(keys)
        b, h, rows, S = keys.shape
        keys = keys.reshape(b, h, rows, S // bk, bk).swapaxes(2, 3)
        slots.input("mask_keys", keys, _spec(keys, keys.shape[2:], heads, at, lambda i: (0, 0, 0)))
    for n, term in enumerate(pattern.terms):
        if term.words is not None:
            words = jnp.pad(term.words, ((0, 0), (0, 0), (0, -term.words.shape[2] % _SUBLANES), (0, 0)))
            spec = _spec(words, (words.shape[2], bq), heads, at, lambda i: (0, i))
            slots.input(f"mask_words_{n}", words.astype(jnp.int32), spec)


def _whole_registers(x: jax.Array) -> jax.Array:
    """[b, h, n, size], n filled up to whole registers."""
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

    def of_word(n: int) -> Any:
        word = refs[f"mask_words_{n}"][pl.ds(tile, 1), rows]
        return word if turned else jnp.broadcast_to(word, (_SUBLANES, word.shape[1])).T[:, 0:1]

    return terms_see(layout.terms, key, of_row, of_key, of_word)
