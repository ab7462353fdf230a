"""Tensor attention: queries attend to pairs of positions, so that one layer sees correlations of three."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import RMSNorm
from attnlab.mixers.sequence import Sequence
from attnlab.ops.keys_values import KVCache, RollingCache, Whole, empty_cache
from attnlab.ops.masks import mean_visible_pairs
from attnlab.ops.tensor_attention import MOST_KEYS, TENSOR_ATTENTION, tensor_attention

_SMALL = 0.1  # beside an offset: the deviation at first of second keys and values, of first ones' 1


@dataclasses.dataclass(frozen=True)
class TensorConfig(HeadConfig):
    """Knobs of tensor attention. It has no positions: RoPE's rotations do not cancel in a product of three."""

    causal: bool = knob(True, "whether a position sees only itself and those before", other=(False,))
    window: int | None = knob(
        None,
        "positions of which a query sees all pairs, itself included; none: all before it. Either way "
        f"{MOST_KEYS} at most",
        other=(3,),
        least=1,
    )
    qk_norm: bool = knob(
        True,
        "RMSNorm of each head's queries and both keys, whose entries are multiplied; with an offset of the first keys "
        "alone",
        other=(False,),
    )
    offset: float = knob(
        0.0,
        "added to the second key and the second value, whose projections begin small where it is not 0; 1: at first "
        "within a tenth of softmax attention with logits q . k1 / d",
        other=(1.0,),
    )
    scale: str = knob(
        "width",
        "logits are multiplied by: width: 1 / d; root: 1 / sqrt(d), as in 2-simplicial attention",
        other=("root",),
        choices=("width", "root"),
    )
    chunk: int = knob(32, "queries computed together; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(TENSOR_ATTENTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            config_lib.require(self.causal, "causal", self.causal, "true where window is set")
            config_lib.require(self.window <= MOST_KEYS, "window", self.window, f"none, or 1 to {MOST_KEYS}")


@register("tensor")
class Tensor(HeadMixer):
    """`o_t = sum_jl softmax_jl(q_t . (k1_j * k2_l) / d) v1_j * v2_l` per head, then a projection.

    The softmax runs over all pairs (j, l) of positions that t sees, (j, j) and (l, j) among them; `*` is elementwise.
    With an offset `k2 = offset + x W_k2` and `v2 = offset + x W_v2`, W drawn a tenth as large, and k2 has no norm: it
    would make of what is small something as large as the offset.
    `attnlab.ops.tensor_attention` has the formula's other forms. The cost is cubic in the length, and inherently so:
    rows of more than 256 visible positions are refused.
    """

    Config = TensorConfig
    capabilities = Capabilities(causal=True, bidirectional=True)
    sequence_parallel = "keys and values are gathered, queries dealt out evenly"
    paper = (
        "Alman and Song 2023, How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to "
        "Kronecker Computation, arXiv:2310.04064"
    )
    extension = (
        "the paper, of theory, defines attention alone: the layer around it, masks, RMSNorm of queries and keys, offset"
    )
    implementations = TENSOR_ATTENTION.table
    variants = (
        {"heads": 2, "window": 4, "offset": 1.0, "scale": "root", "chunk": 3, "head_width": 6},
        {"causal": False, "qk_norm": False, "chunk": 4, "bias": "all"},
    )

    def __init__(self, config: TensorConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, inner = Projections(config, width, rngs=rngs, dtype=dtype), config.heads * self.head_dim
        second = {"gain": _SMALL if config.offset else 1.0}
        self.q, self.k1, self.v1 = (make.qkv(inner) for _ in range(3))
        self.k2, self.v2 = (make.qkv(inner, **second) for _ in range(2))
        self.out = make.out(inner)
        if config.qk_norm:
            self.q_norm, self.k1_norm = (RMSNorm(self.head_dim, ("head",), dtype=dtype) for _ in range(2))
            self.k2_norm = None if config.offset else RMSNorm(self.head_dim, ("head",), dtype=dtype)

    def heads(self, x: jax.Array, seq: Sequence, carried: KVCache | RollingCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        c = self.config
        q, k, v = self.projected(x)
        if carried is None:
            kv, mask = Whole(k, v), seq.mask(causal=c.causal, window=c.window)
        else:
            carried, kv, mask = carried.append(k, v, seq.offsets, seq.padding, c.window)
        scale = self.head_dim ** (-1 if c.scale == "width" else -0.5)
        options = {"scale": scale, "reach": c.window, "chunk": c.chunk, "impl": c.impl}
        return MixerOutput(tensor_attention(q, *kv.by_position(len(q)), mask, **options), carried)

    def projected(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, H, d], both keys side by side [B, T, H, 2 d], and both values, of x [B, T, D]."""
        q, k1, k2, v1, v2 = (split_heads(y(x), self.head_dim) for y in (self.q, self.k1, self.k2, self.v1, self.v2))
        if self.config.qk_norm:
            q, k1 = self.q_norm(q), self.k1_norm(k1)
            k2 = k2 if self.k2_norm is None else self.k2_norm(k2)
        k2, v2 = k2 + self.config.offset, v2 + self.config.offset
        return q, jnp.concatenate([k1, k2], axis=-1), jnp.concatenate([v1, v2], axis=-1)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> KVCache | RollingCache:
        c = self.config
        return empty_cache(batch, c.heads, 2 * self.head_dim, max_length, dtype, window=c.window)

    @classmethod
    def flops(cls, config: TensorConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        """The span is of pairs."""
        inner = config.heads * config.head_dim(width)
        pairs = mean_visible_pairs(length, config.causal, config.window)
        return {"projections": 12.0 * width * inner, "attention": 4.0 * inner * pairs}, pairs
