"""Layers of queries, keys and values whose query heads share key heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import knob
from attnlab.mixers.heads import HeadMixer, Projections, RotaryConfig, split_heads
from attnlab.mixers.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class GroupedConfig(RotaryConfig):
    """Knobs of queries, and of the key heads that groups of them share."""

    kv_heads: int | None = knob(
        None, "key/value heads K, a divisor of heads; none: K = H; 1: multi-query", other=(1, 2)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.key_heads >= 1 and self.heads % self.key_heads == 0
        config_lib.require(divides, "kv_heads", self.key_heads, f"divisors of heads ({self.heads})")

    @property
    def key_heads(self) -> int:
        """K."""
        return self.heads if self.kv_heads is None else self.kv_heads


class GroupedMixer(HeadMixer):
    """Base of layers that project queries, keys and values, and rotate queries and keys."""

    def __init__(self, config: GroupedConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, d = Projections(config, width, rngs=rngs, dtype=dtype), self.head_dim
        self.q = make.qkv(config.heads * d)
        self.k, self.v = (make.qkv(config.key_heads * d, "kv_heads") for _ in range(2))
        self.out = make.out(config.heads * d)

    def projected(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, H, d], k and v [B, T, K, d] of x [B, T, D], before RoPE."""
        return tuple(split_heads(y(x), self.head_dim) for y in (self.q, self.k, self.v))

    def positioned(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values after RoPE."""
        q, k, v = self.projected(x)
        return self.config.rotated(q, seq.positions), self.config.rotated(k, seq.positions), v

    @classmethod
    def projection_flops(cls, config: GroupedConfig, width: int) -> float:
        """FLOPs per token of the four projections."""
        return 2.0 * width * config.head_dim(width) * (2 * config.heads + 2 * config.key_heads)
