"""Multi-token attention: the weight of a key depends on the scores of neighbouring queries, keys and heads."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.attention import Attention, AttentionConfig, Reads
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.parts import Linear, RMSNorm, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.keys_values import KVCache
from attnlab.ops.masks import Mask
from attnlab.ops.multi_token_attention import MULTI_TOKEN_ATTENTION, multi_token_attention


@dataclasses.dataclass(frozen=True)
class MultiTokenConfig(AttentionConfig):
    """Knobs of multi-token attention: it looks back only."""

    causal: ClassVar[bool] = True
    window: ClassVar[int | None] = None
    qk_norm: ClassVar[bool] = False
    qk_epsilon: ClassVar[float | None] = None

    query_span: int = knob(6, "queries that a filter of scores spans, the own one the last", other=(2,), least=1)
    key_span: int = knob(
        11, "keys that a filter of scores spans, an odd number, the key in the middle", other=(3,), least=1
    )
    logit_mix: int | None = knob(
        None, "neighbouring heads whose filtered scores are mixed before the softmax, a divisor of heads; none: they "
        "are not", other=(4,), least=1,
    )  # fmt: skip
    after: bool = knob(False, "whether the weights are filtered, too, after the softmax", other=(True,))
    head_mix: int | None = knob(
        None, "neighbouring heads whose weights are mixed after the softmax, a divisor of heads; none: they are not",
        other=(2,), least=1,
    )  # fmt: skip
    norm: bool = knob(True, "RMSNorm of each head's output", other=(False,))
    gate: bool = knob(
        True, "multiply each head's output, normed, by a sigmoid of a projection of itself", other=(False,)
    )
    impl: str = impl_knob(MULTI_TOKEN_ATTENTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(self.key_span % 2 == 1, "key_span", self.key_span, "odd")
        for key in ("logit_mix", "head_mix"):
            divides = (c := getattr(self, key)) is None or self.heads % c == 0
            config_lib.require(divides, key, c, f"divisors of heads ({self.heads}), or none")

    @property
    def reach(self) -> int:
        """Queries before a position that its output depends on."""
        return (self.query_span - 1) * (2 if self.after else 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MultiTokenCache:
    """Keys and values, and the last queries, [B, reach, H, d]."""

    kv: KVCache
    tail: jax.Array


@dataclasses.dataclass(frozen=True)
class Rows:
    """Keys and values [B, S, K, ..], and the rows' keys, those before the first included: [B, reach + T] each."""

    k: jax.Array
    v: jax.Array
    start: jax.Array
    end: jax.Array


@register("multi_token")
class MultiToken(Attention):
    """`softmax(conv(q k^T / sqrt(d))) v` per head: scores of query_span queries and key_span keys make one logit.

    Filters are of a head, at first those that change nothing. Scores that causality or documents hide are 0 before they
    are filtered, so that nothing of later keys comes in, and hidden again after. What filters make of scores, and the
    weights, may be mixed over groups of heads, by matrices that are the identity at first.
    `attnlab.ops.multi_token_attention` has the formula. Each head's output is normed by RMSNorm, whose scale heads
    share, and multiplied by `sigmoid(o w + b)`, a number of a head and position.
    """

    Config = MultiTokenConfig
    capabilities = Capabilities()
    sequence_parallel = ""
    paper = "Golovneva et al. 2025, Multi-Token Attention, arXiv:2504.00927"
    implementations = MULTI_TOKEN_ATTENTION.table
    variants = (
        {"kv_heads": 2, "query_span": 3, "key_span": 3, "after": True, "logit_mix": 4, "head_mix": 2, "bias": "all"},
        {"query_span": 2, "key_span": 5, "norm": False, "gate": False, "rope_base": None, "logit_mix": 2},
    )

    def __init__(self, config: MultiTokenConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        kind, H = param_dtype(dtype), config.heads
        same = jnp.zeros((H, config.query_span, config.key_span), kind).at[:, -1, config.key_span // 2].set(1)
        axes = "heads", "conv", "conv"
        self.filters = param(same, axes=axes, role=Role.TAPS)
        if config.after:
            self.after = param(same, axes=axes, role=Role.TAPS)
        for name, c in (("logit_mix", config.logit_mix), ("mix", config.head_mix)):
            if c is not None:
                mix = jnp.tile(jnp.eye(c, dtype=kind), (H // c, 1, 1))
                setattr(self, name, param(mix, axes=("gates", "gates", "gates"), role=Role.SCALE))
        if config.norm:
            self.norm = RMSNorm(self.head_dim, ("head",), dtype=dtype, epsilon=1e-5)
        if config.gate:
            self.gate = Linear(self.head_dim, 1, ("head", "gates"), rngs=rngs, dtype=dtype, bias=True)

    def reads(self, x: jax.Array, seq: Sequence, cache: MultiTokenCache | None = None) -> Reads:
        (q, k, v), (B, T, _), P = self.positioned(x, seq), x.shape, self.config.reach
        if cache is None:
            mask = seq.mask(causal=True)
            before, first = jnp.zeros((B, P, *q.shape[2:]), q.dtype), None
            bounds = mask.interval(T, T)
        else:
            first, before = cache.kv.length, cache.tail.astype(q.dtype)
            kv, view, mask = cache.kv.append(k, v, seq.offsets, seq.padding)
            (k, v), bounds = view.by_position(B), (mask.k_start, mask.k_end)
        start, end = (jnp.broadcast_to(bound, (B, T)) for bound in bounds)
        start, end = (jnp.concatenate(pair, axis=1) for pair in zip(self._before(first, seq, B), (start, end)))
        q = jnp.concatenate([before, q], axis=1)
        if cache is not None:
            cache = MultiTokenCache(kv, q[:, q.shape[1] - P :].astype(cache.tail.dtype))
        return Reads(q, Rows(k, v, start, end), mask, cache)

    def _before(self, first: jax.Array | None, seq: Sequence, batch: int) -> tuple[jax.Array, jax.Array]:
        """What the rows before the first see, [B, reach]: their document's keys, where it goes on; else nothing."""
        P = self.config.reach
        if first is None:
            return (jnp.zeros((batch, P), jnp.int32),) * 2
        index, start = first - P + jnp.arange(P, dtype=jnp.int32), first - seq.offsets[:, :1]
        goes_on = index >= start
        return jnp.where(goes_on, start, 0), jnp.where(goes_on, index + 1, 0)

    def attend(self, q: jax.Array, kv: Rows, mask: Mask, x: jax.Array) -> MixerOutput:
        c = self.config
        after, mix = self.after[...] if c.after else None, self.mix[...] if c.head_mix else None
        logit_mix = self.logit_mix[...] if c.logit_mix else None
        arrays = q, kv.k, kv.v, self.filters[...], after, mix, kv.start, kv.end
        o = multi_token_attention(*arrays, whole=mask.causal, logit_mix_Ncc=logit_mix, impl=c.impl)
        if c.norm:
            o = self.norm(o)
        if c.gate:
            o = o * jax.nn.sigmoid(self.gate(o))
        return MixerOutput(o)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> MultiTokenCache:
        tail = jnp.zeros((batch, self.config.reach, self.config.heads, self.head_dim), dtype)
        return MultiTokenCache(super().init_carried(batch, max_length, dtype), tail)

    @classmethod
    def flops(cls, config: MultiTokenConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        flops, span = super().flops(config, width, length)
        flops["attention"] += 2.0 * config.heads * ((config.logit_mix or 0) + (config.head_mix or 0)) * span
        flops["gate"] = 2.0 * config.heads * config.head_dim(width) * config.gate
        return flops, span
