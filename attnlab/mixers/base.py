"""The contract of a mixer: what goes in, what comes out, what it must declare.

A mixer mixes information across positions. Adding one is one file in this package: a `Config`, a `Mixer` under
`@register(name)`, its streaming state and its FLOPs; `tests/mixers/test_contract.py` then holds it to every law.

Parameters are made by `parts.Linear` and `roles.param`, which say what each is: optimizers decide by it. A kernel whose
output is cut into parts says which (`roles.Fused`).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.errors import UnsupportedPattern
from attnlab.mixers import roles
from attnlab.ops.documents import document_index, overflowed
from attnlab.registry import Registry

State = Any  # a pytree of arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """Where the positions of a batch stand.

    Attributes:
      positions: [B, T] int32, position within its document, for position encodings.
      segments: [B, T] int32 or None. Documents packed in one row carry different ids and are contiguous; 0 is padding.
        None says that every row is one document without padding.
      context: [B, S, D] or None, what cross-attention reads.
      grid: rows and columns of an image whose pixels or patches, row by row, are the last positions of every row of the
        batch; those before them (a class token) are not of the image. None where there is no image.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    context: jax.Array | None = None
    grid: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def whole(cls, batch: int, length: int) -> Sequence:
        """One unpadded document per row, positions 0 to length - 1."""
        return cls(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixerOutput:
    """What a mixer returns.

    Attributes:
      y: [B, T, D].
      state: the streaming state after these positions; None from `__call__`.
      losses: named scalars that the trainer adds to the loss, already multiplied by their coefficients.
      metrics: named scalars that the trainer logs, averaged over layers.
    """

    y: jax.Array
    state: State = None
    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a mixer supports; what it does not, it refuses with `UnsupportedPattern`."""

    causal: bool = True
    bidirectional: bool = False
    cross: bool = False
    packed: bool = True
    streaming: bool = True
    fixed_state: bool = False  # the state's size does not grow with the length


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one mixer layer costs.

    Attributes:
      parameters: number of scalars.
      flops: forward FLOPs per token of the matrix products by part, a multiply-add counted as 2, masked-out pairs not
        counted, averaged over a sequence of the given length. Backward is twice this.
      state_bytes: bytes of `init_state` per sequence at the given length.
      span: mean number of keys that a query sees, None where no part's cost depends on it.
    """

    parameters: int
    flops: dict[str, float]
    state_bytes: int
    span: float | None = None

    @property
    def total_flops(self) -> float:
        """Forward FLOPs per token, all parts."""
        return sum(self.flops.values())


def knob(default: Any, doc: str, *, other: tuple[Any, ...] = (), build: Callable[[Any, str], Any] | None = None) -> Any:
    """A documented field of a mixer's Config.

    Args:
      default: the field's default.
      doc: what it does, with units; `attnlab list NAME` prints it.
      other: values that differ from the default and must make a difference; the contract battery tries each of them.
      build: `(tree, path)` to the value, where a config node stands here; None: the value is of the annotated type.
    """
    metadata = {"doc": doc, "other": other} | ({"build": build} if build else {})
    return dataclasses.field(default=default, metadata=metadata)


class MixerConfig:
    """Base class of the frozen dataclasses of knobs. A mixer with both directions makes `causal` a knob."""

    node_name: ClassVar[str]
    causal: ClassVar[bool] = True


class Mixer(nnx.Module):
    """Base class of all mixers; see the module's docstring.

    Attributes:
      Config: frozen dataclass of `knob` fields, checked at construction; among them `impl`, which has `definition`.
      capabilities: what it supports.
      name: the registered name.
      paper: title, authors' year and identifier of the source.
      extension: what here is ours and not in the paper; empty if nothing.
      implementations: values of the Config's `impl` by name, `definition` among them; each is held to the definition.
        The table of an op (`attnlab.ops.dispatch.Op`), or names alone where the mixer itself is the only place.
      variants: combinations of knobs that the contract battery must try besides each knob alone.
      counted: the implementation whose matrix products `flops` declares.
      context: how positions are split over devices (mesh.context), in a few words; empty: they cannot be.
      contains_overflow: whether a document of a packed row that overflows leaves the row's other documents as they are;
        other rows it must leave in any case.
    """

    Config: ClassVar[type[MixerConfig]]
    capabilities: ClassVar[Capabilities] = Capabilities()
    name: ClassVar[str]
    paper: ClassVar[str]
    extension: ClassVar[str] = ""
    implementations: ClassVar[Collection[str]]
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()
    counted: ClassVar[str] = "definition"
    context: ClassVar[str] = ""
    contains_overflow: ClassVar[bool] = False

    def __init__(self, config: Any, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        raise NotImplementedError

    def __call__(self, x: jax.Array, seq: Sequence) -> MixerOutput:
        """Mixes whole sequences, `x` [B, T, D]: the training form."""
        raise NotImplementedError

    def init_state(self, batch: int, max_length: int, dtype: Any = jnp.float32) -> State:
        """The state before the first position, with room for `max_length` positions where it grows."""
        raise UnsupportedPattern(f"mixer {self.name!r} does not stream")

    def extend(self, x: jax.Array, seq: Sequence, state: State) -> MixerOutput:
        """Mixes the next T >= 1 positions, `x` [B, T, D], given the state of those before."""
        raise UnsupportedPattern(f"mixer {self.name!r} does not stream")

    @classmethod
    def flops(cls, config: Any, width: int, length: int) -> tuple[dict[str, float], float | None]:
        """`Cost.flops` and `Cost.span`."""
        raise NotImplementedError

    @classmethod
    def cost(cls, config: Any, width: int, length: int, dtype: Any = jnp.float32) -> Cost:
        """Costs of one layer on sequences of `length` positions; parameters and state are counted on the real thing."""
        module = nnx.eval_shape(lambda: cls(config, width=width, rngs=nnx.Rngs(0), dtype=dtype))
        parameters = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(module, nnx.Param)))
        state_bytes = 0
        if cls.capabilities.streaming and config.causal:
            state = jax.eval_shape(lambda: module.init_state(1, length, dtype))
            state_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
        flops, span = cls.flops(config, width, length)
        return Cost(parameters, flops, state_bytes, span)

    @classmethod
    def context_of(cls, config: Any) -> str:
        """`context`, where it depends on the config."""
        return cls.context

    def require(self, seq: Sequence, *, causal: bool) -> None:
        """Raises UnsupportedPattern for what `capabilities` rules out."""
        can = self.capabilities
        for asked, able, what in (
            (causal, can.causal, "causal mixing"),
            (not causal, can.bidirectional, "bidirectional mixing (causal=False)"),
            (seq.context is not None, can.cross, "cross-attention (Sequence.context)"),
            (seq.segments is not None, can.packed, "packed documents or padding (Sequence.segments)"),
        ):
            if asked and not able:
                raise UnsupportedPattern(f"mixer {self.name!r} does not support {what}")


class HeadMixer(Mixer):
    """A mixer that is a sum over heads: `heads` computes each head's output, `combine` projects and adds them.

    What stands between the heads and their sum (MoH's gates) then works on any of them.

    A document of a packed row whose inputs have overflowed (`attnlab.ops.documents.overflowed`) gives NaN, and changes
    nothing in the others: `heads` reads zeros for it. Streaming states are dataclasses with `segment` [B] int32, the id
    of the current document, -1 before the first position. Between calls of `extend` it is -2 - id where that
    document has overflowed, which `heads` does not see.
    """

    contains_overflow = True

    def heads(self, x: jax.Array, seq: Sequence, state: State = None) -> MixerOutput:
        """Each head's output, `y` [B, T, H, e], ready to be projected: norms and gates on it are applied.

        With a state the positions are the next T >= 1 of a stream and the output holds the new state; without, they
        are whole sequences.
        """
        raise NotImplementedError

    def combine(self, o_BTHe: jax.Array, x: jax.Array) -> jax.Array:
        """The layer's output [B, T, D] from the heads' outputs: a projection, linear in them."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, seq: Sequence) -> MixerOutput:
        self.require(seq, causal=self.config.causal)
        if seq.segments is None:
            out = self.heads(x, seq)
            return dataclasses.replace(out, y=self.combine(out.y, x), state=None)
        lost_BT = overflowed(x, document_index(seq.segments), causal=self.config.causal)
        x = jnp.where(lost_BT[..., None], 0, x)
        out = self.heads(x, seq)
        y = _marked(self.combine(out.y, x), lost_BT, seq.segments)
        return dataclasses.replace(out, y=y, state=None)

    def extend(self, x: jax.Array, seq: Sequence, state: State) -> MixerOutput:
        self.require(seq, causal=True)
        segments = jnp.ones(x.shape[:2], jnp.int32) if seq.segments is None else seq.segments
        lost_B = state.segment < -1
        state = dataclasses.replace(state, segment=jnp.where(lost_B, -2 - state.segment, state.segment))
        lost_BT = overflowed(x, document_index(segments, state.segment), lost_B, causal=True)
        x = jnp.where(lost_BT[..., None], 0, x)
        out = self.heads(x, seq, state)
        segment = out.state.segment
        after = dataclasses.replace(out.state, segment=jnp.where(lost_BT[:, -1], -2 - segment, segment))
        return dataclasses.replace(out, y=_marked(self.combine(out.y, x), lost_BT, segments), state=after)


def _marked(y: jax.Array, lost_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """NaN where a document has overflowed; padding stays finite."""
    return jnp.where((lost_BT & (segments_BT != 0))[..., None], jnp.nan, y)


MIXERS: Registry[Mixer] = Registry("mixer")
names, get = MIXERS.names, MIXERS.get


def register(name: str):
    """Class decorator: makes a Mixer known by `name` to configs, the command line and the contract battery."""

    def add(cls: type[Mixer]) -> type[Mixer]:
        if cls.extension:  # said once, read in the docstring, in `attnlab list` and in docs/mixers.md
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nExtension, not in the paper: {cls.extension}."
        return MIXERS.register(name)(cls)

    return add


def config_from_node(node: Any, path: str = "mixer") -> Any:
    """The typed Config of a node `{"name": ..., **fields}`; a Config passes through."""
    return MIXERS.config_from_node(node, path)


def build(node: Any, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> Mixer:
    """Builds a mixer of model width `width` from a config node or a Config; activations are computed in `dtype`.

    Raises:
      ConfigError: an impossible config.
      ValueError: a parameter of the mixer states no role.
    """
    config = config_from_node(node)
    mixer = get(config.node_name)(config, width=width, rngs=rngs, dtype=dtype)
    roles.usages(nnx.state(mixer, nnx.Param))
    return mixer
