"""Multi-head latent attention: keys and values of all heads are made of one narrow vector, and it alone is cached."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.masked import Masked, MaskedCache, mask_knob, mean_keys, require_mask, resolve_mask
from attnlab.mixers.parts import Linear, RMSNorm, param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION
from attnlab.ops.cached_attention import CACHED_ATTENTION
from attnlab.ops.keys_values import Cached, KVCache, Whole, empty_cache
from attnlab.ops.rope import rope

_BASE = 10_000.0  # of the rotary embedding


@dataclasses.dataclass(frozen=True)
class MLAConfig(HeadConfig):
    """Knobs of multi-head latent attention; `head_width` is that of queries and keys without positions.

    Attributes:
      turns_more: whether RoPE turns something beside the channels of `rotary_width`.
    """

    turns_more: ClassVar[bool] = False

    causal: bool = knob(True, "whether a position sees only itself and those before", other=(False,))
    rank: int | None = knob(
        None, "width r of the latent that keys and values are made of; none: 4 head widths", other=(5,), least=1
    )
    query_rank: int | None = knob(
        None,
        "width of the latent that queries are made of; none: they are projected from the input",
        other=(6,),
        least=1,
    )
    rotary_width: int | None = knob(
        None,
        "channels that RoPE turns, even, of each query and of one key that all heads share, beside those of a head; "
        "none: half a head width; 0: no positions",
        other=(4, 0),
        least=0,
    )
    rope_base: float | None = knob(
        _BASE, "base of the rotary embedding; none: these channels are not turned", other=(100.0, None), above=1
    )
    value_width: int | None = knob(None, "width e of a head's values; none: the head width", other=(3,), least=1)
    impl: str = impl_knob(ATTENTION)
    decode_impl: str = impl_knob(CACHED_ATTENTION, doc="implementation of the op over the cached latents")
    mask: Any = mask_knob()

    def __post_init__(self) -> None:
        resolve_mask(self)
        super().__post_init__()
        require_mask(self)
        even = (self.rotary_width or 0) % 2 == 0
        config_lib.require(even, "rotary_width", self.rotary_width, "even, 0 or more, or none")
        read = self.rotary_width != 0 or self.turns_more or self.rope_base in (_BASE, None)
        config_lib.require(read, "rope_base", self.rope_base, f"{_BASE} or none where rotary_width is 0")

    def widths(self, width: int) -> Widths:
        """Of a model of the given width."""
        d = self.head_dim(width)
        rotary = max(2, d // 4 * 2) if self.rotary_width is None else self.rotary_width
        return Widths(d, rotary, self.value_width or d, self.rank or 4 * d)


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of a head's keys without positions, of those with, of its values, and of the latent."""

    plain: int
    rotary: int
    value: int
    latent: int

    @property
    def pair(self) -> int:
        """Multiply-adds of a query and a key by a head, with keys and values made."""
        return self.plain + self.rotary + self.value

    @property
    def absorbed_pair(self) -> int:
        """The same on latents."""
        return 2 * (self.latent + self.rotary)


@register("mla")
class MLA(Masked, HeadMixer):
    """`o_h = softmax((q_h . k_h + r_h . r) / sqrt(d + d_r)) v_h`, with `k_h, v_h = c W_h` of `c = RMSNorm(x W_c)`.

    `r_h` of the query and `r = x W_r`, which all heads share, are turned by RoPE; q_h and k_h are not. A stream keeps c
    and r of each position and nothing of the heads.

    `q_h . k_h` is `(W_h q_h) . c`: a few queries attend to the latents as they lie in the cache, all heads with one key
    and one value (the weights absorbed); for many queries keys and values are made first, as in training.
    """

    Config = MLAConfig
    capabilities = Capabilities(causal=True, bidirectional=True)
    sequence_parallel = "keys and values are gathered, queries dealt out evenly"
    paper = (
        "DeepSeek-AI 2024, DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model, "
        "arXiv:2405.04434"
    )
    implementations = ATTENTION.table
    variants = (
        {"heads": 2, "rank": 5, "query_rank": 6, "value_width": 3, "rope_base": 100.0, "bias": "all"},
        {"causal": False, "rotary_width": 0, "rank": 7},
    )

    def __init__(self, config: MLAConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, H = Projections(config, width, rngs=rngs, dtype=dtype), config.heads
        self.widths = w = config.widths(width)
        up = lambda rank, columns: Linear(rank, H * columns, ("gates", "heads"), rngs=rngs, dtype=dtype)
        if config.query_rank is None:
            self.q = make.qkv(H * (w.plain + w.rotary))
        else:
            self.q_down = make.qkv(config.query_rank, "gates")
            self.q_norm = RMSNorm(config.query_rank, ("gates",), dtype=dtype)
            self.q = up(config.query_rank, w.plain + w.rotary)
        self.down = make.qkv(w.latent, "gates")
        self.norm = RMSNorm(w.latent, ("gates",), dtype=dtype)
        if w.rotary:
            self.shared = make.qkv(w.rotary, "gates")
        self.k, self.v = up(w.latent, w.plain), up(w.latent, w.value)
        self.out = make.out(H * w.value)

    def heads(self, x: jax.Array, seq: Sequence, carried: KVCache | MaskedCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        view, causal = self.viewed(seq, carried, lambda cache: cache.length), self.config.causal
        q, latents = self.queries(x, view.seq), self.latents(x, view.seq)
        if carried is None:
            kv, mask = self.expanded(q, latents), view.mask(seq.mask(causal=causal), causal=causal)
            return MixerOutput(view.ordered(kv).attend(q, mask, **self._options))
        cache, kv, interval = view.carried.append(latents, latents[..., :0], seq.offsets, seq.padding)
        carried, kv, mask = view.kept(cache), Cached(kv.k, kv.k, kv.fits), view.mask(interval, causal=causal)
        if self.absorbs(x.shape[1]):
            return MixerOutput(self.absorbed(q, kv, mask), carried)
        kv = self.expanded(q, kv.by_position(len(q))[1])
        return MixerOutput(kv.attend(q, mask, **self._options), carried)

    def queries(self, x: jax.Array, seq: Sequence) -> jax.Array:
        """[B, T, H, d + d_r], the last channels turned."""
        q = self.q(x if self.config.query_rank is None else self.q_norm(self.q_down(x)))
        plain, rotary = jnp.split(split_heads(q, self.widths.plain + self.widths.rotary), [self.widths.plain], axis=-1)
        return jnp.concatenate([plain, self._turned(rotary, seq)], axis=-1)

    def latents(self, x: jax.Array, seq: Sequence) -> jax.Array:
        """What is cached, [B, T, 1, r + d_r]: the normed latent and the turned key that heads share."""
        c = self.norm(self.down(x))[:, :, None]
        return jnp.concatenate([c, self._turned(self.shared(x)[:, :, None], seq)], axis=-1) if self.widths.rotary else c

    def expanded(self, q: jax.Array, latents: jax.Array) -> Whole:
        """Keys [B, S, H, d + d_r] and values [B, S, H, e] of latents [B, S, 1, r + d_r]."""
        c, shared = jnp.split(latents.astype(q.dtype)[:, :, 0], [self.widths.latent], axis=-1)
        k, v = split_heads(self.k(c), self.widths.plain), split_heads(self.v(c), self.widths.value)
        shared = jnp.broadcast_to(shared[:, :, None], (*k.shape[:3], self.widths.rotary))
        return Whole(jnp.concatenate([k, shared], axis=-1), v)

    def absorbs(self, queries: int) -> bool:
        """Whether so many queries cost less on the latents than with keys and values made of all of them."""
        w = self.widths
        return queries * (w.absorbed_pair - w.pair) <= w.latent * (w.plain + w.value)

    def absorbed(self, q: jax.Array, kv: Cached, mask: Any) -> jax.Array:
        """[B, T, H, e] of queries over latents, which are both the keys and the values."""
        w, wide = self.widths, param_dtype(self.dtype)
        of_heads = lambda linear: linear.kernel[...].astype(q.dtype).reshape(w.latent, self.config.heads, -1)
        einsum = lambda *args: jnp.einsum(*args, preferred_element_type=wide).astype(q.dtype)
        plain, rotary = jnp.split(q, [w.plain], axis=-1)
        q = jnp.concatenate([einsum("bthd,rhd->bthr", plain, of_heads(self.k)), rotary], axis=-1)
        o = kv.attend(q, mask, **self._options)[..., : w.latent]
        return einsum("bthr,rhe->bthe", o, of_heads(self.v))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> KVCache | MaskedCache:
        latent = self.widths.latent + self.widths.rotary
        return self.beside_mask(empty_cache(batch, 1, latent, max_length, dtype, value_width=0), batch, max_length)

    @classmethod
    def flops(cls, config: MLAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, w, span = config.heads, config.widths(width), mean_keys(config, length)
        queries = H * (w.plain + w.rotary)
        of_q = width * queries if config.query_rank is None else config.query_rank * (width + queries)
        of_kv = width * (w.latent + w.rotary) + w.latent * H * (w.plain + w.value)
        return {
            "projections": 2.0 * (of_q + of_kv + width * H * w.value),
            "attention": 2.0 * H * w.pair * span,
        }, span

    # Inside.

    @property
    def _options(self) -> dict[str, Any]:
        scale = (self.widths.plain + self.widths.rotary) ** -0.5
        return {"scale": scale, "impl": self.config.impl, "decode_impl": self.config.decode_impl}

    def _turned(self, y: jax.Array, seq: Sequence) -> jax.Array:
        base = self.config.rope_base
        return y if base is None or not self.widths.rotary else rope(y, seq.positions, base)
