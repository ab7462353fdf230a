"""Softmax attention: multi-head, grouped-query, multi-query, with a window, sinks, a soft-cap and QK-norm as knobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab import masks
from attnlab.mixers.attention import Reads
from attnlab.mixers.base import MixerOutput, impl_knob, knob, register
from attnlab.mixers.cross import CrossAttention, CrossConfig
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Context, Sequence
from attnlab.ops.attention import ATTENTION
from attnlab.ops.cached_attention import CACHED_ATTENTION
from attnlab.ops.keys_values import Cached, KeysValues, KVCache, Reordered, Whole
from attnlab.ops.masks import Mask


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(CrossConfig):
    """Knobs of softmax attention."""

    sinks: bool = knob(False, "a learned logit per head that takes weight and gives nothing", other=(True,))
    soft_cap: float | None = knob(None, "c in c * tanh(logits / c); none: no cap", other=(2.0,), above=0)
    query_scale: float | None = knob(None, "factor on q . k; none: 1 / sqrt(d)", other=(0.2,), above=0)
    impl: str = impl_knob(ATTENTION)
    decode_impl: str = impl_knob(CACHED_ATTENTION, doc="implementation of the op over a cache")
    mask: Any = knob(
        None,
        "node of a mask that narrows what a query sees (docs/masks.md); none: all that causality and documents allow",
        other=({"name": "power_blocks", "block": 2, "sinks": 0},),
        build=lambda tree, path: _mask_config(tree, path),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", _mask_config(self.mask, "mask"))
        super().__post_init__()
        cosine = self.qk_norm == "cosine"
        config_lib.require(
            self.query_scale is None or not cosine, "query_scale", self.query_scale, "none where qk_norm is cosine"
        )
        if self.mask is None:
            return
        need, name, where = config_lib.require, self.mask.node_name, "where mask is set"
        cross = masks.get(name).cross
        need(self.window is None, "window", self.window, f"none {where}")
        allowed = f"a context, which mask {name} is of" if cross else f"none {where}"
        need((self.source is not None) == cross, "source", self.source, allowed)
        need(
            self.qk_norm != "cosine", "qk_norm", self.qk_norm, f"another {where}: cosine counts the keys of an interval"
        )
        why = masks.get(name).unserved(self.mask, causal=self.causal)
        need(cross or not why, "causal", self.causal, f"{str(not self.causal).lower()}: {why}")
        for field, impls in (("impl", ("auto", "flash", "tiles", "definition")), ("decode_impl", _DECODE_IMPLS)):
            value = getattr(self, field)
            need(value in impls, field, value, f"{', '.join(impls)} {where}")


_DECODE_IMPLS = "auto", "one_query", "tiles", "definition"


def _mask_config(tree: Any, path: str) -> masks.MaskConfig | None:
    """The typed Config of a node; None where it is none."""
    tree = tree.text if isinstance(tree, config_lib.Override) else tree
    if tree is None or (isinstance(tree, str) and tree.lower() in ("none", "null")):
        return None
    return masks.config_from_node(tree, path)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedCache:
    """All keys and values so far, and what the mask says of each: int32 [B, S] arrays."""

    kv: KVCache
    coordinates: tuple[jax.Array, ...]


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
        self.mask = None if config.mask is None else masks.build(config.mask)

    @property
    def stack_reads(self) -> tuple[str, ...]:
        return ("step",) if self.mask is not None and self.mask.reads_step else ()

    def require(self, seq: Sequence, *, causal: bool) -> None:
        super().require(seq, causal=causal)
        if self.mask is not None:
            self.mask.require(seq, causal=causal)

    def narrowed(self, interval: Mask, seq: Sequence, node: jax.Array | None) -> Mask:
        return interval if self.mask is None else self.mask.of_context(seq, node, interval)

    def reads(self, x: jax.Array, seq: Sequence, cache: Any = None) -> Reads:
        if self.mask is None or self.mask.cross:
            return super().reads(x, seq, cache)
        placed = lambda *stream: dataclasses.replace(seq, positions=self.mask.positions(seq, *stream))
        if cache is None:
            q, k, v = self.positioned(x, placed())
            kv, mask, order = Whole(k, v), self.mask.mask(seq, causal=self.config.causal), self.mask.order(seq)
            return Reads(self.scaled(q, kv, mask), kv if order is None else Reordered(kv, order), mask)
        first = cache.kv.length
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first, axis=1)
        stored = tuple(map(put, cache.coordinates, self.mask.coordinates(seq)))
        index = first + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        q, k, v = self.positioned(x, placed(stored, index))
        kv, view, interval = cache.kv.append(k, v, seq.offsets, seq.padding)
        mask = self.mask.rows(seq, stored, interval)
        return Reads(self.scaled(q, view, mask), view, mask, MaskedCache(kv, stored))

    def scaled(self, q: jax.Array, kv: Whole | Cached, mask: Mask) -> jax.Array:
        if self.config.query_scale is None:
            return super().scaled(q, kv, mask)
        return (q.astype(param_dtype(self.dtype)) * (self.config.query_scale * self.head_dim**0.5)).astype(q.dtype)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> Any:
        cache = super().init_carried(batch, max_length, dtype)
        if self.mask is None or self.mask.cross:
            return cache
        blank = jnp.zeros((batch, max_length), jnp.int32)
        return MaskedCache(cache, (blank,) * self.mask.stored)

    @classmethod
    def require_length(cls, config: SoftmaxConfig, length: int) -> None:
        if config.mask is not None:
            masks.build(config.mask).require_length(length)

    @classmethod
    def cost_note(cls, config: SoftmaxConfig) -> str:
        return "" if config.mask is None else masks.get(config.mask.node_name).span_note

    @classmethod
    def flops(cls, config: SoftmaxConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        flops, span = super().flops(config, width, length)
        if config.mask is not None:
            span = masks.build(config.mask).span(length, causal=config.causal)
            flops["attention"] = 4.0 * config.heads * config.head_dim(width) * span
        return flops, span

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
