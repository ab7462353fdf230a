"""RWKV-7: a linear memory per head whose transitions decay channels and move what stands along one key to another."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import LayerNorm, LowRank, param_dtype
from attnlab.mixers.roles import Role, drawn, normal, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.dplr import DPLR, chunked_flops, dplr
from attnlab.ops.linear import per_channel
from attnlab.ops.norm import unit

_SLOWEST = math.exp(-0.5)  # log decays lie between -exp(-1/2) and 0
_ALONE = 0, 12  # l and L of a layer by itself
# What is shifted, and by which power of a channel's place it looks back at first.
_MIXED = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


@dataclasses.dataclass(frozen=True)
class RWKV7Config(HeadConfig):
    """Knobs of RWKV-7's time mixing."""

    decay_rank: int | None = knob(
        None, "rank of the projection to decays; none: 1.8 sqrt(D) in multiples of 32, 32 at least", other=(3,), least=1
    )
    rate_rank: int | None = knob(
        None, "rank of the projection to in-context rates a; none: as decay_rank's", other=(3,), least=1
    )
    gate_rank: int | None = knob(
        None, "rank of the projection to gates; none: 0.6 D^0.8 in multiples of 32, 32 at least", other=(3,), least=1
    )
    value_residual: bool = knob(
        True, "mix the values of the stack's first such layer into those of later ones", other=(False,)
    )
    residual_rank: int | None = knob(
        None, "rank of the projection to that mixture's shares; none: 1.3 sqrt(D) in multiples of 32, 32 at least",
        other=(2,), least=1,
    )  # fmt: skip
    layer: int | None = knob(
        None, "l, of which layer of a stack the first values are, from 0; none: the layer's number in its stack, and 0 "
        "by itself", other=(1,), least=0,
    )  # fmt: skip
    layers: int | None = knob(
        None, "L, layers of that stack; none: those of the stack, and 12 of a layer by itself", other=(3,), least=1
    )
    chunk: int = knob(64, "positions computed at once in training", other=(4,), least=1)
    impl: str = impl_knob(DPLR)

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        plain = self.residual_rank is None or self.value_residual
        need(plain, "residual_rank", self.residual_rank, "none where value_residual is false")
        if self.layer is not None:
            need(self.layers is not None, "layer", self.layer, "none where layers is")
            need(self.layer < self.layers, "layer", self.layer, f"less than layers ({self.layers}), or none")

    def ranks(self, width: int) -> tuple[int, int, int, int]:
        """Of decays, rates, gates and shares of the first values in a model of the given width; the last may be 0."""
        in_32s = lambda r: max(32, 32 * round(r / 32))
        small, large, least = in_32s(1.8 * width**0.5), in_32s(0.6 * width**0.8), in_32s(1.3 * width**0.5)
        shares = (self.residual_rank or least) if self.value_residual else 0
        return self.decay_rank or small, self.rate_rank or small, self.gate_rank or large, shares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RWKV7State:
    """The memory and the input before.

    Attributes:
      memory: [B, H, d, d], fp32 (fp64 in a float64 model).
      tail: [B, 1, D], the last input.
    """

    memory: jax.Array
    tail: jax.Array


@register("rwkv7")
class RWKV7(HeadMixer):
    """`S_t = (diag(w_t) - (a_t * c_t) c_t^T) S_{t-1} + k_t v_t^T`, `o_t = S_t^T r_t` per head.

    Each of r, w, k, v, a and g is made of its own mixture `x_t + mu (x_{t-1} - x_t)`. r, k and v are projections;
    `log w = -exp(-1/2) sigmoid(b_w + tanh(x W_1) W_2)` and `a = sigmoid(b_a + x A_1 A_2)` numbers of each channel;
    `c` is `k * k_k` divided by its length in each head, and then k becomes `k (1 + (a - 1) k_a)`. The output is
    `((GroupNorm(o) + (sum r * k * r_k) v) * g) W_o`, norm and sum over a head, `g = sigmoid(x G_1) G_2`. In a stack v
    of later layers is `v + (v' - v) sigmoid(b_v + x V_1 V_2)`, v' that of the first.
    """

    Config = RWKV7Config
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the state is passed on with its transition"
    paper = 'Peng et al. 2025, RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv:2503.14456'
    implementations = DPLR.table
    counted = "chunked"
    variants = ({"heads": 2, "head_width": 6, "decay_rank": 2, "rate_rank": 3, "gate_rank": 4, "chunk": 3},)

    def __init__(self, config: RWKV7Config, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        inner, kind = config.heads * self.head_dim, param_dtype(dtype)
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.r, self.k, self.v = (make.qkv(inner) for _ in range(3))
        smaller = lambda rows, axes: drawn(
            rngs, normal, (rows, inner), kind, 0.1 / math.sqrt(rows), axes=axes, role=Role.MATRIX
        )
        self.k.kernel = smaller(width, ("embed", "heads"))
        for name, rank in zip(("decay", "rate", "gate", "share"), config.ranks(width), strict=True):
            if rank:
                low = LowRank(width, rank, inner, rngs=rngs, dtype=dtype)
                low.up.kernel = smaller(rank, ("gates", "heads"))
                setattr(self, name, low)
        self._make_vectors(width, inner, kind)
        self.norm = LayerNorm(inner, ("heads",), dtype=dtype, epsilon=1e-5 * self.head_dim)
        self.out = make.out(inner)
        self._begin(*_ALONE)

    def _make_vectors(self, width: int, inner: int, kind: Any) -> None:
        """What is of channels, at first as in released code: by a channel's place in the model and in its head; what
        depends on the layer's place too is `_begin`'s."""
        self.mix = param(jnp.zeros((len(_MIXED), width), kind), axes=("mix", "embed"), role=Role.SCALE)
        around, zigzag = _line(inner, kind) - 0.5, _zigzag(inner, self.head_dim, kind)
        make = lambda value, role: param(value, axes=("heads",), role=role)
        self.decay_bias = make(jnp.zeros((inner,), kind), Role.DECAY_RATE)
        self.rate_bias = make(-0.19 + 0.3 * zigzag + 0.4 * around, Role.BIAS)
        if self.config.value_residual:
            self.share_bias = make(0.73 - 0.4 * around, Role.BIAS)
        self.k_k = make(0.71 - 0.1 * around, Role.SCALE)
        self.k_a = make(jnp.full((inner,), 1.02, kind), Role.SCALE)
        self.r_k = make(jnp.full((inner,), -0.04, kind), Role.SCALE)

    def begin_layer(self, layer: jax.Array, layers: int) -> None:
        c = self.config
        enough = c.layer is not None or c.layers is None or c.layers >= layers
        config_lib.require(enough, "layers", c.layers, f"the stack's {layers} or more where layer is none, or none")
        self._begin(layer, layers)

    def _begin(self, layer: jax.Array | int, layers: int) -> None:
        """First values of what depends on the layer's place in a stack, which knobs say where they are set."""
        c = self.config
        kind, inner = self.mix.dtype, self.decay_bias.shape[0]
        l = jnp.asarray(layer if c.layer is None else c.layer, kind)
        L = layers if c.layers is None else c.layers
        self.mix[...] = _mixtures(self.mix.shape[1], 1 - l / L, kind)
        rising = (l / max(L - 1, 1)) ** 0.3
        zigzag = _zigzag(inner, self.head_dim, kind)
        self.decay_bias[...] = -5.5 + 6 * _line(inner, kind) ** (1 + rising) + 2.5 * zigzag
        self.norm.scale[...] = jnp.full((inner,), ((l + 1) / L) ** 0.7, kind)

    def heads(self, x: jax.Array, seq: Sequence, carried: RWKV7State | None = None) -> MixerOutput:
        c, wide = self.config, param_dtype(self.dtype)
        x = x.astype(self.dtype)
        before, tail = self._before(x, seq, None if carried is None else carried.tail)
        mixed = {name: x + per_channel(mu.astype(x.dtype), before - x) for name, mu in zip(_MIXED, self.mix[...])}
        of_heads = lambda y: split_heads(y.astype(wide), self.head_dim)
        r, k = of_heads(self.r(mixed["r"])), self.k(mixed["k"]).astype(wide)
        v, shared = self.values(of_heads(self.v(mixed["v"])), mixed["v"], seq)
        slow = self.decay.up(jnp.tanh(self.decay.down(mixed["w"]))).astype(wide) + self.decay_bias[...]
        a = jax.nn.sigmoid(self.rate(mixed["a"]).astype(wide) + self.rate_bias[...])
        gate = self.gate.up(jax.nn.sigmoid(self.gate.down(mixed["g"])))
        along = unit(split_heads(per_channel(self.k_k[...], k), self.head_dim))
        k = of_heads(k + per_channel(self.k_a[...], k * (a - 1)))
        o, memory = dplr(
            r, k, v.astype(self.dtype), of_heads(-_SLOWEST * jax.nn.sigmoid(slow)), -along, along * of_heads(a),
            documents_BT=seq.documents, state_BHde=None if carried is None else carried.memory,
            chunk=c.chunk, impl=c.impl,
        )  # fmt: skip
        own = jnp.sum(r * k * self.r_k[...].reshape(c.heads, -1), axis=-1, keepdims=True) * v
        o = ((self.normed(o) + own) * of_heads(gate)).astype(self.dtype)
        state = None if carried is None else RWKV7State(memory, tail.astype(carried.tail.dtype))
        return MixerOutput(o, state, shared=shared)

    def values(self, v_BTHd: jax.Array, x: jax.Array, seq: Sequence) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Values with those of the stack's first such layer mixed in, and what later layers find of them.

        By itself, or as the first of its stack, a layer's values are its own.

        Raises:
          ConfigError: a layer by itself is said to be a later one of a stack.
        """
        if not self.config.value_residual:
            return v_BTHd, {}
        values, layers = self._names()
        found, first = (seq.shared or {}).get(values), v_BTHd
        config_lib.require(
            found is not None or not self.config.layer, "layer", self.config.layer,
            "0 or none of a layer by itself, which finds no first layer's values; any where value_residual is false",
        )  # fmt: skip
        if found is not None:
            first = jnp.where(seq.shared[layers] == 0, v_BTHd, found)
        share = jax.nn.sigmoid(self.share(x).astype(v_BTHd.dtype) + self.share_bias[...])
        v = v_BTHd + (first - v_BTHd) * split_heads(share, self.head_dim)
        return v, {} if found is None else {values: first, layers: seq.shared[layers] + 1}

    def init_shared(self, batch: int, length: int) -> dict[str, jax.Array]:
        if not self.config.value_residual:
            return {}
        values = jnp.zeros((batch, length, self.config.heads, self.head_dim), param_dtype(self.dtype))
        return dict(zip(self._names(), (values, jnp.int32(0)), strict=True))

    def _names(self) -> tuple[str, str]:
        """Of values and the number of layers so far, among layers with as many heads, as wide."""
        of = f"rwkv7_{self.config.heads}_{self.head_dim}"
        return f"{of}_values", f"{of}_layers"

    def _before(self, x: jax.Array, seq: Sequence, tail: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The input one position earlier, 0 at a document's first, and the last input."""
        one = jnp.ones((1, x.shape[-1]), x.dtype)
        return causal_conv(x, jnp.concatenate([one, 0 * one]), seq.documents, tail)

    def normed(self, o_BTHd: jax.Array) -> jax.Array:
        """GroupNorm, a group for each head, in fp32 (fp64)."""
        y = o_BTHd.astype(param_dtype(self.dtype))
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.norm.epsilon)
        of_heads = lambda p: p[...].reshape(self.config.heads, -1)
        return y * of_heads(self.norm.scale) + of_heads(self.norm.bias)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> RWKV7State:
        d, width = self.head_dim, self.mix.shape[-1]
        memory = jnp.zeros((batch, self.config.heads, d, d), param_dtype(self.dtype))
        return RWKV7State(memory, jnp.zeros((batch, 1, width), dtype))

    @classmethod
    def flops(cls, config: RWKV7Config, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d = config.head_dim(width)
        inner = config.heads * d
        return {
            "projections": 8.0 * width * inner,
            "gates": 2.0 * sum(config.ranks(width)) * (width + inner),
            "memory": config.heads * chunked_flops(config.chunk, length, d, d) / length,
        }, None


def _line(columns: int, dtype: Any) -> jax.Array:
    """From 0 to 1 over the channels."""
    return jnp.arange(columns, dtype=dtype) / max(columns - 1, 1)


def _zigzag(columns: int, head_dim: int, dtype: Any) -> jax.Array:
    """`z |z|` of each channel, z from -1 to 1 in each head."""
    z = (jnp.arange(columns, dtype=dtype) % head_dim - (head_dim - 1) / 2) / max((head_dim - 1) / 2, 1)
    return z * jnp.abs(z)


def _mixtures(width: int, up: jax.Array, dtype: Any) -> jax.Array:
    """mu [6, D] at first, of a layer whose share `up` of its stack lies above it, 1 - l / L."""
    place = jnp.arange(width, dtype=dtype) / width
    return 1 - place ** (jnp.asarray(list(_MIXED.values()), dtype)[:, None] * up)
