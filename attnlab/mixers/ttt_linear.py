"""TTT-Linear: the state is a linear model per head that takes a step of gradient descent at every position."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadMixer, Projections, RotaryConfig, split_heads
from attnlab.mixers.parts import LayerNorm, param_dtype
from attnlab.mixers.roles import Role, drawn, normal, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.ttt_linear import TTT_LINEAR, Affine, Learned, TTTState, flops_per_token, ttt_linear

_DEVIATION = 0.02  # of the map at first
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class TTTLinearConfig(RotaryConfig):
    """Knobs of TTT-Linear; positions that RoPE turns by are those in a mini-batch."""

    chunk: int = knob(
        16, "positions in a mini-batch, whose gradients are taken at the same weights, b", other=(3,), least=1
    )
    rate: float = knob(1.0, "largest step size, times d", other=(0.3,), above=0)
    impl: str = impl_knob(TTT_LINEAR)


@register("ttt_linear")
class TTTLinear(HeadMixer):
    """`o_t = q_t + f(q_t; W_t, b_t)`, `f(x; W, b) = LN(x W + b)` per head, with W and b trained along the sequence.

    The loss of position j is `1/2 |f(k_j) - (v_j - k_j)|^2`; its gradient is taken at the weights with which its
    mini-batch of `chunk` positions begins, and steps are `tau_t rate sigmoid(x_j W_r + b_r) / d` long, where
    `tau_t = max(0, 1 / i + learned_i)` for row t at place i = 1, 2, ... of its mini-batch: `attnlab.ops.ttt_linear` has
    the formula. The heads' outputs together pass a LayerNorm and are projected.

    Mini-batches are counted from the start of each document, whatever `Sequence.positions` says.
    """

    Config = TTTLinearConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the map is handed on from device to device, row by row"
    paper = "Sun et al. 2024, Learning to (Learn at Test Time): RNNs with Expressive Hidden States, arXiv:2407.04620"
    extension = "mini-batches that begin anew with each packed document, and lengths that they do not divide"
    implementations = TTT_LINEAR.table
    counted = "chunked"
    variants = ({"heads": 2, "head_width": 6, "chunk": 4, "rope_width": 2},)

    def __init__(self, config: TTTLinearConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        H, d, wide = config.heads, self.head_dim, param_dtype(dtype)
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.q, self.k, self.v = (make.qkv(H * d) for _ in range(3))
        self.rate = make(H, "gates", bias=True)
        args = ((H, d, d), wide, _DEVIATION)
        self.weight = drawn(rngs, normal, *args, axes=("heads", "memory_in", "memory_out"), role=Role.MEMORY)
        self.weight_bias = param(jnp.zeros((H, d), wide), axes=("heads", "memory_out"), role=Role.MEMORY)
        self.gain = param(jnp.ones((H, d), wide), axes=("heads", "head"), role=Role.SCALE)
        self.shift = param(jnp.zeros((H, d), wide), axes=("heads", "head"), role=Role.BIAS)
        self.tau = param(jnp.zeros((config.chunk,), wide), axes=("positions",), role=Role.POSITIONS)
        self.norm = LayerNorm(H * d, ("heads",), dtype=dtype, epsilon=_EPSILON)
        self.out = make.out(H * d)

    def heads(self, x: jax.Array, seq: Sequence, carried: TTTState | None = None) -> MixerOutput:
        c, (B, T, _), wide = self.config, x.shape, param_dtype(self.dtype)
        offsets = jnp.arange(T, dtype=jnp.int32)[None] if seq.offsets is None else seq.offsets
        q, k, v = (split_heads(y(x), self.head_dim) for y in (self.q, self.k, self.v))
        q, k = (c.rotated(y, offsets % c.chunk) for y in (q, k))
        rate = c.rate / self.head_dim * jax.nn.sigmoid(self.rate(x).astype(wide))
        o, state = ttt_linear(
            q, k, v, rate, self.learned(), documents_BT=seq.documents, state=carried, impl=c.impl
        )  # fmt: skip
        o = self.norm(o.reshape(B, T, -1)).reshape(o.shape)
        return MixerOutput(o.astype(self.dtype), state)

    def learned(self) -> Learned:
        """What the op takes of the parameters."""
        tau = jnp.maximum(1 / (1 + jnp.arange(self.config.chunk)) + self.tau[...], 0).astype(self.tau.dtype)
        return Learned(Affine(self.weight[...], self.weight_bias[...]), self.gain[...], self.shift[...], tau)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> TTTState:
        H, d, wide = self.config.heads, self.head_dim, param_dtype(self.dtype)
        blank = Affine(jnp.zeros((batch, H, d, d), wide), jnp.zeros((batch, H, d), wide))  # a document begins anew
        return TTTState(blank, blank, jnp.zeros((batch,), jnp.int32))

    @classmethod
    def flops(cls, config: TTTLinearConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, d = config.heads, config.head_dim(width)
        return {
            "projections": 8.0 * width * H * d,
            "gates": 2.0 * width * H,
            "memory": H * flops_per_token(length, config.chunk, d),
        }, None
