"""Local linear attention: softmax attention's local average replaced by a local linear regression."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.attention import Attention, AttentionConfig
from attnlab.mixers.base import MixerOutput, impl_knob, knob, register
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.keys_values import KeysValues
from attnlab.ops.local_linear import LOCAL_LINEAR, local_linear
from attnlab.ops.masks import Mask, mean_visible_keys

_LEAST_RIDGE = 1e-3  # below it float32 loses the output


@dataclasses.dataclass(frozen=True)
class LocalLinearConfig(AttentionConfig):
    """Knobs of local linear attention: of its queries, keys and values, and of the regression.

    It has no sinks, with which weights would not sum to 1, and no soft-cap, which the paper has not.
    """

    qk_norms = (False, True, "layer")  # cosine attention scales queries by their number of keys

    qk_norm: bool | str = knob(
        True,
        "of each head's queries and keys, before RoPE: they must share one space; true: RMSNorm; layer: LayerNorm",
        other=(False, "layer"),
    )
    ridge: float | None = knob(
        None,
        "ridge, on weights that sum to 1; none: learned per head and position, softplus(w x + b) + ridge_min, "
        "1 at first where x = 0",
        other=(0.3,),
        least=_LEAST_RIDGE,
    )
    ridge_min: float = knob(
        0.01, f"least learned ridge, {_LEAST_RIDGE} or more", other=(0.1,), least=_LEAST_RIDGE, below=1
    )
    iterations: int = knob(
        16,
        "iterations of conjugate gradients: those that declared FLOPs count, and the most where max_iterations is none",
        other=(6,),
        least=1,
    )
    max_iterations: int | None = knob(
        None, "bound for impl=cg and pallas, which go on until `tolerance`; none: iterations", other=(64,)
    )
    tolerance: float | None = knob(
        None,
        "relative residual at which a solve is done; none: 1e-5, in float64 1e-13",
        other=(1e-14,),
        above=0,
        below=1,
    )
    blocks: int = knob(
        1,
        "groups of channels, of d / blocks each; second moments between groups count as 0; a "
        "divisor of d / 2: the pairs that RoPE turns stay together",
        other=(2,),
        least=1,
    )
    impl: str = impl_knob(
        LOCAL_LINEAR,
        doc="cg and pallas (TPU, Hopper) stop when a block of rows is done, cg_fixed after `iterations`; one of",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_iterations is not None:
            allowed = f"{self.iterations} (iterations) or more, or none"
            enough = self.max_iterations >= self.iterations
            config_lib.require(enough, "max_iterations", self.max_iterations, allowed)

        whole = self.blocks == 1 or self.rope_width is None
        config_lib.require(whole, "blocks", self.blocks, "1 where rope_width is set")

    def head_dim(self, width: int) -> int:
        d = super().head_dim(width)
        config_lib.require(d // 2 % self.blocks == 0, "blocks", self.blocks, f"divisors of {d // 2}, half a head")
        return d


@register("local_linear")
class LocalLinear(Attention):
    """The value at the query of the affine map of keys that fits the values best, weighted by softmax attention.

    `attnlab.ops.local_linear` has the formula. Metrics are means over heads and positions: the relative residual of the
    solves, and their iterations.
    """

    Config = LocalLinearConfig
    paper = "Zuo et al. 2025, Local Linear Attention, arXiv:2510.01450"
    extension = (
        "The ridge is learned per head and position; queries and keys are normalised; sums are centred at the mean "
        "key; blocks"
    )
    implementations = LOCAL_LINEAR.table
    counted = "cg_fixed"
    variants = (
        {"kv_heads": 2, "window": 4, "rope_base": None, "head_width": 6},
        {"kv_heads": 1, "causal": False, "qk_norm": False},
        {"kv_heads": 2, "blocks": 2, "max_iterations": 64, "ridge_min": 0.1, "qk_norm": "layer"},
    )

    def __init__(self, config: LocalLinearConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        if config.ridge is None:
            self.ridge = Linear(width, config.heads, ("embed", "heads"), rngs=rngs, dtype=dtype)
            bias = math.log(math.expm1(1 - config.ridge_min))
            rows = jnp.full((config.heads,), bias, param_dtype(dtype))
            self.ridge_bias = param(rows, axes=("heads",), role=Role.BIAS)

    def positioned(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As in softmax attention, the channels of queries and keys in the order of `blocks`."""
        q, k, v = super().positioned(x, seq)
        if self.config.blocks > 1:  # the same order for both leaves all scores as they are
            halves = lambda y: y.reshape(*y.shape[:-1], 2, self.config.blocks, -1)
            q, k = (halves(y).swapaxes(-3, -2).reshape(y.shape) for y in (q, k))
        return q, k, v

    def attend(self, q: jax.Array, kv: KeysValues, mask: Mask, x: jax.Array) -> MixerOutput:
        c = self.config
        o, solves = local_linear(
            q,
            *kv.by_position(len(q)),
            mask,
            self.ridge_of(x),
            iterations=c.iterations,
            max_iterations=c.max_iterations,
            tolerance=c.tolerance,
            blocks=c.blocks,
            impl=c.impl,
        )
        metrics = {
            "local_linear_residual": solves.residual_BTH.mean(),
            "local_linear_iterations": solves.iterations_BTH.mean(),
        }
        return MixerOutput(o, metrics=metrics)

    def ridge_of(self, x: jax.Array) -> jax.Array:
        """Ridge [B, T, H] of x [B, T, D], or a scalar where it is given; in fp32."""
        if self.config.ridge is not None:
            return jnp.asarray(self.config.ridge, param_dtype(self.dtype))
        logits = self.ridge(x).astype(param_dtype(self.dtype)) + self.ridge_bias[...]
        return jax.nn.softplus(logits) + self.config.ridge_min

    @classmethod
    def flops(cls, config: LocalLinearConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        """Solves of `iterations` iterations; how many residuals ask for is known only at run time."""
        flops, _ = super().flops(config, width, length)
        d, span = config.head_dim(width), mean_visible_keys(length, config.causal, config.window)
        if config.ridge is None:
            flops["ridge"] = 2.0 * width * config.heads
        # Scores, mean key, twice the keys an iteration, the fit at the keys, values.
        flops["attention"] = 2.0 * config.heads * d * span * (4 + 2 * config.iterations)
        return flops, span
