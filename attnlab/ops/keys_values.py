"""Keys and values, and where they lie: whole sequences, or the rows of a cache. Attention reads either through them."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from attnlab.ops.attention import attention
from attnlab.ops.cached_attention import cached_attention
from attnlab.ops.gathered_attention import gathered_attention, interleaved, selected_cached_attention
from attnlab.ops.masks import Mask


class KeysValues(Protocol):
    """What a layer attends to."""

    def attend(self, q_BTHd: jax.Array, mask: Mask, *, impl: str, decode_impl: str, **options: Any) -> jax.Array:
        """Softmax attention of queries: o_BTHe.

        Args:
          q_BTHd: queries.
          mask: which keys each sees.
          impl, decode_impl: of the op over whole sequences, and of that over a cache.
          options: as in `attnlab.ops.attention`.
        """
        ...

    def attend_selected(
        self,
        q_BTHd: jax.Array,
        mask: Mask,
        wanted_BTE: jax.Array,
        *,
        shared: tuple[int, ...],
        routed: tuple[int, ...],
        active: int,
        key_heads: int,
        impl: str,
        decode_impl: str,
        **options: Any,
    ) -> jax.Array:
        """`attend`, of which only the heads `shared`, and of `routed` those wanted, are used.

        Args:
          wanted_BTE: bool, which of the E heads `routed` each position uses, at most `active`.
          key_heads: most key heads that one position's heads read.
        """
        ...

    def by_position(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, K, d] and values [B, S, K, e] of `batch` sequences."""
        ...


@dataclasses.dataclass(frozen=True)
class Whole:
    """Keys and values [B, S, K, ...] of whole sequences."""

    k: jax.Array
    v: jax.Array

    def attend(self, q_BTHd: jax.Array, mask: Mask, *, impl: str, decode_impl: str, **options: Any) -> jax.Array:
        """See `KeysValues`."""
        del decode_impl
        return attention(q_BTHd, self.k, self.v, mask, impl=impl, **options)

    def attend_selected(
        self, q_BTHd, mask, wanted_BTE, *, shared, routed, active, key_heads, impl, decode_impl, **options
    ) -> jax.Array:
        """See `KeysValues`; 0 where a head is not wanted."""
        del shared, key_heads, decode_impl
        return gathered_attention(
            q_BTHd, self.k, self.v, mask, wanted_BTE, chosen=routed, active=active, impl=impl, **options
        )

    def by_position(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """See `KeysValues`."""
        del batch
        return self.k, self.v


@dataclasses.dataclass(frozen=True)
class Cached:
    """Keys and values [B * K, S, ...] of a cache: head `k` of sequence `b` is row `b * K + k`."""

    k: jax.Array
    v: jax.Array

    def attend(self, q_BTHd: jax.Array, mask: Mask, *, impl: str, decode_impl: str, **options: Any) -> jax.Array:
        """See `KeysValues`."""
        del impl
        return cached_attention(q_BTHd, self.k, self.v, mask, impl=decode_impl, **options)

    def attend_selected(
        self, q_BTHd, mask, wanted_BTE, *, shared, routed, active, key_heads, impl, decode_impl, **options
    ) -> jax.Array:
        """See `KeysValues`. One query leaves out the key heads that no wanted head reads; more queries read all."""
        (B, T, H), K = q_BTHd.shape[:3], self.k.shape[0] // len(q_BTHd)
        sinks = options.pop("sinks_H", None)
        if T > 1 or key_heads == K or sinks is not None:
            return self.attend(q_BTHd, mask, impl=impl, decode_impl=decode_impl, sinks_H=sinks, **options)
        on = interleaved(jnp.ones((B, 1, len(shared), 1), bool), wanted_BTE[..., None], shared, routed)
        return selected_cached_attention(
            q_BTHd,
            self.k,
            self.v,
            mask,
            on.reshape(-1, K, H // K).any(-1),
            reads=key_heads,
            impl=decode_impl,
            **options,
        )

    def by_position(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """See `KeysValues`."""
        rows = lambda x: x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2)
        return rows(self.k), rows(self.v)
