"""The gated short convolution: what stands between the linear attentions and the windows of a Based model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import Convolution, param_dtype
from attnlab.mixers.sequence import Sequence

IMPLEMENTATIONS = "shifts", "definition"


@dataclasses.dataclass(frozen=True)
class ShortConvConfig(HeadConfig):
    """Knobs of the gated short convolution; channels go in heads for what splits or chooses among heads alone."""

    head_width: int | None = knob(None, "channels of a head; none: expand * width / heads", other=(6,), least=1)
    expand: float = knob(2.0, "width E of all channels in widths of the model", other=(1.5,), above=0)
    span: int = knob(3, "positions that the convolution spans, itself included", other=(5,), least=2)
    impl: str = knob(
        "shifts",
        "shifts (a sum of shifted inputs), or definition (all pairs)",
        other=("definition",),
        choices=IMPLEMENTATIONS,
    )

    def head_dim(self, width: int) -> int:
        """Channels of a head in a model of the given width; ConfigError if that is no integer."""
        if self.head_width is not None:
            return self.head_width
        e = self.expand * width / self.heads
        allowed = f"multiples of {self.heads} / {width}, heads / width, or head_width set"
        config_lib.require(e == int(e) >= 1, "expand", self.expand, allowed)
        return int(e)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShortConvState:
    """What the convolution still needs.

    Attributes:
      tail: [B, span - 1, E], its last inputs.
    """

    tail: jax.Array


@register("short_conv")
class ShortConv(HeadMixer):
    """`y = (silu(conv(x W_1)) * (x W_2)) W_o`, a causal depthwise convolution over 3 positions of each channel."""

    Config = ShortConvConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "neighbours exchange the inputs at their edges"
    paper = (
        "Arora et al. 2024, Simple linear attention language models balance the recall-throughput tradeoff, "
        "arXiv:2402.18668, and its released code"
    )
    implementations = IMPLEMENTATIONS
    counted = "shifts"
    variants = ({"heads": 2, "head_width": 6, "span": 4},)

    def __init__(self, config: ShortConvConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        inner = config.heads * self.head_dim
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.v, self.gate = make.qkv(inner), make.qkv(inner)
        self.conv = Convolution(inner, config.span, "heads", rngs=rngs, dtype=dtype)
        self.out = make.out(inner)

    def heads(self, x: jax.Array, seq: Sequence, carried: ShortConvState | None = None) -> MixerOutput:
        v = self.v(x)
        if self.config.impl == "definition" and carried is None:
            y, tail = all_pairs(v, self.conv.filters[...], seq.documents), None
        else:
            y, tail = self.conv(v, seq.documents, None if carried is None else carried.tail)
        y = split_heads(jax.nn.silu(y) * self.gate(x), self.head_dim)
        return MixerOutput(y, None if carried is None else ShortConvState(tail))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> ShortConvState:
        return ShortConvState(self.conv.blank_tail(batch, dtype))

    @classmethod
    def flops(cls, config: ShortConvConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        return {"projections": 6.0 * width * config.heads * config.head_dim(width)}, None


def all_pairs(v_BTC: jax.Array, filters_KC: jax.Array, documents_BT: jax.Array | None) -> jax.Array:
    """The convolution as a matrix over positions for each channel, sums in fp32 (fp64)."""
    (B, T, _), span, wide = v_BTC.shape, len(filters_KC), param_dtype(v_BTC.dtype)
    back = jnp.arange(T)[:, None] - jnp.arange(T)
    seen = jnp.broadcast_to((back >= 0) & (back < span), (B, T, T))
    if documents_BT is not None:
        seen &= documents_BT[:, :, None] == documents_BT[:, None]
    taps = filters_KC.astype(wide)[jnp.clip(span - 1 - back, 0, span - 1)]
    weights = jnp.where(seen[..., None], taps, 0)
    return jnp.sum(weights * v_BTC.astype(wide)[:, None], axis=2).astype(v_BTC.dtype)
