"""What a student learns of a teacher: the outputs of its layers, each by itself, or the distribution of its tokens.

Layers: MOHAWK's second stage (Bick et al. 2024, arXiv:2408.10189), LoLCATs' attention transfer (Zhang et al. 2024,
arXiv:2410.10254), RADLADS' first step (Goldstein et al. 2025, arXiv:2505.03005). All of a student's layers learn at
once, none from what another one of it makes. Those take the error or its square as it is; dividing the square by that
of the teacher's output, so that layers weigh alike, is ours.

Logits: Hinton et al. 2015 (arXiv:1503.02531), section 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.models import layer_inputs
from attnlab.models.blocks import Block
from attnlab.models.layer_inputs import Sides, placed, stack_by_name
from attnlab.models.transformer import REMAT, StackConfig, Transformer
from attnlab.parallel import partition

MATCH = ("logits", "layers")
AT = ("mixer", "block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matching:
    """What of the teacher is matched.

    Attributes:
      match: logits: (1 - a) T^2 KL(teacher || student) + a cross-entropy, end to end; or layers: each layer of the
        student is fed what the teacher's is, and the square of the difference of what they add to the stream is divided
        by that of what the teacher's adds, both summed over a document.
      at: of layers: mixer, what the mixers of a block add; block, what the whole block does.
      layers: of layers: their numbers, from 0; none: those that have another mixer than the teacher's.
      temperature: of logits, T.
      cross_entropy: of logits, a.
    """

    match: str = "logits"
    at: str = "mixer"
    layers: tuple[int, ...] | None = None
    temperature: float = 1.0
    cross_entropy: float = 0.0

    def __post_init__(self) -> None:
        need, choice = config_lib.require, config_lib.require_choice
        choice("match", self.match, MATCH)
        choice("at", self.at, AT)
        need(self.temperature > 0, "temperature", self.temperature, "above 0")
        need(0 <= self.cross_entropy < 1, "cross_entropy", self.cross_entropy, "0 or more, below 1")
        others = ("temperature", "cross_entropy") if self.match == "layers" else ("at", "layers")
        for key in others:
            default, value = Matching.__dataclass_fields__[key].default, getattr(self, key)
            need(value == default, key, value, f"{str(default).lower()} where match = {self.match!r}")
        if self.layers is not None:
            good = self.layers == tuple(sorted(set(self.layers))) and all(n >= 0 for n in self.layers)
            need(good and len(self.layers) > 0, "layers", self.layers, "numbers of layers, from 0, rising")

    def resolved(self, student: StackConfig, teacher: StackConfig) -> Matching:
        """The same with its layers named.

        Raises:
          ConfigError: the student's output, or its layers, are not of the teacher's shapes.
        """
        if student.node_name != teacher.node_name:
            raise _differs("name", student.node_name, teacher.node_name)
        if self.match == "logits":
            if student.vocab != teacher.vocab:
                raise _differs("vocab", student.vocab, teacher.vocab)
            return self
        for key in ("width", "layers", "vocab", "decoupled"):  # the student's layers read what the teacher's do
            if getattr(student, key) != getattr(teacher, key):
                raise _differs(key, getattr(student, key), getattr(teacher, key))
        if student.decoupled_width != teacher.decoupled_width:
            raise _differs("mixers.*.embedding_width", student.decoupled_width, teacher.decoupled_width)
        ours, theirs = (layers_of(config) for config in (student, teacher))
        chosen = self.layers
        if chosen is None:
            chosen = tuple(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            allowed = "a model with another mixer than the teacher's in a layer, or train.distill.layers = numbers"
            config_lib.require(len(chosen) > 0, "model.pattern", student.pattern, allowed)
        config_lib.require(chosen[-1] < student.layers, "train.distill.layers", chosen, f"below {student.layers}")
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if self.at == "mixer" and len(a) != len(b):
                raise ConfigError(
                    f"train.distill.at = 'mixer' is not possible; allowed: block, as layer {i} has {len(a)} mixers "
                    f"(model.pattern = {student.pattern!r}) and the teacher's {len(b)} ({teacher.pattern!r})"
                )
        return dataclasses.replace(self, layers=chosen)

    def learns(self, entry: str) -> bool:
        """Whether a parameter of this name (`initial.Entry`) can learn anything of the teacher; once resolved."""
        if self.match == "logits":
            return True
        inside = ".mixers." if self.at == "mixer" else "."
        return any(entry.startswith(f"transformer.layers.{i}{inside}") for i in self.layers)


def _differs(key: str, ours: Any, theirs: Any) -> ConfigError:
    return ConfigError(f"model.{key} = {config_lib.show(ours)} is not possible; allowed: the teacher's, {theirs!r}")


def layers_of(config: StackConfig) -> list[tuple[Any, ...]]:
    """The configs of the mixers of every layer."""
    blocks = [tuple(config.mixers[letter] for letter in block) for block in config.blocks]
    return blocks * (config.layers // len(blocks))


def relative_errors(error_BT: jax.Array, size_BT: jax.Array, weights_BT: jax.Array, seq: mixers.Sequence) -> jax.Array:
    """[B, T]: errors of positions over the mean size of their document, by their weights.

    Summed over a document they are its weight times (sum of weighted errors) / (sum of weighted sizes): 0 where the
    student is the teacher, 1 where it gives zeros. Documents know nothing of each other. Of one whose sizes are all 0
    they are the errors themselves.

    Args:
      error_BT, size_BT: squares of the difference, and of what it is measured by.
      weights_BT: 0 on padding, of which nothing, not even NaN, counts.
      seq: with `documents`.
    """
    rows = jnp.arange(error_BT.shape[0])[:, None]
    zeros = jnp.zeros((error_BT.shape[0], error_BT.shape[1] + 1), error_BT.dtype)
    used = weights_BT != 0
    weighted = lambda x: jnp.where(used, weights_BT * x, 0)
    sums = lambda x: zeros.at[rows, seq.documents].add(weighted(x))[rows, seq.documents]
    weight, size = sums(jnp.ones_like(error_BT)), sums(size_BT)
    scale = jax.lax.stop_gradient(jnp.where(size > 0, weight / jnp.where(size > 0, size, 1), 1))
    return weighted(error_BT) * jnp.where(used, scale, 0)


def match_layers(
    student: Transformer,
    teacher: Transformer,
    x: jax.Array,
    seq: mixers.Sequence,
    weights: jax.Array,
    matching: Matching,
    key: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], mixers.MixerOutput]:
    """Runs the teacher, and beside it the student's layers on what the teacher's read.

    Args:
      student, teacher: stacks of as many layers of one width; their patterns may differ. No gradient goes to the
        teacher.
      x: [B, T, D], what goes into the teacher.
      seq: its positions, of packed documents; the step is the student's.
      weights: [B, T], 0 on padding.
      matching: resolved.
      key: turns the student's dropout on.

    Returns:
      Of every matched layer, by its number, the sum of `relative_errors`; and losses and metrics of these layers,
      means over them. No gradient goes to others, which run where matched ones need what they hand on
      (`Sequence.shared`).
    """
    walk = _Walk(student, teacher, weights, matching)
    return walk(jax.lax.stop_gradient(x), seq.derived(), key)


class _Walk:
    """Both stacks side by side, scanned over the shortest stretch of layers that is whole periods of both.

    It is also one of which the same places are matched every time.
    """

    def __init__(self, student: Transformer, teacher: Transformer, weights: jax.Array, matching: Matching):
        self.student, self.weights, self.matching = student, weights, matching
        sizes = [len(stack.config.blocks) for stack in (student, teacher)]
        self.stretch = stretch_of(math.lcm(*sizes), student.config.layers, matching.layers)
        self.matched = {i % self.stretch for i in matching.layers}
        self.repeats = student.config.layers // self.stretch
        split = [nnx.split(stack.periods) for stack in (student, teacher)]
        self.graphdefs = [graphdef for graphdef, _ in split]
        self.params = [
            jax.tree.map(lambda p, n=n: p.reshape(self.repeats, self.stretch // n, *p.shape[1:]), params)
            for (_, params), n in zip(split, sizes, strict=True)
        ]
        self.params[1] = jax.lax.stop_gradient(self.params[1])
        self.stacks, self.periods = (student, teacher), (student.periods, teacher.periods)
        self.dtypes = [stack.config.compute_dtype for stack in (student, teacher)]
        self.unroll = max(1, student.unroll() * self.repeats // student.repeats)

    def __call__(
        self, x: jax.Array, seq: mixers.Sequence, key: jax.Array | None
    ) -> tuple[dict[str, jax.Array], mixers.MixerOutput]:
        given = zip(self.periods, self.dtypes, strict=True)
        seqs = [layer_inputs.with_embedding(period, x.astype(dtype), seq) for period, dtype in given]
        seqs[1] = dataclasses.replace(seqs[1], step=None)  # a teacher has learned
        shared = [layer_inputs.first_shared(period, x) for period in self.periods]
        sides = [self._sides(stack, x.shape[1], seq) for stack in self.stacks]
        # What a layer hands on, those after it need: then all of the student's run.
        self.all_run = bool(shared[0])
        keys = None if key is None else jax.random.split(key, (self.repeats, self.stretch))
        numbers = jnp.arange(self.repeats, dtype=jnp.int32)
        run = functools.partial(self._stretch, seqs)
        _, (errors, losses, metrics) = jax.lax.scan(
            run, (x, *shared), (*self.params, keys, numbers, sides), unroll=self.unroll
        )
        found = {str(i): errors[i % self.stretch][i // self.stretch] for i in self.matching.layers}
        return found, mixers.MixerOutput(x, None, jax.tree.map(jnp.mean, losses), jax.tree.map(jnp.mean, metrics))

    def _sides(self, stack: Transformer, length: int, seq: mixers.Sequence) -> Sides | None:
        """What a stack's layers read of its second stream, each of a stretch [repeats, ...]; no layer learns by it."""
        found, size = stack.sides(length, seq.text), len(stack.config.blocks)
        if found is None:
            return None
        of = lambda j: jax.tree.map(lambda a: a[j // size :: self.stretch // size], found[j % size])
        return jax.lax.stop_gradient([of(j) for j in range(self.stretch)])

    def _stretch(self, seqs: list[mixers.Sequence], carry: Any, inputs: Any) -> tuple[Any, Any]:
        (x, *shared), (*params, keys, number, sides) = carry, inputs
        ours, theirs = (self._blocks(*split) for split in zip(self.graphdefs, params, strict=True))
        errors, losses, metrics = {}, [], []
        for j, (block, teacher) in enumerate(zip(ours, theirs, strict=True)):
            told = zip(seqs, shared, sides, strict=True)
            own, other = (placed(s, number, j, self.stretch, h, z) for s, h, z in told)
            read, added, outs, x = _recorded(teacher, x, other, self.matching.at, self.weights.dtype)
            shared[1] = functools.reduce(lambda a, out: a | out.shared, outs, shared[1])
            if j in self.matched or self.all_run:
                key = None if keys is None else keys[j]
                error, outs = self._beside(block, j in self.matched, read, added, own, key)
                shared[0] = functools.reduce(lambda a, out: a | out.shared, outs, shared[0])
            if j in self.matched:
                errors[j] = error
                losses += [out.losses for out in outs]
                metrics += [out.metrics for out in outs]
        return (x, *shared), (errors, stack_by_name(losses), stack_by_name(metrics))

    def _blocks(self, graphdef: Any, params: Any) -> list[Block]:
        count = jax.tree.leaves(params)[0].shape[0]
        periods = [nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params)) for i in range(count)]
        return [block for period in periods for block in period.blocks]

    def _beside(
        self,
        block: Block,
        matched: bool,
        read: list[jax.Array],
        wanted: list[jax.Array],
        seq: mixers.Sequence,
        key: jax.Array | None,
    ) -> tuple[jax.Array, list[mixers.MixerOutput]]:
        """The error of the student's block where it reads what the teacher's did, and what its mixers returned.

        Backward keeps of it what the student's `remat` says: each layer is one by itself, however long the stretch.
        """
        graphdef, params = nnx.split(block)
        if not matched:  # what it hands on may be learned through, not by it
            params = jax.lax.stop_gradient(params)

        def run(params: Any, read: Any, wanted: Any, shared: Any, key: Any) -> tuple[jax.Array, Any]:
            here = dataclasses.replace(seq, shared=shared)
            made, outs = self._made(nnx.merge(graphdef, params), read, here, key)
            error = sum(self._error(a, b, here) for a, b in zip(made, wanted, strict=True))
            return error, [(out.losses, out.metrics, out.shared) for out in outs]

        remat = self.student.config.remat
        if remat != "none":  # a scan that is unrolled is no loop, which would keep what runs twice apart
            run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=self.unroll >= self.repeats)
        error, outs = run(params, read, wanted, seq.shared, key)
        return error, [mixers.MixerOutput(read[0], losses=a, metrics=b, shared=c) for a, b, c in outs]

    def _made(
        self, block: Block, read: list[jax.Array], seq: mixers.Sequence, key: jax.Array | None
    ) -> tuple[list[jax.Array], list[mixers.MixerOutput]]:
        """What the student's block adds, and what its mixers returned."""
        read = [x.astype(self.dtypes[0]) for x in read]
        if self.matching.at == "block":
            _, added, outs, _ = _recorded(block, read[0], seq, "block", self.weights.dtype, key)
            return added, outs
        mixing = [sublayer for sublayer in block.sublayers if sublayer.mixes]
        outs = [sublayer.added(x, seq, key=k) for sublayer, x, k in zip(mixing, read, _keys(block, key))]
        return [out.y for out in outs], outs

    def _error(self, made: jax.Array, wanted: jax.Array, seq: mixers.Sequence) -> jax.Array:
        wide = self.weights.dtype
        made, wanted = made.astype(wide), wanted.astype(wide)
        square = lambda y: jnp.sum(jnp.where((self.weights != 0)[..., None], y, 0) ** 2, axis=-1)
        return jnp.sum(relative_errors(square(made - wanted), square(wanted), self.weights, seq))


def stretch_of(period: int, layers: int, matched: tuple[int, ...]) -> int:
    """Layers of the shortest stretch that is whole periods, of which a stack is whole ones, all matched alike."""

    def alike(stretch: int) -> bool:
        places = {i % stretch for i in matched}
        return layers % stretch == 0 and {i for i in range(layers) if i % stretch in places} == set(matched)

    return next(stretch for stretch in range(period, layers + 1, period) if alike(stretch))


def _keys(block: Block, key: jax.Array | None) -> Any:
    return [None] * len(block.sublayers) if key is None else jax.random.split(key, len(block.sublayers))


def _recorded(
    block: Block, x: jax.Array, seq: mixers.Sequence, at: str, wide: Any, key: jax.Array | None = None
) -> tuple[list[jax.Array], list[jax.Array], list[mixers.MixerOutput], jax.Array]:
    """What a block's mixers (or the whole of it) read and add; what its mixers returned, and the stream after it.

    What the whole adds is summed in the type `wide`, not told from the stream, which may be large and is rounded.
    """
    x = first = partition.constrain(x, "batch", "seq", None)
    read, added, outs = [], [], []
    for sublayer, k in zip(block.sublayers, _keys(block, key), strict=True):
        out = sublayer.added(x, seq, key=k)
        if sublayer.mixes:
            read.append(x)
            outs.append(out)
        if sublayer.mixes or at == "block":
            added.append(out.y)
        x = x + out.y
    return ([first], [sum(y.astype(wide) for y in added)], outs, x) if at == "block" else (read, added, outs, x)
