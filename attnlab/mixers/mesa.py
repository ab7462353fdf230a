"""The mesa layer: every position reads the ridge regression of all values so far on their keys."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import RMSNorm, param_dtype
from attnlab.mixers.roles import Role, drawn, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.mesa import MESA, flops_per_token, mesa
from attnlab.ops.norm import unit
from attnlab.ops.two_stage import log_gate

_FIRST_RIDGE = 1.0
_NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class MesaConfig(HeadConfig):
    """Knobs of the mesa layer; `head_width` is that of queries, keys and values."""

    conv: int = knob(
        4, "positions that the convolution of q and k spans, itself included; 1: none", other=(1,), least=1
    )
    gate: bool = knob(False, "multiply the normed outputs by silu(x W_g)", other=(True,))
    ridge_min: float = knob(
        0.25, "least ridge; the learned one is softplus(p) + ridge_min, 1 at first", other=(0.5,), least=1e-3, below=1
    )
    iterations: int = knob(
        30, "iterations of conjugate gradients: the most, and those that declared FLOPs count", other=(12,), least=1
    )
    tolerance: float | None = knob(
        None,
        "relative residual at which a solve is done; none: 1e-5, in float64 1e-13",
        other=(1e-14,),
        above=0,
        below=1,
    )
    chunk: int = knob(64, "positions computed at once; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(MESA, doc="cg stops when all systems are done, cg_fixed after `iterations`; one of")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MesaState:
    """The sums and what the convolution still needs.

    Attributes:
      sums: [B, H, d, 2d], of keys with keys and with values, fp32 (fp64 in a float64 model).
      tail: [B, conv - 1, H * 2d], the last inputs of the convolution.
    """

    sums: jax.Array
    tail: jax.Array


@register("mesa")
class Mesa(HeadMixer):
    """`o_t = S_t^T (G_t + diag(ridge))^-1 q_t` per head, where, of all s <= t of the document,

        G_t = a_t G_{t-1} + beta_t k_t k_t^T,      S_t = a_t S_{t-1} + beta_t k_t v_t^T.

    q and k are projections of x, convolved along the sequence, through SiLU, divided by their length; v is projected.
    `a_t = sigmoid(x W_a + b)`, `beta_t = sigmoid(x W_b + b)` per head, the ridge is learned per channel. Each head's
    output is normed by RMSNorm, whose scale all heads share. Metrics are means over heads and positions: the relative
    residual of the solves, and their iterations.
    """

    Config = MesaConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the sums are passed on; each device solves for its positions"
    paper = "von Oswald et al. 2025, MesaNet: Sequence Modeling by Locally Optimal Test-Time Training, arXiv:2506.05233"
    extension = "solves stop at a tolerance, not only after a number of iterations"
    implementations = MESA.table
    counted = "cg_fixed"
    variants = ({"heads": 2, "head_width": 4, "conv": 2, "chunk": 3, "gate": True},)

    def __init__(self, config: MesaConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        d, inner, wide = self.head_dim, config.heads * self.head_dim, param_dtype(dtype)
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.q, self.k, self.v = (make.qkv(inner) for _ in range(3))
        if config.conv > 1:
            bound, shape = 1 / math.sqrt(config.conv), (config.conv, 2 * inner)
            args = (shape, wide, -bound, bound)
            self.filters = drawn(rngs, jax.random.uniform, *args, axes=("conv", "heads"), role=Role.TAPS)
        self.keep, self.beta = (make(config.heads, "gates", bias=True) for _ in range(2))
        logits = jnp.full((config.heads, d), math.log(math.expm1(_FIRST_RIDGE - config.ridge_min)), wide)
        self.ridge = param(logits, axes=("heads", "head"), role=Role.BIAS)
        self.norm = RMSNorm(d, ("head",), dtype=dtype, epsilon=_NORM_EPSILON)
        if config.gate:
            self.gate = make(inner)
        self.out = make.out(inner)

    def heads(self, x: jax.Array, seq: Sequence, carried: MesaState | None = None) -> MixerOutput:
        c, (B, T, _), wide = self.config, x.shape, param_dtype(self.dtype)
        # One convolution for q and k, whose channels lie together head by head.
        qk = jnp.concatenate([split_heads(y(x), self.head_dim) for y in (self.q, self.k)], axis=-1)
        tail = None if carried is None else carried.tail
        if c.conv > 1:
            flat, tail = causal_conv(qk.reshape(B, T, -1), self.filters[...], seq.documents, tail)
            qk = flat.reshape(qk.shape)
        q, k = (unit(y) for y in jnp.split(jax.nn.silu(qk), 2, axis=-1))
        o, solves, sums = mesa(
            q,
            k,
            split_heads(self.v(x), self.head_dim),
            log_gate(self.keep(x).astype(wide)),
            jax.nn.sigmoid(self.beta(x).astype(wide)),
            jax.nn.softplus(self.ridge[...]) + c.ridge_min,
            documents_BT=seq.documents,
            state_BHdf=None if carried is None else carried.sums,
            iterations=c.iterations,
            tolerance=c.tolerance,
            chunk=c.chunk,
            impl=c.impl,
        )
        o = self.norm(o)
        if c.gate:
            o = o * jax.nn.silu(self.gate(x).astype(wide)).reshape(o.shape)
        metrics = {"mesa_residual": solves.residual_BTH.mean(), "mesa_iterations": solves.iterations_BTH.mean()}
        state = None if carried is None else MesaState(sums, tail.astype(carried.tail.dtype))
        return MixerOutput(o.astype(self.dtype), state, metrics=metrics)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> MesaState:
        H, d = self.config.heads, self.head_dim
        return MesaState(
            sums=jnp.zeros((batch, H, d, 2 * d), param_dtype(self.dtype)),
            tail=jnp.zeros((batch, self.config.conv - 1, H * 2 * d), dtype),
        )

    @classmethod
    def flops(cls, config: MesaConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        """Solves of `iterations` iterations; how many residuals ask for is known only at run time."""
        H, d = config.heads, config.head_dim(width)
        return {
            "projections": 2.0 * width * H * d * (5 if config.gate else 4),
            "gates": 4.0 * width * H,
            "memory": H * flops_per_token(length, config.chunk, d, d, config.iterations),
        }, None
