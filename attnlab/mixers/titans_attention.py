"""The attention beside or behind a Titans memory: a sliding window, and persistent keys that every query sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.heads import split_heads
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role, drawn, normal
from attnlab.mixers.sequence import Sequence
from attnlab.ops.keys_values import KeysValues, RollingCache, Whole, empty_cache
from attnlab.ops.masks import Mask
from attnlab.ops.rope import rope


class Attention(nnx.Module):
    """Queries, keys and values, positioned, and the persistent keys and values [N, H, d] where there are any."""

    def __init__(self, config: Any, fan_in: int, head_dim: int, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.head_dim = config, head_dim
        width = config.heads * head_dim
        options = {"rngs": rngs, "dtype": dtype, "bias": config.bias != "none"}
        self.q, self.k, self.v = (Linear(fan_in, width, ("embed", "heads"), **options) for _ in range(3))
        if config.persistent:
            shape = (2, config.persistent, config.heads, head_dim)
            axes = ("kind", "persistent", "heads", "head")
            self.persistent = drawn(rngs, normal, shape, param_dtype(dtype), 1.0, axes=axes, role=Role.TOKENS)

    def positioned(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v [B, T, H, d] of x [B, T, fan_in]."""
        q, k, v = (split_heads(y(x), self.head_dim) for y in (self.q, self.k, self.v))
        return self.rotated(q, positions), self.rotated(k, positions), v

    def rotated(self, x_BTHd: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys after RoPE."""
        base = self.config.rope_base
        return x_BTHd if base is None else rope(x_BTHd, positions, base)

    def __call__(
        self, x: jax.Array, seq: Sequence, cache: RollingCache | None = None
    ) -> tuple[jax.Array, RollingCache | None]:
        """Heads' outputs [B, T, H, d] over whole sequences, or from the cache on, and the cache after them."""
        q, k, v = self.positioned(x, seq.positions)
        window = self.config.window
        if cache is None:
            return self._attend(q, Whole(k, v), seq.mask(causal=True, window=window)), None
        cache, kv, mask = cache.append(k, v, seq.offsets, seq.padding, window)
        return self._attend(q, kv, mask), cache

    def cache(self, batch: int, dtype: Any) -> RollingCache:
        """The keys and values before the first position."""
        c = self.config
        return empty_cache(batch, c.heads, self.head_dim, c.window, dtype, window=c.window)

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
