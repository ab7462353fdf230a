"""Hebbian fast weights: a matrix per head that adds outer products of what it sees, and forgets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, flops_per_token, linear_recurrence

_LEAST_KEPT, _MOST_KEPT = 0.9, 0.999  # of the heads at first
RATES = {
    "head": "softplus(b), a number per head, 1 at first",
    "data": "sigmoid(x w) per head and position",
    "one": "1",
}


@dataclasses.dataclass(frozen=True)
class HebbianConfig(HeadConfig):
    """Knobs of Hebbian fast weights; `head_width` is that of queries, keys and values."""

    decay: bool = knob(
        True,
        f"forget by lambda = sigmoid(a) per head, from {_LEAST_KEPT} to {_MOST_KEPT} at first; false: nothing",
        other=(False,),
    )
    rate: str = knob(
        "head",
        f"eta, how strongly is written; {'; '.join(f'{k}: {v}' for k, v in RATES.items())}",
        other=("data", "one"),
        choices=RATES,
    )
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(LINEAR_RECURRENCE)


@register("hebbian")
class Hebbian(HeadMixer):
    """`W_t = lambda W_{t-1} + eta_t k_t v_t^T`, `o_t = q_t W_t` per head: a linear recurrence.

    There is no normalisation and no scale, and no position encoding but the decay.
    """

    Config = HebbianConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the state is passed on as a sum"
    paper = "after Ba et al. 2016, Using Fast Weights to Attend to the Recent Past, arXiv:1610.06258"
    extension = "our reading of a Hebbian rule as one layer, not a reproduction: decays and rates are learned per head"
    implementations = LINEAR_RECURRENCE.table
    counted = "chunked"
    variants = (
        {"heads": 2, "head_width": 6, "chunk": 3, "rate": "data"},
        {"decay": False, "rate": "one", "chunk": 4, "bias": "all"},
    )

    def __init__(self, config: HebbianConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        H, inner, wide = config.heads, config.heads * self.head_dim, param_dtype(dtype)
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.q, self.k, self.v = (make.qkv(inner) for _ in range(3))
        if config.decay:
            # 1 - lambda is log-uniform over the heads: each remembers another stretch.
            forgotten = jnp.geomspace(1 - _LEAST_KEPT, 1 - _MOST_KEPT, H, dtype=wide)
            self.keep = param(jnp.log1p(-forgotten) - jnp.log(forgotten), axes=("heads",), role=Role.DECAY_RATE)
        if config.rate == "data":
            self.rate = make(H, "gates")
        elif config.rate == "head":
            one = jnp.full((H,), math.log(math.expm1(1.0)), wide)
            self.rate_bias = param(one, axes=("heads",), role=Role.BIAS)
        self.out = make.out(inner)

    def heads(self, x: jax.Array, seq: Sequence, carried: jax.Array | None = None) -> MixerOutput:
        """As in the contract; `carried` is the memory [B, H, d, d]."""
        c, wide = self.config, param_dtype(self.dtype)
        q, k, v = (split_heads(y(x), self.head_dim) for y in (self.q, self.k, self.v))
        o, memory = linear_recurrence(
            q, k, self.rated(v.astype(wide), x).astype(self.dtype),
            log_decay=jax.nn.log_sigmoid(self.keep[...]) if c.decay else None,
            documents_BT=seq.documents, state_BHde=carried, chunk=c.chunk, impl=c.impl,
        )  # fmt: skip
        return MixerOutput(o.astype(self.dtype), memory)

    def rated(self, v_BTHd: jax.Array, x: jax.Array) -> jax.Array:
        """Values times eta."""
        if self.config.rate == "one":
            return v_BTHd
        if self.config.rate == "head":
            return jax.nn.softplus(self.rate_bias[...])[:, None] * v_BTHd
        return jax.nn.sigmoid(self.rate(x).astype(v_BTHd.dtype))[..., None] * v_BTHd

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> jax.Array:
        return jnp.zeros((batch, self.config.heads, self.head_dim, self.head_dim), param_dtype(dtype))

    @classmethod
    def flops(cls, config: HebbianConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, d = config.heads, config.head_dim(width)
        return {
            "projections": 8.0 * width * H * d,
            "gates": 2.0 * width * H * (config.rate == "data"),
            "recurrence": H * flops_per_token(length, config.chunk, d, d),
        }, None
