"""Gated linear attention: a linear memory per head that forgets each channel of the keys at a rate of the input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import LowRank, RMSNorm, param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, flops_per_token, linear_recurrence


@dataclasses.dataclass(frozen=True)
class GLAConfig(HeadConfig):
    """Knobs of gated linear attention; `head_width` is e, that of values."""

    key_width: int | None = knob(
        None, "width d of a head's queries and keys; none: half a head's width of values", other=(3,), least=1
    )
    key_heads: int | None = knob(
        None,
        "heads K of keys, values and decays, a divisor of heads; each serves heads / K neighbouring heads of queries; "
        "none: heads",
        other=(2,),
        least=1,
    )
    rank: int = knob(16, "rank r of the projection to decays", other=(3,), least=1)
    temperature: float = knob(16.0, "tau, by which log decays are divided", other=(2.0,), above=0)
    gate: bool = knob(True, "multiply the normed outputs by silu(x W_g)", other=(False,))
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(LINEAR_RECURRENCE)

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.heads % (self.key_heads or self.heads) == 0
        config_lib.require(divides, "key_heads", self.key_heads, f"divisors of heads ({self.heads}), or none")

    def key_dim(self, width: int) -> int:
        """d in a model of the given width; ConfigError if half a head's width is no integer."""
        e = self.head_dim(width)
        if self.key_width is None:
            allowed = f"set where a head's width of values is odd ({e})"
            config_lib.require(e % 2 == 0, "key_width", None, allowed)
        return self.key_width or e // 2


@register("gla")
class GLA(HeadMixer):
    """`S_t = diag(a_t) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t / sqrt(d)` per head; `(RMSNorm(o) * silu(x W_g)) W_o`.

    `a_t = sigmoid(x W_1 W_2 + b)^(1 / tau)` is a number for each channel of the keys, `tau` 16. q, k and v are
    projections of x, with neither activation nor convolution. The norm's scale is shared by all heads.
    """

    Config = GLAConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the state is passed on as a sum"
    paper = "Yang et al. 2024, Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635"
    implementations = LINEAR_RECURRENCE.table
    counted = "chunked"
    variants = (
        {"heads": 2, "head_width": 6, "rank": 2, "temperature": 1.0, "chunk": 3},
        {"key_heads": 2, "key_width": 3, "chunk": 4},
    )

    def __init__(self, config: GLAConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        self.key_dim, self.key_heads = config.key_dim(width), config.key_heads or config.heads
        keys, values = self.key_heads * self.key_dim, config.heads * self.head_dim
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        shared = "heads" if self.key_heads == config.heads else "kv_heads"
        self.q = make.qkv(config.heads * self.key_dim)
        self.k, self.v = make.qkv(keys, shared), make.qkv(self.key_heads * self.head_dim, shared)
        self.log_decay = LowRank(width, config.rank, keys, rngs=rngs, dtype=dtype, bias=True)
        self.norm = RMSNorm(self.head_dim, ("head",), dtype=dtype)
        if config.gate:
            self.gate = make(values)
        self.out = make.out(values)

    def heads(self, x: jax.Array, seq: Sequence, carried: jax.Array | None = None) -> MixerOutput:
        """As in the contract; `carried` is the memory [B, H, d, e]."""
        c, wide = self.config, param_dtype(self.dtype)
        of_heads = lambda y, width: jnp.repeat(split_heads(y, width), c.heads // self.key_heads, axis=2)
        q = split_heads(self.q(x), self.key_dim) * self.key_dim**-0.5
        k, v = of_heads(self.k(x), self.key_dim), of_heads(self.v(x), self.head_dim)
        log_decay = jax.nn.log_sigmoid(self.log_decay(x).astype(wide)) / c.temperature
        o, memory = linear_recurrence(
            q, k, v, log_decay=of_heads(log_decay, self.key_dim), documents_BT=seq.documents, state_BHde=carried,
            chunk=c.chunk, impl=c.impl,
        )  # fmt: skip
        o = self.norm(o)
        if c.gate:
            o = o * jax.nn.silu(split_heads(self.gate(x), self.head_dim))
        return MixerOutput(o, memory)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> jax.Array:
        return jnp.zeros((batch, self.config.heads, self.key_dim, self.head_dim), param_dtype(self.dtype))

    @classmethod
    def flops(cls, config: GLAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, d, e = config.heads, config.key_dim(width), config.head_dim(width)
        K = config.key_heads or H
        return {
            "projections": 2.0 * width * (H * d + K * (d + e) + (2 if config.gate else 1) * H * e),
            "decay": 2.0 * config.rank * (width + K * d),
            "recurrence": H * flops_per_token(length, config.chunk, d, e, channels=True),
        }, None
