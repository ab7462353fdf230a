"""Which tiles of a mask are empty, full or neither: found from extremes of coordinates, no pair of which is looked at.

A tile is `bq` rows against `bk` keys. What is made of a mask that is known while tracing (NumPy arrays) is known too.
An empty tile may be taken for a partial one where several coordinates narrow it; one with a visible pair is never taken
for an empty one, nor one with a hidden pair for a full one.

Shapes: as in `attnlab.ops.masks`; `nq`, `nk` tiles of rows and of keys, `L` places of a row of a table.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import UserError
from attnlab.ops.masks import NEVER, Array, Groups, Mask, by_head, numpy_if

EMPTY, PARTIAL, FULL = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileTable:
    """The tiles that are not empty.

    index: int32 `[B, h, nq, L]`, numbers of tiles of keys, ascending; behind `count` the last one is repeated.
    kind: int8, like `index`: PARTIAL, the mask is to be evaluated; FULL, all is visible; 0 behind `count`.
    count: int32 `[B, h, nq]`.
    """

    index: Array
    kind: Array
    count: Array


def tile_kinds(mask: Mask, length: int, keys: int, bq: int, bk: int) -> Array:
    """EMPTY, PARTIAL or FULL of every tile, int8 `[B, h, nq, nk]`; a tile that reaches over the end is not full."""
    xp = numpy_if(mask.known())
    kinds = None
    for term in mask.terms():
        kind = _term_kinds(term, length, keys, bq, bk)
        kinds = kind if kinds is None else xp.maximum(kinds, kind)
    return kinds


def table_of(kinds: Array, most: int | None = None, *, full_first: bool = False) -> TileTable:
    """The table of kinds `[B, h, nq, nk]`; `most`: see `tile_table`. `full_first`: ascending within each kind."""
    xp = numpy_if(isinstance(kinds, np.ndarray))
    count = (kinds > EMPTY).sum(-1, dtype=xp.int32)
    if most is None:
        most = max(1, int(count.max(initial=0))) if xp is np else kinds.shape[-1]
    order = xp.argsort(FULL - kinds if full_first else kinds == EMPTY, axis=-1, stable=True)[..., :most].astype(
        xp.int32
    )
    count = xp.minimum(count, most)
    wanted = xp.arange(most, dtype=xp.int32) < count[..., None]
    last = xp.take_along_axis(order, xp.maximum(count - 1, 0)[..., None], axis=-1)
    kind = xp.where(wanted, xp.take_along_axis(kinds, order, axis=-1), 0).astype(xp.int8)
    return TileTable(xp.where(wanted, order, last), kind, count)


def tile_table(
    mask: Mask, length: int, keys: int, bq: int, bk: int, *, most: int | None = None, of_keys: bool = False
) -> TileTable:
    """The tiles that are not empty, for each tile of `bq` of `length` rows those of `bk` of `keys` keys.

    most: L, which the caller knows to be enough; None: as many as there are where the mask is known, else all.
    of_keys: the other way round: for each tile of keys those of rows, `[B, h, nk, L]`.
    """
    kinds = tile_kinds(mask, length, keys, bq, bk)
    return table_of(kinds.swapaxes(-1, -2) if of_keys else kinds, most)


def tile_words(mask: Mask, length: int, keys: int, bk: int) -> Array:
    """For each row the bits of the groups of each tile of keys, uint32 `[B, h, T, nk]`, the tile's first group lowest.

    Only right where the groups of a tile are 32 consecutive ones at most. Raises UserError where the mask is a union,
    has no groups, or more than 32 in no promised order (`Groups.size`).
    """
    groups = mask.groups
    if groups is None or mask.either is not None:
        raise UserError("mask: words of tiles are those of one term with groups")
    W = groups.bits.shape[-1]
    if W > 1 and groups.size is None:
        raise UserError(f"mask: {32 * W} groups in no order; allowed: at most 32, or Groups.size set")
    xp = numpy_if(mask.known())
    group = groups.known_group()
    tiles = _tiled(group, bk, NEVER, xp)
    first = xp.where(tiles < 0, NEVER, tiles).min(-1)  # [B, h, nk]
    first = xp.where(first == NEVER, 0, first)
    bits = xp.repeat(groups.bits, groups.rows, axis=2)[:, :, :length]
    bits = xp.pad(bits, ((0, 0), (0, 0), (0, 0), (0, 1)))
    word = lambda at: _along(bits, at[:, :, None], xp)
    shift = (first & 31).astype(xp.uint32)[:, :, None]
    low = word(first >> 5) >> shift
    high = xp.where(shift == 0, 0, word((first >> 5) + 1) << ((32 - shift) & 31))
    return (low | high).astype(xp.uint32)


def mean_span(mask: Mask, length: int, keys: int) -> float:
    """Mean number of keys that a row sees, over batch and heads, of a mask that is known while tracing.

    Raises UserError for one that is not.
    """
    if not mask.known():
        raise UserError("mask: a mean number of visible keys needs arrays of NumPy")
    size = 128
    kinds = tile_kinds(mask, length, keys, size, size)
    total = float((kinds == FULL).sum()) * size**2
    partial = kinds == PARTIAL
    for i, j in zip(*np.nonzero(partial.any((0, 1)))):
        rows, columns = slice(i * size, min(length, (i + 1) * size)), slice(j * size, min(keys, (j + 1) * size))
        seen = mask.visible(length, keys, rows, columns).sum((-1, -2))
        total += float(np.where(partial[:, :, i, j], seen, 0).sum())
    return total / (kinds.shape[0] * kinds.shape[1] * length)


def _term_kinds(term: Mask, length: int, keys: int, bq: int, bk: int) -> Array:
    xp = numpy_if(term.known())
    start, end = term.interval(length, keys)
    index = xp.arange(keys, dtype=xp.int32)[None, None]
    sides = [(index, start, end), *((by_head(a.key), a.lo, a.hi) for a in term.axes)]
    empty, full = False, True
    for key, lo, hi in sides:
        lo = xp.full((1, 1, length), -NEVER, xp.int32) if lo is None else by_head(lo)
        hi = xp.full((1, 1, length), NEVER, xp.int32) if hi is None else by_head(hi)
        lo, hi = xp.broadcast_arrays(lo, hi)
        key = _tiled(key, bk, NEVER, xp)
        least, most = key.min(-1)[:, :, None], key.max(-1)[:, :, None]
        # Rows past the end have an empty interval, which takes part in no extreme of what may be seen; no tile with one
        # is full, as no key lies in it.
        lo, hi = _tiled(lo, bq, 0, xp), _tiled(hi, bq, 0, xp)
        some = lo < hi
        of_rows = lambda x: x[..., None]
        empty = empty | (most < of_rows(xp.where(some, lo, NEVER).min(-1)))
        empty = empty | (least >= of_rows(xp.where(some, hi, -NEVER).max(-1)))
        full = full & (least >= of_rows(lo.max(-1))) & (most < of_rows(hi.min(-1)))
    if term.groups is not None:
        some, every = _groups_of_tiles(term.groups, length, bq, bk, xp)
        empty, full = empty | ~some, full & every
    return xp.where(empty, EMPTY, xp.where(full, FULL, PARTIAL)).astype(xp.int8)


def _groups_of_tiles(groups: Groups, length: int, bq: int, bk: int, xp) -> tuple[Array, Array]:
    """Whether a row of a tile may see a key by its group, and whether all see all: bool [B, h, nq, nk] each."""
    group = _tiled(groups.known_group(), bk, -1, xp)
    W = groups.bits.shape[-1]
    bit = xp.where(group < 0, 0, xp.uint32(1) << (group & 31).astype(xp.uint32)).astype(xp.uint32)
    ored = _reduced(xp, "or")
    if bq % groups.rows == 0:
        bits, rows = groups.bits, bq // groups.rows
    else:
        bits, rows = xp.repeat(groups.bits, groups.rows, axis=2)[:, :, :length], bq
    bits = xp.moveaxis(bits, -1, 0)
    some = xp.zeros((), bool)
    every = xp.all(group >= 0, axis=-1)[:, :, None]
    for w in range(W):
        present = ored(xp.where(group >> 5 == w, bit, 0))[:, :, None]
        of_rows = _tiled(bits[w], rows, 0, xp)
        some = some | ((ored(of_rows)[..., None] & present) != 0)
        every = every & ((_reduced(xp, "and")(of_rows)[..., None] & present) == present)
    return some, every


def _reduced(xp, how: str):
    """Bitwise "or" or "and" over the last axis."""
    if xp is np:
        operation = np.bitwise_or if how == "or" else np.bitwise_and
        return lambda x: operation.reduce(x, axis=-1)
    first, operation = (0, jax.lax.bitwise_or) if how == "or" else (2**32 - 1, jax.lax.bitwise_and)
    return lambda x: jax.lax.reduce(x.astype(jnp.uint32), np.uint32(first), operation, (x.ndim - 1,))


def _tiled(x: Array, size: int, fill: int, xp) -> Array:
    """[B, h, n] as [B, h, tiles, size]."""
    x = xp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size)), constant_values=fill)
    return x.reshape(*x.shape[:2], -1, size)


def _along(x: Array, at: Array, xp) -> Array:
    """`x[b, h, t, at[b, h, t, j]]` where axes of 1 are repeated."""
    shape = lambda a, last: (max(x.shape[0], at.shape[0]), max(x.shape[1], at.shape[1]), x.shape[2], last)
    wide = lambda a: xp.broadcast_to(a, shape(a, a.shape[-1]))
    return xp.take_along_axis(wide(x), wide(at), axis=3)
