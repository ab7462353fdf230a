"""Agent attention: few agents gather from the keys and hand out to the queries; both ways, and causal in two forms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, drawn, normal, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops import agent_causal as causal_ops
from attnlab.ops import agent_refreshed as refreshed_ops
from attnlab.ops.agent import AGENT_ATTENTION, CAUSAL_AGENT_ATTENTION, causal_agent_attention, pooled_agent_attention
from attnlab.ops.agent_attention import depthwise_conv
from attnlab.ops.causal_conv import causal_conv

_TAPS = 3  # of the convolution, along each axis
_TABLE = 7  # rows and columns of the biases' tables


@dataclasses.dataclass(frozen=True)
class AgentConfig(HeadConfig):
    """Knobs of agent attention."""

    agents: int = knob(16, "agents m; a square number for images", other=(4,), least=1)
    causal: bool | None = knob(
        None, "whether a position sees only itself and those before; none: true without a grid", other=(False,)
    )
    form: str | None = knob(
        None,
        "learned: agents are parameters, the state is of fixed size; pooled: means of "
        "queries, where causal of the chunk before; none: learned where causal, else pooled",
        other=("pooled",),
        choices=("learned", "pooled"),
    )
    grid: tuple[int, ...] | None = knob(
        None, "rows and columns of the images that biases are for; none: no biases", other=((2, 3),)
    )
    conv: bool = knob(True, "add a depthwise convolution of the values, 3 wide", other=(False,))
    chunk: int = knob(
        64,
        "where causal: positions computed together (learned), or between refreshes of the agents, a "
        "multiple of agents (pooled)",
        other=(4,),
        least=1,
    )
    impl: str = impl_knob(AGENT_ATTENTION)

    def __post_init__(self) -> None:
        if self.causal is None:
            object.__setattr__(self, "causal", self.grid is None)
        super().__post_init__()
        need = config_lib.require
        if self.form is not None:
            need(self.causal or self.form == "pooled", "form", self.form, "pooled, or none, where causal is false")
        if self.grid is not None:
            need(len(self.grid) == 2 and min(self.grid) >= 1, "grid", self.grid, "two numbers, 1 or more, or none")
            need(not self.causal, "grid", self.grid, "none where causal is true")
            need(_is_square(self.agents), "agents", self.agents, "square numbers where there is a grid")
        if self.causal:
            names = CAUSAL_AGENT_ATTENTION.names()
            need(self.impl in names, "impl", self.impl, f"{', '.join(names)} where causal is true")
        if self.refreshed:
            need(self.chunk % self.agents == 0, "chunk", self.chunk, f"multiples of agents ({self.agents})")

    @property
    def refreshed(self) -> bool:
        """Whether the layer is causal with agents made of queries."""
        return bool(self.causal) and self.form == "pooled"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AgentState:
    """What a causal layer carries along the sequence.

    Attributes:
      seen: `Averages` of fixed agents (learned), or `Stream` (pooled).
      tail: [B, 2, H * d], the last values of the current document, for the convolution; None without one.
    """

    seen: causal_ops.Averages | refreshed_ops.Stream
    tail: jax.Array | None


class PositionBias(nnx.Module):
    """Biases [H, m, T] of agents and the positions of an image: a coarse table, one per row, one per column.

    The table of 7 x 7 is resized to the grid bilinearly, at half-pixel centres, without antialiasing; those of rows and
    columns are made for `config.grid` and resized so to another. Positions before the image share one bias.
    """

    def __init__(self, config: AgentConfig, *, rngs: nnx.Rngs, dtype: Any):
        rows, columns = config.grid
        kind, shape, axes = param_dtype(dtype), (config.heads, config.agents), ("heads", "agents")
        table = lambda sizes, names: drawn(
            rngs, _near_zero, (*shape, *sizes), kind, axes=(*axes, *names), role=Role.POSITIONS
        )
        self.table = table((_TABLE, _TABLE), ("rows", "columns"))
        self.row = table((rows,), ("rows",))
        self.column = table((columns,), ("columns",))
        self.leading = table((), ())

    def __call__(self, grid: tuple[int, int], length: int) -> jax.Array:
        row, column = (resize(x[...], (n,)) for x, n in zip((self.row, self.column), grid))
        image = resize(self.table[...], grid) + row[..., :, None] + column[..., None, :]
        image = image.reshape(*image.shape[:2], -1)
        leading = jnp.broadcast_to(self.leading[...][..., None], (*image.shape[:2], length - image.shape[2]))
        return jnp.concatenate([leading, image], axis=-1)


def _near_zero(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.nn.initializers.truncated_normal(0.02)(key, shape, dtype)


def resize(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The last axes of x resized linearly to `shape`, at half-pixel centres, without antialiasing."""
    return jax.image.resize(x, (*x.shape[: x.ndim - len(shape)], *shape), "linear", antialias=False)


@register("agent")
class Agent(HeadMixer):
    """`softmax(Q A^T / sqrt(d)) softmax(A K^T / sqrt(d)) V` by few agents A, plus a depthwise convolution of V.

    The paper's layer is the bidirectional one on an image (`Sequence.grid`), with biases and convolution: A is Q pooled
    to a square of m cells. What is pooled, where the biases stand and how they are resized follow the authors' code.
    """

    Config = AgentConfig
    capabilities = Capabilities(causal=True, bidirectional=True, streaming=True)
    sequence_parallel = "the agents' averages are passed on"
    paper = "Han et al. 2023, Agent Attention: On the Integration of Softmax and Linear Attention, arXiv:2312.08874"
    extension = (
        "causal forms: learned agents (running averages), and agents pooled from the queries of the chunk before, both "
        "with a causal convolution of the values; bidirectional sequences without a grid: min(m, n) agents pooled "
        "along each document of n positions, and a convolution along it; one bias for all positions before an image"
    )
    implementations = AGENT_ATTENTION.table
    counted = "chunked"
    variants = (
        {"form": "pooled", "agents": 2, "chunk": 4},
        {"causal": False, "agents": 3, "heads": 2},
    )

    def __init__(self, config: AgentConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        inner, kind = config.heads * self.head_dim, param_dtype(dtype)
        self.q, self.k, self.v = (make.qkv(inner) for _ in range(3))
        self.out = make.out(inner)
        if config.causal:
            shape = (config.heads, config.agents, self.head_dim)
            axes = ("heads", "agents", "head")
            self.agents = drawn(rngs, normal, shape, kind, 1.0, axes=axes, role=Role.TOKENS)  # as queries are at first
        if config.grid is not None:
            self.bias_in = PositionBias(config, rngs=rngs, dtype=dtype)
            self.bias_out = PositionBias(config, rngs=rngs, dtype=dtype)
        if config.conv:
            taps = (_TAPS,) if config.causal else (_TAPS, _TAPS)
            axes, args = ("taps",) * len(taps), ((*taps, inner), kind, 1 / math.sqrt(math.prod(taps)))
            self.conv_kernel = drawn(rngs, normal, *args, axes=(*axes, "heads"), role=Role.TAPS)
            self.conv_bias = param(jnp.zeros((inner,), kind), axes=("heads",), role=Role.BIAS)

    @classmethod
    def sequence_parallel_of(cls, config: AgentConfig) -> str:
        """Agents pooled from queries see all keys, causal ones anew at every refresh."""
        return cls.sequence_parallel if config.causal and not config.refreshed else ""

    # The contract.

    def heads(self, x: jax.Array, seq: Sequence, carried: AgentState | None = None) -> MixerOutput:
        """As in the contract. With pooled agents, more positions than the state has room for give NaN."""
        q, k, v = (split_heads(y(x), self.head_dim) for y in (self.q, self.k, self.v))
        if not self.config.causal:
            return MixerOutput(self._bidirectional(q, k, v, seq))
        o, seen = self._causal(q, k, v, seq.documents, carried)
        tail = None
        if self.config.conv:
            before = None if carried is None else carried.tail
            flat = v.reshape(*x.shape[:2], -1)
            added, tail = causal_conv(flat, self.conv_kernel[...], seq.documents, before)
            o = self._add(o, added)
        if carried is None:
            return MixerOutput(o)
        return MixerOutput(o, AgentState(seen, tail if tail is None else tail.astype(carried.tail.dtype)))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> AgentState:
        c = self.config
        if c.refreshed:
            seen = refreshed_ops.Stream.empty(batch, c.heads, c.agents, self.head_dim, max_length, dtype)
        else:
            seen = causal_ops.Averages.empty(batch, c.heads, c.agents, self.head_dim, param_dtype(dtype))
        tail = jnp.zeros((batch, _TAPS - 1, c.heads * self.head_dim), dtype) if c.conv else None
        return AgentState(seen, tail)

    @classmethod
    def flops(cls, config: AgentConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        """With `config.grid` on an image, but for resizing biases, once a program; else without one. Of the chunked
        program, what it computes of pairs that are not seen included."""
        c, d = config, config.head_dim(width)
        parts = {"projections": 8.0 * width * c.heads * d}
        if not c.causal:
            agents = c.agents if c.grid else min(c.agents, length)
            return parts | {"agents": 8.0 * c.heads * agents * d}, None
        if not c.refreshed:
            return parts | {"agents": c.heads * _fixed_flops(c.agents, d, length, c.chunk) / length}, None
        refreshes = (length - 1) // c.chunk
        agents = _fixed_flops(c.agents, d, min(c.chunk, length), causal_ops.CHUNK)
        agents += refreshes * _fixed_flops(c.agents, d, c.chunk, causal_ops.CHUNK)
        parts["agents"] = c.heads * agents / length
        if refreshes:
            parts["refreshes"] = 4.0 * c.heads * c.agents * d * refreshes
        return parts, None

    # Inside.

    def _causal(
        self, q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None, state: AgentState | None
    ) -> tuple[jax.Array, Any]:
        c = self.config
        # A stream is computed as its state needs it, whatever whole sequences are computed by.
        impl, before = (c.impl, None) if state is None else ("auto", state.seen)
        return causal_agent_attention(
            q, k, v, self.agents[...], documents, before, refreshed=c.refreshed, chunk=c.chunk, impl=impl
        )

    def _bidirectional(self, q: jax.Array, k: jax.Array, v: jax.Array, seq: Sequence) -> jax.Array:
        grid, B, T = seq.grid, *q.shape[:2]
        if grid is not None:
            self._check_image(seq, T)
        biases = (None, None)
        if grid is not None and self.config.grid is not None:
            biases = self.bias_in(grid, T), self.bias_out(grid, T)
        c = self.config
        o = pooled_agent_attention(q, k, v, seq.segments, *biases, agents=c.agents, grid=grid, impl=c.impl)
        if self.config.conv:
            image = v.reshape(B, T, -1)
            added = depthwise_conv(image, self.conv_kernel[...], grid, seq.documents)
            o = self._add(o, added, 0 if grid is None else T - grid[0] * grid[1])
        return o

    def _add(self, o_BTHe: jax.Array, convolved_BTC: jax.Array, before: int = 0) -> jax.Array:
        """Heads' outputs plus convolved values and their bias, which positions `before` the image have not."""
        bias = jnp.where(jnp.arange(o_BTHe.shape[1])[:, None] >= before, self.conv_bias[...].astype(o_BTHe.dtype), 0)
        return o_BTHe + (convolved_BTC + bias).reshape(o_BTHe.shape)

    def _check_image(self, seq: Sequence, length: int) -> None:
        rows, columns = seq.grid
        if seq.segments is not None:
            raise UnsupportedPattern(f"mixer {self.name!r} does not support packed documents with a grid")
        if rows * columns > length:
            raise UnsupportedPattern(f"mixer {self.name!r}: {length} positions do not hold a {rows} x {columns} grid")
        config_lib.require(_is_square(self.config.agents), "agents", self.config.agents, "square numbers for images")


def _is_square(n: int) -> bool:
    return math.isqrt(n) ** 2 == n


def _fixed_flops(m: int, d: int, length: int, chunk: int) -> float:
    """FLOPs of one head's `fixed_agent_attention` over `length` positions: logits, pairs, and through the averages."""
    size, block = causal_ops.chunk_sizes(length, chunk)
    per_position = 2.0 * size * d + 4.0 * m * d + (2.0 * size * m if size > block else 0)
    return 4.0 * length * m * d + -(-length // size) * size * per_position
