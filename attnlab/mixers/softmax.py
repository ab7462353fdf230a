"""Softmax attention: multi-head, grouped-query, multi-query, with a window, sinks, a soft-cap and QK-norm as knobs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.mixers.base import Capabilities, HeadMixer, MixerConfig, MixerOutput, Sequence, knob, register
from attnlab.mixers.parts import Linear, RMSNorm, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.ops.attention import ATTENTION
from attnlab.ops.cached_attention import CACHED_ATTENTION
from attnlab.ops.keys_values import Cached, KeysValues, Whole
from attnlab.ops.masks import Mask, mask_for_extension, mask_from_segments, mean_visible_keys
from attnlab.ops.rope import rope


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(MixerConfig):
    """Knobs of softmax attention."""

    heads: int = knob(4, "query heads H", other=(2,))
    kv_heads: int | None = knob(
        None, "key/value heads K, a divisor of heads; none: K = H; 1: multi-query", other=(1, 2)
    )
    head_width: int | None = knob(None, "head width d, even; none: width / heads", other=(6,))
    causal: bool = knob(True, "whether a position sees only itself and those before", other=(False,))
    window: int | None = knob(None, "keys that a query sees, itself included; none: all before it", other=(3,))
    sinks: bool = knob(False, "a learned logit per head that takes weight and gives nothing", other=(True,))
    soft_cap: float | None = knob(None, "c in c * tanh(logits / c); none: no cap", other=(2.0,))
    qk_norm: bool = knob(False, "RMSNorm over each head of queries and keys, before RoPE", other=(True,))
    rope_base: float | None = knob(10_000.0, "base of the rotary embedding; none: no positions", other=(100.0, None))
    impl: str = knob("auto", f"implementation of the op: {', '.join(ATTENTION.names())}", other=("definition",))
    decode_impl: str = knob("auto", "implementation of the op over a cache: "
                            f"{', '.join(CACHED_ATTENTION.names())}", other=("definition",))  # fmt: skip

    def __post_init__(self) -> None:
        need = config_lib.require
        need(self.heads >= 1, "heads", self.heads, "1 or more")
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        need(
            kv_heads >= 1 and self.heads % kv_heads == 0,
            "kv_heads",
            kv_heads,
            f"divisors of heads ({self.heads})",
        )
        if self.head_width is not None:
            need(self.head_width >= 2 and self.head_width % 2 == 0, "head_width", self.head_width, "even, 2 or more")
        if self.window is not None:
            need(self.window >= 1, "window", self.window, "1 or more, or none")
            need(self.causal, "causal", self.causal, "true where window is set")
        if self.soft_cap is not None:
            need(self.soft_cap > 0, "soft_cap", self.soft_cap, "above 0, or none")
        if self.rope_base is not None:
            need(self.rope_base > 1, "rope_base", self.rope_base, "above 1, or none")
        config_lib.require_choice("impl", self.impl, ATTENTION.names())
        config_lib.require_choice("decode_impl", self.decode_impl, CACHED_ATTENTION.names())

    def head_dim(self, width: int) -> int:
        """Head width d in a model of the given width; ConfigError if the heads do not divide it."""
        if self.head_width is not None:
            return self.head_width
        if width % self.heads or (width // self.heads) % 2:
            raise ConfigError(
                f"heads = {self.heads} does not divide width = {width} into even head widths; "
                "allowed: another number of heads, or head_width set"
            )
        return width // self.heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values seen so far.

    Attributes:
      k, v: [B * K, S, d], head k of sequence b in row b * K + k: the shape that products take, so that a step changes
        one slot in place where it would else copy the cache. Without a window S is the maximal length and slot j holds
        position j; with a window w the S = w - 1 slots hold the newest keys, the last slot the newest.
      length: int32 scalar, positions seen.
      start: [B] int32, index of the first position of the current document.
      segment: [B] int32, id of the current document, -1 before the first position.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    start: jax.Array
    segment: jax.Array


@register("softmax")
class Softmax(HeadMixer):
    """`softmax(q k^T / sqrt(d)) v` per head, then a projection (Vaswani et al. 2017, eq. 1 and section 3.2.2)."""

    Config = SoftmaxConfig
    capabilities = Capabilities(causal=True, bidirectional=True, streaming=True)
    context = "keys and values are gathered, queries dealt out evenly"
    paper = "Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762"
    implementations = ATTENTION.table
    variants = (
        {"kv_heads": 2, "window": 4, "sinks": True, "soft_cap": 3.0, "qk_norm": True},
        {"kv_heads": 1, "causal": False, "sinks": True},
    )

    def __init__(self, config: SoftmaxConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config, self.dtype = config, dtype
        self.head_dim = config.head_dim(width)
        self.kv_heads = config.kv_heads or config.heads
        q_width, kv_width = config.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q = Linear(width, q_width, ("embed", "heads"), rngs=rngs, dtype=dtype)
        self.k = Linear(width, kv_width, ("embed", "kv_heads"), rngs=rngs, dtype=dtype)
        self.v = Linear(width, kv_width, ("embed", "kv_heads"), rngs=rngs, dtype=dtype)
        self.out = Linear(q_width, width, ("heads", "embed"), rngs=rngs, dtype=dtype)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, ("head",), dtype=dtype)
            self.k_norm = RMSNorm(self.head_dim, ("head",), dtype=dtype)
        if config.sinks:
            self.sinks = param(jnp.zeros((config.heads,), param_dtype(dtype)), axes=("heads",), role=Role.BIAS)

    # Hooks for mixers that change one place of the layer (see gated.py).

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, H, d], k [B, T, K, d], v [B, T, K, d] of x [B, T, D], before QK-norm and RoPE."""
        heads = lambda y: y.reshape(*x.shape[:2], -1, self.head_dim)
        return heads(self.q(x)), heads(self.k(x)), heads(self.v(x))

    def attend(self, q: jax.Array, kv: KeysValues, mask: Mask, x: jax.Array) -> MixerOutput:
        """Heads' outputs [B, T, H, d] from positioned queries, what they attend to, and x [B, T, D]."""
        c = self.config
        sinks = self.sinks[...] if c.sinks else None
        options = {"impl": c.impl, "decode_impl": c.decode_impl}
        return MixerOutput(kv.attend(q, mask, soft_cap=c.soft_cap, sinks_H=sinks, **options))

    def combine(self, o_BTHe: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(o_BTHe.reshape(*x.shape[:2], -1))

    # The contract.

    def heads(self, x: jax.Array, seq: Sequence, state: KVCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        q, k, v = self.positioned(x, seq)
        if state is not None:
            return self._extended(q, k, v, x, seq, state)
        c = self.config
        mask = mask_from_segments(seq.segments, x.shape[1], causal=c.causal, window=c.window)
        return self.attend(q, Whole(k, v), mask, x)

    def init_state(self, batch: int, max_length: int, dtype: Any = jnp.float32) -> KVCache:
        if not self.config.causal:
            raise UnsupportedPattern(f"mixer {self.name!r} with causal=False does not stream")
        slots = max_length if self._rolling_slots(max_length) is None else self._rolling_slots(max_length)
        shape = (batch * self.kv_heads, slots, self.head_dim)
        return KVCache(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            length=jnp.zeros((), jnp.int32),
            start=jnp.zeros((batch,), jnp.int32),
            segment=jnp.full((batch,), -1, jnp.int32),
        )

    @classmethod
    def flops(cls, config: SoftmaxConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, kv_heads = config.head_dim(width), config.kv_heads or config.heads
        span = mean_visible_keys(length, config.causal, config.window)
        return {
            "projections": 2.0 * width * d * (2 * config.heads + 2 * kv_heads),
            "attention": 4.0 * config.heads * d * span,
        }, span

    def positioned(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`project`, then QK-norm and RoPE."""
        q, k, v = self.project(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope_base is not None:
            q, k = (rope(y, seq.positions, self.config.rope_base) for y in (q, k))
        return q, k, v

    # Inside.

    def _extended(
        self, q: jax.Array, k: jax.Array, v: jax.Array, x: jax.Array, seq: Sequence, state: KVCache
    ) -> MixerOutput:
        batch, new = x.shape[:2]
        slots = state.k.shape[1]
        index_T = state.length + jnp.arange(new, dtype=jnp.int32)
        segments = jnp.ones((batch, new), jnp.int32) if seq.segments is None else seq.segments
        start = _document_starts(segments, index_T, state)

        rows = lambda y, cache: y.swapaxes(1, 2).reshape(-1, new, self.head_dim).astype(cache.dtype)
        k, v = rows(k, state.k), rows(v, state.v)
        rolling = self._is_rolling(slots)
        if rolling:
            keys, values = jnp.concatenate([state.k, k], axis=1), jnp.concatenate([state.v, v], axis=1)
            k_cache, v_cache = keys[:, new:], values[:, new:]
            first = jnp.int32(slots)
        else:
            put = lambda cache, y: jax.lax.dynamic_update_slice_in_dim(cache, y, state.length, axis=1)
            keys, values = k_cache, v_cache = put(state.k, k), put(state.v, v)
            first = state.length
        # Slots are counted from the first key at hand; a padding row sees nothing.
        own_start = jnp.where(segments == 0, index_T + 1, start) - (state.length - first)
        mask = mask_for_extension(first, new, own_start, window=self.config.window)
        out = self.attend(q, Cached(keys.astype(q.dtype), values.astype(q.dtype)), mask, x)
        o = out.y
        if not rolling:
            o = jnp.where(state.length + new <= slots, o, jnp.nan)
        cache = KVCache(k_cache, v_cache, state.length + new, start[:, -1], segments[:, -1])
        return dataclasses.replace(out, y=o, state=cache)

    def _rolling_slots(self, max_length: int) -> int | None:
        window = self.config.window
        return window - 1 if window is not None and window <= max_length else None

    def _is_rolling(self, slots: int) -> bool:
        return self.config.window is not None and slots == self.config.window - 1


def _document_starts(segments_BT: jax.Array, index_T: jax.Array, state: KVCache) -> jax.Array:
    """[B, T] index of the first position of each new position's document."""
    before = jnp.concatenate([state.segment[:, None], segments_BT[:, :-1]], axis=1)
    own_start = jnp.where(segments_BT != before, index_T[None], 0)
    return jnp.maximum(jax.lax.cummax(own_start, axis=1), state.start[:, None])
