"""Log-linear Gated DeltaNet: its memory is kept in levels of 1, 2, 4, ... positions, each weighed by the query."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import impl_knob, knob, register
from attnlab.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from attnlab.mixers.parts import LevelWeights
from attnlab.mixers.sequence import Sequence
from attnlab.ops.log_linear import LOG_LINEAR, flops_per_token, log_linear


@dataclasses.dataclass(frozen=True)
class LogLinearDeltaNetConfig(GatedDeltaNetConfig):
    """Knobs of log-linear Gated DeltaNet: those of Gated DeltaNet, and its levels."""

    levels: int = knob(
        16, "levels L; the last has all positions that those before, of 2^(L - 2) together, do not", other=(3,), least=2
    )
    impl: str = impl_knob(LOG_LINEAR)


@register("log_linear_deltanet")
class LogLinearDeltaNet(GatedDeltaNet):
    """`o_t = sum_l w_t^l S_t^l q_t` per head, otherwise `gated_deltanet`.

    `S_t^0 = beta_t v_t k_t^T`; every other level goes through the rule's transition, `a_t S^l (I - beta_t k_t k_t^T)`,
    and for each set bit b of t `S_t^(b + 1)` is the memory of the 2^b positions before those of the lower bits, t
    counted from the document's start. `w_t = softplus(lambda * (x W_l))`, L numbers of a head; lambda, of heads and
    levels, is 1 at first.
    """

    Config = LogLinearDeltaNetConfig
    sequence_parallel = "positions are gathered: each device computes all of its rows and heads"
    paper = "Guo et al. 2025, Log-Linear Attention, arXiv:2506.04761"
    extension = "documents that reach beyond the levels: the last level takes what is left"
    implementations = LOG_LINEAR.table
    variants = (
        {"heads": 2, "head_width": 4, "expand": 1.5, "conv": 2, "chunk": 3, "levels": 3},
        {"key_heads": 2, "query_scale": None, "chunk": 4, "levels": 2},
    )

    def __init__(self, config: LogLinearDeltaNetConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        self.levels = LevelWeights(width, config.heads, config.levels, rngs=rngs, dtype=dtype)

    def recurrence(
        self, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array, memory: Any,
        x: jax.Array, seq: Sequence,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        o, memory = log_linear(
            q, k, v, log_decay, self.levels(x), beta_BTH=beta, documents_BT=seq.documents, offsets_BT=seq.offsets,
            state_BHLde=memory, chunk=self.config.chunk, impl=self.config.impl,
        )  # fmt: skip
        return o.astype(v.dtype), memory

    def memory_shape(self, batch: int) -> tuple[int, ...]:
        return batch, self.config.heads, self.config.levels - 1, self.head_dim, self.value_dim

    @classmethod
    def flops(cls, config: LogLinearDeltaNetConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, d, e, L = config.heads, config.head_dim(width), config.value_dim(width), config.levels
        parts, span = super().flops(config, width, length)
        memory = H * flops_per_token(length, config.chunk, d, e, L, corrected=True)
        return parts | {"levels": 2.0 * width * H * L, "memory": memory}, span
