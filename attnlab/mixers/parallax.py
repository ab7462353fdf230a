"""Parallax: local linear attention whose solved vector is a learned projection instead."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.attention import Attention, AttentionConfig, head_norm
from attnlab.mixers.base import MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import Projections
from attnlab.mixers.sequence import Sequence
from attnlab.ops.keys_values import KeysValues
from attnlab.ops.masks import Mask
from attnlab.ops.parallax import PARALLAX, parallax


@dataclasses.dataclass(frozen=True)
class ParallaxConfig(AttentionConfig):
    """Knobs of Parallax."""

    qk_norms = (False, True, "layer")  # cosine attention scales queries by their number of keys

    qk_norm: bool | str = knob(
        True,
        "of each head's queries, probes and keys, before RoPE; true: RMSNorm; layer: LayerNorm",
        other=(False, "layer"),
    )
    impl: str = impl_knob(PARALLAX)


@register("parallax")
class Parallax(Attention):
    """Softmax attention with a correction along a projected probe; without the probe it is softmax attention.

    `attnlab.ops.parallax` has the formula. Where queries and keys are rotated by RoPE, so are the probes.
    """

    Config = ParallaxConfig
    paper = "Zuo et al. 2026, Parallax: Parameterized Local Linear Attention for Language Modeling, arXiv:2605.29157"
    extension = "RoPE, where it is on, rotates the probes as it does the queries"
    implementations = PARALLAX.table
    variants = (
        {"kv_heads": 2, "window": 4, "qk_norm": False},
        {"kv_heads": 1, "causal": False, "rope_base": None},
        {"qk_norm": "layer", "rope_width": 2, "bias": "all"},
    )

    def __init__(self, config: ParallaxConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.r = make.qkv(config.heads * self.head_dim)
        if config.qk_norm:
            self.r_norm = head_norm(config, self.head_dim, dtype)

    def positioned(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries with their probes behind them, [B, T, H, 2 d], keys and values."""
        q, k, v = super().positioned(x, seq)
        r = self.r(x).reshape(q.shape)
        norm = self.r_norm if self.config.qk_norm else None
        return jnp.concatenate([q, self.config.rotated(r, seq.positions, norm)], axis=-1), k, v

    def attend(self, q: jax.Array, kv: KeysValues, mask: Mask, x: jax.Array) -> MixerOutput:
        q, r = jnp.split(q, 2, axis=-1)
        return MixerOutput(parallax(q, r, *kv.by_position(len(q)), mask, impl=self.config.impl))

    @classmethod
    def flops(cls, config: ParallaxConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        flops, span = super().flops(config, width, length)
        inner = config.heads * config.head_dim(width)
        flops["probes"] = 2.0 * width * inner
        flops["attention"] += 2.0 * inner * span
        return flops, span
