"""Kimi Delta Attention: Gated DeltaNet whose memory forgets each channel of the keys at a rate of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import knob, register
from attnlab.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from attnlab.mixers.heads import Projections, split_heads
from attnlab.mixers.parts import LowRank, log_rates, param_dtype, time_steps
from attnlab.mixers.roles import Role, drawn
from attnlab.ops.delta_rule import chunked_flops


@dataclasses.dataclass(frozen=True)
class KDAConfig(GatedDeltaNetConfig):
    """Knobs of Kimi Delta Attention: those of Gated DeltaNet, and the rank of what it adds."""

    query_scale: float | None = knob(None, "factor on queries of length 1; none: 1 / sqrt(d)", other=(1.0,), above=0)
    gate: bool = knob(True, "multiply the normed outputs by sigmoid(x W_d W_u + b)", other=(False,))
    rank: int | None = knob(
        None,
        "rank r of the projections to decays and to gates; none: the width of a head's values",
        other=(3,),
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        read = self.rank is None or self.decay or self.gate
        config_lib.require(read, "rank", self.rank, "none where decay and gate are false")

    def low_rank(self, width: int) -> int:
        """r in a model of the given width."""
        return self.rank or self.value_dim(width)


class ChannelDecay(nnx.Module):
    """Log decays `-exp(A_log) * softplus(x W_d W_u + dt_bias)`, [B, T, H, d], in fp32; A is of a head.

    At first A is uniform in [1, 16), and softplus(dt_bias) log-uniform in [0.001, 0.1], as in public code.
    """

    def __init__(self, width: int, heads: int, head_dim: int, rank: int, *, rngs: nnx.Rngs, dtype: Any):
        kind, columns = param_dtype(dtype), heads * head_dim
        self.linear = LowRank(width, rank, columns, rngs=rngs, dtype=dtype)
        self.a_log = drawn(rngs, log_rates, heads, kind, axes=("gates",), role=Role.DECAY_RATE)
        self.dt_bias = drawn(rngs, time_steps, columns, kind, axes=("heads",), role=Role.DECAY_RATE)
        self.head_dim = head_dim

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = self.linear(x)
        step = jax.nn.softplus(logits.astype(param_dtype(logits.dtype)) + self.dt_bias[...])
        return -jnp.exp(self.a_log[...])[:, None] * split_heads(step, self.head_dim)


@register("kda")
class KDA(GatedDeltaNet):
    """`S_t = S_{t-1} diag(a_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T`, `o_t = S_t q_t / sqrt(d)` per head.

    As `gated_deltanet`, but `a_t` are d numbers, `ChannelDecay`'s, and the normed outputs are multiplied by
    `sigmoid(x W_d W_u + b)`; both projections are of low rank.
    """

    Config = KDAConfig
    paper = "Kimi Team 2025, Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv:2510.26692"
    variants = (
        {"heads": 2, "head_width": 4, "expand": 1.5, "conv": 2, "chunk": 3, "gate": False},
        {"key_heads": 2, "query_scale": 1.0, "chunk": 4},
    )
    openness = staticmethod(jax.nn.sigmoid)

    def make_decay(self, width: int, *, rngs: nnx.Rngs, dtype: Any) -> ChannelDecay:
        c = self.config
        return ChannelDecay(width, c.heads, self.head_dim, c.low_rank(width), rngs=rngs, dtype=dtype)

    def make_gate(self, make: Projections) -> LowRank:
        c, columns = self.config, self.config.heads * self.value_dim
        return LowRank(make.width, c.low_rank(make.width), columns, rngs=make.rngs, dtype=make.dtype, bias=True)

    @classmethod
    def flops(cls, config: KDAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, d, e, r = config.heads, config.head_dim(width), config.value_dim(width), config.low_rank(width)
        low_rank = lambda columns: 2.0 * r * (width + columns)
        gates = low_rank(H * d) * config.decay + low_rank(H * e) * config.gate
        return {
            "projections": 2.0 * width * ((config.key_heads or H) * 2 * d + 2 * H * e),
            "gates": 2.0 * width * H + gates,
            "memory": H * chunked_flops(config.chunk, length, d, e, config.decay) / length,
        }, None
