"""SAISA: text attends to images that every layer projects anew, and that hold nothing between layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import config as config_lib
from attnlab.masks.layouts import visual
from attnlab.mixers.base import Capabilities, MixerOutput, State, impl_knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.parts import Linear, RMSNorm
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION
from attnlab.ops.cached_attention import CACHED_ATTENTION
from attnlab.ops.documents import largest_input
from attnlab.ops.keys_values import KVCache, Whole, empty_cache
from attnlab.ops.masks import Array, Mask, mask_of_documents, mean_visible_keys


@dataclasses.dataclass(frozen=True)
class SaisaConfig(GroupedConfig):
    """Knobs of SAISA."""

    impl: str = impl_knob(ATTENTION)
    decode_impl: str = impl_knob(CACHED_ATTENTION, doc="implementation of the op over a cache")

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "1: text would read what other layers leave at the positions of images"
        config_lib.require(self.input_conv == 1, "input_conv", self.input_conv, allowed)


@register("saisa")
class Saisa(GroupedMixer):
    """Softmax attention of text to the text before it, and to images made of `norm(P(features))` in place of x.

    P is `gelu(f W_1 + b_1) W_2 + b_2`, of the layer's own; the features f of an image's positions are what the stack
    began from there, `Sequence.embedding` (by itself a layer is its stack's first: f is x). What layers before did to
    these positions is read by nobody. They have no queries: the layer gives exactly 0 there. RoPE turns text and images
    by where they stand in the row. Images are where `Sequence.layout` says so; without one all is text, and the layer
    is softmax attention.
    """

    Config = SaisaConfig
    capabilities = Capabilities()
    sequence_parallel = "keys and values are gathered, queries dealt out evenly"
    paper = (
        "Yuan et al. 2025, SAISA: Towards Multimodal Large Language Models with Both Training and Inference "
        "Efficiency, arXiv:2502.02458"
    )
    extension = (
        "images have an RMSNorm of the layer's own, where the paper has them go through the norm of the layer's input; "
        "features are as wide as the model; several images in a row, and packed rows; the blocks' MLPs, the queries "
        "and the output's projection are computed at the positions of images, too, though no such layer reads them, "
        "and P at those of text"
    )
    implementations = ATTENTION.table
    stack_reads = ("embedding",)
    variants = ({"kv_heads": 2, "rope_width": 2, "bias": "all"},)

    def __init__(self, config: SaisaConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make = lambda *axes: Linear(width, width, axes, rngs=rngs, dtype=dtype, bias=True)
        self.project_in, self.project_out = make("embed", "mlp"), make("mlp", "embed")
        self.visual_norm = RMSNorm(width, ("embed",), dtype=dtype)

    def __call__(self, x: jax.Array, seq: Sequence) -> MixerOutput:
        return _silent(super().__call__(x, seq), seq)

    def extend(self, x: jax.Array, seq: Sequence, state: State) -> MixerOutput:
        return _silent(super().extend(x, seq, state), seq)

    def heads(self, x: jax.Array, seq: Sequence, carried: KVCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        c, of_image = self.config, _of_image(seq)
        q, k, v = self.positioned(jnp.where(of_image[..., None], self.projected_features(x, seq), x), seq)
        if carried is None:
            kv, mask = Whole(k, v), _of_text(seq, of_image)
        else:
            carried, kv, mask = carried.append(k, v, seq.offsets, seq.padding | of_image)
        return MixerOutput(kv.attend(q, mask, impl=c.impl, decode_impl=c.decode_impl), carried)

    def projected_features(self, x: jax.Array, seq: Sequence) -> jax.Array:
        """`norm(P(f))` [B, T, D], what keys and values are made of at the positions of images."""
        features = x if seq.embedding is None else seq.embedding
        # One that has overflowed has done so in x, too; it is to change nothing in other documents.
        features = jnp.where(jnp.abs(features) < largest_input(features.dtype), features, 0)
        hidden = jax.nn.gelu(self.project_in(features), approximate=False)
        return self.visual_norm(self.project_out(hidden)).astype(x.dtype)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> KVCache:
        return empty_cache(batch, self.config.key_heads, self.head_dim, max_length, dtype)

    @classmethod
    def flops(cls, config: SaisaConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        span = mean_visible_keys(length, True, None)
        return {
            "projections": cls.projection_flops(config, width),
            "projector": 4.0 * width * width,
            "attention": 4.0 * config.heads * config.head_dim(width) * span,
        }, span


def _of_image(seq: Sequence) -> Array:
    """Which positions are of an image, bool [B, T]."""
    return np.zeros(seq.positions.shape, bool) if seq.layout is None else visual(seq)


def _of_text(seq: Sequence, of_image: Array) -> Mask:
    """Causal, of whole rows, in which the positions of images see nothing, and are seen."""
    if seq.layout is None:
        return seq.mask(causal=True)
    offsets, asks = seq.offsets, jnp.where(of_image, 0, 1 if seq.segments is None else seq.segments)
    if offsets is None:
        offsets = jnp.broadcast_to(jnp.arange(asks.shape[1], dtype=jnp.int32), asks.shape)
    # Rows that see nothing are not padding here: documents are not what their rows see.
    return dataclasses.replace(mask_of_documents(offsets, asks, causal=True), documents=False)


def _silent(out: MixerOutput, seq: Sequence) -> MixerOutput:
    """With exactly 0 at the positions of images, where a bias of the output would be, too."""
    return dataclasses.replace(out, y=jnp.where(_of_image(seq)[..., None], 0, out.y))
