"""PaTH attention: positions are told by products of Householder-like matrices that depend on the data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.attention import AttentionConfig, head_norm
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.forget_gate import log_left
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
    rope_scaling: ClassVar[Any] = None
    qk_norms = (False, True)

    qk_norm: bool = knob(False, "RMSNorm of each head's queries and keys", other=(True,))
    rank: int = knob(32, "rank of the projection to the vectors w", other=(3,), least=1)
    conv: int = knob(3, "positions that the convolution of w spans, itself included; 1: none", other=(1,), least=1)
    chunk: int = knob(64, "positions whose matrices are joined; changes only speed and memory", other=(4,), least=1)
    forget: bool = knob(
        False,
        "let logits fade by a forget gate sigmoid(x W_f + b) of each query head, as `fox` does (PaTH-FoX)",
        other=(True,),
    )
    gate_scale: float | None = knob(
        None,
        "what its logarithms are multiplied by; 1: as in `fox`; none: what logits are, 1 / sqrt(d), as in the authors' "
        "code",
        other=(1.0,),
        above=0,
    )
    impl: str = impl_knob(PATH_ATTENTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        read = self.forget or self.gate_scale is None
        config_lib.require(read, "gate_scale", self.gate_scale, "none where forget is false")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PathCache:
    """All keys and values so far, and what gates have left of each.

    Attributes:
      keys: [B, K, S, d], as all matrices up to now have left them, in fp32 (fp64 in a float64 model): each position
        rewrites them.
      values: [B, K, S, e].
      tail: [B, conv - 1, K d], the last inputs of the convolution.
      length: int32 scalar, positions seen. More than S give NaN, as jit can raise nothing.
      faded: [B, S, H], the logarithm of what is left of each times `gate_scale`, in the dtype of the keys; None: there
        is no gate.
    """

    keys: jax.Array
    values: jax.Array
    tail: jax.Array
    length: jax.Array
    faded: jax.Array | None


@register("path")
class Path(HeadMixer):
    """Softmax attention with logits `q_i^T H_i ... H_{j+1} k_j / sqrt(d)`, `H_t = I - beta_t w_t w_t^T` per key head.

    w is `silu(conv(x W_1 W_2))` divided by its length, beta = 2 sigmoid(x W_b + b). `attnlab.ops.path_attention` has
    the forms. A stream's keys are rewritten at every position, so that a query meets them as they lie. With `forget`
    logits have `gate_scale sum_{l = j+1..i} log f_l` more, f = sigmoid(x W_f + b) of each query head.
    """

    Config = PathConfig
    capabilities = Capabilities()
    paper = (
        "Yang et al. 2025, PaTH Attention: Position Encoding via Accumulating Householder Transformations, "
        "arXiv:2505.16381"
    )
    extension = (
        "w by a projection of low rank also where query heads share keys (the authors' code has a full one there), "
        "QK-norm of each head (theirs is of all heads at once), and values of gate_scale but 1 / sqrt(d) and 1"
    )
    implementations = PATH_ATTENTION.table
    variants = (
        {"kv_heads": 2, "chunk": 4, "qk_norm": True, "bias": "all", "forget": True},
        {"kv_heads": 1, "rank": 3, "conv": 1, "chunk": 3, "forget": True, "gate_scale": 1.0},
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
        if config.forget:
            self.forget = make(config.heads, "gates", bias=True)
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
        arrays, left = (q, k, v, w, beta), self.left(x, seq)
        if carried is None:
            mask, options = seq.mask(causal=True), {"chunk": c.chunk, "impl": c.impl}
            return MixerOutput(path_attention(*arrays, mask, left_BTH=left, **options))
        o, cache = self.streamed(arrays, left, seq, carried)
        o = jnp.where(cache.length <= cache.keys.shape[2], o, jnp.nan)
        return MixerOutput(o, dataclasses.replace(cache, tail=tail.astype(carried.tail.dtype)))

    def left(self, x: jax.Array, seq: Sequence) -> jax.Array | None:
        """What gates up to each position add to logits [B, T, H], in fp32; None: there is no gate."""
        if not self.config.forget:
            return None
        scale = 1 / math.sqrt(self.head_dim) if self.config.gate_scale is None else self.config.gate_scale
        return scale * log_left(self.forget(x).astype(param_dtype(self.dtype)), seq)

    def vectors(self, x: jax.Array, seq: Sequence, tail: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """w [B, T, K, d] of length 1, in fp32, and the convolution's tail."""
        w = self.w_up(self.w_down(x))
        if self.config.conv > 1:
            w, tail = causal_conv(w, self.filters[...], seq.documents, tail)
        return unit(split_heads(jax.nn.silu(w), self.head_dim)), tail

    def streamed(
        self, arrays: tuple[jax.Array, ...], left: jax.Array | None, seq: Sequence, cache: PathCache
    ) -> tuple[jax.Array, PathCache]:
        """Heads' outputs of the next positions, chunk after chunk, and the cache after them, its tail left as it is."""
        T, C = seq.offsets.shape[1], 1 if self.config.impl == "definition" else self.config.chunk
        index = cache.length + jnp.arange(T, dtype=jnp.int32)
        start = jnp.where(seq.padding, index + 1, index - seq.offsets)
        # Sums begin with these positions: of a key from before, minus what has been added behind it.
        of_keys = (
            None if left is None else jax.lax.dynamic_update_slice_in_dim(-cache.faded, left, cache.length, axis=1)
        )
        arrays, many = (*arrays, start, left), T // C

        def step(carry, of_chunk):
            keys, values, first = carry
            o, keys, values = next_chunk(*of_chunk, first, keys, values, of_keys)
            return (keys, values, first + of_chunk[0].shape[1]), o

        carry, parts = (cache.keys, cache.values, cache.length), []
        if many:
            cut = lambda y: jnp.moveaxis(y[:, : many * C].reshape(len(y), many, C, *y.shape[2:]), 1, 0)
            carry, o = jax.lax.scan(step, carry, jax.tree.map(cut, arrays))
            parts.append(jnp.moveaxis(o, 0, 1).reshape(o.shape[1], many * C, *o.shape[3:]))
        if T % C:
            carry, o = step(carry, jax.tree.map(lambda y: y[:, many * C :], arrays))
            parts.append(o)
        faded = None if left is None else left[:, -1:] - of_keys
        return jnp.concatenate(parts, axis=1), PathCache(*carry[:2], cache.tail, carry[2], faded)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> PathCache:
        K, d, wide = self.config.key_heads, self.head_dim, param_dtype(self.dtype)
        slots = batch, K, max_length, d
        return PathCache(
            keys=jnp.zeros(slots, wide),
            values=jnp.zeros(slots, dtype),
            tail=jnp.zeros((batch, self.config.conv - 1, K * d), dtype),
            length=jnp.zeros((), jnp.int32),
            faded=jnp.zeros((batch, max_length, self.config.heads), wide) if self.config.forget else None,
        )

    @classmethod
    def flops(cls, config: PathConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, H, K = config.head_dim(width), config.heads, config.key_heads
        span = mean_visible_keys(length, True, None)
        return {
            "projections": 2.0 * width * d * 2 * (H + K),
            "vectors": 2.0 * config.rank * (width + K * d) + 2.0 * width * K,
            "gates": 2.0 * width * H * config.forget,
            "attention": (4.0 * H + 2.0 * K) * d * span,
        }, span
