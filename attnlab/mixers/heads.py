"""Mixers that are a sum over heads, and what all of them share: head widths, padding, overflow, the way out."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.mixers.base import Mixer, MixerConfig, MixerOutput, State, knob
from attnlab.mixers.parts import LayerNorm, Linear, RMSNorm, param_dtype
from attnlab.mixers.roles import Role, drawn
from attnlab.mixers.sequence import Context, Sequence
from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.documents import overflowed
from attnlab.ops.rope import rope
from attnlab.ops.rope_scaling import SCALINGS, scaling_from_node


@dataclasses.dataclass(frozen=True)
class HeadConfig(MixerConfig):
    """Knobs of a mixer with heads. Where heads are rotated (`even`), their width is even."""

    even: ClassVar[bool] = False

    heads: int = knob(4, "heads H", other=(2,), least=1)
    head_width: int | None = knob(None, "head width d; none: width / heads", other=(6,), least=1)
    bias: str = knob(
        "none",
        "which projections add a bias: none; qkv: those of queries, keys and values; all: that of the output too",
        other=("qkv", "all"),
        choices=("none", "qkv", "all"),
    )
    input_conv: int = knob(
        1,
        "positions that a causal depthwise convolution of the layer's input spans, itself included; it is added to "
        "the input (Canon-A: Allen-Zhu 2025, Physics of Language Models: Part 4.1); 1: none",
        other=(3,),
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(
            self.causal or self.input_conv == 1, "input_conv", self.input_conv, "1 where causal is false"
        )
        if self.even and self.head_width is not None:
            config_lib.require(self.head_width % 2 == 0, "head_width", self.head_width, "even, 2 or more, or none")

    def head_dim(self, width: int) -> int:
        """Head width d in a model of the given width; ConfigError if the heads do not divide it."""
        if self.head_width is not None:
            return self.head_width
        if width % self.heads or (self.even and (width // self.heads) % 2):
            raise ConfigError(
                f"heads = {self.heads} does not divide width = {width} into {'even ' * self.even}head widths; "
                "allowed: another number of heads, or head_width set"
            )
        return width // self.heads


@dataclasses.dataclass(frozen=True)
class RotaryConfig(HeadConfig):
    """Knobs of a mixer whose queries and keys RoPE turns."""

    even = True

    rope_base: float | None = knob(
        10_000.0, "base of the rotary embedding; none: no positions", other=(100.0, None), above=1
    )
    rope_width: int | None = knob(
        None, "channels of a head that it turns, its first ones, an even number; none: all", other=(2,), least=2
    )

    rope_scaling: Any = knob(
        None,
        f"node of what stretches its wavelengths to longer texts: {', '.join(SCALINGS)} "
        "(attnlab.ops.rope_scaling); none: nothing",
        other=({"name": "yarn", "factor": 4.0, "original_length": 8},),
        build=lambda tree, path: scaling_from_node(tree, path),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_scaling", scaling_from_node(self.rope_scaling, "rope_scaling"))
        super().__post_init__()
        need, turned = config_lib.require, self.rope_base is not None
        if self.rope_width is not None:
            need(self.rope_width % 2 == 0, "rope_width", self.rope_width, "even, 2 or more, or none")
            need(turned, "rope_width", self.rope_width, "none where rope_base is")
        need(turned or self.rope_scaling is None, "rope_scaling", self.rope_scaling, "none where rope_base is")

    def head_dim(self, width: int) -> int:
        d = super().head_dim(width)
        config_lib.require((self.rope_width or 0) <= d, "rope_width", self.rope_width, f"{d}, a head's width, or less")
        return d

    def rotated(
        self, x_BTHd: jax.Array, positions_BT: jax.Array | None, norm: RMSNorm | LayerNorm | None = None
    ) -> jax.Array:
        """Queries or keys after a norm of heads, if there is one, and RoPE, if there are positions."""
        turned = self.rope_base is not None and positions_BT is not None
        options: dict[str, Any] = {}
        if turned and isinstance(norm, RMSNorm):  # one op
            options = {"scale_d": norm.scale[...], "epsilon": norm.epsilon}
        elif norm is not None:
            x_BTHd = norm(x_BTHd)
        if not turned:
            return x_BTHd
        return rope(x_BTHd, positions_BT, self.rope_base, self.rope_width, self.rope_scaling, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadState:
    """What a stream's next positions need of a layer.

    Attributes:
      carried: what `HeadMixer.heads` returned as its state.
      lost: [B] bool, whether the current document has overflowed.
      tail: [B, input_conv - 1, D], the last inputs of the convolution; None where there is none.
    """

    carried: State
    lost: jax.Array
    tail: jax.Array | None = None


class HeadMixer(Mixer):
    """A mixer that is a sum over heads: `heads` computes each head's output, `combine` projects and adds them.

    What stands between the heads and their sum (MoH's gates) then works on any of them. A subclass makes `out`, the
    projection, last but for what does not project, and states what it carries by `init_carried`.

    A document of a packed row whose inputs have overflowed (`attnlab.ops.documents.overflowed`) gives NaN, and changes
    nothing in the others: `heads` reads zeros for it. What `heads` gives for padding is not used, and is to be finite.
    """

    contains_overflow = True
    input_taps: nnx.Param | None = None  # [input_conv, D], where the input is convolved

    def __init__(self, config: Any, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config, self.dtype = config, dtype
        self.head_dim = config.head_dim(width)
        if config.input_conv > 1:
            bound, shape = 1 / math.sqrt(config.input_conv), (config.input_conv, width)
            args = (shape, param_dtype(dtype), -bound, bound)
            self.input_taps = drawn(rngs, jax.random.uniform, *args, axes=("conv", "embed"), role=Role.TAPS)

    @abc.abstractmethod
    def heads(self, x: jax.Array, seq: Sequence, carried: State = None) -> MixerOutput:
        """Each head's output, `y` [B, T, H, e], ready to be projected: norms and gates on it are applied.

        With `carried` the positions are the next T >= 1 of a stream and the output's state is what to carry on;
        without, they are whole sequences. `seq` has its documents derived.
        """

    def combine(self, o_BTHe: jax.Array, x: jax.Array) -> jax.Array:
        """The layer's output [B, T, D] from the heads' outputs: a projection, linear in them but for its bias."""
        return self.out(o_BTHe.reshape(*x.shape[:2], -1))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> State:
        """What `heads` needs before the first position; see `Mixer.init_state`."""
        raise UnsupportedPattern(f"mixer {self.name!r} does not stream")

    # The contract.

    def __call__(self, x: jax.Array, seq: Sequence) -> MixerOutput:
        self.require(seq, causal=self.config.causal)
        seq = seq.derived()
        if seq.segments is None:
            x, _ = self._convolved(x, seq, None)
            out = self.heads(x, seq)
            return dataclasses.replace(out, y=self.combine(out.y, x), state=None)
        out, *_ = self._contained(x, seq, None, None, None)
        return dataclasses.replace(out, state=None)

    def init_state(
        self, batch: int, max_length: int, dtype: Any = jnp.float32, contexts: Mapping[str, Context] | None = None
    ) -> HeadState:
        if not self.config.causal:
            raise UnsupportedPattern(f"mixer {self.name!r} with causal=False does not stream")
        tail = None
        if self.input_taps is not None:
            spans, width = self.input_taps.shape
            tail = jnp.zeros((batch, spans - 1, width), dtype)
        return HeadState(self.init_carried(batch, max_length, dtype), jnp.zeros((batch,), bool), tail)

    def extend(self, x: jax.Array, seq: Sequence, state: HeadState) -> MixerOutput:
        self.require(seq, causal=True)
        if seq.documents is None:
            raise ValueError("extend: the sequence's documents are not known; it is to come from Stream.extend")
        out, lost_B, tail = self._contained(x, seq, state.carried, state.lost, state.tail)
        return dataclasses.replace(out, state=HeadState(out.state, lost_B, tail))

    # Inside.

    def _convolved(self, x: jax.Array, seq: Sequence, tail: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """x plus its convolution, and the tail after it."""
        if self.input_taps is None:
            return x, None
        y, after = causal_conv(x.astype(self.dtype), self.input_taps[...], seq.documents, tail)
        return x + y.astype(x.dtype), None if tail is None else after.astype(tail.dtype)

    def _contained(
        self, x: jax.Array, seq: Sequence, carried: State, lost_B: jax.Array | None, tail: jax.Array | None
    ) -> tuple[MixerOutput, jax.Array, jax.Array | None]:
        """`heads` and `combine` with overflow and padding kept where they are; which rows end in an overflow; the
        convolution's tail."""
        lost_BT = overflowed(x, seq.documents, lost_B, causal=self.config.causal)
        x = jnp.where(lost_BT[..., None], 0, x)
        x, tail = self._convolved(x, seq, tail)
        out = self.heads(x, seq, carried)
        o = jnp.where(seq.padding[..., None, None], 0, out.y)  # padding mixes nothing
        y = self.combine(o, x)
        unknown_BT = self.unknown(seq, carried)
        nan_BT = lost_BT if unknown_BT is None else lost_BT | unknown_BT
        y = jnp.where((nan_BT & ~seq.padding)[..., None], jnp.nan, y)
        return dataclasses.replace(out, y=y), lost_BT[:, -1], tail

    def unknown(self, seq: Sequence, carried: State) -> jax.Array | None:
        """Positions that give NaN as nothing says what they see, bool [B, T]; None: there are none."""
        return None


class Projections:
    """Makes a layer's projections: `make(columns, axis)` from the model's width, `make.out(rows)` back to it.

    `make.qkv` is as `make`; it, and `make.out`, add a bias where the layer's knob `bias` says so.
    """

    def __init__(self, config: HeadConfig, width: int, *, rngs: nnx.Rngs, dtype: Any):
        self.width, self.rngs, self.dtype, self.bias = width, rngs, dtype, config.bias

    def __call__(self, columns: int, axis: str = "heads", fan_in: int | None = None, **options: Any) -> Linear:
        """Of x [..., D], or of what is `fan_in` wide, to [..., columns]."""
        return Linear(fan_in or self.width, columns, ("embed", axis), rngs=self.rngs, dtype=self.dtype, **options)

    def qkv(self, columns: int, axis: str = "heads", **options: Any) -> Linear:
        """Of x [..., D] to queries, keys or values [..., columns]."""
        return self(columns, axis, bias=self.bias != "none", **options)

    def out(self, rows: int) -> Linear:
        """Of all heads' outputs [..., rows] to [..., D]."""
        bias = self.bias == "all"
        return Linear(rows, self.width, ("heads", "embed"), rngs=self.rngs, dtype=self.dtype, bias=bias)


def split_heads(y: jax.Array, width: int) -> jax.Array:
    """[B, T, H * width] to [B, T, H, width]."""
    return y.reshape(*y.shape[:2], -1, width)
