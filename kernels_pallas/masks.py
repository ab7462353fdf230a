"""The one form of mask that kernels know: query row `t` sees the keys `starts[t] <= s < ends[t]`.

Causal attention, windows, packed documents, queries over a cache and gathered rows are all such intervals. A tile of
scores (some rows against some keys) is empty, full or partial; which one follows from the intervals' extremes over its
rows. All of it is jnp: intervals may be traced.

Shapes: `B` batch, or 1 where all of it shares its intervals; `T` rows, `S` keys, `N` tiles of rows. int32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

EMPTY, PARTIAL, FULL = 0, 1, 2


def intervals(
    starts: jax.Array | None, ends: jax.Array | None, rows: int, keys: int
) -> tuple[jax.Array, jax.Array] | None:
    """Starts and ends [B, T] within 0 and `keys`, those of rows that see nothing 0 and 0; None where all see all."""
    if starts is None and ends is None:
        return None
    starts = jnp.zeros((1, rows), jnp.int32) if starts is None else jnp.clip(starts.astype(jnp.int32), 0, keys)
    ends = jnp.full((1, rows), keys, jnp.int32) if ends is None else jnp.clip(ends.astype(jnp.int32), 0, keys)
    some = ends > starts
    return jnp.where(some, starts, 0), jnp.where(some, ends, 0)


def visible(starts: jax.Array | None, ends: jax.Array | None, rows: int, keys: int) -> jax.Array:
    """The mask written out, bool [B, T, S]: for definitions."""
    found = intervals(starts, ends, rows, keys)
    if found is None:
        return jnp.ones((1, rows, keys), bool)
    s = jnp.arange(keys, dtype=jnp.int32)
    return (s >= found[0][..., None]) & (s < found[1][..., None])


def tile_ranges(starts: jax.Array, ends: jax.Array, rows: int, keys: int) -> jax.Array:
    """Which tiles of `keys` keys each tile of `rows` rows meets, [B, N, 4]: (first, full, full_end, end).

    Row tile `n` meets no key tile outside [first, end). Starts hide keys in tiles before `full` alone, ends in tiles
    from `full_end` on alone: those in [full, full_end) are full, all rows that see anything see all of the tile. The
    others are partial; some of them may be empty where intervals leave gaps. `full_end < full` is possible.

    Args:
      starts, ends: from `intervals`, [B, T], `T % rows == 0`.
      rows, keys: of a tile.
    """
    starts, ends = (x.reshape(x.shape[0], -1, rows) for x in (starts, ends))
    some = ends > starts
    most = jnp.iinfo(jnp.int32).max
    low = jnp.where(some, starts, most).min(-1)
    high = jnp.where(some, ends, 0).max(-1)
    last_start = jnp.where(some, starts, 0).max(-1)
    first_end = jnp.where(some, ends, most).min(-1)
    any_row = some.any(-1)
    first = jnp.where(any_row, low // keys, 0)
    end = jnp.where(any_row, -(-high // keys), 0)
    full = jnp.clip(-(-last_start // keys), first, end)
    full_end = jnp.clip(first_end // keys, first, end)
    return jnp.stack([first, full, full_end, end], -1)


def halved(ranges: jax.Array, bounds: tuple[jax.Array, jax.Array], rows: int, keys: int) -> jax.Array:
    """Whether a row tile meets more than one key tile, the last with its second half of rows alone: int32 [B, N].

    Args:
      ranges: of `tile_ranges`; `bounds`, `rows`, `keys` as there.
    """
    starts, ends = (x.reshape(x.shape[0], -1, 2, rows // 2)[:, :, 0] for x in bounds)
    first, last = ranges[..., 0], ranges[..., 3] - 1
    first_half_end = jnp.where(ends > starts, ends, 0).max(-1)
    return ((first_half_end <= last * keys) & (first < last)).astype(jnp.int32)


def tile_kinds(ranges: jax.Array, tiles: int) -> jax.Array:
    """`EMPTY`, `PARTIAL` or `FULL` of each of `tiles` key tiles, [B, N, tiles], from `tile_ranges`."""
    first, full, full_end, end = (ranges[..., i, None] for i in range(4))
    tile = jnp.arange(tiles, dtype=jnp.int32)
    met = (tile >= first) & (tile < end)
    return jnp.where(met, jnp.where((tile >= full) & (tile < full_end), FULL, PARTIAL), EMPTY)


def seen_keys(starts: jax.Array, ends: jax.Array, keys: int, *, low: bool = True, high: bool = True) -> jax.Array:
    """Which keys any row sees, bool [B, S]: those at which more intervals have begun than ended.

    Args:
      starts, ends: from `intervals`.
      keys: S.
      low, high: whether rows may begin after the first key, end before the last.
    """
    s = jnp.arange(keys, dtype=jnp.int32)[None]
    if not low:
        return s < ends.max(-1, keepdims=True)
    if not high:
        return s >= jnp.where(ends > starts, starts, keys).min(-1, keepdims=True)
    return jnp.cumsum(_counts(starts, keys) - _counts(ends, keys), -1) > 0


def _counts(x: jax.Array, size: int) -> jax.Array:
    """How often each number below `size` is in a row of x [B, T], float32 [B, size].

    A product of two digits' one-hot matrices: sorting and scattering, which would do, are slow on TPU.
    """
    base = 128
    digit = lambda x, n: (x[..., None] == jnp.arange(n, dtype=jnp.int32)).astype(jnp.bfloat16)
    high, low = digit(x // base, -(-size // base)), digit(x % base, base)
    counts = jnp.einsum("btm,btn->bmn", high, low, preferred_element_type=jnp.float32)
    return counts.reshape(x.shape[0], -1)[:, :size]
