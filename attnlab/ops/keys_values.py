"""Keys and values, and where they lie: whole sequences, or the rows of a cache. Attention reads either through them.

A cache takes the next keys and values by `append`, which gives the cache after them, what queries read, and their mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.attention import attention
from attnlab.ops.attention_gated import gated, gated_attention
from attnlab.ops.cached_attention import cached_attention
from attnlab.ops.gathered_attention import gathered_attention, selected_cached_attention
from attnlab.ops.head_subsets import interleaved
from attnlab.ops.masks import Mask, mask_for_extension


class KeysValues(Protocol):
    """What a layer attends to."""

    def attend(
        self,
        q_BTHd: jax.Array,
        mask: Mask,
        *,
        impl: str,
        decode_impl: str,
        gate_BTHe: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Softmax attention of queries: o_BTHe.

        Args:
          q_BTHd: queries.
          mask: which keys each sees.
          impl, decode_impl: of the op over whole sequences, and of that over a cache.
          gate_BTHe: logits of a gate, by whose logistic function the output is multiplied; None: there is none.
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
        gather_impl: str,
        **options: Any,
    ) -> jax.Array:
        """`attend`, of which only the heads `shared`, and of `routed` those wanted, are used.

        Args:
          wanted_BTE: bool, which of the E heads `routed` each position uses, at most `active`.
          key_heads: most key heads that one position's heads read.
          gather_impl: of the op of the heads wanted (`attnlab.ops.gathered_attention`).
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

    def attend(self, q_BTHd, mask, *, impl, decode_impl, gate_BTHe=None, **options) -> jax.Array:
        """See `KeysValues`."""
        del decode_impl
        if gate_BTHe is not None:
            return gated_attention(q_BTHd, self.k, self.v, mask, gate_BTHe, impl=impl, **options)
        return attention(q_BTHd, self.k, self.v, mask, impl=impl, **options)

    def attend_selected(
        self, q_BTHd, mask, wanted_BTE, *, shared, routed, active, key_heads, impl, decode_impl, gather_impl, **options
    ) -> jax.Array:
        """See `KeysValues`; 0 where a head is not wanted."""
        del shared, key_heads, decode_impl
        return gathered_attention(
            q_BTHd, self.k, self.v, mask, wanted_BTE,
            chosen=routed, active=active, impl=impl, gather_impl=gather_impl, **options,
        )  # fmt: skip

    def by_position(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """See `KeysValues`."""
        del batch
        return self.k, self.v


@dataclasses.dataclass(frozen=True)
class Reordered:
    """Whole sequences under a mask that has its rows and its keys in another order: position i is what `order[i]` was.

    Softmax attention is the same in any order; fewer tiles of a mask may be seen in one than in another.
    """

    kv: Whole
    order: np.ndarray

    def attend(self, q_BTHd, mask, *, gate_BTHe=None, **options) -> jax.Array:
        """See `KeysValues`."""
        gate_BTHe = None if gate_BTHe is None else self._taken(gate_BTHe)
        biases = {name: self._taken(options[name]) for name in ("key_bias_BSh", "query_bias_BTh") if name in options}
        return self._back(self._kv().attend(self._taken(q_BTHd), mask, gate_BTHe=gate_BTHe, **options | biases))

    def attend_selected(self, q_BTHd, mask, wanted_BTE, **options) -> jax.Array:
        """See `KeysValues`."""
        q, wanted = self._taken(q_BTHd), self._taken(wanted_BTE)
        return self._back(self._kv().attend_selected(q, mask, wanted, **options))

    def by_position(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """See `KeysValues`."""
        return self.kv.by_position(batch)

    def _kv(self) -> Whole:
        return Whole(self._taken(self.kv.k), self._taken(self.kv.v))

    def _taken(self, x: jax.Array) -> jax.Array:
        return x[:, self.order]

    def _back(self, x: jax.Array) -> jax.Array:
        return x[:, np.argsort(self.order)]


@dataclasses.dataclass(frozen=True)
class Cached:
    """Keys and values [B * K, S, ...] of a cache: head `k` of sequence `b` is row `b * K + k`.

    `fits` is a bool scalar: where it is false, what is read is NaN; None: it is true.
    """

    k: jax.Array
    v: jax.Array
    fits: jax.Array | None = None

    def attend(self, q_BTHd, mask, *, impl, decode_impl, gate_BTHe=None, **options) -> jax.Array:
        """See `KeysValues`."""
        del impl
        o = self._or_nan(cached_attention(q_BTHd, self.k, self.v, mask, impl=decode_impl, **options))
        return o if gate_BTHe is None else gated(o, gate_BTHe)

    def attend_selected(
        self, q_BTHd, mask, wanted_BTE, *, shared, routed, active, key_heads, impl, decode_impl, gather_impl, **options
    ) -> jax.Array:
        """See `KeysValues`. One query leaves out the key heads that no wanted head reads; more queries read all."""
        (B, T, H), K = q_BTHd.shape[:3], self.k.shape[0] // len(q_BTHd)
        del gather_impl
        sinks = options.pop("sinks_H", None)
        if T > 1 or key_heads == K or sinks is not None:
            return self.attend(q_BTHd, mask, impl=impl, decode_impl=decode_impl, sinks_H=sinks, **options)
        on = interleaved(jnp.ones((B, 1, len(shared), 1), bool), wanted_BTE[..., None], shared, routed)
        on_BK = on.reshape(-1, K, H // K).any(-1)
        return self._or_nan(
            selected_cached_attention(q_BTHd, self.k, self.v, mask, on_BK, reads=key_heads, impl=decode_impl, **options)
        )

    def by_position(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """See `KeysValues`."""
        rows = lambda x: x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2)
        return rows(self.k), self._or_nan(rows(self.v))

    def _or_nan(self, x: jax.Array) -> jax.Array:
        return x if self.fits is None else jnp.where(self.fits, x, jnp.nan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """All keys and values so far.

    Attributes:
      k, v: [B * K, S, d] and [B * K, S, e], head k of sequence b in row b * K + k: the shape that products take, so
        that a step changes one slot in place where it would else copy the cache. Slot j holds position j.
      length: int32 scalar, positions seen. More than S give NaN, as jit can raise nothing.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    def append(
        self, k_BTKd: jax.Array, v_BTKe: jax.Array, offset_BT: jax.Array, padding_BT: jax.Array | None,
        window: int | None = None,
    ) -> tuple[KVCache, Cached, Mask]:  # fmt: skip
        """The cache after the next T positions, what they read, and which of it each sees.

        Args:
          k_BTKd, v_BTKe: of these positions.
          offset_BT: positions of its document before each; those of other documents are not seen.
          padding_BT: positions that see nothing; None: none.
          window: keys that a position sees, itself included.
        """
        new, slots = k_BTKd.shape[1], self.k.shape[1]
        put = lambda old, y: jax.lax.dynamic_update_slice_in_dim(old, cache_rows(y, old.dtype), self.length, axis=1)
        cache = KVCache(put(self.k, k_BTKd), put(self.v, v_BTKe), self.length + new)
        mask = _mask(self.length, offset_BT, padding_BT, window)
        view = Cached(cache.k.astype(k_BTKd.dtype), cache.v.astype(v_BTKe.dtype), cache.length <= slots)
        return cache, view, mask

    def append_beside(self, old_BSc: jax.Array, new_BTc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a layer keeps of each key in an array of its own, as `append` of this cache orders the keys.

        Returns:
          what is kept after the next T positions, and what is read along with the keys of `append`.
        """
        kept = jax.lax.dynamic_update_slice_in_dim(old_BSc, new_BTc.astype(old_BSc.dtype), self.length, axis=1)
        return kept, kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RollingCache:
    """The newest w - 1 keys and values, for a window of w: k [B * K, w - 1, d], v [B * K, w - 1, e], newest last."""

    k: jax.Array
    v: jax.Array

    def append(
        self, k_BTKd: jax.Array, v_BTKe: jax.Array, offset_BT: jax.Array, padding_BT: jax.Array | None,
        window: int | None = None,
    ) -> tuple[RollingCache, Cached, Mask]:  # fmt: skip
        """As `KVCache.append`."""
        new, slots = k_BTKd.shape[1], self.k.shape[1]
        k, v = (
            jnp.concatenate([old, cache_rows(y, old.dtype)], axis=1) for old, y in ((self.k, k_BTKd), (self.v, v_BTKe))
        )
        mask = _mask(slots, offset_BT, padding_BT, window)
        view = Cached(k.astype(k_BTKd.dtype), v.astype(v_BTKe.dtype))
        return RollingCache(k[:, new:], v[:, new:]), view, mask

    def append_beside(self, old_BSc: jax.Array, new_BTc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `KVCache.append_beside`."""
        read = jnp.concatenate([old_BSc, new_BTc.astype(old_BSc.dtype)], axis=1)
        return read[:, new_BTc.shape[1] :], read


def empty_cache(
    batch: int, heads: int, width: int, max_length: int, dtype: Any,
    *, window: int | None = None, value_width: int | None = None,
) -> KVCache | RollingCache:  # fmt: skip
    """The cache before the first position: a rolling one where a window is no longer than `max_length`.

    Values are as wide as keys where `value_width` is None; 0: there are none.
    """
    rolling = window is not None and window <= max_length
    slots = batch * heads, window - 1 if rolling else max_length
    empty = [jnp.zeros((*slots, n), dtype) for n in (width, width if value_width is None else value_width)]
    return RollingCache(*empty) if rolling else KVCache(*empty, jnp.zeros((), jnp.int32))


def cache_rows(y_BTKd: jax.Array, dtype: Any) -> jax.Array:
    """Keys or values as the rows [B * K, T, d] of a cache."""
    B, T, K, d = y_BTKd.shape  # values may be 0 wide, where keys are all that is kept
    return y_BTKd.swapaxes(1, 2).reshape(B * K, T, d).astype(dtype)


def _mask(first: jax.Array | int, offset_BT: jax.Array, padding_BT: jax.Array | None, window: int | None) -> Mask:
    """Of queries of which the first is key `first` of those at hand."""
    new = offset_BT.shape[1]
    index_T = first + jnp.arange(new, dtype=jnp.int32)
    start_BT = index_T - offset_BT
    if padding_BT is not None:
        start_BT = jnp.where(padding_BT, index_T + 1, start_BT)
    return mask_for_extension(first, new, start_BT, window=window)
