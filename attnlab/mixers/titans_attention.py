"""The attention beside or behind a Titans memory: a sliding window, and persistent keys that every query sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Sequence
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.ops.keys_values import Cached, KeysValues, Whole
from attnlab.ops.masks import Mask, mask_for_extension, mask_from_segments
from attnlab.ops.rope import rope


class Attention(nnx.Module):
    """Queries, keys and values, positioned, and the persistent keys and values [N, H, d] where there are any."""

    def __init__(self, config: Any, fan_in: int, head_dim: int, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.head_dim = config, head_dim
        width = config.heads * head_dim
        self.q, self.k, self.v = (Linear(fan_in, width, ("embed", "heads"), rngs=rngs, dtype=dtype) for _ in range(3))
        if config.persistent:
            shape = (2, config.persistent, config.heads, head_dim)
            rows = jax.random.normal(rngs.params(), shape, param_dtype(dtype))
            self.persistent = param(rows, axes=("kind", "persistent", "heads", "head"), role=Role.TOKENS)

    def positioned(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v [B, T, H, d] of x [B, T, fan_in]."""
        q, k, v = (p(x).reshape(*x.shape[:2], -1, self.head_dim) for p in (self.q, self.k, self.v))
        return self.rotated(q, positions), self.rotated(k, positions), v

    def rotated(self, x_BTHd: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys after RoPE."""
        base = self.config.rope_base
        return x_BTHd if base is None else rope(x_BTHd, positions, base)

    def whole(self, x: jax.Array, seq: Sequence) -> jax.Array:
        """Heads' outputs [B, T, H, d] over whole sequences."""
        q, k, v = self.positioned(x, seq.positions)
        mask = mask_from_segments(seq.segments, x.shape[1], causal=True, window=self.config.window)
        return self._attend(q, Whole(k, v), mask)

    def extended(
        self, x: jax.Array, seq: Sequence, position_BT: jax.Array, cache: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Heads' outputs of the next positions, and the newest keys and values [B * H, window - 1, d] after them.

        `position_BT` counts from the document's beginning in the stream.
        """
        new, slots = x.shape[1], cache[0].shape[1]
        q, k, v = self.positioned(x, seq.positions)
        rows = lambda y, old: jnp.concatenate(
            [old, y.swapaxes(1, 2).reshape(-1, new, self.head_dim).astype(old.dtype)], axis=1
        )
        keys, values = rows(k, cache[0]), rows(v, cache[1])
        start_BT = slots + jnp.arange(new, dtype=jnp.int32) - position_BT
        if seq.segments is not None:
            start_BT = jnp.where(seq.segments == 0, slots + new, start_BT)
        mask = mask_for_extension(slots, new, start_BT, window=self.config.window)
        o = self._attend(q, Cached(keys.astype(q.dtype), values.astype(q.dtype)), mask)
        return o, (keys[:, new:], values[:, new:])

    def cache(self, batch: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The keys and values before the first position."""
        empty = jnp.zeros((batch * self.config.heads, self.config.window - 1, self.head_dim), dtype)
        return empty, empty

    def _attend(self, q: jax.Array, kv: KeysValues, mask: Mask) -> jax.Array:
        """Softmax attention, with the persistent keys in the same softmax.

        They are a sink of the window's softmax, whose logit is 0 when the log-sum-exp of their logits is taken off all
        others through one more channel; another channel of ones tells the weight that remains for them.
        """
        impls = dict.fromkeys(("impl", "decode_impl"), "definition" if self.config.impl == "definition" else "auto")
        if not self.config.persistent:
            return kv.attend(q, mask, **impls)
        wide, scale = param_dtype(q.dtype), self.head_dim**-0.5
        keys, values = self.persistent[...].astype(wide)
        logits = jnp.einsum("bthd,nhd->bthn", q.astype(wide), keys) * scale
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        prefix = jnp.einsum("bthn,nhd->bthd", jnp.exp(logits - total), values)
        more = lambda y, column: jnp.concatenate([y.astype(wide), column], axis=-1)
        ones = lambda y: jnp.ones((*y.shape[:-1], 1), wide)
        more_kv = dataclasses.replace(kv, k=more(kv.k, ones(kv.k)), v=more(kv.v, ones(kv.v)))
        sinks = jnp.zeros((self.config.heads,), wide)
        o = more_kv.attend(more(q, -total / scale), mask, scale=scale, sinks_H=sinks, **impls)
        return (o[..., :-1] + (1 - o[..., -1:]) * prefix).astype(q.dtype)
