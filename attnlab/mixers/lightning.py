"""Lightning attention: linear attention whose heads forget at fixed rates, normalised after the sum, gated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, HeadMixer, MixerConfig, MixerOutput, Sequence, knob, register
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.recurrent import RecurrentState, recur
from attnlab.mixers.roles import Role, param
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, flops_per_token

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
class LightningConfig(MixerConfig):
    """Knobs of lightning attention."""

    heads: int = knob(4, "heads H", other=(2,))
    head_width: int | None = knob(None, "head width d; none: width / heads", other=(3,))
    slopes: str = knob("geometric", f"m_h of head h = 0 .. H - 1; {'; '.join(f'{k}: {v}' for k, v in SLOPES.items())}",
                       other=("interleaved",))  # fmt: skip
    decay_scale: float = knob(
        1.0, "c in the decay exp(-c * m_h) per position of head h; 0: nothing decays. "
        "TransNormerLLM's layer l of L has c = 1 - l / (L - 1) + 1e-5", other=(0.0,)
    )  # fmt: skip
    activation: str = knob("silu", f"of queries, keys and values: {', '.join(ACTIVATIONS)}", other=("identity",))
    norm: str = knob("srmsnorm", f"of the output; {'; '.join(f'{k}: {v}' for k, v in NORMS.items())}",
                     other=("rmsnorm", "layernorm"))  # fmt: skip
    norm_epsilon: float = knob(1e-6, "added to the mean square in the norm", other=(1e-5,))
    norm_over: str = knob("layer", "layer: over all heads' channels; head: over each head's own", other=("head",))
    gate_rank: int | None = knob(None, "r in the output's gate sigmoid(x W [D, r] W [r, H d]); none: d", other=(2,))
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,))
    impl: str = knob("auto", f"implementation of the op: {', '.join(LINEAR_RECURRENCE.names())}", other=("definition",))

    def __post_init__(self) -> None:
        need, choice = config_lib.require, config_lib.require_choice
        for name in ("heads", "chunk"):
            need(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("head_width", "gate_rank"):
            value = getattr(self, name)
            need(value is None or value >= 1, name, value, "1 or more, or none")
        need(0 <= self.decay_scale < float("inf"), "decay_scale", self.decay_scale, "0 or more")
        choice("slopes", self.slopes, list(SLOPES))
        need(0 < self.norm_epsilon < 1, "norm_epsilon", self.norm_epsilon, "above 0, below 1")
        choice("activation", self.activation, list(ACTIVATIONS))
        choice("norm", self.norm, list(NORMS))
        choice("norm_over", self.norm_over, ["layer", "head"])
        choice("impl", self.impl, LINEAR_RECURRENCE.names())

    def head_dim(self, width: int) -> int:
        """Head width d in a model of the given width; ConfigError if the heads do not divide it."""
        if self.head_width is None:
            allowed = f"divisors of the width {width}, or any with head_width set"
            config_lib.require(width % self.heads == 0, "heads", self.heads, allowed)
        return self.head_width or width // self.heads


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
    context = "the state is passed on as a sum"
    paper = "Qin et al. 2024, Lightning Attention-2, arXiv:2401.04658; TransNormerLLM, arXiv:2307.14995"
    extension = "norm_over=head (the paper's norm is over the layer's width), a gate_rank other than the head width"
    implementations = LINEAR_RECURRENCE.table
    counted = "chunked"
    variants = (
        {"heads": 2, "chunk": 3, "norm": "layernorm", "norm_over": "head", "decay_scale": 2.5},
        {"heads": 3, "head_width": 4, "slopes": "interleaved", "norm_epsilon": 0.1},
    )

    def __init__(self, config: LightningConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config, self.dtype = config, dtype
        self.head_dim = config.head_dim(width)
        inner, rank = config.heads * self.head_dim, config.gate_rank or self.head_dim
        linear = lambda fan_in, fan_out, *axes: Linear(fan_in, fan_out, axes, rngs=rngs, dtype=dtype)
        self.q = linear(width, inner, "embed", "heads")
        self.k = linear(width, inner, "embed", "heads")
        self.v = linear(width, inner, "embed", "heads")
        self.gate_down = linear(width, rank, "embed", "gates")
        self.gate_up = linear(rank, inner, "gates", "heads")
        self.out = linear(inner, width, "heads", "embed")
        if config.norm != "srmsnorm":
            self.scale = param(jnp.ones((inner,), param_dtype(dtype)), axes=("heads",), role=Role.SCALE)
        if config.norm == "layernorm":
            self.bias = param(jnp.zeros((inner,), param_dtype(dtype)), axes=("heads",), role=Role.BIAS)

    def heads(self, x: jax.Array, seq: Sequence, state: RecurrentState | None = None) -> MixerOutput:
        c = self.config
        decay = None if c.decay_scale == 0 else -c.decay_scale * slopes(c.heads, c.slopes)
        q, k, v = (self._split(self._activated(linear(x))) for linear in (self.q, self.k, self.v))
        o, state = recur(q, k, v, seq, state, log_decay=decay, chunk=c.chunk, impl=c.impl)
        gate = self._split(self.gate_up(self.gate_down(x)))
        o = self.normed(o) * jax.nn.sigmoid(gate.astype(param_dtype(self.dtype)))
        return MixerOutput(o.astype(self.dtype), state)

    def combine(self, o_BTHe: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(o_BTHe.reshape(*x.shape[:2], -1))

    def init_state(self, batch: int, max_length: int, dtype: Any = jnp.float32) -> RecurrentState:
        return RecurrentState.empty(batch, self.config.heads, self.head_dim, self.head_dim, dtype)

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

    def _split(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], self.config.heads, self.head_dim)
