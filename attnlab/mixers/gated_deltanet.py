"""Gated DeltaNet: a linear memory per head that decays and that is corrected, not only added to, at every write."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections
from attnlab.mixers.parts import Linear, RMSNorm, param_dtype, time_steps
from attnlab.mixers.roles import Role, drawn
from attnlab.mixers.sequence import Sequence
from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.delta_rule import DELTA_RULE, chunked_flops, delta_rule
from attnlab.ops.norm import unit

_LARGEST_A = 16.0


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(HeadConfig):
    """Knobs of Gated DeltaNet; `head_width` is that of queries and keys."""

    key_heads: int | None = knob(
        None,
        "heads K of queries and keys, a divisor of heads; each serves heads / K neighbouring heads of values; "
        "none: heads",
        other=(2,),
        least=1,
    )
    expand: float = knob(1.0, "width of values in head widths, e / d", other=(2.0,), above=0)
    query_scale: float | None = knob(1.0, "factor on queries of length 1; none: 1 / sqrt(d)", other=(None,), above=0)
    conv: int = knob(
        4, "positions that the convolution of q, k and v spans, itself included; 1: none", other=(1,), least=1
    )
    gate: bool = knob(True, "multiply the normed outputs by silu(x W_g)", other=(False,))
    norm_epsilon: float = knob(1e-6, "added to the mean square in the norm", other=(0.1,), above=0, below=1)
    decay: bool = knob(True, "let the memory decay; false: DeltaNet", other=(False,))
    chunk: int = knob(64, "positions computed at once in training", other=(4,), least=1)
    impl: str = impl_knob(DELTA_RULE)

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.heads % (self.key_heads or self.heads) == 0
        config_lib.require(divides, "key_heads", self.key_heads, f"divisors of heads ({self.heads}), or none")

    def value_dim(self, width: int) -> int:
        """Width e of a head's values in a model of the given width; ConfigError if it is no integer."""
        d = self.head_dim(width)
        config_lib.require(
            self.expand * d == int(self.expand * d) >= 1, "expand", self.expand, f"multiples of 1 / {d}, the head width"
        )
        return int(self.expand * d)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState:
    """The memory and what the convolution still needs.

    Attributes:
      memory: [B, H, d, e], or of levels, [B, H, L - 1, d, e]; fp32 (fp64 in a float64 model).
      tail: [B, conv - 1, K * 2d + H * e], the last inputs of the convolution.
    """

    memory: jax.Array
    tail: jax.Array


class Decay(nnx.Module):
    """Log decays `-exp(A_log) * softplus(x W + dt_bias)` per head, [B, T, H], in fp32.

    As in Mamba-2: A is uniform in (0, 16], and softplus(dt_bias) log-uniform in [0.001, 0.1].
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype: Any):
        kind = param_dtype(dtype)
        self.linear = Linear(width, heads, ("embed", "gates"), rngs=rngs, dtype=dtype)
        self.a_log = drawn(rngs, _log_rates, heads, kind, axes=("gates",), role=Role.DECAY_RATE)
        self.dt_bias = drawn(rngs, time_steps, heads, kind, axes=("gates",), role=Role.DECAY_RATE)

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = self.linear(x)
        step = jax.nn.softplus(logits.astype(param_dtype(logits.dtype)) + self.dt_bias[...])
        return -jnp.exp(self.a_log[...]) * step


def _log_rates(key: jax.Array, heads: int, dtype: Any) -> jax.Array:
    """Logarithms of numbers uniform in (0, 16]."""
    return jnp.log(_LARGEST_A * (1 - jax.random.uniform(key, (heads,), dtype)))


@register("gated_deltanet")
class GatedDeltaNet(HeadMixer):
    """`S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T`, `o_t = S_t q_t` per head (section 3 of the paper).

    q, k and v are projections of x, convolved along the sequence, through SiLU; q and k are divided by their length.
    `a_t` is `Decay`'s, `beta_t = sigmoid(x W_b)`. Each head's output is normed by RMSNorm, whose scale all heads share,
    and gated by `silu(x W_g)`. Queries are not scaled by 1 / sqrt(d): the norm would take
    it out again, up to its epsilon, which is then as if d times as large.

    `expand` is 1 so that a layer costs nearest to one of softmax attention, 5 D^2 parameters against 4 D^2; hybrids
    such as InfiniteVL (head_width=128, expand=2) have 2.
    """

    Config = GatedDeltaNetConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the state is passed on with its transition"
    paper = "Yang et al. 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464"
    implementations = DELTA_RULE.table
    counted = "chunked"
    variants = (
        {"heads": 2, "head_width": 4, "expand": 1.5, "conv": 2, "chunk": 3},
        {"key_heads": 2, "query_scale": None, "chunk": 4},
    )

    def __init__(self, config: GatedDeltaNetConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        self.value_dim = config.value_dim(width)
        self.key_heads = config.key_heads or config.heads
        keys, values = self.key_heads * self.head_dim, config.heads * self.value_dim
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.q, self.k, self.v = make.qkv(keys), make.qkv(keys), make.qkv(values)
        if config.conv > 1:
            bound, shape = 1 / math.sqrt(config.conv), (config.conv, 2 * keys + values)
            args = (shape, param_dtype(dtype), -bound, bound)
            self.filters = drawn(rngs, jax.random.uniform, *args, axes=("conv", "heads"), role=Role.TAPS)
        self.beta = make(config.heads, "gates")
        if config.decay:
            self.log_decay = self.make_decay(width, rngs=rngs, dtype=dtype)
        self.norm = RMSNorm(self.value_dim, ("head",), dtype=dtype, epsilon=config.norm_epsilon)
        if config.gate:
            self.gate = self.make_gate(make)
        self.out = make.out(values)

    def make_decay(self, width: int, *, rngs: nnx.Rngs, dtype: Any) -> nnx.Module:
        """From x to log decays, as the op takes them."""
        return Decay(width, self.config.heads, rngs=rngs, dtype=dtype)

    def make_gate(self, make: Projections) -> nnx.Module:
        """From x to what `openness` makes gates of, [B, T, H e]."""
        return make(self.config.heads * self.value_dim)

    openness = staticmethod(jax.nn.silu)

    def strength(self, logits_BTH: jax.Array) -> jax.Array:
        """beta of its logits."""
        return jax.nn.sigmoid(logits_BTH)

    def heads(self, x: jax.Array, seq: Sequence, carried: DeltaState | None = None) -> MixerOutput:
        c, (B, T, _) = self.config, x.shape
        # One convolution for q, k and v, whose channels lie together key head by key head.
        qkv = jnp.concatenate([y(x).reshape(B, T, self.key_heads, -1) for y in (self.q, self.k, self.v)], axis=-1)
        tail = None if carried is None else carried.tail
        if c.conv > 1:
            flat, tail = causal_conv(qkv.reshape(B, T, -1), self.filters[...], seq.documents, tail)
            qkv = flat.reshape(qkv.shape)
        qk, v = jnp.split(jax.nn.silu(qkv), [2 * self.head_dim], axis=-1)
        q, k = (unit(y) for y in jnp.split(qk, 2, axis=-1))
        if c.query_scale != 1:
            q = q * (self.head_dim**-0.5 if c.query_scale is None else c.query_scale)
        if self.key_heads < c.heads:
            q, k = (jnp.repeat(y, c.heads // self.key_heads, axis=2) for y in (q, k))
            v = v.reshape(B, T, c.heads, -1)
        beta = self.strength(self.beta(x).astype(param_dtype(self.dtype)))
        log_decay = self.log_decay(x) if c.decay else jnp.zeros_like(beta)
        o, memory = self.recurrence(q, k, v, log_decay, beta, None if carried is None else carried.memory, x, seq)
        o = self.norm(o)
        if c.gate:
            o = o * self.openness(self.gate(x)).reshape(o.shape)
        if carried is None:
            return MixerOutput(o)
        return MixerOutput(o, DeltaState(memory, tail.astype(carried.tail.dtype)))

    def recurrence(
        self, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array, memory: Any,
        x: jax.Array, seq: Sequence,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """What queries [B, T, H, d] read after each write, [B, T, H, e] in the dtype of v, and the memory after the
        last position; from the layer's input x."""
        return delta_rule(
            q, k, v, log_decay, beta, documents_BT=seq.documents, state_BHde=memory, chunk=self.config.chunk,
            impl=self.config.impl,
        )  # fmt: skip

    def memory_shape(self, batch: int) -> tuple[int, ...]:
        """Of what `recurrence` hands on."""
        return batch, self.config.heads, self.head_dim, self.value_dim

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> DeltaState:
        H, d, e = self.config.heads, self.head_dim, self.value_dim
        return DeltaState(
            memory=jnp.zeros(self.memory_shape(batch), param_dtype(self.dtype)),
            tail=jnp.zeros((batch, self.config.conv - 1, self.key_heads * 2 * d + H * e), dtype),
        )

    @classmethod
    def flops(cls, config: GatedDeltaNetConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, d, e = config.heads, config.head_dim(width), config.value_dim(width)
        small = 2 if config.decay else 1
        return {
            "projections": 2.0 * width * ((config.key_heads or H) * 2 * d + H * (3 if config.gate else 2) * e),
            "gates": 2.0 * width * H * small,
            "memory": H * chunked_flops(config.chunk, length, d, e) / length,
        }, None
