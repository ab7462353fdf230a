"""A stream's keys and values with summaries of their complete blocks: what layers that choose blocks carry on.

Shapes: as in `attnlab.ops.key_blocks`; `S` positions and `N` entries that there is room for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops.key_blocks import BlockPlaces, at_blocks
from attnlab.ops.keys_values import Cached, KVCache, empty_cache

# From keys and values of blocks, [B, M, n, K, d] each, to what is kept of each block, [B, M, ...].
Summary = Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache:
    """All keys and values so far, and of every complete block a summary, made once, when it completes.

    Attributes:
      kv: the keys and values.
      summaries: each [B, N, ...].
      entry: [B, S] int32, of each key the entry that its block has, or would get.
      done: [B] int32, entries so far.
    """

    kv: KVCache
    summaries: tuple[jax.Array, ...]
    entry: jax.Array
    done: jax.Array

    @classmethod
    def empty(
        cls, batch: int, heads: int, width: int, max_length: int, size: int, dtype: Any, summary: Summary
    ) -> BlockCache:
        """Before the first position, with room for `max_length`; heads: key heads K of width d."""
        entries = max(1, max_length // size)
        block = jax.ShapeDtypeStruct((batch, entries, size, heads, width), dtype)
        made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(summary, block, block))
        room = jnp.zeros((batch, max_length), jnp.int32)
        return cls(empty_cache(batch, heads, width, max_length, dtype), made, room, jnp.zeros((batch,), jnp.int32))

    def append(
        self, k_BTKd: jax.Array, v_BTKd: jax.Array, offset_BT: jax.Array, size: int, summary: Summary
    ) -> tuple[BlockCache, Cached, BlockPlaces]:
        """The cache after the next T positions, what they read, and where they stand; their first is key `kv.length`.

        Args:
          offset_BT: positions of its document before each.
          size: n.
          summary: as given to `empty`.
        """
        first, places = self.kv.length, BlockPlaces.of(offset_BT, size, self.done)
        kv, view, _ = self.kv.append(k_BTKd, v_BTKd, offset_BT, None)
        entry = jax.lax.dynamic_update_slice_in_dim(self.entry, places.entry, first, axis=1)
        last, slot = places.last_positions()
        by_position = (x.reshape(len(k_BTKd), -1, *x.shape[1:]).swapaxes(1, 2) for x in (view.k, view.v))
        made = summary(*(at_blocks(x, first + last, size) for x in by_position))
        rows = jnp.arange(len(k_BTKd))[:, None]
        put = lambda old, new: old.at[rows, slot].set(new.astype(old.dtype), mode="drop")
        return BlockCache(kv, tuple(map(put, self.summaries, made)), entry, places.done), view, places
