"""The stack: pre-norm blocks around mixers, one pattern of mixers repeated, scanned over the repeats."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from attnlab import config as config_lib
from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.parts import RMSNorm
from attnlab.models import layer_inputs
from attnlab.models.blocks import GLUS, Block
from attnlab.models.layer_inputs import Sides, placed, stack_by_name
from attnlab.parallel import partition

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}

NORMS = ["rms", "none"]

_POLICIES = jax.checkpoint_policies
REMAT = {
    "none": None,  # keep every activation
    "attention": _POLICIES.save_only_these_names("attention_o", "attention_lse"),  # all but attention runs twice
    "minimal": _POLICIES.dots_with_no_batch_dims_saveable,  # keep the products with weights
    "full": _POLICIES.nothing_saveable,  # keep a block's input only
}


def mixer_table(tree: Any, path: str) -> FrozenDict[str, Any]:
    """Hashable, typed mixer Configs from `{"S": node, ...}`; letters are what `pattern` is made of."""
    if not isinstance(tree, Mapping) or not tree:
        raise ConfigError(f"{path} = {tree!r} must map letters to mixers, e.g. {{'M': {{'name': 'softmax'}}}}")
    for letter in tree:
        config_lib.require(len(letter) == 1, f"{path}.{letter}", letter, "keys of one letter")
    return FrozenDict({letter: mixers.config_from_node(node, f"{path}.{letter}") for letter, node in tree.items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of blocks: what all models of one share.

    Attributes:
      width: D.
      layers: number of blocks, a multiple of the pattern's length.
      mixers: letter to mixer node.
      pattern: which mixer sits in which block, one period of it; `S+X` is one block of both, one after the other.
      gated: letters whose sublayers come in through a learned gate, closed at first.
      mlp_width: hidden width of the MLP; none: 8/3 D, rounded up to a multiple of 64; 0: blocks have no MLP.
      mlp_gate: what the MLP's gate goes through: silu (SwiGLU), gelu or gelu_tanh (GEGLU, as Gemma's).
      mlp_bias: whether the MLP's three projections add a bias.
      dtype: of activations and products; parameters are fp32 (float64 is for tests).
      remat: which activations backward keeps: none (all), attention, minimal, full.
      unroll: periods that one iteration of the scan over layers runs; 0: all of them on CPU, 1 elsewhere.
      dropout: rate on what every mixer and MLP adds to the stream.
      norm: of what every sublayer reads, and before the output: rms, or none, as in models made to be understood.
      norm_after: whether what a sublayer adds to the stream is normed, too (Gemma Team 2024, Gemma 2, section 2).
      norm_epsilon: added to the mean square in these norms.
    """

    node_name: ClassVar[str]
    context_names: ClassVar[tuple[str, ...]] = ()  # of the contexts that a model of this kind gives its stack
    causal: ClassVar[bool] = True  # whether a position sees only itself and those before; so must every mixer
    # Where and how it is computed: its numbers change by rounding only.
    placement: ClassVar[tuple[str, ...]] = ("remat", "unroll")

    width: int
    layers: int
    mixers: Any = config_lib.node(mixer_table)
    pattern: str = "M"
    gated: str = ""
    mlp_width: int | None = None
    mlp_gate: str = "silu"
    mlp_bias: bool = False
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0
    dropout: float = 0.0
    norm: str = "rms"
    norm_after: bool = False
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        need = config_lib.require
        need(self.layers >= 1, "model.layers", self.layers, "1 or more")
        known = ", ".join(self.mixers)
        form = re.fullmatch(r"([^+](\+[^+])*)+", self.pattern)
        need(form is not None, "model.pattern", self.pattern, f"letters of model.mixers ({known}), + between two")
        for letter in "".join(self.blocks):
            if letter not in self.mixers:
                raise ConfigError(
                    f"model.pattern = {self.pattern!r} names the mixer {letter!r}, which model.mixers does not have; "
                    f"allowed: {known}"
                )
        for letter in self.mixers:
            if letter not in self.pattern:
                raise ConfigError(
                    f"model.mixers.{letter} is in no layer: model.pattern = {self.pattern!r} does not name it"
                )
        need(set(self.gated) <= set(self.mixers), "model.gated", self.gated, f"letters of model.mixers ({known})")
        count = len(self.blocks)
        allowed = f"multiples of the blocks of model.pattern {self.pattern!r} ({count})"
        need(self.layers % count == 0, "model.layers", self.layers, allowed)
        self._require_numbers()
        made = {}
        for letter, mixer in self.mixers.items():
            where = f"model.mixers.{letter}"
            self._require_direction(mixer, where)
            source, given = getattr(mixer, "source", None), ", ".join(self.context_names)
            allowed = f"{given}, or none" if given else f"none: {self.described} has no contexts"
            need(source is None or source in self.context_names, f"{where}.source", source, allowed)
            try:  # what only mixer and width together can tell, before any compile
                made[letter] = nnx.eval_shape(functools.partial(self._begun, mixer))
            except ConfigError as error:
                raise ConfigError(f"in {where} (model.width = {self.width}): {error}") from None
            read, own = made[letter].embedding_width, getattr(self, "decoupled", False)
            allowed = f"none, or {self.width}, the model's width, without a table of their own (model.decoupled)"
            need(own or read in (None, self.width), f"{where}.embedding_width", read, allowed)
        self._require_one_stream()
        letters = self.layers // count * "".join(self.blocks)
        mixers.require_layers(made, {letter: letters.count(letter) for letter in made})

    def _begun(self, mixer: Any) -> mixers.Mixer:
        """The mixer of a config as the first layer of the stack."""
        made = mixers.build(mixer, width=self.width, rngs=nnx.Rngs(0))
        made.begin_layer(jnp.int32(0), self.layers)
        return made

    def _require_numbers(self) -> None:
        """Raises ConfigError unless what hangs on no mixer is possible."""
        need, choice = config_lib.require, config_lib.require_choice
        need(self.width >= 1, "model.width", self.width, "1 or more")
        need(self.mlp_width is None or self.mlp_width >= 0, "model.mlp_width", self.mlp_width, "0 or more, or none")
        choice("model.mlp_gate", self.mlp_gate, list(GLUS))
        for key, given in (("mlp_gate", self.mlp_gate != "silu"), ("mlp_bias", self.mlp_bias)):
            allowed = f"{StackConfig.__dataclass_fields__[key].default} where model.mlp_width is 0".lower()
            need(not given or self.hidden > 0, f"model.{key}", getattr(self, key), allowed)
        choice("model.dtype", self.dtype, list(DTYPES))
        choice("model.remat", self.remat, list(REMAT))
        need(self.unroll >= 0, "model.unroll", self.unroll, "0 or more")
        need(0 <= self.dropout < 1, "model.dropout", self.dropout, "0 or more, below 1")
        choice("model.norm", self.norm, NORMS)
        need(self.norm != "none" or not self.norm_after, "model.norm_after", True, "false where model.norm is none")
        need(self.norm_epsilon > 0, "model.norm_epsilon", self.norm_epsilon, "above 0")

    def _require_direction(self, mixer: Any, where: str) -> None:
        able = lambda name: getattr(mixers.get(name).capabilities, "causal" if self.causal else "bidirectional")
        if not able(mixer.node_name):
            sees = "none after it, which" if not self.causal else "those after it, and"
            raise ConfigError(
                f"{where}.name = {mixer.node_name!r} lets a position see {sees} {self.described} needs"
                f"{' what does not' if self.causal else ''}; allowed: {', '.join(filter(able, mixers.names()))}"
            )
        wanted = str(self.causal).lower()
        config_lib.require(
            mixer.causal == self.causal, f"{where}.causal", mixer.causal, f"{wanted} in {self.described}"
        )

    def _require_one_stream(self) -> None:
        """Raises ConfigError unless there is at most one second stream, which nothing but positions decides."""
        streams = {letter: mixer.second_stream for letter, mixer in self.mixers.items() if mixer.second_stream}
        allowed = "mixers that read one and the same second stream"
        config_lib.require(len(set(streams.values())) < 2, "model.mixers", streams, allowed)
        for letter, mixer in self.mixers.items():
            source, allowed = getattr(mixer, "source", None), f"none beside the second stream of {', '.join(streams)}"
            config_lib.require(not streams or source is None, f"model.mixers.{letter}.source", source, allowed)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Letters of each block of the pattern."""
        return tuple(block.replace("+", "") for block in re.findall(r"[^+](?:\+[^+])*", self.pattern))

    @property
    def described(self) -> str:
        """What it is, for messages."""
        return "a causal stack"

    def require_contexts(self, contexts: Mapping[str, mixers.Context] | None) -> None:
        """Raises UserError unless contexts are those that the mixers read."""
        read = {m.source for m in self.mixers.values() if getattr(m, "source", None) is not None}
        if read != set(contexts or ()):
            shown = lambda names: ", ".join(sorted(names)) or "none"
            raise UserError(f"contexts given: {shown(contexts or ())}; the layers read: {shown(read)}")

    def require_split(self, context: int) -> None:
        """Raises ConfigError unless positions can be split over `mesh.context` devices (-1: over some)."""
        for letter, mixer in self.mixers.items():
            if context != 1 and not mixers.get(mixer.node_name).sequence_parallel_of(mixer):
                raise ConfigError(
                    f"mesh.context = {context}: model.mixers.{letter} ({mixer.node_name}, as configured) "
                    "cannot split its positions over devices; allowed: 1, as a number"
                )

    def require_length(self, length: int) -> None:
        """Raises ConfigError unless rows of `data.length` positions are possible for every mixer."""
        for letter, mixer in self.mixers.items():
            try:
                mixers.get(mixer.node_name).require_length(mixer, length)
            except ConfigError as error:
                raise ConfigError(f"in model.mixers.{letter} (data.length = {length}): {error}") from None

    def require_nothing_ahead(self) -> None:
        """Raises ConfigError where a mask shows later positions: a loss on every next token would count them."""
        for letter, mixer in self.mixers.items():
            if mixers.get(mixer.node_name).sees_ahead(mixer):
                raise ConfigError(
                    f"model.mixers.{letter} has a mask that shows later positions; allowed: one that does not, as the "
                    "loss on this data counts every next token"
                )

    @property
    def draws(self) -> bool:
        """Whether its loss is random in training, and takes a key."""
        return self.dropout > 0

    @property
    def stream_bytes(self) -> int:
        """Of what goes from layer to layer, per position."""
        return self.width * jnp.dtype(self.compute_dtype).itemsize

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP; 0: there is none."""
        return -(-8 * self.width // (3 * 64)) * 64 if self.mlp_width is None else self.mlp_width

    def make_norm(self) -> Callable[[jax.Array], jax.Array]:
        """A norm of the stream; none: the identity."""
        if self.norm == "none":
            return _unchanged
        return RMSNorm(self.width, ("embed",), dtype=self.compute_dtype, epsilon=self.norm_epsilon)

    @property
    def norm_parameters(self) -> int:
        """Of one norm."""
        return self.width if self.norm == "rms" else 0

    @property
    def compute_dtype(self) -> Any:
        """The jnp dtype of activations."""
        return DTYPES[self.dtype]


def _unchanged(x: jax.Array) -> jax.Array:
    return x


class Period(nnx.Module):
    """The blocks of one period of the pattern."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, letters, rngs=rngs) for letters in config.blocks])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackState:
    """The streaming state of a stack.

    Attributes:
      stream: where the stream stands.
      layers: per repeat, per block of the period, the states of its mixers.
      sides: per repeat, what its blocks read of a second stream, for all positions of a document; None: nothing.
    """

    stream: mixers.Stream
    layers: list[list[list[Any]]]
    sides: list[Sides | None]


class Transformer(nnx.Module):
    """Repeats of the pattern's period; parameters are stacked [repeats, ...] and the stack is a scan."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.repeats = config.layers // len(config.blocks)

        @nnx.split_rngs(splits=self.repeats)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stacked(rngs: nnx.Rngs, repeat: jax.Array) -> Period:
            period = Period(config, rngs=rngs)
            layer_inputs.begin_layers(period, repeat, config.layers)
            return period

        self.periods = stacked(rngs, jnp.arange(self.repeats, dtype=jnp.int32))

    def __call__(self, x: jax.Array, seq: mixers.Sequence, key: jax.Array | None = None) -> mixers.MixerOutput:
        """Whole sequences, x [B, T, D]; `key` turns dropout on.

        Losses and metrics are means over the layers that have them.
        """
        self.config.require_contexts(seq.contexts)
        out, _ = self._through(x, seq.derived(), key, self.sides(x.shape[1], seq.text))
        return out

    def sides(self, length: int, text: jax.Array | None = None) -> Sides | None:
        """What the mixers read of the second stream, arrays [repeats, 1, length, D]; None: no mixer reads one.

        The stream goes through the blocks as one row more, which all rows share: the same norms, mixers and MLPs, no
        dropout; losses and metrics of it are not counted. `text` is `Sequence.text`.
        """
        begun = layer_inputs.second_stream(self.periods, length, text)
        return None if begun is None else self._through(*begun, None, None)[1]

    def _through(
        self, x: jax.Array, seq: mixers.Sequence, key: jax.Array | None, sides: Sides | None
    ) -> tuple[mixers.MixerOutput, Sides]:
        """The stream x through all blocks, and what mixers read of it where it is the second one."""
        graphdef, params = nnx.split(self.periods)
        seq, shared = layer_inputs.with_embedding(self.periods, x, seq), layer_inputs.first_shared(self.periods, x)
        keys = None if key is None else jax.random.split(key, (self.repeats, len(self.config.blocks)))
        numbers = jnp.arange(self.repeats, dtype=jnp.int32) if layer_inputs.reads(self.periods, "layer") else None

        def run(carry: tuple[jax.Array, dict[str, jax.Array]], inputs: Any) -> tuple[Any, Any]:
            (x, shared), (p, k, number, sides) = carry, inputs
            losses, metrics, read = [], [], []
            for i, block in enumerate(nnx.merge(graphdef, p).blocks):
                here = placed(seq, number, i, len(self.config.blocks), shared, sides)
                x, outs = block(x, here, key=None if k is None else k[i])
                shared = functools.reduce(lambda a, out: a | out.shared, outs, shared)
                losses += [out.losses for out in outs]
                metrics += [out.metrics for out in outs]
                read.append(tuple(out.side for out in outs))
            return (x, shared), (stack_by_name(losses), stack_by_name(metrics), read)

        if self.config.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[self.config.remat], prevent_cse=False)
        inputs = params, keys, numbers, sides
        (x, _), (losses, metrics, read) = jax.lax.scan(run, (x, shared), inputs, unroll=self.unroll())
        mean = functools.partial(jax.tree.map, jnp.mean)
        return mixers.MixerOutput(x, losses=mean(losses), metrics=mean(metrics)), read

    def init_state(
        self,
        batch: int,
        max_length: int,
        contexts: Mapping[str, mixers.Context] | None = None,
        text: jax.Array | None = None,
    ) -> StackState:
        """The state before the first position, with room for `max_length` positions.

        Contexts are read here, once, and the second stream is made of all positions; `text` is `Sequence.text`.

        Every leaf is a buffer of its own, though layers start equal keys and values as one: jit takes the state as
        donated.
        """
        self.config.require_contexts(contexts)
        state = lambda mixer: mixer.init_state(batch, max_length, self.config.compute_dtype, contexts=contexts)
        of = lambda block: [state(sublayer.branch) for sublayer in block.sublayers if sublayer.mixes]
        layers = [[of(block) for block in period.blocks] for period in self.unstacked()]
        sides = layer_inputs.unstacked_sides(self.sides(max_length, text), self.repeats)
        return jax.tree.map(jnp.copy, StackState(mixers.Stream.start(batch), layers, sides))

    def unstacked(self) -> list[Period]:
        """The periods one by one: decoding unrolls them, as a scan would copy every weight at every token."""
        graphdef, params = nnx.split(self.periods)
        return [nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params)) for i in range(self.repeats)]

    def unroll(self) -> int:
        """Periods that one iteration of the scan over them runs."""
        if self.config.unroll:
            return min(self.config.unroll, self.repeats)
        return self.repeats if partition.platform() == "cpu" else 1


def extend(
    periods: list[Period], x: jax.Array, seq: mixers.Sequence, state: StackState
) -> tuple[jax.Array, StackState]:
    """Runs the next positions, x [B, T, D], through unstacked periods; the new state."""
    seq, stream = state.stream.extend(seq)
    seq, shared = layer_inputs.with_embedding(periods[0], x, seq), layer_inputs.first_shared(periods[0], x)
    layers, numbers = [], range(len(periods)) if layer_inputs.reads(periods[0], "layer") else [None] * len(periods)
    for number, period, states, sides in zip(numbers, periods, state.layers, state.sides, strict=True):
        after = []
        for i, (block, s) in enumerate(zip(period.blocks, states, strict=True)):
            x, outs = block(x, placed(seq, number, i, len(period.blocks), shared, sides), s)
            shared = functools.reduce(lambda a, out: a | out.shared, outs, shared)
            after.append([out.state for out in outs])
        layers.append(after)
    return x, StackState(stream, layers, state.sides)
