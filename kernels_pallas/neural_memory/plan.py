"""Groups: the runs of positions that a kernel takes at once, so that chunks begin with their documents.

A group is either up to `rows` positions of one document, from the beginning of one of its chunks, or several short
documents (`shortest`), of at most a chunk each, whole, from the first one's beginning. So all positions of a group
start from the same weights, and every slice of `chunk` positions takes its gradients at the weights before the slice,
or, with several documents, at the initial ones. Where the row ends inside a chunk that chunk is a group of its own: the
state then has its first weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CONTINUES, BEGINS, SEVERAL = 0, 1, 2  # a document; one; several short ones


def shortest(chunk: int, rows: int) -> int:
    """How long documents are at most that share a group: two of them fit."""
    return min(chunk, rows // 2)


def bound(length: int, chunk: int, rows: int) -> int:
    """How many groups the documents of a row can need."""
    size = shortest(chunk, rows)
    return min(length, 2 * (length // size) + 5)


def groups(
    position_BT: jax.Array, first_B: jax.Array, chunk: int, rows: int, *, packed: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First positions [B, N + 1] (T behind the last), kinds [B, N], and the position at which each one's document
    began [B, T] (negative: before the row).

    Args:
      position_BT: int32, of each in its document; 0 begins one.
      first_B: where groups begin; if that is inside a document, at the beginning of one of its chunks.
      packed: False: a row is one document from its beginning, so that it has fewer groups.
    """
    B, T = position_BT.shape
    t = jnp.arange(T, dtype=jnp.int32)[None]
    new = position_BT == 0
    begin = t - position_BT
    shifted = lambda x, fill: jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=fill)
    following = jax.lax.cummin(jnp.where(new, t, T), axis=1, reverse=True)
    end = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    size = shortest(chunk, rows)
    short = (begin >= 0) & (end - begin <= size)
    # Short documents that begin within so many positions end within `rows` of the first of them.
    room = rows - size + 1
    run = jax.lax.cummax(jnp.where(new & short & ~shifted(short, False), t, 0), axis=1)
    cell = (begin - run) // room
    opens = new & short & ((run == t) | (cell != shifted(cell, -1)))
    origin = jnp.where(begin < 0, first_B[:, None], begin)
    rest = (position_BT[:, -1:] + 1) % chunk
    cut = (t == T - rest) & (rest > 0) & (begin == begin[:, -1:])
    start = jnp.where(short, opens, ((t - origin) % rows == 0) | cut) & (t >= first_B[:, None])
    N = bound(T, chunk, rows) if packed else min(T, T // rows + 2)
    starts = jnp.sort(jnp.where(start, t, T), axis=1)[:, :N]
    starts = jnp.pad(starts, ((0, 0), (0, N + 1 - starts.shape[1])), constant_values=T)
    kind = jnp.where(new, jnp.where(short, SEVERAL, BEGINS), CONTINUES)
    kinds = jnp.take_along_axis(kind, jnp.minimum(starts[:, :-1], T - 1), axis=1)
    return starts, kinds, begin


def by_segment(starts: jax.Array, segment: int, segments: int, *, of_ends: bool) -> jax.Array:
    """[B, segments + 1]: the first group of each segment, of those that begin in it, or that end in it."""
    T = segments * segment
    real = starts[:, :-1] < starts[:, 1:]
    at = starts[:, 1:] - 1 if of_ends else starts[:, :-1]
    at = jnp.where(real, at, T)
    edges = jnp.arange(segments + 1, dtype=jnp.int32) * segment
    return jnp.sum((at[:, None] < edges[:, None]).astype(jnp.int32), axis=-1)
