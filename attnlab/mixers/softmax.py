"""Softmax attention: multi-head, grouped-query, multi-query, with a window, sinks, a soft-cap and QK-norm as knobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.attention import Reads
from attnlab.mixers.base import MixerOutput, impl_knob, knob, register
from attnlab.mixers.cross import CrossAttention, CrossConfig
from attnlab.mixers.masked import Masked, mask_knob, require_mask, resolve_mask
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Context, Sequence
from attnlab.ops.attention import ATTENTION
from attnlab.ops.cached_attention import CACHED_ATTENTION
from attnlab.ops.keys_values import Cached, KeysValues, Whole
from attnlab.ops.masks import Mask


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(CrossConfig):
    """Knobs of softmax attention."""

    sinks: bool = knob(False, "a learned logit per head that takes weight and gives nothing", other=(True,))
    soft_cap: float | None = knob(None, "c in c * tanh(logits / c); none: no cap", other=(2.0,), above=0)
    query_scale: float | None = knob(None, "factor on q . k; none: 1 / sqrt(d)", other=(0.2,), above=0)
    impl: str = impl_knob(ATTENTION)
    decode_impl: str = impl_knob(CACHED_ATTENTION, doc="implementation of the op over a cache")
    mask: Any = mask_knob()

    def __post_init__(self) -> None:
        resolve_mask(self)
        super().__post_init__()
        cosine = self.qk_norm == "cosine"
        config_lib.require(
            self.query_scale is None or not cosine, "query_scale", self.query_scale, "none where qk_norm is cosine"
        )
        require_mask(self)


@register("softmax")
class Softmax(Masked, CrossAttention):
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

    def narrowed(self, interval: Mask, seq: Sequence, node: jax.Array | None) -> Mask:
        return interval if self.mask is None else self.mask.of_context(seq, node, interval)

    def reads(self, x: jax.Array, seq: Sequence, cache: Any = None) -> Reads:
        if self.mask is None or self.mask.cross:
            return super().reads(x, seq, cache)
        view, c = self.viewed(seq, cache, lambda kv: kv.length), self.config
        q, k, v = self.positioned(x, view.seq)
        if cache is None:
            kept, kv, interval = None, Whole(k, v), seq.mask(causal=c.causal)
        else:
            kept, kv, interval = view.carried.append(k, v, seq.offsets, seq.padding)
            kept = view.kept(kept)
        mask = view.mask(interval, causal=c.causal)
        return Reads(self.scaled(q, kv, mask), view.ordered(kv) if cache is None else kv, mask, kept)

    def scaled(self, q: jax.Array, kv: Whole | Cached, mask: Mask) -> jax.Array:
        if self.config.query_scale is None:
            return super().scaled(q, kv, mask)
        return (q.astype(param_dtype(self.dtype)) * (self.config.query_scale * self.head_dim**0.5)).astype(q.dtype)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> Any:
        return self.beside_mask(super().init_carried(batch, max_length, dtype), batch, max_length)

    @classmethod
    def blank_contexts(cls, config: SoftmaxConfig, width: int, rows: int) -> Mapping[str, Context] | None:
        blank = super().blank_contexts(config, width, rows)
        if blank is None or config.mask is None:
            return blank
        node = jnp.zeros((1, rows), jnp.int32)
        return {name: dataclasses.replace(context, node=node) for name, context in blank.items()}

    def output_gate(self, x: jax.Array) -> jax.Array | None:
        """Logits [B, T, H, d] of a gate that attention multiplies its output by, made of x [B, T, D]; None: no gate."""
        return None

    def attend(self, q: jax.Array, kv: KeysValues, mask: Mask, x: jax.Array) -> MixerOutput:
        c = self.config
        sinks = self.sinks[...] if c.sinks else None
        options = {"impl": c.impl, "decode_impl": c.decode_impl, "gate_BTHe": self.output_gate(x)}
        return MixerOutput(kv.attend(q, mask, soft_cap=c.soft_cap, sinks_H=sinks, **options))
