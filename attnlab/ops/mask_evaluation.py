"""A mask evaluated for one tile of rows against a few tiles of keys, from arrays cut to one key head's.

Shapes: as in `attnlab.ops.masks`; `G` query heads of a key head, `g` is 1 or G, `n` tiles of keys at a time; lengths
are whole numbers of tiles, of `bq` rows and `bk` keys.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.ops.masks import NEVER, Array, Groups, Mask, by_head, numpy_if


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """One term of a mask. Its arrays have the leading axes [B or 1, K or 1, g]; a key head's own have g alone.

    start, end: `[..., T]`.
    axes: of each the keys `[..., nk, bk]`, and lo and hi, `[..., T]` or None.
    group: `[..., nk, bk]`; bits: `[..., T / shared, W]`; None where there are no groups.
    first_word: `[..., nk]`, g = 1: the word of each tile's first group, where a tile's groups are consecutive, or None.
    width: bk. shared: rows that share bits, 1 or whole tiles.
    """

    start: Array
    end: Array
    axes: tuple[tuple[Array, Array | None, Array | None], ...]
    group: Array | None
    bits: Array | None
    first_word: Array | None
    width: int = dataclasses.field(metadata={"static": True})
    shared: int = dataclasses.field(metadata={"static": True})

    def visible(self, tile: Array, tiles: Array, bq: int) -> jax.Array:
        """Which pairs of the tile of rows `tile` and the tiles of keys `tiles` are seen: bool [g, bq, n * bk]."""
        of_rows = lambda x: jax.lax.dynamic_slice_in_dim(x, tile * bq, bq, x.ndim - 1)[..., None]
        s = (tiles[:, None] * self.width + jnp.arange(self.width, dtype=jnp.int32)).reshape(-1)
        seen = (s >= of_rows(self.start)) & (s < of_rows(self.end))
        for key, lo, hi in self.axes:
            key = _gathered(key, tiles)[:, None]
            if lo is not None:
                seen = seen & (key >= of_rows(lo))
            if hi is not None:
                seen = seen & (key < of_rows(hi))
        if self.group is None:
            return seen
        group = _gathered(self.group, tiles)[:, None]
        word = self._words(group, tile, tiles, bq)
        return seen & (group >= 0) & (((word >> (group & 31).astype(jnp.uint32)) & 1) == 1)

    def _words(self, group: jax.Array, tile: Array, tiles: Array, bq: int) -> jax.Array:
        """Of each row and each key the word that has the bit of the key's group: [g, bq or 1, n * bk]."""
        first, size = (tile * bq, bq) if self.shared == 1 else (tile * bq // self.shared, 1)
        bits = jax.lax.dynamic_slice_in_dim(self.bits, first, size, 1)
        at, words = group >> 5, bits.shape[-1]
        if words == 1:
            return bits
        if self.first_word is None:
            heads = max(group.shape[0], bits.shape[0])
            at = jnp.broadcast_to(jnp.maximum(at, 0), (heads, size, at.shape[-1]))
            return jnp.take_along_axis(jnp.broadcast_to(bits, (heads, size, words)), at, axis=2)
        few = min(words, -(-self.width // 32) + 1)
        first_word = jnp.asarray(self.first_word)[0, tiles, None]
        own = bits[..., first_word + jnp.arange(few, dtype=jnp.int32)]  # one behind the last has no key's bit
        of_tile = at.reshape(*at.shape[:-1], -1, self.width) - first_word
        found = [jnp.where(of_tile == f, own[..., f : f + 1], 0) for f in range(few)]
        near = sum(found[1:], found[0])
        return near.reshape(*near.shape[:-2], -1)


def _gathered(x: jax.Array, tiles: Array) -> jax.Array:
    """[..., nk, bk] at some tiles, side by side: [..., n * bk]."""
    found = x.at[..., tiles, :].get(mode="promise_in_bounds")
    return found.reshape(*found.shape[:-2], -1)


def sides_of(mask: Mask, length: int, keys: int, heads: int, key_heads: int, bq: int, bk: int) -> tuple[Side, ...]:
    """The terms of a mask of `heads` query heads over `key_heads`, ready to be cut to key heads."""
    return tuple(_side(term, length, keys, heads, key_heads, bq, bk) for term in mask.terms())


def _by_key_head(x: Array, heads: int, key_heads: int) -> Array:
    """`[B, h, ...]` as [B, K or 1, g, ...]."""
    rest = x.shape[2:]
    if x.shape[1] in (1, key_heads):
        return x.reshape(x.shape[0], x.shape[1], 1, *rest)
    return x.reshape(x.shape[0], key_heads, heads // key_heads, *rest)


def _side(term: Mask, length: int, keys: int, heads: int, key_heads: int, bq: int, bk: int) -> Side:
    xp = numpy_if(term.known())
    split = lambda x: _by_key_head(by_head(x), heads, key_heads)
    of_rows = lambda x: None if x is None else _padded(split(x), 3, bq, 0, xp)
    of_keys = lambda x, fill: _cut(_padded(split(x), 3, bk, fill, xp), bk)
    start, end = term.interval(length, keys)
    axes = tuple((of_keys(axis.key, NEVER), of_rows(axis.lo), of_rows(axis.hi)) for axis in term.axes)
    if term.groups is None:
        return Side(of_rows(start), of_rows(end), axes, None, None, None, bk, 1)
    group = of_keys(term.groups.known_group(), -1)
    bits, shared = _bits(term.groups, length, bq, xp)
    consecutive = term.groups.size is not None and group.shape[2] == 1
    first_word = None
    if consecutive:
        first = xp.where(group < 0, NEVER, group).min(-1)
        first_word = xp.where(first == NEVER, 0, first) >> 5
    return Side(of_rows(start), of_rows(end), axes, group, split(bits), first_word, bk, shared)


def _bits(groups: Groups, length: int, bq: int, xp) -> tuple[Array, int]:
    """The bits [B, h, rows / shared, W], and `Side.shared`."""
    if groups.rows % bq == 0:
        return groups.bits, groups.rows
    bits = xp.repeat(groups.bits, groups.rows, axis=2)[:, :, :length]
    return _padded(bits, 2, bq, 0, xp), 1


def _padded(x: Array, axis: int, size: int, fill: int, xp) -> Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % size)
    return xp.pad(x, pad, constant_values=fill)


def _cut(x: Array, size: int) -> Array:
    return x.reshape(*x.shape[:-1], -1, size)
