"""Based: linear attention whose feature map makes the second-order Taylor polynomial of softmax's exponential."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops.feature_maps import Taylor
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, flops_per_token, linear_recurrence


@dataclasses.dataclass(frozen=True)
class BasedConfig(HeadConfig):
    """Knobs of Based's linear attention; `head_width` is that of values."""

    feature_width: int = knob(16, "width f of a head's queries and keys before the feature map", other=(5,), least=1)
    features: str = knob(
        "symmetric",
        "symmetric: 1 + f + f (f + 1) / 2 features; full: 1 + f + f^2, the same "
        "layer with every product of two channels twice",
        other=("full",),
        choices=("symmetric", "full"),
    )
    epsilon: float = knob(1e-12, "added to the denominator, which is at least 1/2", other=(0.5,), least=0)
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(LINEAR_RECURRENCE)

    def feature_map(self) -> Taylor:
        """Of queries and keys."""
        return Taylor(self.feature_width, self.features == "symmetric")


@register("based")
class Based(HeadMixer):
    """`o_t = sum_s w_ts v_s / (sum_s w_ts + epsilon)`, s <= t, `w_ts = 1 + z + z^2 / 2`, `z = q_t . k_s / sqrt(f)`.

    The weight is `phi(q_t) . phi(k_s)` of `Taylor` features, at least 1/2; so numerator and denominator are one linear
    recurrence, of the values with a column of ones.
    """

    Config = BasedConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the state is passed on as a sum"
    paper = (
        "Arora et al. 2024, Simple linear attention language models balance the recall-throughput tradeoff, "
        "arXiv:2402.18668"
    )
    extension = (
        "features=symmetric: the same weights from 153 features instead of 273 (f = 16); a denominator below its bound "
        "of 1/2, by rounding, is put back on it"
    )
    implementations = LINEAR_RECURRENCE.table
    counted = "chunked"
    variants = ({"heads": 2, "feature_width": 3, "features": "full", "chunk": 3, "head_width": 6},)

    def __init__(self, config: BasedConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, inner = Projections(config, width, rngs=rngs, dtype=dtype), config.heads * self.head_dim
        self.q, self.k = (make.qkv(config.heads * config.feature_width) for _ in range(2))
        self.v = make.qkv(inner)
        self.out = make.out(inner)

    def heads(self, x: jax.Array, seq: Sequence, carried: jax.Array | None = None) -> MixerOutput:
        """As in the contract; `carried` is the memory [B, H, features, e + 1]."""
        c = self.config
        q, k = (split_heads(y(x), c.feature_width) for y in (self.q, self.k))
        v = split_heads(self.v(x), self.head_dim)
        u = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        sums, memory = linear_recurrence(
            q, k, u, documents_BT=seq.documents, state_BHde=carried, features=c.feature_map(), chunk=c.chunk,
            impl=c.impl,
        )  # fmt: skip
        return MixerOutput(self.averaged(sums).astype(self.dtype), memory)

    def averaged(self, sums_BTHe: jax.Array) -> jax.Array:
        """Sums of weighted values by the sum of weights, which is in the last column."""
        # Weights are at least 1/2; features of huge queries and keys cancel, and may round their sum to about 0.
        sums_BTHe = sums_BTHe.astype(param_dtype(sums_BTHe.dtype))
        return sums_BTHe[..., :-1] / (jnp.maximum(sums_BTHe[..., -1:], 0.5) + self.config.epsilon)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> jax.Array:
        shape = (batch, self.config.heads, self.config.feature_map().count, self.head_dim + 1)
        return jnp.zeros(shape, param_dtype(dtype))

    @classmethod
    def flops(cls, config: BasedConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        e, H = config.head_dim(width), config.heads
        return {
            "projections": 4.0 * width * H * (config.feature_width + e),
            "recurrence": H * flops_per_token(length, config.chunk, config.feature_map().count, e + 1),
        }, None
