"""Gated slot attention: softmax attention to a fixed number of slots, whose keys and values are running averages."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import RMSNorm, param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops import value_decay as slots_op
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, flops_per_token, linear_recurrence
from attnlab.ops.value_decay import value_decay


@dataclasses.dataclass(frozen=True)
class GSAConfig(HeadConfig):
    """Knobs of gated slot attention."""

    slots: int = knob(64, "slots m of a head", other=(5,), least=1)
    temperature: float = knob(8.0, "tau, by which log decays are divided", other=(2.0,), above=0)
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(
        LINEAR_RECURRENCE, doc="implementation of the second pass; the first follows it where it has one of that name"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GSAState:
    """The slots.

    Attributes:
      slot_keys: [B, H, d, m], fp32 (fp64 in a float64 model).
      slot_values: [B, H, m, d], so too.
    """

    slot_keys: jax.Array
    slot_values: jax.Array


@register("gsa")
class GSA(HeadMixer):
    """`K_t = diag(a_t) K_{t-1} + (1 - a_t) k_t^T`, V_t so too, `o_t = V_t^T softmax(K_t q_t)` per head, over m slots.

    q, k and v are `silu` of projections of x, `a_t = sigmoid(x W_a)^(1 / tau)` is a number for each slot, `tau` 8. The
    layer's output is `RMSNorm(silu(o)) W_o`, the norm over all heads. Softmax's logits have no scale.
    """

    Config = GSAConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "both memories are passed on as sums"
    paper = "Zhang et al. 2024, Gated Slot Attention for Efficient Linear-Time Sequence Modeling, arXiv:2409.07146"
    implementations = LINEAR_RECURRENCE.table
    counted = "chunked"
    variants = ({"heads": 2, "head_width": 6, "slots": 3, "temperature": 1.0, "chunk": 3},)

    def __init__(self, config: GSAConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        inner = config.heads * self.head_dim
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.q, self.k, self.v = (make.qkv(inner) for _ in range(3))
        self.forget = make(config.heads * config.slots)
        self.norm = RMSNorm(inner, ("heads",), dtype=dtype)
        self.out = make.out(inner)

    def heads(self, x: jax.Array, seq: Sequence, carried: GSAState | None = None) -> MixerOutput:
        c, wide = self.config, param_dtype(self.dtype)
        q, k, v = (split_heads(jax.nn.silu(y(x)), self.head_dim) for y in (self.q, self.k, self.v))
        log_decay = jax.nn.log_sigmoid(split_heads(self.forget(x), c.slots).astype(wide)) / c.temperature
        write = -jnp.expm1(log_decay)
        before = (None, None) if carried is None else (carried.slot_keys, carried.slot_values)
        logits, slot_keys = value_decay(
            q.astype(wide), k, write, log_decay, documents_BT=seq.documents, state_BHdm=before[0], chunk=c.chunk,
            impl="definition" if c.impl == "definition" else "auto",
        )  # fmt: skip
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        o, slot_values = linear_recurrence(
            weights, write.astype(self.dtype), v, log_decay=log_decay, documents_BT=seq.documents,
            state_BHde=before[1], chunk=c.chunk, impl=c.impl,
        )  # fmt: skip
        o = self.norm(jax.nn.silu(o).reshape(*x.shape[:2], -1)).reshape(o.shape)
        return MixerOutput(o, None if carried is None else GSAState(slot_keys, slot_values))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> GSAState:
        H, d, m, wide = self.config.heads, self.head_dim, self.config.slots, param_dtype(self.dtype)
        return GSAState(jnp.zeros((batch, H, d, m), wide), jnp.zeros((batch, H, m, d), wide))

    @classmethod
    def flops(cls, config: GSAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, d, m, C = config.heads, config.head_dim(width), config.slots, config.chunk
        return {
            "projections": 2.0 * width * H * (4 * d + m),
            "logits": H * slots_op.flops_per_token(length, C, d, m),
            "values": H * flops_per_token(length, C, m, d, channels=True),
        }, None
