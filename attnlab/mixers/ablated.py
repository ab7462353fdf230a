"""Attention with one of its principles taken away: mixing, the exponential, the query, or the context."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.base import Capabilities, MixerOutput, State, knob, register
from attnlab.mixers.heads import HeadMixer, Projections, RotaryConfig, split_heads
from attnlab.mixers.parts import RMSNorm, param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops import running_softmax as by_key
from attnlab.ops.documents import largest_input
from attnlab.ops.feature_maps import Taylor
from attnlab.ops.keys_values import KVCache, Whole, empty_cache
from attnlab.ops.linear_recurrence import flops_per_token, linear_recurrence
from attnlab.ops.masks import mean_visible_keys
from attnlab.ops.running_softmax import RunningState, running_softmax
from attnlab.ops.taylor_attention import pairs_are_fewer, taylor_attention

WEIGHTS = {
    "taylor": "1 + s + s^2 / 2 in place of exp(s), s = q . k / sqrt(d)",
    "key_score": "softmax of a score that a key has of its own, silu(q_s) . k_s / sqrt(d) of one position s",
    "static": "softmax attention whose queries and keys are made of what the stack began from, the token's embedding",
    "random_stream": "softmax attention whose queries and keys are made of a second stream that begins as fixed noise "
    "and goes through the same blocks",
    "text_stream": "the same with a stream that begins as the embeddings of one fixed text",
    "none": "no mixing: a gated MLP of as many parameters",
}
_STREAMS = "random_stream", "text_stream"

_ATTENTION = {"auto": "auto", "chunked": "xla", "definition": "definition"}


@dataclasses.dataclass(frozen=True)
class AblatedConfig(RotaryConfig):
    """Knobs of ablated attention; RoPE is of `taylor`, `static` and the streams, the others have no use for it."""

    weights: str = knob(
        "taylor",
        f"of a position for those before it; {'; '.join(f'{k}: {v}' for k, v in WEIGHTS.items())}",
        other=("key_score", "static", "random_stream", "none"),
        choices=WEIGHTS,
    )
    text: str | None = knob(
        None,
        "of text_stream: a .npy file of the text's ids, int [n]; documents have n positions at most",
        other=("text.npy",),
    )
    taylor_state: str = knob(
        "features",
        "what a stream of taylor keeps: features: a state of fixed size; cache: keys and values, fewer numbers up to "
        "about d^2 / 4 positions",
        other=("cache",),
        choices=("features", "cache"),
    )
    embedding_width: int | None = knob(
        None,
        "of static: width of the embeddings that queries and keys are made of, those of a table of the model's "
        "(model.decoupled); none: the model's width",
        other=(4,),
        least=1,
    )
    noise: float = knob(1.0, "deviation of the noise that random_stream begins as", other=(0.02,), above=0)
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,), least=1)
    impl: str = knob(
        "auto",
        "auto (of taylor blocks of pairs in short rows, the recurrence in long ones), chunked (a recurrence; attention "
        "in blocks of XLA), or definition (all pairs)",
        other=("definition",),
        choices=("auto", "chunked", "definition"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.weights == "text_stream"
        allowed = f"{'a .npy file' if given else 'none'} where weights is {self.weights}"
        config_lib.require(bool(self.text) == given, "text", self.text, allowed)
        one = f"1 where weights is {self.weights}: the second stream would need it, too"
        config_lib.require(not self.second_stream or self.input_conv == 1, "input_conv", self.input_conv, one)

        needs = "features where weights is not taylor"
        kept = self.weights == "taylor" or self.taylor_state == "features"
        config_lib.require(kept, "taylor_state", self.taylor_state, needs)
        narrow = self.weights == "static" or self.embedding_width is None
        config_lib.require(narrow, "embedding_width", self.embedding_width, "none where weights is not static")
        noisy = self.weights == "random_stream" or self.noise == 1
        config_lib.require(noisy, "noise", self.noise, "1 where weights is not random_stream")

    @property
    def second_stream(self) -> str:
        return self.weights if self.weights in _STREAMS else ""

    def takes_pairs(self, length: int, head_dim: int) -> bool:
        """Whether `taylor` attends to pairs of whole rows of so many positions, not by features."""
        few = self.impl == "auto" and pairs_are_fewer(length, head_dim)
        return self.taylor_state == "cache" or self.impl == "definition" or few

    def mlp_width(self, width: int) -> int:
        """Hidden width of a head's share of the MLP: three matrices have the parameters of attention's four."""
        return round(4 * self.head_dim(width) / 3)


@register("ablated")
class Ablated(HeadMixer):
    """Attention without one of its principles, `weights`.

    taylor: `o_t = sum_s w_ts v_s / sum_s w_ts`, `w = 1 + s + s^2 / 2`, `s = q_t . k_s / sqrt(d)` after RoPE: pair by
    pair in blocks of rows where these are short (`attnlab.ops.taylor_attention`), by features of q and k in long ones.
    key_score: `o_t = sum_s exp(r_s) v_s / sum_s exp(r_s)`, `r_s = silu(q_s) . k_s / sqrt(d)`: no query, no positions.
    static: `softmax(q k^T / sqrt(d)) v` after RoPE, q and k of RMSNorm(e), e `Sequence.embedding`; v is of x. By
    itself a layer is its stack's first: e is x.
    random_stream: as static, q and k of `Sequence.side`, what the layer reads of a second stream where it stands in its
    document: one that begins as noise and goes through all blocks of the stack as x does. By itself a layer reads what
    the stream begins as.
    text_stream: the same, but the stream begins as `Sequence.text`, the embeddings of the fixed text; positions behind
    its end give NaN, as jit can raise nothing.
    none: `silu(x W_1) * (x W_2)`, projected: no mixing.
    Sums are over s <= t of the document.
    """

    Config = AblatedConfig
    capabilities = Capabilities()
    sequence_parallel = "the state is passed on as a sum; keys and values of static and of taylor's pairs are gathered"
    paper = (
        "Xue et al. 2025, Deconstructing Attention: Investigating Design Principles for Effective Language Modeling, "
        "arXiv:2510.11602"
    )
    extension = (
        "weights=none: the MLP's width is a multiple of heads; weights=taylor: a state of features, or blocks "
        "without a maximum; weights=static: the embedding has an RMSNorm of the layer's own"
    )
    implementations = ("definition", "chunked")
    counted = "chunked"
    variants = (
        {"weights": "key_score", "heads": 2, "chunk": 3, "head_width": 6},
        {"weights": "taylor", "heads": 2, "chunk": 3, "rope_base": None, "head_width": 4},
        {"weights": "taylor", "heads": 2, "taylor_state": "cache", "head_width": 6},
        {"weights": "static", "heads": 2, "rope_base": 50.0, "head_width": 6},
        {"weights": "none", "heads": 2, "head_width": 6, "bias": "all"},
        {"weights": "random_stream", "heads": 2, "rope_base": None, "head_width": 6},
    )

    def __init__(self, config: AblatedConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        if config.weights == "none":
            inner = config.heads * config.mlp_width(width)
            self.gate, self.up = make.qkv(inner), make.qkv(inner)
        else:
            inner = config.heads * self.head_dim
            self.q, self.k = (make.qkv(inner, fan_in=config.embedding_width) for _ in range(2))
            self.v = make.qkv(inner)
        self.width = width
        if config.weights == "static":
            self.embedding_norm = RMSNorm(config.embedding_width or width, ("embed",), dtype=dtype)
        self.out = make.out(inner)

    @property
    def stack_reads(self) -> tuple[str, ...]:
        return ("embedding",) if self.config.weights == "static" else ()

    @property
    def embedding_width(self) -> int | None:
        return self.config.embedding_width

    def heads(self, x: jax.Array, seq: Sequence, carried: State = None) -> MixerOutput:
        """As in the contract; `carried` is a memory [B, H, features, d + 1], a `RunningState`, a cache, or empty."""
        c, wide = self.config, param_dtype(self.dtype)
        if c.weights == "none":
            gated = jax.nn.silu(self.gate(x).astype(wide)) * self.up(x).astype(wide)
            return MixerOutput(gated.reshape(*x.shape[:2], c.heads, -1).astype(self.dtype), ())
        e = self._fixed(x, seq) if c.weights in ("static", *_STREAMS) else x
        q, k, v = (split_heads(y(z), self.head_dim) for y, z in ((self.q, e), (self.k, e), (self.v, x)))
        if c.weights == "key_score":
            scores = (jax.nn.silu(q.astype(wide)) * k.astype(wide)).sum(-1) * self.head_dim**-0.5
            o, state = running_softmax(scores, v, documents_BT=seq.documents, state=carried, chunk=c.chunk, impl=c.impl)
            return MixerOutput(o.astype(self.dtype), state)
        q, k = (c.rotated(y, seq.positions) for y in (q, k))
        if c.weights in ("static", *_STREAMS):
            out = self._attended(q, k, v, seq, carried)
            if seq.text is None or c.weights != "text_stream":
                return out
            within = (_places(x, seq) < len(seq.text))[..., None, None]
            return dataclasses.replace(out, y=jnp.where(within, out.y, jnp.nan))
        return self._taylor(q, k, v, seq, carried)

    def _taylor(self, q: jax.Array, k: jax.Array, v: jax.Array, seq: Sequence, carried: State) -> MixerOutput:
        """By pairs of whole rows or with a cache, or by features."""
        c = self.config
        if isinstance(carried, KVCache) or (carried is None and c.takes_pairs(q.shape[1], self.head_dim)):
            kv, mask = Whole(k, v), seq.mask(causal=True)
            if carried is not None:
                carried, kv, mask = carried.append(k, v, seq.offsets, seq.padding, None)
            impl = "definition" if c.impl == "definition" else "auto"
            return MixerOutput(taylor_attention(q, *kv.by_position(len(q)), mask, impl=impl), carried)
        u = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        sums, memory = linear_recurrence(
            q, k, u, documents_BT=seq.documents, state_BHde=carried, features=Taylor(self.head_dim), chunk=c.chunk,
            impl=c.impl,
        )  # fmt: skip
        sums = sums.astype(param_dtype(self.dtype))
        # Weights are at least 1/2, but features of huge queries and keys may round their sum to less.
        return MixerOutput((sums[..., :-1] / jnp.maximum(sums[..., -1:], 0.5)).astype(self.dtype), memory)

    def _fixed(self, x: jax.Array, seq: Sequence) -> jax.Array:
        """What queries and keys are made of where they know no context, [B, T, D]."""
        if self.config.second_stream:
            places = _places(x, seq)
            begun = seq.side is None
            e = self._begun(places, seq.text) if begun else jnp.take(seq.side[0], places, axis=0, mode="clip")
            return jnp.broadcast_to(e.astype(self.dtype), x.shape)
        e = x if seq.embedding is None else seq.embedding
        if e.shape[-1] != (wanted := self.config.embedding_width or self.width):
            raise UnsupportedPattern(f"mixer {self.name!r} reads embeddings {wanted} wide, these are {e.shape[-1]}")
        # One that has overflowed has done so in x, too; it is to change nothing in other documents.
        return self.embedding_norm(jnp.where(jnp.abs(e) < largest_input(e.dtype), e, 0))

    def begin_second(self, length: int, text: jax.Array | None) -> jax.Array:
        return self._begun(jnp.arange(length, dtype=jnp.int32)[None], text).astype(self.dtype)

    def _begun(self, places: jax.Array, text: jax.Array | None) -> jax.Array:
        """What the stream begins as, [B, T, D], at places [B, T] of its document: the text's embeddings, or normal
        numbers of each place, of deviation `noise`."""
        if self.config.weights == "text_stream":
            if text is None:
                raise UnsupportedPattern(f"mixer {self.name!r} with weights=text_stream reads Sequence.text, the "
                                         "embeddings of a fixed text, which is not given")  # fmt: skip
            return jnp.take(text, places, axis=0, mode="clip")
        key = jax.random.key(0)  # of no parameter: the noise is never learned, and the same in every run
        of_place = lambda t: jax.random.normal(jax.random.fold_in(key, t), (self.width,), param_dtype(self.dtype))
        return self.config.noise * jax.vmap(jax.vmap(of_place))(places)

    def _attended(self, q: jax.Array, k: jax.Array, v: jax.Array, seq: Sequence, cache: KVCache | None) -> MixerOutput:
        """Softmax attention of whole sequences, or over the cache with these positions."""
        if cache is None:
            kv, mask = Whole(k, v), seq.mask(causal=True)
        else:
            cache, kv, mask = cache.append(k, v, seq.offsets, seq.padding, None)
        decode = "definition" if self.config.impl == "definition" else "auto"
        return MixerOutput(kv.attend(q, mask, impl=_ATTENTION[self.config.impl], decode_impl=decode), cache)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> State:
        c, d, wide = self.config, self.head_dim, param_dtype(self.dtype)
        if c.weights == "none":
            return ()
        if c.weights in ("static", *_STREAMS) or c.taylor_state == "cache":
            return empty_cache(batch, c.heads, d, max_length, dtype)
        if c.weights == "key_score":
            return RunningState.start(batch, c.heads, d, wide)
        return jnp.zeros((batch, c.heads, Taylor(d).count, d + 1), wide)

    @classmethod
    def flops(cls, config: AblatedConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, H, C = config.head_dim(width), config.heads, config.chunk
        if config.weights == "none":
            return {"projections": 6.0 * width * H * config.mlp_width(width)}, None
        pairs = config.weights == "taylor" and config.takes_pairs(length, d)
        if config.weights in ("static", *_STREAMS) or pairs:
            span = mean_visible_keys(length, True, None)
            projections = 4.0 * H * d * (width + (config.embedding_width or width))
            return {"projections": projections, "attention": 4.0 * H * d * span}, span
        if config.weights == "key_score":
            recurrence = by_key.flops_per_token(length, C, d)
        else:
            recurrence = flops_per_token(length, C, Taylor(d).count, d + 1)
        return {"projections": 8.0 * width * H * d, "recurrence": H * recurrence}, None


def _places(x: jax.Array, seq: Sequence) -> jax.Array:
    """Positions of its document before each, [B or 1, T]."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None] if seq.offsets is None else seq.offsets
