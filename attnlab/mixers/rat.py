"""RAT: a gated linear RNN inside chunks, softmax attention over the chunks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadMixer, Projections, RotaryConfig
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, drawn
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION_WITH_LSE, attention_with_lse
from attnlab.ops.cached_attention import cached_attention
from attnlab.ops.key_blocks import BlockPlaces
from attnlab.ops.masks import Mask
from attnlab.ops.segmented_ema import SEGMENTED_EMA, segmented_ema


@dataclasses.dataclass(frozen=True)
class RATConfig(RotaryConfig):
    """Knobs of RAT; positions that RoPE turns by are those of chunks."""

    chunk: int = knob(
        16, "positions in a chunk, L; 1: attention over all; the length: no attention", other=(3, 1), least=1
    )
    groups: int = knob(2, "projections of queries and of keys; head h has number h mod groups", other=(1,))
    impl: str = impl_knob(SEGMENTED_EMA)
    attend_impl: str = impl_knob(ATTENTION_WITH_LSE, doc="implementation of the op over the chunks' entries")

    def __post_init__(self) -> None:
        super().__post_init__()
        shared = self.groups >= 1 and self.heads % self.groups == 0
        config_lib.require(shared, "groups", self.groups, f"divisors of heads ({self.heads})")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RATState:
    """Entries of chunks, and the running averages.

    Attributes:
      k, v: [B * H, S, d], head h of sequence b in row b * H + h; the last entries of complete chunks, of all documents
        one after the other.
      running: [B, 2, H * d], averages of values and of keys at the last position, fp32 (fp64 in a float64 model).
      entries: [B] int32, chunks completed so far.
    """

    k: jax.Array
    v: jax.Array
    running: jax.Array
    entries: jax.Array


def _complete(places: BlockPlaces) -> Mask:
    """Each position sees the entries of its document's complete chunks."""
    return Mask(places.entry - places.block, places.entry)


def _reaches(key: jax.Array, count: int, dtype: Any, longest: int) -> jax.Array:
    """Logarithms of numbers uniform in [1, longest]."""
    return jnp.log(jax.random.uniform(key, (count,), dtype, 1.0, longest))


@register("rat")
class RAT(HeadMixer):
    """Queries attend to one entry of each chunk before theirs, and to their own chunk so far, in one softmax.

    Inside a chunk of L positions, for values and keys with the same gate `g = sigmoid(x W_g + b)` per channel,

        v~_t = g_t v~_{t-1} + (1 - g_t) v_t,      k~_t = g_t k~_{t-1} + (1 - g_t) k_t,      both 0 before the chunk,

    and `y_t = sum_j softmax_j(q_t . k~_j / sqrt(d)) v~_j` over j = the last positions of the t // L chunks before, and
    t itself; the output is `W_O (sigmoid(x W_z) * y)`. Queries and k~ are rotated by the index of their chunk. With
    L = 1 the averages are (1 - g_t) v_t and (1 - g_t) k_t, not v_t and k_t.

    Chunks and their indices are counted from the start of each document, whatever `Sequence.positions` says.
    """

    Config = RATConfig
    capabilities = Capabilities()
    sequence_parallel = "averages are passed on as sums; the ends of chunks are gathered"
    paper = (
        "Wei et al. 2025, RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling, "
        "arXiv:2507.04416"
    )
    extension = (
        "lengths that L does not divide, and chunks that begin anew with each packed document; b = 0 where L is 1, "
        "which the paper leaves open"
    )
    implementations = SEGMENTED_EMA.table
    variants = ({"heads": 2, "chunk": 2, "head_width": 4, "rope_base": 100.0},)

    def __init__(self, config: RATConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        inner, shared = config.heads * self.head_dim, config.groups * self.head_dim
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.z, self.v, self.g = make(inner), make.qkv(inner), make(inner)
        self.q, self.k = (make.qkv(shared, "kv_heads") for _ in range(2))
        # exp(b) is uniform in [1, L - 1]: averages reach back over about so many positions.
        longest = max(config.chunk - 1, 1)
        self.gate_bias = drawn(rngs, _reaches, inner, param_dtype(dtype), longest, axes=("heads",), role=Role.BIAS)
        self.out = make.out(inner)

    def heads(self, x: jax.Array, seq: Sequence, carried: RATState | None = None) -> MixerOutput:
        """As in the contract. More chunks than the state has room for give NaN, as jit can raise nothing."""
        offset = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if seq.offsets is None else seq.offsets
        places = BlockPlaces.of(offset, self.config.chunk, None if carried is None else carried.entries)
        running = self._averages(x, places, carried)
        q, k, v = self._positioned(x, running, places)
        if carried is not None:
            o, cache = self._extended(q, k, v, places, carried)
        elif self.config.impl == "definition":
            o = self._all_pairs(q, k, v, places, seq.documents)
        else:
            o = self._over_chunks(q, k, v, places, whole=seq.segments is None)
        z = jax.nn.sigmoid(self.z(x))
        o = o * z.reshape(o.shape)
        if carried is None:
            return MixerOutput(o)
        return MixerOutput(o, RATState(*cache, running[:, -1], places.done))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> RATState:
        H, d, L = self.config.heads, self.head_dim, self.config.chunk
        entries = jnp.zeros((batch * H, -(-max_length // L), d), dtype)
        return RATState(
            k=entries,
            v=entries,
            running=jnp.zeros((batch, 2, H * d), param_dtype(self.dtype)),
            entries=jnp.zeros((batch,), jnp.int32),
        )

    @classmethod
    def flops(cls, config: RATConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, L = config.head_dim(width), config.chunk
        full, rest = divmod(length, L)
        span = (L * full * (full + 1) / 2 + rest * (full + 1)) / length
        return {
            "projections": 2.0 * width * d * (4 * config.heads + 2 * config.groups),
            "attention": 4.0 * config.heads * d * span,
        }, span

    # Inside.

    def _averages(self, x: jax.Array, places: BlockPlaces, state: RATState | None) -> jax.Array:
        """Averages of values and of keys, [B, T, 2, H * d], in fp32 or wider."""
        c, B = self.config, x.shape[0]
        wide = param_dtype(self.dtype)
        g = jax.nn.sigmoid(self.g(x).astype(wide) + self.gate_bias[...])
        keys = jnp.tile(self.k(x), (1, 1, c.heads // c.groups))
        inputs = (1 - g)[:, :, None] * jnp.stack([self.v(x), keys], axis=2).astype(wide)
        decay = jnp.where((places.offset % c.chunk == 0)[..., None], 0, g)
        start = jnp.zeros((B, 2, inputs.shape[-1]), wide) if state is None else state.running
        return segmented_ema(decay, inputs, start, impl=c.impl)

    def _positioned(
        self, x: jax.Array, running_BT2I: jax.Array, places: BlockPlaces
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k~ and v~ [B, T, H, d], rotated."""
        c = self.config
        heads = lambda y: y.astype(self.dtype).reshape(*x.shape[:2], -1, self.head_dim)
        q = heads(jnp.tile(self.q(x), (1, 1, c.heads // c.groups)))
        v, k = heads(running_BT2I[:, :, 0]), heads(running_BT2I[:, :, 1])
        return c.rotated(q, places.block), c.rotated(k, places.block), v

    def _all_pairs(
        self, q: jax.Array, k: jax.Array, v: jax.Array, places: BlockPlaces, documents: jax.Array | None
    ) -> jax.Array:
        """The definition: a softmax over all pairs, of which most are hidden."""
        T = q.shape[1]
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        visible = places.ends[:, None] & (places.block[:, None] < places.block[:, :, None])
        visible = (visible & jnp.tril(jnp.ones((T, T), bool))) | jnp.eye(T, dtype=bool)
        if documents is not None:
            visible &= documents[:, None] == documents[:, :, None]
        logits = jnp.einsum("bthd,bshd->bhts", q.astype(dtype), k.astype(dtype), precision="highest")
        weights = jax.nn.softmax(jnp.where(visible[:, None], logits * self.head_dim**-0.5, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshe->bthe", weights, v.astype(dtype), precision="highest").astype(q.dtype)

    def _over_chunks(self, q: jax.Array, k: jax.Array, v: jax.Array, places: BlockPlaces, *, whole: bool) -> jax.Array:
        """Attention over the gathered entries, merged with each position's own."""
        (B, T), L = q.shape[:2], self.config.chunk
        slots = (T - 1) // L  # the most entries that a later position of their document can see
        if slots == 0:
            return v
        if whole:
            entries = [y[:, L - 1 : slots * L : L] for y in (k, v)]
        else:
            slot = jnp.where(places.ends, places.entry, slots)
            rows = jnp.arange(B)[:, None]
            at = jnp.zeros((B, slots), jnp.int32).at[rows, slot].set(jnp.arange(T, dtype=jnp.int32), mode="drop")
            entries = [y[rows, at] for y in (k, v)]
        return _merged(q, k, v, *entries, _complete(places), self.config.attend_impl)

    def _extended(
        self, q: jax.Array, k: jax.Array, v: jax.Array, places: BlockPlaces, state: RATState
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Heads' outputs of the next positions, and the entries after them."""
        B, T, H, d = q.shape
        slots = state.k.shape[1]
        impl = "definition" if self.config.impl == "definition" else self.config.attend_impl
        # A lone position is written whether it ends its chunk or not, and is then one of the entries that it reads.
        slot = places.entry if T == 1 else jnp.where(places.ends, places.entry, slots)
        slot = jnp.repeat(slot, H, axis=0)
        rows = jnp.arange(B * H)[:, None]
        by_head = lambda y: y.swapaxes(1, 2).reshape(B * H, T, d)
        cache = tuple(
            old.at[rows, slot].set(by_head(y).astype(old.dtype), mode="drop") for old, y in ((state.k, k), (state.v, v))
        )
        keys, values = (y.astype(q.dtype) for y in cache)
        if T == 1:
            seen = Mask(places.entry - places.block, places.entry + 1)
            o = cached_attention(q, keys, values, seen, impl="definition" if impl == "definition" else "auto")
        else:
            keys, values = (y.reshape(B, H, slots, d).swapaxes(1, 2) for y in (keys, values))
            o = _merged(q, k, v, keys, values, _complete(places), impl)
        return jnp.where((places.entry < slots)[..., None, None], o, jnp.nan), cache


def _merged(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, mask: Mask, impl: str
) -> jax.Array:
    """One softmax over the keys that `mask` shows and each position's own k and v, [B, T, H, d]."""
    o, lse_BTH = attention_with_lse(q, keys, values, mask, impl=impl)
    own_BTH = jnp.sum(q.astype(lse_BTH.dtype) * k, axis=-1) * q.shape[-1] ** -0.5
    weight = jax.nn.sigmoid(own_BTH - lse_BTH)[..., None]
    return ((1 - weight) * o + weight * v).astype(q.dtype)
