"""The contract of a mixer: what goes in, what comes out, what it must declare.

A mixer mixes information across positions. Adding one is one file in this package: a `Config`, a `Mixer` under
`@register(name)`, its streaming state and its FLOPs; `tests/mixers/test_contract*.py` then hold it to every law.

Parameters are made by `parts.Linear` and `roles.param`, which say what each is: optimizers decide by it. A kernel whose
output is cut into parts says which (`roles.Fused`).
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.mixers import roles
from attnlab.mixers.sequence import Context, Sequence
from attnlab.ops.dispatch import Op
from attnlab.registry import Registry

State = Any  # a pytree of arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixerOutput:
    """What a mixer returns.

    Attributes:
      y: [B, T, D].
      state: the streaming state after these positions; None from `__call__`.
      losses: named scalars that the trainer adds to the loss, already multiplied by their coefficients.
      metrics: named scalars that the trainer logs, averaged over layers.
      shared: what layers after this one find in `Sequence.shared`, by the names of `Mixer.init_shared`; others stay.
      side: set by a stack, of a mixer that reads the second stream where that is what is mixed: its `Sequence.side`.
    """

    y: jax.Array
    state: State = None
    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    shared: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    side: jax.Array | None = None


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
      span: mean number of keys (of pairs of them, where those are attended to) that a query sees, None where no part's
        cost depends on it.
      context_flops: of cross-attention, per row of the context and not per token, which `flops` does not count.
    """

    parameters: int
    flops: dict[str, float]
    state_bytes: int
    span: float | None = None
    context_flops: float = 0.0

    @property
    def total_flops(self) -> float:
        """Forward FLOPs per token, all parts."""
        return sum(self.flops.values())


def impl_knob(op: Op, *, default: str = "auto", doc: str = "implementation of the op") -> Any:
    """The knob `impl` of a mixer: one of the op's names, also of those that enter its table later."""
    return knob(default, f"{doc}: {', '.join(op.names())}", other=("definition",), choices=op.names)


class MixerConfig:
    """Base class of the frozen dataclasses of knobs. A mixer with both directions makes `causal` a knob.

    What a knob by itself may be is checked here; a subclass that checks more calls `super().__post_init__()` first.

    Attributes:
      second_stream: the kind of a second stream that the mixer reads beside its input, a property where it depends on
        knobs; empty: none. It begins as `Mixer.begin_second` says and goes through all blocks of the stack.
      text: a file of the ids whose embeddings it reads as `Sequence.text`, a knob or a property; None: it reads none.
    """

    node_name: ClassVar[str]
    causal: ClassVar[bool] = True
    second_stream: ClassVar[str] = ""
    text: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        config_lib.require_knobs(self)


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
      sequence_parallel: how positions are split over devices (mesh.context), in a few words; empty: they cannot be.
      stack_reads: what of its stack it reads, of `layer`, `embedding` and `step`: see `Sequence`.
      embedding_width: of the embedding that it reads, a property where it depends on knobs; None: the model's width.
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
    sequence_parallel: ClassVar[str] = ""
    stack_reads: ClassVar[tuple[str, ...]] = ()
    embedding_width: ClassVar[int | None] = None
    contains_overflow: ClassVar[bool] = False

    @abc.abstractmethod
    def __init__(self, config: Any, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        """Makes the parameters."""

    @abc.abstractmethod
    def __call__(self, x: jax.Array, seq: Sequence) -> MixerOutput:
        """Mixes whole sequences, `x` [B, T, D]: the training form."""

    def init_state(
        self, batch: int, max_length: int, dtype: Any = jnp.float32, contexts: Mapping[str, Context] | None = None
    ) -> State:
        """The state before the first position, with room for `max_length` positions where it grows.

        What cross-attention reads in `contexts` is read here, once.
        """
        raise UnsupportedPattern(f"mixer {self.name!r} does not stream")

    def extend(self, x: jax.Array, seq: Sequence, state: State) -> MixerOutput:
        """Mixes the next T >= 1 positions, `x` [B, T, D], given the state of those before; `seq` by `Stream.extend`."""
        raise UnsupportedPattern(f"mixer {self.name!r} does not stream")

    def init_shared(self, batch: int, length: int) -> dict[str, jax.Array]:
        """What `Sequence.shared` holds before the first layer, of shapes [batch, length, ...]; default: nothing.

        Mixers of one stack that share a name share its array: what their arrays' shapes and meaning depend on is part
        of the name.
        """
        return {}

    def begin_second(self, length: int, text: jax.Array | None) -> jax.Array:
        """What the second stream begins as, [1, length, D], of positions from a document's first; `text` is
        `Sequence.text`. Where `MixerConfig.second_stream` names one."""
        raise UnsupportedPattern(f"mixer {self.name!r} reads no second stream")

    def begin_layer(self, layer: jax.Array, layers: int) -> None:
        """Sets anew what of the first values depends on the layer's place in its stack; default: nothing does.

        A stack calls it once, as it makes its layers. Parameters keep their shapes, dtypes and metadata.

        Args:
          layer: int32 scalar, traced: the number that `Sequence.layer` has at run time.
          layers: how many the stack has.

        Raises:
          ConfigError: the layer cannot be one of so many.
        """

    def require_stack(self, layers: int) -> None:
        """Raises ConfigError where a stack cannot have so many layers that share the names of `init_shared`."""

    @classmethod
    @abc.abstractmethod
    def flops(cls, config: Any, width: int, length: int) -> tuple[dict[str, float], float | None]:
        """`Cost.flops` and `Cost.span`."""

    @classmethod
    def cost(cls, config: Any, width: int, length: int, dtype: Any = jnp.float32) -> Cost:
        """Costs of one layer on sequences of `length` positions; parameters and state are counted on the real thing."""
        build = lambda: cls(config, width=width, rngs=nnx.Rngs(0), dtype=dtype)
        parameters = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(nnx.eval_shape(build), nnx.Param)))
        state_bytes = 0
        if cls.capabilities.streaming and config.causal:
            blank = lambda: build().init_state(1, length, dtype, contexts=cls.blank_contexts(config, width, length))
            state_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(blank)))
        flops, span = cls.flops(config, width, length)
        return Cost(parameters, flops, state_bytes, span, cls.context_flops(config, width))

    @classmethod
    def cost_note(cls, config: Any) -> str:
        """What `flops` leaves open where it does not count what is computed, one clause; default: what its core leaves
        open, of a mixer around another (`config.core`), else nothing."""
        core = getattr(config, "core", None)
        return "" if core is None else get(core.node_name).cost_note(core)

    @classmethod
    def require_length(cls, config: Any, length: int) -> None:
        """Raises ConfigError where rows of `length` positions are not possible with this config; default: where they
        are not with its core, of a mixer around another (`config.core`)."""
        if (core := getattr(config, "core", None)) is not None:
            get(core.node_name).require_length(core, length)

    @classmethod
    def sees_ahead(cls, config: Any) -> bool:
        """Whether a position may see later ones though mixing is causal, as some masks of images let it.

        Default: as its core, of a mixer around another (`config.core`).
        """
        core = getattr(config, "core", None)
        return core is not None and get(core.node_name).sees_ahead(core)

    @classmethod
    def context_flops(cls, config: Any, width: int) -> float:
        """`Cost.context_flops`; 0 where nothing is read but the sequence."""
        return 0.0

    @classmethod
    def blank_contexts(cls, config: Any, width: int, rows: int) -> Mapping[str, Context] | None:
        """What `init_state` reads of a context of so many rows, for costs; None: it reads none."""
        return None

    @classmethod
    def sequence_parallel_of(cls, config: Any) -> str:
        """`sequence_parallel`, where it depends on the config."""
        return cls.sequence_parallel

    def require(self, seq: Sequence, *, causal: bool) -> None:
        """Raises UnsupportedPattern for what `capabilities` rules out."""
        can = self.capabilities
        for asked, able, what in (
            (causal, can.causal, "causal mixing"),
            (not causal, can.bidirectional, "bidirectional mixing (causal=False)"),
            (seq.segments is not None, can.packed, "packed documents or padding (Sequence.segments)"),
        ):
            if asked and not able:
                raise UnsupportedPattern(f"mixer {self.name!r} does not support {what}")


MIXERS: Registry[Mixer] = Registry("mixer", ["attnlab.mixers"])
names, get, known = MIXERS.names, MIXERS.get, MIXERS.__contains__


def register(name: str):
    """Class decorator: makes a Mixer known by `name` to configs, the command line and the contract battery."""

    def add(cls: type[Mixer]) -> type[Mixer]:
        if cls.extension:  # said once, read in the docstring, in `attnlab list` and in docs/mixers/
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


def require_layers(made: Mapping[str, Mixer], layers: Mapping[str, int]) -> None:
    """Raises ConfigError unless mixers that hand on to each other allow as many of them as a stack has.

    Args:
      made: by letter, abstract.
      layers: how many there are of each letter.
    """
    shared = {letter: jax.eval_shape(lambda m=mixer: m.init_shared(1, 1)).keys() for letter, mixer in made.items()}
    for letter, mixer in made.items():
        together = sum(layers[other] for other in made if shared[other] == shared[letter])
        try:
            if shared[letter]:
                mixer.require_stack(together)
        except ConfigError as error:
            raise ConfigError(f"in model.mixers.{letter}, of which kind are {together} layers: {error}") from None
