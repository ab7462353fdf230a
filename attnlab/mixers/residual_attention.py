"""Residual attention: the attention map of an earlier layer comes in again, through a gate that is closed at first."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.heads import Projections
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.keys_values import KeysValues, KVCache, Whole, empty_cache
from attnlab.ops.linear import per_channel
from attnlab.ops.masks import Mask, mean_visible_keys

_IMPLS = {"auto": "auto", "xla": "xla", "definition": "definition"}


@dataclasses.dataclass(frozen=True)
class ResidualAttentionConfig(GroupedConfig):
    """Knobs of residual attention."""

    form: str = knob(
        "weights", "what of the earlier layer is added: its weights, times the values of this one; or its logits",
        other=("logits",), choices=("weights", "logits"),
    )  # fmt: skip
    earlier: str = knob(
        "previous", "whose map it is: previous, that of the layer before; first, that of the stack's first; of the "
        "layers of this kind with as many heads, as wide, and of the same earlier",
        other=("first",), choices=("previous", "first"),
    )  # fmt: skip
    impl: str = knob("auto", "of attention: auto, xla (blocks of queries), definition (all pairs)",
                     other=("definition",), choices=tuple(_IMPLS))  # fmt: skip


@register("residual_attention")
class ResidualAttention(GroupedMixer):
    """Softmax attention with the map of an earlier layer, of queries q' and keys k', behind `g = tanh(a x W_g)`.

    weights: `softmax(q k^T / sqrt(d)) v + g softmax(q' k'^T / sqrt(d)) v`. logits: `softmax((q k^T + g q' k'^T) /
    sqrt(d)) v`. g is a number of each head and position, and a one of each head that is 0 at first: the layer begins as
    softmax attention. No map is stored: it is made again of q' and k', which layers hand on, after RoPE. By itself, or
    as the first of its stack, a layer's earlier map is its own.
    """

    Config = ResidualAttentionConfig
    capabilities = Capabilities()
    sequence_parallel = "keys and values are gathered, queries dealt out evenly"
    paper = "Shen et al. 2025, LaTtE-Flow: Layerwise Timestep-Expert Flow-based Transformer, arXiv:2506.06952"
    extension = (
        "read from the abstract alone, which leaves open where maps are added; the gate is of the layer's input, where "
        "the paper has the timestep of a flow"
    )
    implementations = ("definition", "xla")
    variants = ({"form": "logits", "kv_heads": 2, "earlier": "first"},)

    def __init__(self, config: ResidualAttentionConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        self.gate = Projections(config, width, rngs=rngs, dtype=dtype)(config.heads, "gates")
        self.opening = param(jnp.zeros((config.heads,), param_dtype(dtype)), axes=("gates",), role=Role.SCALE)

    def heads(self, x: jax.Array, seq: Sequence, carried: tuple[KVCache, ...] | None = None) -> MixerOutput:
        """As in the contract. More positions than a cache has room for give NaN, as jit can raise nothing."""
        c, (q, k, v) = self.config, self.positioned(x, seq)
        q1, k1, shared = self._source(q, k, seq)
        wide = param_dtype(self.dtype)
        g = jnp.tanh(per_channel(self.opening[...].astype(wide), self.gate(x).astype(wide)))[..., None].astype(q.dtype)
        if c.form == "logits":
            together = lambda a, b: jnp.concatenate([a, b], axis=-1)
            (kv,), mask, carried = self._read([together(k, k1)], v, seq, carried)
            o = self._attend(kv, together(q, g * q1), mask)
        else:
            (own, earlier), mask, carried = self._read([k, k1], v, seq, carried)
            o = self._attend(own, q, mask) + g * self._attend(earlier, q1, mask)
        return MixerOutput(o, carried, shared=shared)

    def init_shared(self, batch: int, length: int) -> dict[str, jax.Array]:
        c, d = self.config, self.head_dim
        blank = lambda heads: jnp.zeros((batch, length, heads, d), self.dtype)
        return dict(zip(self._names(), (blank(c.heads), blank(c.key_heads), jnp.int32(0)), strict=True))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> tuple[KVCache, ...]:
        c, d = self.config, self.head_dim
        make = lambda width, values: empty_cache(batch, c.key_heads, width, max_length, dtype, value_width=values)
        return (make(2 * d, d),) if c.form == "logits" else (make(d, d), make(d, 0))

    @classmethod
    def flops(cls, config: ResidualAttentionConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        inner, span = config.heads * config.head_dim(width), mean_visible_keys(length, True, None)
        return {
            "projections": cls.projection_flops(config, width),
            "gates": 2.0 * width * config.heads,
            "attention": (6.0 if config.form == "logits" else 8.0) * inner * span,
        }, span

    # Inside.

    def _names(self) -> tuple[str, str, str]:
        """Of queries, keys and the number of layers so far, among layers that can read each other's maps."""
        c = self.config
        of = f"residual_attention_{c.earlier}_{c.heads}_{c.key_heads}_{self.head_dim}"
        return f"{of}_queries", f"{of}_keys", f"{of}_layers"

    def _source(self, q: jax.Array, k: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """q' and k', and what later layers find."""
        queries, keys, layers = self._names()
        if queries not in (seq.shared or {}):
            return q, k, {}
        before = seq.shared[layers]
        q1, k1 = (jnp.where(before == 0, own, seq.shared[name]) for own, name in ((q, queries), (k, keys)))
        handed = (q, k) if self.config.earlier == "previous" else (q1, k1)
        return q1, k1, {queries: handed[0], keys: handed[1], layers: before + 1}

    def _read(
        self, keys: list[jax.Array], v: jax.Array, seq: Sequence, caches: tuple[KVCache, ...] | None
    ) -> tuple[list[KeysValues], Mask, tuple[KVCache, ...] | None]:
        """Keys with the values that all of them have, the mask, and the caches, whose values lie in the first."""
        if caches is None:
            return [Whole(k, v) for k in keys], seq.mask(causal=True), None
        step = lambda cache, k, v: cache.append(k, v, seq.offsets, seq.padding, None)
        after, read, masks = zip(*map(step, caches, keys, (v, v[..., :0])))
        return [dataclasses.replace(kv, v=read[0].v) for kv in read], masks[0], after

    def _attend(self, kv: KeysValues, q: jax.Array, mask: Mask) -> jax.Array:
        """Softmax attention of logits divided by sqrt(d)."""
        impl = self.config.impl
        decode = "definition" if impl == "definition" else "auto"
        return kv.attend(q, mask, impl=_IMPLS[impl], decode_impl=decode, scale=self.head_dim**-0.5)
