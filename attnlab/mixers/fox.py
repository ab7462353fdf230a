"""Forgetting attention: softmax attention whose logits fade with what each position between query and key forgets."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.attention import Attention, AttentionConfig, Reads
from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.forget_gate import log_left
from attnlab.mixers.heads import Projections, split_heads
from attnlab.mixers.masked import Masked, MaskedCache, mask_knob, require_mask, resolve_mask
from attnlab.mixers.parts import HeadsRMSNorm, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION
from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.keys_values import KeysValues, KVCache, RollingCache, Whole
from attnlab.ops.masks import Mask

_IMPLS = "definition", "tiles"  # that take biases
_DECODE_IMPLS = "auto", "one_query", "tiles", "definition"
_LIFETIMES = 2.0, 128.0  # of the first head and the last, where knobs do not say others


@dataclasses.dataclass(frozen=True)
class FoxConfig(AttentionConfig):
    """Knobs of forgetting attention. With `qk_norm`, `shift`, `output_norm` and `output_gate` it is the Pro block's."""

    causal: ClassVar[bool] = True  # no knob: what lies between a query and a later key is not defined
    rope_width: ClassVar[int | None] = None
    qk_norms = (False, True)

    rope_base: float | None = knob(None, "base of the rotary embedding; none: no positions", other=(100.0,), above=1)
    qk_norm: bool = knob(
        False, "RMSNorm of each head's queries and keys, with scales of its own, before RoPE", other=(True,)
    )
    forget: str = knob(
        "input",
        "what is left of the past at a position: input: sigmoid(x W_f + b); constant: sigmoid(b), learned per head; "
        "fixed: the same, not learned (ALiBi)",
        other=("constant", "fixed"),
        choices=("input", "constant", "fixed"),
    )
    lifetime_min: float | None = knob(
        None,
        "positions after which 1 / e is left in the first head, at first; none: 2; heads between the first and the "
        "last are spaced evenly in the logarithm; none too where forget is input",
        other=(4.0,),
        least=0.02,
    )
    lifetime_max: float | None = knob(None, "the same in the last head; none: 128", other=(16.0,), least=0.02)
    shift: bool = knob(
        False, "mix each head's keys and values with those of the position before, by learned shares", other=(True,)
    )
    output_norm: bool = knob(False, "RMSNorm of each head's output, with a scale of its own", other=(True,))
    output_gate: bool = knob(False, "multiply the heads' outputs by sigmoid(x W_g)", other=(True,))
    impl: str = knob(
        "auto", "implementation of the op: auto, definition, tiles", other=("definition",), choices=("auto", *_IMPLS)
    )
    decode_impl: str = knob(
        "auto",
        f"implementation of the op over a cache: {', '.join(_DECODE_IMPLS)}",
        other=("definition",),
        choices=_DECODE_IMPLS,
    )
    mask: Any = mask_knob()

    def __post_init__(self) -> None:
        resolve_mask(self)
        super().__post_init__()
        require_mask(self)
        need, ahead = config_lib.require, Masked.sees_ahead(self)
        need(not ahead, "mask", ahead and self.mask.node_name, "masks under which no position sees a later one")
        for key in ("lifetime_min", "lifetime_max"):
            given = getattr(self, key)
            need(given is None or self.forget != "input", key, given, "none where forget is input")
        need(self.lifetime_max is None or self.heads > 1, "lifetime_max", self.lifetime_max, "none where heads is 1")
        low, high = self.lifetimes
        key = "lifetime_max" if self.lifetime_min is None else "lifetime_min"
        allowed = f"{low} or more" if key == "lifetime_max" else f"lifetime_max ({high}) or less"
        need(low <= high, key, getattr(self, key), allowed)

    @property
    def lifetimes(self) -> tuple[float, float]:
        """Positions after which 1 / e is left in the first head and in the last, at first."""
        low, high = _LIFETIMES
        return self.lifetime_min or low, self.lifetime_max or high


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FoxCache:
    """Keys and values, and what has been forgotten of each.

    Attributes:
      kv: the cache.
      faded: [B, S, H] for S keys of `kv`, the logarithm of what is left of each, in fp32 (fp64 in a float64 model).
      tail: [B, 1, 2 K d], keys and values of the last position before they are mixed; None where they are not.
    """

    kv: KVCache | RollingCache
    faded: jax.Array
    tail: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Faded:
    """Keys and values, and the biases of logits: of queries `left` [B, T, H], of keys `faded` [B, S, H]."""

    kv: KeysValues
    left: jax.Array
    faded: jax.Array

    def attend(self, q_BTHd: jax.Array, mask: Mask, **options: Any) -> jax.Array:
        """As `KeysValues.attend`."""
        return self.kv.attend(q_BTHd, mask, query_bias_BTh=self.left, key_bias_BSh=self.faded, **options)


@register("fox")
class Fox(Masked, Attention):
    """`o_t = sum_s softmax_s(q_t . k_s / sqrt(d) + sum_{l = s+1..t} log f_l) v_s` per head, `f_l` in (0, 1).

    f is of each query head, sigmoid(x W_f + b), in fp32; its sum is a bias of the query less one of the key. With
    `shift`, `k_t` is `a_t k'_{t-1} + (1 - a_t) k'_t` of the projections k', a = sigmoid(x W_s) per key head, 0 standing
    for k' before a document's first; so is v, by shares of its own; QK-norm comes after it. Norms have scales of
    each head.
    """

    Config = FoxConfig
    capabilities = Capabilities()
    paper = "Lin et al. 2025, Forgetting Transformer: Softmax Attention with a Forget Gate, arXiv:2503.02130"
    extension = (
        "windows, groups of query heads that share keys, and default lifetimes of 2 to 128 positions of a forget gate "
        "that does not depend on the input"
    )
    implementations = {name: ATTENTION.table[name] for name in _IMPLS}
    variants = (
        {"qk_norm": True, "shift": True, "output_norm": True, "output_gate": True},
        {"kv_heads": 2, "window": 4, "shift": True, "rope_base": 100.0, "bias": "all"},
        {"kv_heads": 1, "forget": "constant"},
    )

    def __init__(self, config: FoxConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, kind = Projections(config, width, rngs=rngs, dtype=dtype), param_dtype(dtype)
        if config.forget == "input":
            self.forget = make(config.heads, "gates", bias=True)
        elif config.forget == "constant":
            bias = spread_logits(config.heads, kind, config.lifetimes)
            self.forget_bias = param(bias, axes=("gates",), role=Role.BIAS)
        if config.shift:
            self.k_shift, self.v_shift = (make(config.key_heads, "gates") for _ in range(2))
        if config.output_norm:
            self.o_norm = HeadsRMSNorm(config.heads, self.head_dim, "heads", dtype=dtype)
        if config.output_gate:
            self.gate = make(config.heads * self.head_dim)

    def make_norm(self, heads: int, axis: str) -> HeadsRMSNorm:
        epsilon = 1e-6 if self.config.qk_epsilon is None else self.config.qk_epsilon
        return HeadsRMSNorm(heads, self.head_dim, axis, dtype=self.dtype, epsilon=epsilon)

    def reads(self, x: jax.Array, seq: Sequence, cache: FoxCache | MaskedCache | None = None) -> Reads:
        c, view = self.config, self.viewed(seq, cache, lambda cache: cache.kv.length)
        k, v = self.keys_values(x)
        cache = view.carried
        tail = None if cache is None else cache.tail
        if c.shift:
            k, v, tail = self.shifted(k, v, x, seq, tail)
        q, k = (self.placed(y, view.seq.positions, name) for y, name in ((self.queries(x), "q"), (k, "k")))
        left = self.left(x, seq)
        if cache is None:
            mask = view.mask(seq.mask(causal=True, window=c.window), causal=True)
            return Reads(q, Faded(view.ordered(Whole(k, v)), left, -left), mask)
        # Of a key that was there before, what its document forgets in these positions is forgotten, too.
        kv, whole, interval = cache.kv.append(k, v, seq.offsets, seq.padding, c.window)
        kept, read = cache.kv.append_beside(cache.faded, -left)
        cache = view.kept(FoxCache(kv, kept + left[:, -1:], tail))
        return Reads(q, Faded(whole, left, read), view.mask(interval, causal=True), cache)

    def attend(self, q: jax.Array, kv: Faded, mask: Mask, x: jax.Array) -> MixerOutput:
        c = self.config
        o = kv.attend(q, mask, impl=c.impl, decode_impl=c.decode_impl)
        if c.output_norm:
            o = self.o_norm(o)
        if c.output_gate:
            o = o * jax.nn.sigmoid(self.gate(x)).reshape(o.shape)
        return MixerOutput(o)

    def left(self, x: jax.Array, seq: Sequence) -> jax.Array:
        """Sums of log f [B, T, H] from the start of each document, or of the sequence, in fp32."""
        B, T, H, wide = *x.shape[:2], self.config.heads, param_dtype(self.dtype)
        if self.config.forget == "input":
            logits = self.forget(x).astype(wide)
        elif self.config.forget == "constant":
            logits = self.forget_bias[...].astype(wide)
        else:
            logits = spread_logits(H, wide, self.config.lifetimes)
        return log_left(jnp.broadcast_to(logits, (B, T, H)), seq)

    def shifted(
        self, k: jax.Array, v: jax.Array, x: jax.Array, seq: Sequence, tail: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys and values, each with a share of the position before it, and what the next position needs of these."""
        B, T, K, d = k.shape
        flat, wide = jnp.concatenate([k, v], axis=2).reshape(B, T, -1), param_dtype(self.dtype)
        back = jnp.zeros((2, flat.shape[2]), wide).at[0].set(1)
        before, after = causal_conv(flat, back, seq.documents, tail)
        shares = jnp.concatenate([self.k_shift(x), self.v_shift(x)], axis=-1)
        share = jax.nn.sigmoid(shares.astype(wide))[..., None]
        mixed = share * split_heads(before, d) + (1 - share) * split_heads(flat, d)
        k, v = jnp.split(mixed.astype(k.dtype), 2, axis=2)
        return k, v, after if tail is None else after.astype(tail.dtype)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> FoxCache | MaskedCache:
        kv, c = super().init_carried(batch, max_length, dtype), self.config
        faded = jnp.zeros((batch, kv.k.shape[1], c.heads), param_dtype(self.dtype))
        tail = jnp.zeros((batch, 1, 2 * c.key_heads * self.head_dim), dtype) if c.shift else None
        return self.beside_mask(FoxCache(kv, faded, tail), batch, max_length)

    @classmethod
    def flops(cls, config: FoxConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        flops, span = super().flops(config, width, length)
        columns = config.heads * (config.forget == "input") + 2 * config.key_heads * config.shift
        flops["gates"] = 2.0 * width * (columns + config.heads * config.head_dim(width) * config.output_gate)
        return flops, span


def spread_logits(heads: int, dtype: Any, lifetimes: tuple[float, float] = _LIFETIMES) -> jax.Array:
    """[H], b with sigmoid(b) = exp(-1 / n), n from the first lifetime to the last, spaced evenly in the logarithm."""
    rates = 1 / jnp.geomspace(*lifetimes, heads, dtype=dtype)
    return -rates - jnp.log(-jnp.expm1(-rates))
