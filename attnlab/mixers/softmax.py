"""Softmax attention: multi-head, grouped-query, multi-query, with a window, sinks, a soft-cap and QK-norm as knobs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import MixerOutput, impl_knob, knob, register
from attnlab.mixers.cross import CrossAttention, CrossConfig
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.ops.attention import ATTENTION
from attnlab.ops.cached_attention import CACHED_ATTENTION
from attnlab.ops.keys_values import KeysValues
from attnlab.ops.masks import Mask


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(CrossConfig):
    """Knobs of softmax attention."""

    sinks: bool = knob(False, "a learned logit per head that takes weight and gives nothing", other=(True,))
    soft_cap: float | None = knob(None, "c in c * tanh(logits / c); none: no cap", other=(2.0,), above=0)
    impl: str = impl_knob(ATTENTION)
    decode_impl: str = impl_knob(CACHED_ATTENTION, doc="implementation of the op over a cache")


@register("softmax")
class Softmax(CrossAttention):
    """`softmax(q k^T / sqrt(d)) v` per head, then a projection (Vaswani et al. 2017, eq. 1 and section 3.2.2)."""

    Config = SoftmaxConfig
    paper = "Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762"
    implementations = ATTENTION.table
    variants = (
        {"kv_heads": 2, "window": 4, "sinks": True, "soft_cap": 3.0, "qk_norm": True},
        {"kv_heads": 1, "causal": False, "sinks": True, "bias": "all"},
        {"kv_heads": 2, "window": 4, "qk_norm": "cosine", "rope_width": 2},
    )

    def __init__(self, config: SoftmaxConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        if config.sinks:
            self.sinks = param(jnp.zeros((config.heads,), param_dtype(dtype)), axes=("heads",), role=Role.BIAS)

    def output_gate(self, x: jax.Array) -> jax.Array | None:
        """Logits [B, T, H, d] of a gate that attention multiplies its output by, made of x [B, T, D]; None: no gate."""
        return None

    def attend(self, q: jax.Array, kv: KeysValues, mask: Mask, x: jax.Array) -> MixerOutput:
        c = self.config
        sinks = self.sinks[...] if c.sinks else None
        options = {"impl": c.impl, "decode_impl": c.decode_impl, "gate_BTHe": self.output_gate(x)}
        return MixerOutput(kv.attend(q, mask, soft_cap=c.soft_cap, sinks_H=sinks, **options))
