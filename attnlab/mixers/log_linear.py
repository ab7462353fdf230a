"""Log-linear attention: Mamba-2 whose memory is kept in levels of 1, 2, 4, ... positions, each weighed by the query."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import impl_knob, knob, register
from attnlab.mixers.mamba2 import Mamba2, Mamba2Config
from attnlab.mixers.parts import LevelWeights, param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops.log_linear import LOG_LINEAR, flops_per_token, log_linear


@dataclasses.dataclass(frozen=True)
class LogLinearConfig(Mamba2Config):
    """Knobs of log-linear attention: those of Mamba-2, and its levels."""

    levels: int = knob(
        16, "levels L; the last has all positions that those before, of 2^(L - 2) together, do not", other=(3,), least=2
    )
    impl: str = impl_knob(LOG_LINEAR)


@register("log_linear")
class LogLinear(Mamba2):
    """`o_t = sum_l w_t^l S_t^l^T q_t + D v_t` per head, otherwise `mamba2`.

    `S_t^0` is what t writes, and for each set bit b of t `S_t^(b + 1)` the memory of the 2^b positions before those of
    the lower bits, t counted from the document's start. `w_t = softplus(lambda * (x W_l))`, L numbers of a head;
    lambda, of heads and levels, is 1 at first. All levels decay as Mamba-2's memory does.
    """

    Config = LogLinearConfig
    sequence_parallel = "positions are gathered: each device computes all of its rows and heads"
    paper = "Guo et al. 2025, Log-Linear Attention, arXiv:2506.04761"
    extension = "documents that reach beyond the levels: the last level takes what is left"
    implementations = LOG_LINEAR.table
    variants = (
        {"heads": 2, "head_width": 6, "state_width": 5, "conv": 2, "chunk": 3, "levels": 3},
        {"groups": 2, "expand": 1.0, "state_width": 3, "chunk": 4, "levels": 2},
    )

    def __init__(self, config: LogLinearConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        self.levels = LevelWeights(width, config.heads, config.levels, rngs=rngs, dtype=dtype)

    def recurrence(
        self, q: jax.Array, k: jax.Array, u: jax.Array, log_decay: jax.Array, memory: Any, x: jax.Array, seq: Sequence
    ) -> tuple[jax.Array, Any]:
        return log_linear(
            *self.of_heads(q, k), u, log_decay, self.levels(x), documents_BT=seq.documents, offsets_BT=seq.offsets,
            state_BHLde=memory, chunk=self.config.chunk, impl=self.config.impl,
        )  # fmt: skip

    def init_memory(self, batch: int) -> jax.Array:
        c = self.config
        shape = batch, c.heads, c.levels - 1, c.state_width, self.head_dim
        return jnp.zeros(shape, param_dtype(self.dtype))

    @classmethod
    def flops(cls, config: LogLinearConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, P, N, L = config.heads, config.head_dim(width), config.state_width, config.levels
        parts, span = super().flops(config, width, length)
        recurrence = H * flops_per_token(length, config.chunk, N, P, L)
        return parts | {"levels": 2.0 * width * H * L, "recurrence": recurrence}, span
