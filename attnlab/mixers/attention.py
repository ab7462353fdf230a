"""Layers of queries, keys and values that differ in what a query makes of the keys it sees."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, knob
from attnlab.mixers.grouped import GroupedConfig
from attnlab.mixers.heads import HeadMixer, Projections, split_heads
from attnlab.mixers.masked import mean_keys
from attnlab.mixers.parts import LayerNorm, RMSNorm, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.keys_values import Cached, KeysValues, KVCache, RollingCache, Whole, empty_cache
from attnlab.ops.masks import Mask
from attnlab.ops.norm import unit

QK_NORMS = {
    False: "none",
    True: "RMSNorm",
    "layer": "LayerNorm with scale and bias",
    "cosine": "length 1, and logits q . k softplus(tau) ln(n) with tau per head and n the keys that the query sees",
}
_FIRST_TEMPERATURE = 1 / 0.24


@dataclasses.dataclass(frozen=True)
class AttentionConfig(GroupedConfig):
    """Knobs of queries, keys and values."""

    qk_norms: ClassVar[tuple[bool | str, ...]] = tuple(QK_NORMS)

    causal: bool = knob(True, "whether a position sees only itself and those before", other=(False,))
    window: int | None = knob(None, "keys that a query sees, itself included; none: all before it", other=(3,), least=1)
    qk_norm: bool | str = knob(
        False,
        "of each head's queries and keys, before RoPE; "
        f"{'; '.join(f'{str(k).lower()}: {v}' for k, v in QK_NORMS.items())}",
        other=(True, "layer", "cosine"),
    )
    qk_epsilon: float | None = knob(
        None,
        "added to the mean square, variance or squared length in qk_norm; none: 1e-6, with layer 1e-5",
        other=(0.1,),
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            config_lib.require(self.causal, "causal", self.causal, "true where window is set")
        allowed = ", ".join(str(kind).lower() for kind in self.qk_norms)
        config_lib.require(self.qk_norm in self.qk_norms, "qk_norm", self.qk_norm, allowed)
        plain = self.qk_epsilon is None or self.qk_norm is not False
        config_lib.require(plain, "qk_epsilon", self.qk_epsilon, "none where qk_norm is false")

    def read_width(self, width: int) -> int:
        """Width of what keys and values are made of, in a model of the given width."""
        return width


@dataclasses.dataclass(frozen=True)
class Reads:
    """Queries and what they read.

    Attributes:
      q: [B, T, H, d], positioned.
      kv, mask: the keys and values, and which of them each query sees.
      cache: of the stream after these positions; None for whole sequences.
    """

    q: jax.Array
    kv: KeysValues
    mask: Mask
    cache: KVCache | RollingCache | None = None


class Attention(HeadMixer):
    """Base of layers that project queries, keys and values and differ in `attend`."""

    capabilities = Capabilities(causal=True, bidirectional=True, streaming=True)
    sequence_parallel = "keys and values are gathered, queries dealt out evenly"

    def __init__(self, config: AttentionConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        inner = config.heads * self.head_dim
        self.q = make.qkv(inner)
        columns, fan_in = config.key_heads * self.head_dim, config.read_width(width)
        self.k, self.v = (make.qkv(columns, "kv_heads", fan_in=fan_in) for _ in range(2))
        self.out = make.out(inner)
        if config.qk_norm == "cosine":
            tau = jnp.full((config.heads,), math.log(math.expm1(_FIRST_TEMPERATURE)), param_dtype(dtype))
            self.temperature = param(tau, axes=("heads",), role=Role.SCALE)
        elif config.qk_norm:
            self.q_norm = self.make_norm(config.heads, "heads")
            self.k_norm = self.make_norm(config.key_heads, "kv_heads")

    # Hooks for mixers that change one place of the layer (see gated.py).

    def make_norm(self, heads: int, axis: str) -> nnx.Module:
        """The norm of queries or keys [B, T, heads, d], `axis` the logical one of the heads; one scale for all."""
        return head_norm(self.config, self.head_dim, self.dtype)

    def queries(self, x: jax.Array) -> jax.Array:
        """q [B, T, H, d] of x [B, T, D], before QK-norm and RoPE."""
        return split_heads(self.q(x), self.head_dim)

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """k [B, T, K, d], v [B, T, K, d] of x [B, T, D], before QK-norm and RoPE."""
        return split_heads(self.k(x), self.head_dim), split_heads(self.v(x), self.head_dim)

    def positioned(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values after QK-norm and RoPE."""
        k, v = self.keys_values(x)
        return self.placed(self.queries(x), seq.positions, "q"), self.placed(k, seq.positions, "k"), v

    def placed(self, y: jax.Array, positions: jax.Array | None, name: str) -> jax.Array:
        """Queries (`name` q) or keys (k) after QK-norm, and RoPE where positions are given."""
        c, norm = self.config, None
        if c.qk_norm == "cosine":
            y = unit(y, *([] if c.qk_epsilon is None else [c.qk_epsilon])).astype(y.dtype)
        elif c.qk_norm:
            norm = self.q_norm if name == "q" else self.k_norm
        return c.rotated(y, positions, norm)

    @abc.abstractmethod
    def attend(self, q: jax.Array, kv: KeysValues, mask: Mask, x: jax.Array) -> MixerOutput:
        """Heads' outputs [B, T, H, d] from positioned queries, what they attend to, and x [B, T, D]."""

    # The contract, in two steps, so that a layer around this one (see moh.py) may read other keys.

    def reads(self, x: jax.Array, seq: Sequence, cache: KVCache | RollingCache | None = None) -> Reads:
        """Queries and what they read: the whole sequences, or the cache with these positions."""
        (q, k, v), c = self.positioned(x, seq), self.config
        if cache is None:
            kv, mask = Whole(k, v), seq.mask(causal=c.causal, window=c.window)
        else:
            cache, kv, mask = cache.append(k, v, seq.offsets, seq.padding, c.window)
        return Reads(self.scaled(q, kv, mask), kv, mask, cache)

    def attended(self, reads: Reads, x: jax.Array) -> MixerOutput:
        """Heads' outputs, and the cache as state."""
        out = self.attend(reads.q, reads.kv, reads.mask, x)
        return dataclasses.replace(out, state=reads.cache)

    def heads(self, x: jax.Array, seq: Sequence, carried: KVCache | RollingCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        return self.attended(self.reads(x, seq, carried), x)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> KVCache | RollingCache:
        c = self.config
        return empty_cache(batch, c.key_heads, self.head_dim, max_length, dtype, window=c.window)

    def scaled(self, q: jax.Array, kv: Whole | Cached, mask: Mask) -> jax.Array:
        """In cosine attention queries times `softplus(tau) ln(n)` and what attention will divide logits by; else q."""
        if self.config.qk_norm != "cosine":
            return q
        tau_H, seen_BT = self.temperature[...], mask.seen(q.shape[1], kv.k.shape[1])
        length_BT = jnp.log(jnp.maximum(seen_BT, 1).astype(tau_H.dtype))
        scale_BTH = self.head_dim**0.5 * length_BT[..., None] * jax.nn.softplus(tau_H)
        return (q * scale_BTH[..., None]).astype(q.dtype)

    @classmethod
    def flops(cls, config: AttentionConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d = config.head_dim(width)
        span = mean_keys(config, length)
        return {
            "projections": 2.0 * width * d * (2 * config.heads + 2 * config.key_heads),
            "attention": 4.0 * config.heads * d * span,
        }, span


def head_norm(config: AttentionConfig, width: int, dtype: Any) -> RMSNorm | LayerNorm:
    """The norm of each head that `qk_norm` names, true or "layer"."""
    options = {} if config.qk_epsilon is None else {"epsilon": config.qk_epsilon}
    return (LayerNorm if config.qk_norm == "layer" else RMSNorm)(width, ("head",), dtype=dtype, **options)
