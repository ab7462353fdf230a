"""Lightning attention: linear attention whose heads forget at fixed rates, normalised after the sum, gated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, flops_per_token, linear_recurrence

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": jax.nn.silu, "identity": lambda z: z}
NORMS = {
    "srmsnorm": "x / rms(x)",
    "rmsnorm": "x / rms(x), times a learned scale",
    "layernorm": "(x - mean(x)) / std(x), times a learned scale, plus a learned bias",
}
SLOPES = {
    "geometric": "2^(-8 (h + 1) / H) for any H",
    "interleaved": "the same for powers of two; else those of the power of two below, then every second one of the "
    "power above, as in ALiBi's and TransNormerLLM's released code",
}


@dataclasses.dataclass(frozen=True)
class LightningConfig(HeadConfig):
    """Knobs of lightning attention."""

    slopes: str = knob(
        "geometric",
        f"m_h of head h = 0 .. H - 1; {'; '.join(f'{k}: {v}' for k, v in SLOPES.items())}",
        other=("interleaved",),
        choices=SLOPES,
    )
    decay_scale: float = knob(
        1.0,
        "c in the decay exp(-c * m_h) per position of head h; 0: nothing decays. "
        "TransNormerLLM's layer l of L has c = 1 - l / (L - 1) + 1e-5",
        other=(0.0,),
        least=0,
    )
    activation: str = knob(
        "silu", f"of queries, keys and values: {', '.join(ACTIVATIONS)}", other=("identity",), choices=ACTIVATIONS
    )
    norm: str = knob(
        "srmsnorm",
        f"of the output; {'; '.join(f'{k}: {v}' for k, v in NORMS.items())}",
        other=("rmsnorm", "layernorm"),
        choices=NORMS,
    )
    norm_epsilon: float = knob(1e-6, "added to the mean square in the norm", other=(1e-5,), above=0, below=1)
    norm_over: str = knob(
        "layer",
        "layer: over all heads' channels; head: over each head's own",
        other=("head",),
        choices=("layer", "head"),
    )
    gate_rank: int | None = knob(
        None, "r in the output's gate sigmoid(x W [D, r] W [r, H d]); none: d", other=(2,), least=1
    )
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(LINEAR_RECURRENCE)


def slopes(heads: int, form: str = "geometric") -> jax.Array:
    """Slopes of heads by one of `SLOPES` (Press et al. 2022, arXiv:2108.12409, section 3, and its released code)."""
    if form == "interleaved":
        below = 1 << (heads.bit_length() - 1)
        even = lambda n: [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
        return jnp.asarray(even(below) + even(2 * below)[::2][: heads - below])
    return jnp.exp2(-8 * (jnp.arange(heads) + 1) / heads)


@register("lightning")
class Lightning(HeadMixer):
    """`o_t = sum_{s <= t} exp(-slope (t - s)) (q_t . k_s) v_s` per head; `Norm(o) * sigmoid(x W_d W_u)`, projected.

    The layer is that of TransNormerLLM's released code, with neither scale nor denominator; the chunked computation is
    Lightning Attention-2's (section 3.2). It has no position encoding other than the decay.
    """

    Config = LightningConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the state is passed on as a sum"
    paper = "Qin et al. 2024, Lightning Attention-2, arXiv:2401.04658; TransNormerLLM, arXiv:2307.14995"
    extension = "norm_over=head (the paper's norm is over the layer's width), a gate_rank other than the head width"
    implementations = LINEAR_RECURRENCE.table
    counted = "chunked"
    variants = (
        {"heads": 2, "chunk": 3, "norm": "layernorm", "norm_over": "head", "decay_scale": 2.5},
        {"heads": 3, "head_width": 4, "slopes": "interleaved", "norm_epsilon": 0.1},
    )

    def __init__(self, config: LightningConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        inner, rank = config.heads * self.head_dim, config.gate_rank or self.head_dim
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.q, self.k, self.v = (make.qkv(inner) for _ in range(3))
        self.gate_down = make(rank, "gates")
        self.gate_up = Linear(rank, inner, ("gates", "heads"), rngs=rngs, dtype=dtype)
        self.out = make.out(inner)
        if config.norm != "srmsnorm":
            self.scale = param(jnp.ones((inner,), param_dtype(dtype)), axes=("heads",), role=Role.SCALE)
        if config.norm == "layernorm":
            self.bias = param(jnp.zeros((inner,), param_dtype(dtype)), axes=("heads",), role=Role.BIAS)

    def heads(self, x: jax.Array, seq: Sequence, carried: jax.Array | None = None) -> MixerOutput:
        """As in the contract; `carried` is the memory [B, H, d, d]."""
        c = self.config
        decay = None if c.decay_scale == 0 else -c.decay_scale * slopes(c.heads, c.slopes)
        q, k, v = (split_heads(self._activated(linear(x)), self.head_dim) for linear in (self.q, self.k, self.v))
        o, memory = linear_recurrence(
            q, k, v, documents_BT=seq.documents, state_BHde=carried, log_decay=decay, chunk=c.chunk, impl=c.impl
        )
        gate = split_heads(self.gate_up(self.gate_down(x)), self.head_dim)
        o = self.normed(o) * jax.nn.sigmoid(gate.astype(param_dtype(self.dtype)))
        return MixerOutput(o.astype(self.dtype), memory)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> jax.Array:
        return jnp.zeros((batch, self.config.heads, self.head_dim, self.head_dim), param_dtype(dtype))

    @classmethod
    def flops(cls, config: LightningConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d = config.head_dim(width)
        inner, rank = config.heads * d, config.gate_rank or d
        return {
            "projections": 8.0 * width * inner,
            "gate": 2.0 * rank * (width + inner),
            "recurrence": config.heads * flops_per_token(length, config.chunk, d, d),
        }, None

    def normed(self, o_BTHe: jax.Array) -> jax.Array:
        """The norm of the heads' outputs, in fp32 (fp64)."""
        c = self.config
        over = (-2, -1) if c.norm_over == "layer" else -1
        y = o_BTHe.astype(param_dtype(self.dtype))
        if c.norm == "layernorm":
            y -= jnp.mean(y, over, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, over, keepdims=True) + c.norm_epsilon)
        if c.norm != "srmsnorm":
            y *= self.scale[...].reshape(c.heads, -1)
        return y + self.bias[...].reshape(c.heads, -1) if c.norm == "layernorm" else y

    def _activated(self, z: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.activation](z.astype(param_dtype(self.dtype))).astype(self.dtype)
