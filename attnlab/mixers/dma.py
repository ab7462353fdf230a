"""Dynamic mask attention: a learned score of each key decides which ones are kept, the same for all queries."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.heads import Projections
from attnlab.mixers.parts import RMSNorm, param_dtype
from attnlab.mixers.roles import Role, drawn, normal
from attnlab.mixers.sequence import Sequence
from attnlab.ops.dynamic_mask_attention import DYNAMIC_MASK_ATTENTION, Live, dynamic_mask_attention
from attnlab.ops.masks import mean_visible_keys


@dataclasses.dataclass(frozen=True)
class DMAConfig(GroupedConfig):
    """Knobs of dynamic mask attention."""

    keep: int = knob(128, "keys that a query attends to, those of the highest scores", other=(3,), least=1)
    keep_self: bool = knob(
        False,
        "whether a query's own key is one of them, in place of the worst where it is not among the best",
        other=(True,),
    )
    form: str = knob(
        "linear", "score of a key: linear: A softplus(v W); exp: its exponential, as in later code",
        other=("exp",), choices=("linear", "exp"),
    )  # fmt: skip
    chunk: int = knob(128, "rows computed together; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(DYNAMIC_MASK_ATTENTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(self.keep > self.keep_self, "keep", self.keep, "2 or more where keep_self is true")


@register("dma")
class DMA(GroupedMixer):
    """`softmax(q . k_j / sqrt(d) + delta_j)` over the `keep` keys of the prefix whose `delta` is highest.

    `delta_j = A softplus(W v_j)` per key head, of the values of all key heads; with `bias` W has one, too. A query's
    own key is not kept by force, or with `keep_self` takes the place of the worst of its keys where it is not among the
    best. Queries and keys have an RMSNorm before RoPE. What has dropped out never comes back, so that a stream holds
    `keep` keys (with `keep_self` one fewer), whatever the length. The choice has no gradient: `delta` learns by the
    bias alone.
    """

    Config = DMAConfig
    capabilities = Capabilities(fixed_state=True)
    paper = "Shi et al. 2025, Trainable Dynamic Mask Sparse Attention, arXiv:2508.02124"
    extension = "keys are chosen in each query's prefix and document, and of equal scores the oldest; keep_self"
    implementations = DYNAMIC_MASK_ATTENTION.table
    variants = (
        {"keep": 3, "kv_heads": 2, "chunk": 2},
        {"keep": 3, "keep_self": True, "chunk": 4},
        {"keep": 4, "kv_heads": 1, "chunk": 3, "form": "exp", "rope_base": None, "bias": "all"},
    )

    def __init__(self, config: DMAConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        wide, K = param_dtype(dtype), config.key_heads  # scores are compared: in bf16 many would tie
        make = Projections(config, width, rngs=rngs, dtype=wide)
        self.score = make.qkv(K, "kv_heads", fan_in=K * self.head_dim)
        self.strength = drawn(rngs, normal, (K,), wide, 0.02, axes=("kv_heads",), role=Role.SCALE)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, ("head",), dtype=dtype) for _ in range(2))

    def heads(self, x: jax.Array, seq: Sequence, carried: Live | None = None) -> MixerOutput:
        c, (q, k, v) = self.config, self.projected(x)
        q, k = c.rotated(self.q_norm(q), seq.positions), c.rotated(self.k_norm(k), seq.positions)
        # What padding holds may be huge: exp of its score would be inf, and gradients NaN though nobody reads it.
        scored = v if seq.padding is None else jnp.where(seq.padding[..., None, None], 0, v)
        documents = jnp.zeros(x.shape[:2], jnp.int32) if seq.documents is None else seq.documents
        o, live = dynamic_mask_attention(
            q, k, v, self.delta(scored), documents, carried,
            keep=c.keep, own=c.keep_self, chunk=c.chunk,
            impl=c.impl if carried is None or c.impl != "definition" else "auto",
        )  # fmt: skip
        return MixerOutput(o, live)

    def delta(self, v: jax.Array) -> jax.Array:
        """Scores [B, T, K] of values [B, T, K, d], in fp32 or wider."""
        step = jax.nn.softplus(self.score(v.reshape(*v.shape[:2], -1)))
        delta = self.strength[...] * step
        return delta if self.config.form == "linear" else jnp.exp(delta)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> Live:
        c, wide = self.config, param_dtype(self.dtype)
        shape = batch, c.key_heads, c.keep - c.keep_self
        keys = jnp.zeros((*shape, self.head_dim), dtype)
        return Live(keys, keys, jnp.zeros(shape, wide), jnp.zeros(shape, bool))

    @classmethod
    def flops(cls, config: DMAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, span = config.head_dim(width), mean_visible_keys(length, True, config.keep)
        return {
            "projections": cls.projection_flops(config, width),
            "scores": 2.0 * config.key_heads**2 * d,
            "attention": 4.0 * config.heads * d * span,
        }, span
