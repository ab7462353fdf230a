"""Based: linear attention whose feature map makes the second-order Taylor polynomial of softmax's exponential."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, HeadMixer, MixerConfig, MixerOutput, Sequence, knob, register
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.recurrent import RecurrentState, recur
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, flops_per_token


def full_features(x: jax.Array) -> jax.Array:
    """`[1, x / f^(1/4), vec(x x^T) / sqrt(2 f)]` [..., 1 + f + f^2], of x [..., f] (Arora et al. 2024, section 4.1)."""
    f = x.shape[-1]
    products = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], f * f)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x * f**-0.25, products * (2 * f) ** -0.5], axis=-1)


def symmetric_features(x: jax.Array) -> jax.Array:
    """`full_features` with each product x_i x_j, i != j, once and times sqrt(2): [..., 1 + f + f (f + 1) / 2].

    Products are those of x and of x shifted round by r = 0 .. f / 2 places: each pair stands at one distance r on the
    circle, and twice where r is half of f.
    """
    f = x.shape[-1]
    circle = jnp.concatenate([x, x], axis=-1)
    parts = [jnp.ones_like(x[..., :1]), x * f**-0.25, x * x * (2 * f) ** -0.5]
    for r in range(1, f // 2 + 1):
        pairs = f // 2 if 2 * r == f else f
        parts.append(x[..., :pairs] * circle[..., r : r + pairs] * f**-0.5)
    return jnp.concatenate(parts, axis=-1)


FEATURES = {"symmetric": symmetric_features, "full": full_features}


@dataclasses.dataclass(frozen=True)
class BasedConfig(MixerConfig):
    """Knobs of Based's linear attention."""

    heads: int = knob(4, "heads H", other=(2,))
    head_width: int | None = knob(None, "width e of a head's values; none: width / heads", other=(3,))
    feature_width: int = knob(16, "width f of a head's queries and keys before the feature map", other=(5,))
    features: str = knob("symmetric", "symmetric: 1 + f + f (f + 1) / 2 features; full: 1 + f + f^2, the same "
                         "layer with every product of two channels twice", other=("full",))  # fmt: skip
    epsilon: float = knob(1e-12, "added to the denominator, which is at least 1/2", other=(0.5,))
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,))
    impl: str = knob("auto", f"implementation of the op: {', '.join(LINEAR_RECURRENCE.names())}", other=("definition",))

    def __post_init__(self) -> None:
        need, choice = config_lib.require, config_lib.require_choice
        for name in ("heads", "feature_width", "chunk"):
            need(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        need(self.head_width is None or self.head_width >= 1, "head_width", self.head_width, "1 or more, or none")
        need(0 <= self.epsilon < float("inf"), "epsilon", self.epsilon, "0 or more")
        choice("features", self.features, list(FEATURES))
        choice("impl", self.impl, LINEAR_RECURRENCE.names())

    def head_dim(self, width: int) -> int:
        """Value width e in a model of the given width; ConfigError if the heads do not divide it."""
        if self.head_width is None:
            allowed = f"divisors of the width {width}, or any with head_width set"
            config_lib.require(width % self.heads == 0, "heads", self.heads, allowed)
        return self.head_width or width // self.heads

    def feature_count(self) -> int:
        """Width of queries and keys after the feature map."""
        f = self.feature_width
        return 1 + f + (f * (f + 1) // 2 if self.features == "symmetric" else f * f)


@register("based")
class Based(HeadMixer):
    """`o_t = sum_s w_ts v_s / (sum_s w_ts + epsilon)`, s <= t, `w_ts = 1 + z + z^2 / 2`, `z = q_t . k_s / sqrt(f)`.

    The weight is `phi(q_t) . phi(k_s)` of `full_features`, at least 1/2; so numerator and denominator are one linear
    recurrence, of the values with a column of ones.
    """

    Config = BasedConfig
    capabilities = Capabilities(fixed_state=True)
    context = "the state is passed on as a sum"
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
        self.config, self.dtype = config, dtype
        self.head_dim = config.head_dim(width)
        narrow, inner = config.heads * config.feature_width, config.heads * self.head_dim
        linear = lambda fan_in, fan_out, *axes: Linear(fan_in, fan_out, axes, rngs=rngs, dtype=dtype)
        self.q = linear(width, narrow, "embed", "heads")
        self.k = linear(width, narrow, "embed", "heads")
        self.v = linear(width, inner, "embed", "heads")
        self.out = linear(inner, width, "heads", "embed")

    def heads(self, x: jax.Array, seq: Sequence, state: RecurrentState | None = None) -> MixerOutput:
        c, wide = self.config, param_dtype(self.dtype)
        q, k, v = (linear(x).reshape(*x.shape[:2], c.heads, -1).astype(wide) for linear in (self.q, self.k, self.v))
        q, k = (FEATURES[c.features](y) for y in (q, k))
        u = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        sums, state = recur(q, k, u, seq, state, chunk=c.chunk, impl=c.impl)
        return MixerOutput(self.averaged(sums).astype(self.dtype), state)

    def averaged(self, sums_BTHe: jax.Array) -> jax.Array:
        """Sums of weighted values by the sum of weights, which is in the last column."""
        # Weights are at least 1/2; features of huge queries and keys cancel, and may round their sum to about 0.
        return sums_BTHe[..., :-1] / (jnp.maximum(sums_BTHe[..., -1:], 0.5) + self.config.epsilon)

    def combine(self, o_BTHe: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(o_BTHe.reshape(*x.shape[:2], -1))

    def init_state(self, batch: int, max_length: int, dtype: Any = jnp.float32) -> RecurrentState:
        c = self.config
        return RecurrentState.empty(batch, c.heads, c.feature_count(), self.head_dim + 1, dtype)

    @classmethod
    def flops(cls, config: BasedConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        e, H = config.head_dim(width), config.heads
        return {
            "projections": 4.0 * width * H * (config.feature_width + e),
            "recurrence": H * flops_per_token(length, config.chunk, config.feature_count(), e + 1),
        }, None
