"""Top-k broadcast: a bottleneck of few positions, chosen by a score of their own, that all positions read alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops.dynamic_mask_attention import Live
from attnlab.ops.masks import mean_visible_keys
from attnlab.ops.topk_broadcast import topk_broadcast


@dataclasses.dataclass(frozen=True)
class TopkBroadcastConfig(HeadConfig):
    """Knobs of top-k broadcast; each head is a bottleneck of its own."""

    keep: int = knob(8, "positions k that are broadcast", other=(3,), least=1)
    causal: bool = knob(True, "whether a position sees only itself and those before", other=(False,))
    chunk: int = knob(128, "rows computed together; changes only speed and memory", other=(4,), least=1)
    impl: str = knob(
        "auto", "auto, chunked, or definition (all pairs)", other=("definition",),
        choices=("auto", "chunked", "definition"),
    )  # fmt: skip


@register("topk_broadcast")
class TopkBroadcast(HeadMixer):
    """`o_t = sum_j softmax_j(s_j) v_j` over the `keep` positions j of the highest `s_j = w . x_j / sqrt(D)` per head.

    j is of t's document, up to t where `causal`, else anywhere in it: then all its positions get the same. There are no
    queries, and no positions. The choice has no gradient: w learns by the softmax over the chosen.
    """

    Config = TopkBroadcastConfig
    capabilities = Capabilities(bidirectional=True, fixed_state=True)
    paper = "Bengio 2017, The Consciousness Prior, arXiv:1709.08568"
    extension = (
        "the layer: the paper has the idea of a low-dimensional bottleneck that is broadcast, and no formula of it"
    )
    implementations = ("definition", "chunked")
    variants = ({"keep": 3, "chunk": 2, "heads": 2}, {"keep": 2, "causal": False, "head_width": 6, "bias": "all"})

    def __init__(self, config: TopkBroadcastConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        inner = config.heads * self.head_dim
        # Scores are compared: in bf16 many would tie. The kernel is w / sqrt(D).
        self.score = Projections(config, width, rngs=rngs, dtype=param_dtype(dtype))(config.heads)
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.v, self.out = make.qkv(inner), make.out(inner)

    def heads(self, x: jax.Array, seq: Sequence, carried: Live | None = None) -> MixerOutput:
        c = self.config
        documents = jnp.zeros(x.shape[:2], jnp.int32) if seq.documents is None else seq.documents
        o, live = topk_broadcast(
            self.score(x), split_heads(self.v(x), self.head_dim), documents, carried,
            keep=c.keep, causal=c.causal, chunk=c.chunk, impl="auto" if carried is not None else c.impl,
        )  # fmt: skip
        return MixerOutput(o, live)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> Live:
        shape = (batch, self.config.heads, self.config.keep)
        empty = lambda columns: jnp.zeros((*shape, columns), dtype)
        return Live(empty(1), empty(self.head_dim), jnp.zeros(shape, param_dtype(self.dtype)), jnp.zeros(shape, bool))

    @classmethod
    def flops(cls, config: TopkBroadcastConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, H = config.head_dim(width), config.heads
        span = mean_visible_keys(length, True, config.keep) if config.causal else min(config.keep, length)
        return {
            "projections": 4.0 * width * H * d,
            "scores": 2.0 * width * H,
            "attention": 2.0 * H * (d + config.causal) * span,
        }, span
