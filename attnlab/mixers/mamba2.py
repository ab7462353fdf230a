"""Mamba-2: a linear memory per head whose decay and strength of writing are one step size, made of the input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import Convolution, RMSNorm, log_rates, param_dtype, time_steps
from attnlab.mixers.roles import Role, drawn, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.linear import per_channel
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, flops_per_token, linear_recurrence


@dataclasses.dataclass(frozen=True)
class Mamba2Config(HeadConfig):
    """Knobs of Mamba-2; `head_width` is P, that of values."""

    head_width: int | None = knob(
        None, "width P of a head's values; none: expand * width / heads. The paper's is 64", other=(6,), least=1
    )
    expand: float = knob(2.0, "width E of all values together in widths of the model", other=(1.5,), above=0)
    state_width: int = knob(128, "width N of queries and keys", other=(5,), least=1)
    groups: int = knob(
        1,
        "groups G of neighbouring heads, a divisor of heads: those of a group have one query and one key, and the "
        "output's norm is over a group",
        other=(2,),
        least=1,
    )
    conv: int = knob(4, "positions that the convolutions span, itself included", other=(2,), least=2)
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(LINEAR_RECURRENCE)

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.heads % self.groups == 0
        config_lib.require(divides, "groups", self.groups, f"divisors of heads ({self.heads})")

    def head_dim(self, width: int) -> int:
        """P in a model of the given width; ConfigError if it is no integer."""
        if self.head_width is not None:
            return self.head_width
        P = self.expand * width / self.heads
        allowed = f"multiples of {self.heads} / {width}, heads / width, or head_width set"
        config_lib.require(P == int(P) >= 1, "expand", self.expand, allowed)
        return int(P)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2State:
    """The memory and what the convolutions still need.

    Attributes:
      memory: [B, H, N, P], fp32 (fp64 in a float64 model).
      tail: the last inputs of the convolutions of queries, keys and values, [B, conv - 1, channels].
    """

    memory: jax.Array
    tail: tuple[jax.Array, jax.Array, jax.Array]


@register("mamba2")
class Mamba2(HeadMixer):
    """`S_t = exp(-A dt_t) S_{t-1} + k_t (dt_t v_t)^T`, `o_t = S_t^T q_t + D v_t`, `RMSNorm(o * silu(x W_z)) W_o`.

    In the paper's words: k is B, q is C, v is X. The three are projections of x, convolved along the sequence with a
    bias, through SiLU; heads of a group share q and k. `dt_t = softplus(x W_dt + dt_bias)`, a number of a head, as
    A and D are.

    At first A is uniform in [1, 16), softplus(dt_bias) log-uniform in [0.001, 0.1], and D is 1.
    """

    Config = Mamba2Config
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the state is passed on as a sum"
    paper = "Dao and Gu 2024, Transformers are SSMs: Generalized Models and Efficient Algorithms, arXiv:2405.21060"
    implementations = LINEAR_RECURRENCE.table
    counted = "chunked"
    variants = (
        {"heads": 2, "head_width": 6, "state_width": 5, "conv": 2, "chunk": 3},
        {"groups": 2, "expand": 1.0, "state_width": 3, "chunk": 4},
    )

    def __init__(self, config: Mamba2Config, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        c, kind = config, param_dtype(dtype)
        values, keys = c.heads * self.head_dim, c.groups * c.state_width
        # One group serves all heads: every device that has some of them has its queries and keys.
        shared = "kv_heads" if c.groups > 1 else "gates"
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.q, self.k, self.v = make.qkv(keys, shared), make.qkv(keys, shared), make.qkv(values)
        conv = lambda channels, axis: Convolution(channels, c.conv, axis, rngs=rngs, dtype=dtype, bias=True)
        self.conv_q, self.conv_k, self.conv_v = conv(keys, shared), conv(keys, shared), conv(values, "heads")
        self.gate, self.step = make(values), make(c.heads, "gates")
        self.a_log = drawn(rngs, log_rates, c.heads, kind, axes=("gates",), role=Role.DECAY_RATE)
        self.dt_bias = drawn(rngs, time_steps, c.heads, kind, axes=("gates",), role=Role.DECAY_RATE)
        self.skip = param(jnp.ones((c.heads,), kind), axes=("gates",), role=Role.SCALE)
        self.norm = RMSNorm(values, ("heads",), dtype=dtype, epsilon=1e-5)
        self.out = make.out(values)

    def heads(self, x: jax.Array, seq: Sequence, carried: Mamba2State | None = None) -> MixerOutput:
        c, wide = self.config, param_dtype(self.dtype)
        tails = (None, None, None) if carried is None else carried.tail
        convolutions = (self.q, self.conv_q), (self.k, self.conv_k), (self.v, self.conv_v)
        made = [conv(linear(x), seq.documents, tail) for (linear, conv), tail in zip(convolutions, tails, strict=True)]
        q, k, v = (jax.nn.silu(y) for y, _ in made)
        q, k = (split_heads(y, c.state_width) for y in (q, k))
        v = split_heads(v, self.head_dim)
        dt = jax.nn.softplus(self.step(x).astype(wide) + self.dt_bias[...])
        v = v.astype(wide)
        memory = None if carried is None else carried.memory
        o, memory = self.recurrence(q, k, dt[..., None] * v, -jnp.exp(self.a_log[...]) * dt, memory, x, seq)
        o = self.normed((o + self.skip[...][:, None] * v) * jax.nn.silu(split_heads(self.gate(x), self.head_dim)))
        if carried is None:
            return MixerOutput(o)
        return MixerOutput(o, Mamba2State(memory, tuple(tail for _, tail in made)))

    def recurrence(
        self, q: jax.Array, k: jax.Array, u: jax.Array, log_decay: jax.Array, memory: Any, x: jax.Array, seq: Sequence
    ) -> tuple[jax.Array, Any]:
        """What queries [B, T, G, N] read of all that was written, [B, T, H, P], and the memory after the last
        position."""
        if self.config.groups > 1:
            q, k = self.of_heads(q, k)
        return linear_recurrence(
            q, k, u, log_decay=log_decay, documents_BT=seq.documents, state_BHde=memory, chunk=self.config.chunk,
            impl=self.config.impl,
        )  # fmt: skip

    def of_heads(self, *of_groups_BTGN: jax.Array) -> list[jax.Array]:
        """Those of each head, [B, T, H, N]."""
        return [jnp.repeat(y, self.config.heads // self.config.groups, axis=2) for y in of_groups_BTGN]

    def normed(self, o_BTHP: jax.Array) -> jax.Array:
        """RMSNorm over the channels of a group, in fp32 (fp64)."""
        y = o_BTHP.astype(param_dtype(self.dtype)).reshape(*o_BTHP.shape[:2], self.config.groups, -1)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.norm.epsilon)
        y = per_channel(self.norm.scale[...], y.reshape(*y.shape[:2], -1))
        return y.reshape(o_BTHP.shape).astype(self.dtype)

    def init_memory(self, batch: int) -> Any:
        """Before the first position."""
        c = self.config
        return jnp.zeros((batch, c.heads, c.state_width, self.head_dim), param_dtype(self.dtype))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> Mamba2State:
        tails = tuple(conv.blank_tail(batch, dtype) for conv in (self.conv_q, self.conv_k, self.conv_v))
        return Mamba2State(self.init_memory(batch), tails)

    @classmethod
    def flops(cls, config: Mamba2Config, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, P, N = config.heads, config.head_dim(width), config.state_width
        return {
            "projections": 2.0 * width * (3 * H * P + 2 * config.groups * N),
            "step": 2.0 * width * H,
            "recurrence": H * flops_per_token(length, config.chunk, N, P, shared_by=H if config.groups == 1 else 1),
        }, None
