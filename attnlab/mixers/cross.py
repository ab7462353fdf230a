"""Attention to a named context in place of the sequence itself: cross-attention, with packing and cached keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnlab import config as config_lib
from attnlab.errors import UserError
from attnlab.mixers.attention import Attention, AttentionConfig, Reads
from attnlab.mixers.base import Capabilities, knob
from attnlab.mixers.heads import HeadState
from attnlab.mixers.sequence import Context, Sequence
from attnlab.ops.keys_values import Cached, KVCache, RollingCache, Whole, cache_rows
from attnlab.ops.masks import Mask


@dataclasses.dataclass(frozen=True)
class CrossConfig(AttentionConfig):
    """Knobs of attention to a context."""

    source: str | None = knob(
        None, "name of the context whose rows are read in place of the sequence's own; none: its own", other=("image",)
    )
    context_width: int | None = knob(None, "width of the context's rows; none: that of the model", other=(6,), least=1)
    rope_context: bool = knob(
        False, "whether queries and the context's keys are rotated, each by positions of its own", other=(True,)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        need, reads = config_lib.require, self.source is not None
        need(reads or self.context_width is None, "context_width", self.context_width, "none where source is")
        need(reads or not self.rope_context, "rope_context", self.rope_context, "false where source is none")
        need(not reads or self.window is None, "window", self.window, "none where source is set")
        need(not reads or self.input_conv == 1, "input_conv", self.input_conv, "1 where source is set")
        rotated = self.rope_base is not None
        need(rotated or not self.rope_context, "rope_context", self.rope_context, "false where rope_base is none")

    def read_width(self, width: int) -> int:
        return width if self.context_width is None else self.context_width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContextCache:
    """Keys and values of a context, made once: k, v [B * K, S, d] as in `KVCache`, segments and node [B, S] or None."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None
    node: jax.Array | None


class CrossAttention(Attention):
    """Base of attention layers that may read a context (Vaswani et al. 2017, section 3.2.3, for softmax attention).

    With `source` set a position sees the context's rows that `Context` shows it, whatever `causal` says, and no
    position of its own sequence.
    """

    capabilities = Capabilities(causal=True, bidirectional=True, cross=True, streaming=True)

    def reads(self, x: jax.Array, seq: Sequence, cache: KVCache | RollingCache | ContextCache | None = None) -> Reads:
        if self.config.source is None:
            return super().reads(x, seq, cache)
        q = self.placed(self.queries(x), seq.positions if self.config.rope_context else None, "q")
        context = self._context(seq.contexts, optional=cache is not None)
        if cache is None:
            k, v = self._keys_values(context)
            kv, segments, node, size = Whole(k, v), context.segments, context.node, k.shape[1]
        else:
            kv = Cached(cache.k.astype(q.dtype), cache.v.astype(q.dtype))
            segments, node, size = cache.segments, cache.node, cache.k.shape[1]
        mask = self.narrowed(context.mask(seq, segments, size), seq, node)
        return Reads(self.scaled(q, kv, mask), kv, mask, cache)

    def init_state(
        self, batch: int, max_length: int, dtype: Any = jnp.float32, contexts: Mapping[str, Context] | None = None
    ) -> HeadState:
        if self.config.source is None:
            return super().init_state(batch, max_length, dtype)
        context = self._context(contexts)
        k, v = (cache_rows(y, dtype) for y in self._keys_values(context))
        return HeadState(ContextCache(k, v, context.segments, context.node), jnp.zeros((batch,), bool))

    def narrowed(self, interval: Mask, seq: Sequence, node: jax.Array | None) -> Mask:
        """The mask of a context's rows, of numbers `node` [B, S], of which `interval` is what `Context` shows."""
        return interval

    @classmethod
    def flops(cls, config: CrossConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        flops, span = super().flops(config, width, length)
        if config.source is None:
            return flops, span
        inner = config.heads * config.head_dim(width)  # a context as long as the sequence
        return {"projections": 4.0 * width * inner, "attention": 4.0 * inner * length}, float(length)

    @classmethod
    def context_flops(cls, config: CrossConfig, width: int) -> float:
        if config.source is None:
            return 0.0
        return 4.0 * config.read_width(width) * config.key_heads * config.head_dim(width)

    @classmethod
    def blank_contexts(cls, config: CrossConfig, width: int, rows: int) -> Mapping[str, Context] | None:
        if config.source is None:
            return None
        return {config.source: Context(jnp.zeros((1, rows, config.read_width(width))))}

    # Inside.

    def _context(self, contexts: Mapping[str, Context] | None, optional: bool = False) -> Context:
        """That which the layer reads. In a stream only its intervals are needed, and it may be left out."""
        name, contexts = self.config.source, contexts or {}
        if name not in contexts and optional:
            return Context()
        if name not in contexts or (contexts[name].rows is None and not optional):
            given = ", ".join(n for n, c in contexts.items() if c.rows is not None) or "none"
            raise UserError(f"mixer {self.name!r} reads the context source = {name!r}; contexts with rows: {given}")
        return contexts[name]

    def _keys_values(self, context: Context) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, d] of the context, after QK-norm and RoPE; padding is read as zeros."""
        rows, positions = context.rows, None
        if context.segments is not None:
            rows = jnp.where((context.segments == 0)[..., None], 0, rows)
        if self.config.rope_context:
            positions = context.positions
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape[:2])
        k, v = self.keys_values(rows)
        return self.placed(k, positions, "k"), v
