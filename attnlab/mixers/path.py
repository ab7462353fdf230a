"""PaTH attention: positions are told by products of Householder-like matrices that depend on the data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.attention import AttentionConfig, head_norm
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadMixer, Projections, split_heads
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role, drawn
from attnlab.mixers.sequence import Sequence
from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.masks import mean_visible_keys
from attnlab.ops.norm import unit
from attnlab.ops.path_attention import PATH_ATTENTION, next_chunk, path_attention


@dataclasses.dataclass(frozen=True)
class PathConfig(AttentionConfig):
    """Knobs of PaTH attention: it looks back only, and no RoPE turns it."""

    causal: ClassVar[bool] = True
    window: ClassVar[int | None] = None
    rope_base: ClassVar[float | None] = None
    rope_width: ClassVar[int | None] = None

    qk_norm: bool = knob(False, "RMSNorm of each head's queries and keys", other=(True,))
    rank: int = knob(32, "rank of the projection to the vectors w", other=(3,), least=1)
    conv: int = knob(3, "positions that the convolution of w spans, itself included; 1: none", other=(1,), least=1)
    chunk: int = knob(64, "positions whose matrices are joined; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(PATH_ATTENTION)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PathCache:
    """All keys and values so far.

    Attributes:
      keys: [B, K, S, d], as all matrices up to now have left them, in fp32 (fp64 in a float64 model): each position
        rewrites them.
      values: [B, K, S, e].
      tail: [B, conv - 1, K d], the last inputs of the convolution.
      length: int32 scalar, positions seen. More than S give NaN, as jit can raise nothing.
    """

    keys: jax.Array
    values: jax.Array
    tail: jax.Array
    length: jax.Array


@register("path")
class Path(HeadMixer):
    """Softmax attention with logits `q_i^T H_i ... H_{j+1} k_j / sqrt(d)`, `H_t = I - beta_t w_t w_t^T` per key head.

    w is `silu(conv(x W_1 W_2))` divided by its length, beta = 2 sigmoid(x W_b + b). `attnlab.ops.path_attention` has
    the forms. A stream's keys are rewritten at every position, so that a query meets them as they lie.
    """

    Config = PathConfig
    capabilities = Capabilities()
    paper = (
        "Yang et al. 2025, PaTH Attention: Position Encoding via Accumulating Householder Transformations, "
        "arXiv:2505.16381"
    )
    implementations = PATH_ATTENTION.table
    variants = (
        {"kv_heads": 2, "chunk": 4, "qk_norm": True, "bias": "all"},
        {"kv_heads": 1, "rank": 3, "conv": 1, "chunk": 3},
    )

    def __init__(self, config: PathConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, d, K = Projections(config, width, rngs=rngs, dtype=dtype), self.head_dim, config.key_heads
        self.q = make.qkv(config.heads * d)
        self.k, self.v = (make.qkv(K * d, "kv_heads") for _ in range(2))
        self.w_down = make(config.rank, "gates")
        self.w_up = Linear(config.rank, K * d, ("gates", "kv_heads"), rngs=rngs, dtype=dtype)
        if config.conv > 1:
            bound = 1 / math.sqrt(config.conv)
            args = ((config.conv, K * d), param_dtype(dtype), -bound, bound)
            self.filters = drawn(rngs, jax.random.uniform, *args, axes=("conv", "kv_heads"), role=Role.TAPS)
        self.beta = make(K, "gates", bias=True)
        if config.qk_norm:
            self.q_norm, self.k_norm = (head_norm(config, d, dtype) for _ in range(2))
        self.out = make.out(config.heads * d)

    def heads(self, x: jax.Array, seq: Sequence, carried: PathCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        c = self.config
        q, k, v = (split_heads(y(x), self.head_dim) for y in (self.q, self.k, self.v))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        w, tail = self.vectors(x, seq, None if carried is None else carried.tail)
        logits = self.beta(x)
        beta = 2 * jax.nn.sigmoid(logits.astype(param_dtype(self.dtype)))
        arrays = q, k, v, w, beta
        if carried is None:
            return MixerOutput(path_attention(*arrays, seq.mask(causal=True), chunk=c.chunk, impl=c.impl))
        o, keys, values = self.streamed(arrays, seq, carried)
        length = carried.length + x.shape[1]
        o = jnp.where(length <= keys.shape[2], o, jnp.nan)
        return MixerOutput(o, PathCache(keys, values, tail.astype(carried.tail.dtype), length))

    def vectors(self, x: jax.Array, seq: Sequence, tail: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """w [B, T, K, d] of length 1, in fp32, and the convolution's tail."""
        w = self.w_up(self.w_down(x))
        if self.config.conv > 1:
            w, tail = causal_conv(w, self.filters[...], seq.documents, tail)
        return unit(split_heads(jax.nn.silu(w), self.head_dim)), tail

    def streamed(
        self, arrays: tuple[jax.Array, ...], seq: Sequence, cache: PathCache
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Heads' outputs of the next positions, chunk after chunk, and the keys and values after them."""
        T, C = seq.offsets.shape[1], 1 if self.config.impl == "definition" else self.config.chunk
        index = cache.length + jnp.arange(T, dtype=jnp.int32)
        start = jnp.where(seq.padding, index + 1, index - seq.offsets)
        arrays, many = (*arrays, start), T // C

        def step(carry, of_chunk):
            keys, values, first = carry
            o, keys, values = next_chunk(*of_chunk, first, keys, values)
            return (keys, values, first + of_chunk[0].shape[1]), o

        carry, parts = (cache.keys, cache.values, cache.length), []
        if many:
            chunks = [jnp.moveaxis(y[:, : many * C].reshape(len(y), many, C, *y.shape[2:]), 1, 0) for y in arrays]
            carry, o = jax.lax.scan(step, carry, tuple(chunks))
            parts.append(jnp.moveaxis(o, 0, 1).reshape(o.shape[1], many * C, *o.shape[3:]))
        if T % C:
            carry, o = step(carry, tuple(y[:, many * C :] for y in arrays))
            parts.append(o)
        return jnp.concatenate(parts, axis=1), *carry[:2]

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> PathCache:
        K, d = self.config.key_heads, self.head_dim
        slots = batch, K, max_length, d
        return PathCache(
            keys=jnp.zeros(slots, param_dtype(self.dtype)),
            values=jnp.zeros(slots, dtype),
            tail=jnp.zeros((batch, self.config.conv - 1, K * d), dtype),
            length=jnp.zeros((), jnp.int32),
        )

    @classmethod
    def flops(cls, config: PathConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, H, K = config.head_dim(width), config.heads, config.key_heads
        span = mean_visible_keys(length, True, None)
        return {
            "projections": 2.0 * width * d * 2 * (H + K),
            "vectors": 2.0 * config.rank * (width + K * d) + 2.0 * width * K,
            "attention": (4.0 * H + 2.0 * K) * d * span,
        }, span
