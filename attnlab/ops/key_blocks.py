"""Blocks of consecutive keys, counted from each document's start: their means, and which of them each row chooses.

Only complete blocks have a number (their *entry*), in the order of the row, so that T positions have T // size of them
at most however documents lie. A block that its document leaves incomplete never gets one.

Shapes: `B` batch, `T` positions, `N` entries, `n` positions of a block, `h` heads: 1, key heads or query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops.masks import Groups, Mask

ROWS = 256  # whose scores against all blocks exist at one time


@dataclasses.dataclass(frozen=True)
class BlockPlaces:
    """Where positions stand among blocks, int32 [B, T]; B is 1 where all rows agree.

    Attributes:
      size: n.
      offset: positions of the document before it.
      entry: blocks of all documents that were complete before the position's own: the entry that its own would get.
      ends: bool, whether it is the last of its block.
    """

    size: int
    offset: jax.Array
    entry: jax.Array
    ends: jax.Array

    @classmethod
    def of(cls, offset_BT: jax.Array, size: int, done_B: jax.Array | None = None) -> BlockPlaces:
        """Of positions with so many of their document before them; `done_B`: entries before the first position."""
        ends = offset_BT % size == size - 1
        done = 0 if done_B is None else done_B[:, None]
        return cls(size, offset_BT, done + jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends, ends)

    @property
    def block(self) -> jax.Array:
        """Complete blocks of the position's document before its own: entries `entry - block` to `entry` are these."""
        return self.offset // self.size

    @property
    def done(self) -> jax.Array:
        """[B], entries after the last position."""
        return self.entry[:, -1] + self.ends[:, -1]

    def last_positions(self) -> tuple[jax.Array, jax.Array]:
        """Of the entries that these positions complete, in order: where each ends, and its number.

        Both int32 [B, M], M the most that there can be; behind the last the place is 0 and the number beyond all.
        """
        B, T = self.ends.shape
        most, rows = -(-T // self.size), jnp.arange(B)[:, None]
        rank = jnp.cumsum(self.ends, axis=1, dtype=jnp.int32) - 1
        slot, t = jnp.where(self.ends, rank, most), jnp.arange(T, dtype=jnp.int32)
        at = jnp.zeros((B, most), jnp.int32).at[rows, slot].set(t, mode="drop")
        none = jnp.full((B, most), jnp.iinfo(jnp.int32).max, jnp.int32)
        return at, none.at[rows, slot].set(jnp.broadcast_to(self.entry, (B, T)), mode="drop")

    def own_and_earlier(self, first: jax.Array | int = 0, padding_BT: jax.Array | None = None) -> tuple[Mask, Mask]:
        """Intervals of each row: of its own block up to it, and of its document before that block.

        Args:
          first: the key that the first row is.
          padding_BT: rows that see nothing; None: none.
        """
        index = first + jnp.arange(self.offset.shape[1], dtype=jnp.int32)[None]
        block = index - self.offset % self.size
        unseen = lambda start: start if padding_BT is None else jnp.where(padding_BT, index + 1, start)
        end = jnp.broadcast_to(index + 1, self.offset.shape)
        return Mask(unseen(block), end), Mask(unseen(index - self.offset), block)


def blocks_of(x_BTKd: jax.Array, places: BlockPlaces, *, one_document: bool) -> jax.Array:
    """[B, N, n, K, d]: what stands in the complete blocks of whole rows, N = T // n; anything behind the last.

    one_document: of every row, without padding.
    """
    n, T = places.size, x_BTKd.shape[1]
    N = T // n
    if one_document:
        return x_BTKd[:, : N * n].reshape(x_BTKd.shape[0], N, n, *x_BTKd.shape[2:])
    return at_blocks(x_BTKd, places.last_positions()[0][:, :N], n)


def at_blocks(x_BTKd: jax.Array, last_BM: jax.Array, size: int) -> jax.Array:
    """[B, M, n, K, d]: the `size` positions up to each last one."""
    at = jnp.maximum(last_BM[..., None] - (size - 1) + jnp.arange(size, dtype=jnp.int32), 0)
    return x_BTKd[jnp.arange(x_BTKd.shape[0])[:, None, None], at]


def mean_of_blocks(x_BMnKd: jax.Array) -> jax.Array:
    """Means over n, [B, M, K, d], in fp32 or wider: of a block bitwise the same among whatever others it stands.

    It adds halves, so that no program may choose another order: near ties of scores would else be resolved another way
    in a stream.
    """
    n = x_BMnKd.shape[2]
    x = x_BMnKd.astype(jnp.promote_types(x_BMnKd.dtype, jnp.float32))
    while (size := x.shape[2]) > 1:
        half = size // 2
        x = jnp.concatenate([x[:, :, :half] + x[:, :, half : 2 * half], x[:, :, 2 * half :]], axis=2)
    return x[:, :, 0] / n


def top(scores: jax.Array, valid: jax.Array, count: int) -> jax.Array:
    """Which are among the `count` >= 1 highest of the valid ones of [..., N], bool; of equal ones the first."""
    scores = jnp.where(valid, scores, -jnp.inf)
    least = jax.lax.top_k(scores, min(count, scores.shape[-1]))[0][..., -1:]
    above, equal = scores > least, scores == least
    room = count - above.sum(-1, keepdims=True, dtype=jnp.int32)
    return valid & (above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room)))


def by_rows(run: Callable[..., Any], *arrays_BT: jax.Array, rows: int = ROWS) -> Any:
    """`run(*arrays)`, where a row of the result [B, T, ...] needs that row of the arrays alone: `rows` at a time."""
    T = max(x.shape[1] for x in arrays_BT)
    if T <= rows:
        return run(*arrays_BT)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -T % rows)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda parts: run(*parts), tuple(map(cut, arrays_BT)))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :T], out)


def mask_of_chosen(interval: Mask, bits_BThW: jax.Array, entry_BS: jax.Array, own: Mask) -> Mask:
    """A row sees what `own` shows, and of its interval the keys of the blocks whose bits are set.

    Args:
      interval: no more than the row's own document, up to the row.
      bits_BThW: uint32, of `packed_bits` over entries.
      entry_BS: the entry that each key's block has, or would get (`BlockPlaces.entry`).
    """
    groups = Groups(entry_BS, jnp.moveaxis(bits_BThW, 2, 1), chosen=True)
    return dataclasses.replace(interval, groups=groups, either=own)
