"""Differential attention: each head's output is that of one softmax less a share of another's."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.attention import AttentionConfig
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadMixer, Projections, split_heads
from attnlab.mixers.masked import Masked, MaskedCache, mask_knob, mean_keys, require_mask, resolve_mask
from attnlab.mixers.parts import RMSNorm, param_dtype
from attnlab.mixers.roles import Role, drawn, normal
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION
from attnlab.ops.cached_attention import CACHED_ATTENTION
from attnlab.ops.keys_values import KVCache, RollingCache, Whole, empty_cache

Caches = tuple[KVCache | RollingCache, ...]
_VECTORS = "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"
_DEVIATION = 0.1  # of these at first


@dataclasses.dataclass(frozen=True)
class DiffConfig(AttentionConfig):
    """Knobs of differential attention; a head is a pair of softmaxes, `head_width` that of its queries."""

    qk_norm: ClassVar[bool] = False
    qk_epsilon: ClassVar[float | None] = None

    heads: int = knob(2, "heads H, of two softmaxes each: half as many as a baseline's", other=(1,), least=1)
    kv_heads: int | None = knob(None, "key/value heads K, a divisor of heads; none: K = H; 1: multi-query", other=(1,))
    version: int = knob(
        1,
        "1: keys in pairs, values of two head widths, one share for all heads, a norm of each head (the paper); "
        "2: one key and value for both softmaxes, a share for each head and position, no norm",
        other=(2,),
        least=1,
    )
    impl: str = impl_knob(ATTENTION)
    decode_impl: str = impl_knob(CACHED_ATTENTION, doc="implementation of the op over a cache")
    mask: Any = mask_knob()

    def __post_init__(self) -> None:
        resolve_mask(self)
        super().__post_init__()
        config_lib.require(self.version in (1, 2), "version", self.version, "1, 2")
        require_mask(self)

    def head_dim(self, width: int) -> int:
        """Width d of a head's queries: of version 1 half of width / heads, which is that of its values."""
        if self.version == 2 or self.head_width is not None:
            return super().head_dim(width)
        pairs = f"heads of which twice as many divide width = {width} into even head widths, or head_width set"
        config_lib.require(width % (4 * self.heads) == 0, "heads", self.heads, pairs)
        return dataclasses.replace(self, head_width=width // (2 * self.heads)).head_dim(width)

    @property
    def keys(self) -> int:
        """How many keys a key head has."""
        return 2 if self.version == 1 else 1


@register("diff")
class Diff(Masked, HeadMixer):
    """`o = softmax(q1 k1^T / sqrt(d)) v - lambda softmax(q2 k2^T / sqrt(d)) v` per head, whose noise cancels.

    Version 1 (sections 2.1 and 3.1 of the paper): q1, q2, k1, k2 are d = D / 2H wide, v is 2 d; `lambda = exp(l1 . m1)
    - exp(l2 . m2) + lambda_init` of four learned vectors [d] that heads share; o passes RMSNorm, whose scale heads
    share, and is multiplied by 1 - lambda_init; `lambda_init = 0.8 - 0.6 exp(-0.3 n)` in layer n of a stack, from 0;
    n = 0 where the mixer is by itself.

    Version 2 (the authors' code of 2026): `k1 = k2`, all are D / H wide, `lambda = sigmoid(x W)` per head and position;
    o is neither normed nor scaled.
    """

    Config = DiffConfig
    capabilities = Capabilities(causal=True, bidirectional=True)
    sequence_parallel = "keys and values are gathered, queries dealt out evenly"
    paper = "Ye et al. 2024, Differential Transformer, arXiv:2410.05258; version 2: Microsoft, Diff-Transformer-V2"
    implementations = ATTENTION.table
    variants = (
        {"heads": 4, "kv_heads": 2, "window": 4},
        {"version": 2, "heads": 4, "kv_heads": 2, "bias": "all"},
        {"version": 2, "causal": False, "rope_base": None},
    )

    def __init__(self, config: DiffConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, d, K = Projections(config, width, rngs=rngs, dtype=dtype), self.head_dim, config.key_heads
        self.value_dim = config.keys * d
        self.q = make.qkv(config.heads * 2 * d)
        self.k = make.qkv(K * config.keys * d, "kv_heads")
        self.v = make.qkv(K * self.value_dim, "kv_heads")
        if config.version == 1:
            for name in _VECTORS:
                args = (d,), param_dtype(dtype), _DEVIATION
                setattr(self, name, drawn(rngs, normal, *args, axes=("head",), role=Role.SCALE))
            self.norm = RMSNorm(self.value_dim, ("head",), dtype=dtype, epsilon=1e-5)
        else:
            self.share = make(config.heads, "gates")
        self.out = make.out(config.heads * self.value_dim)

    @property
    def stack_reads(self) -> tuple[str, ...]:
        return ("layer", *super().stack_reads)

    def heads(self, x: jax.Array, seq: Sequence, carried: Caches | MaskedCache | None = None) -> MixerOutput:
        """As in the contract. More positions than a cache has room for give NaN, as jit can raise nothing."""
        c, (B, T, _) = self.config, x.shape
        view = self.viewed(seq, carried, lambda caches: caches[0].length)
        q, k = (c.rotated(split_heads(y(x), self.head_dim), view.seq.positions) for y in (self.q, self.k))
        v = split_heads(self.v(x), self.value_dim)
        keys = [k[:, :, i :: c.keys] for i in range(c.keys)]
        if carried is None:
            read, interval = [view.ordered(Whole(k, v)) for k in keys], seq.mask(causal=c.causal, window=c.window)
        else:  # the values lie in the first key's cache
            values = v, v[..., :0]
            step = lambda cache, k, v: cache.append(k, v, seq.offsets, seq.padding, c.window)
            caches, read, (interval, *_) = zip(*map(step, view.carried, keys, values))
            carried, read = view.kept(caches), [dataclasses.replace(kv, v=read[0].v) for kv in read]
        mask = view.mask(interval, causal=c.causal)
        attend = lambda kv, q: kv.attend(q, mask, impl=c.impl, decode_impl=c.decode_impl)
        if c.version == 1:
            first, second = (attend(kv, q[:, :, i::2]) for i, kv in enumerate(read))
        elif c.mask is not None:  # which may be of each head, and a head is a pair
            first, second = (attend(read[0], q[:, :, i::2]) for i in range(2))
        else:
            first, second = jnp.moveaxis(attend(read[0], q).reshape(B, T, c.heads, 2, -1), 3, 0)
        return MixerOutput(self.difference(first, second, x, seq), carried)

    def difference(self, first: jax.Array, second: jax.Array, x: jax.Array, seq: Sequence) -> jax.Array:
        """Heads' outputs [B, T, H, e] of those of their two softmaxes."""
        wide = param_dtype(self.dtype)
        if self.config.version == 2:
            share = jax.nn.sigmoid(self.share(x).astype(wide))[..., None]
            return (first - share * second).astype(first.dtype)
        least = lambda_init(0 if seq.layer is None else seq.layer, wide)
        o = self.norm(first - self.lambda_of(least) * second)
        return ((1 - least) * o).astype(first.dtype)

    def lambda_of(self, least: jax.Array) -> jax.Array:
        """lambda of version 1, a scalar in fp32, of lambda_init."""
        q1, k1, q2, k2 = (getattr(self, name)[...] for name in _VECTORS)
        return jnp.exp((q1 * k1).sum()) - jnp.exp((q2 * k2).sum()) + least

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> Caches | MaskedCache:
        c = self.config
        values = (self.value_dim, 0)[: c.keys]
        make = lambda e: empty_cache(
            batch, c.key_heads, self.head_dim, max_length, dtype, window=c.window, value_width=e
        )
        return self.beside_mask(tuple(map(make, values)), batch, max_length)

    @classmethod
    def flops(cls, config: DiffConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, H, n = config.head_dim(width), config.heads, config.keys
        span = mean_keys(config, length)
        columns = 2 * H + 2 * n * config.key_heads + n * H
        flops = {"projections": 2.0 * width * d * columns, "attention": 4.0 * H * d * (1 + n) * span}
        return flops | ({"gates": 2.0 * width * H} if config.version == 2 else {}), span


def lambda_init(layer: jax.Array | int, dtype: Any) -> jax.Array:
    """`0.8 - 0.6 exp(-0.3 n)` of the layer of number n, a scalar."""
    return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(layer, dtype))
