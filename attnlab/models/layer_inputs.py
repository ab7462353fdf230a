"""What a stack tells its layers: their places, what it began from, what layers before hand on, its second stream."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attnlab import mixers

if TYPE_CHECKING:
    from attnlab.models.transformer import Period

# `Sequence.sides` of each block of a period.
Sides = list[tuple[jax.Array | None, ...]]


def mixers_of(period: Period) -> list[mixers.Mixer]:
    """All of the period's, in their order."""
    return [sublayer.branch for block in period.blocks for sublayer in block.sublayers if sublayer.mixes]


def number_of(repeat: jax.Array | int, block: int, blocks: int) -> jax.Array:
    """Of the `block`-th block of a repeat of the period, which has so many, through the stack; int32."""
    return jnp.int32(repeat * blocks + block)


def begin_layers(period: Period, repeat: jax.Array, layers: int) -> None:
    """Tells each mixer of a repeat of the period, which is one of a stack of so many layers, its place in it."""
    for i, block in enumerate(period.blocks):
        for sublayer in block.sublayers:
            if sublayer.mixes:
                sublayer.branch.begin_layer(number_of(repeat, i, len(period.blocks)), layers)


def reads(period: Period, what: str) -> bool:
    """Whether a mixer of the period asks for it (`Mixer.stack_reads`)."""
    return any(what in mixer.stack_reads for mixer in mixers_of(period))


def with_embedding(period: Period, x: jax.Array, seq: mixers.Sequence) -> mixers.Sequence:
    """The sequence as mixers read it who ask for what the stack began from; what is given in its place stays."""
    return dataclasses.replace(seq, embedding=x) if seq.embedding is None and reads(period, "embedding") else seq


def first_shared(period: Period, x: jax.Array) -> dict[str, jax.Array]:
    """`Sequence.shared` before the first layer."""
    return functools.reduce(lambda a, mixer: a | mixer.init_shared(*x.shape[:2]), mixers_of(period), {})


def second_stream(period: Period, length: int, text: jax.Array | None) -> tuple[jax.Array, mixers.Sequence] | None:
    """The second stream as it begins, [1, length, D], and where it stands; None: no mixer of the period reads one.

    It is one document, whose positions are those of every other document.
    """
    for mixer in mixers_of(period):
        if mixer.config.second_stream:
            seq = dataclasses.replace(mixers.Sequence.whole(1, length), second=True)
            return mixer.begin_second(length, text), seq
    return None


def placed(
    seq: mixers.Sequence,
    number: jax.Array | int | None,
    block: int,
    blocks: int,
    shared: dict[str, jax.Array],
    sides: Sides | None = None,
) -> mixers.Sequence:
    """The sequence as a block reads it, which is the `block`-th of period `number`."""
    layer = None if number is None else number_of(number, block, blocks)
    return dataclasses.replace(seq, layer=layer, shared=shared, sides=None if sides is None else sides[block])


def stack_by_name(dicts: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Of each name the values of all that have it, along a new first axis."""
    names = functools.reduce(lambda a, b: a | b.keys(), dicts, set())
    return {name: jnp.stack([d[name] for d in dicts if name in d]) for name in sorted(names)}


def unstacked_sides(sides: Sides | None, repeats: int) -> list[Any]:
    """Those of each repeat, of arrays [repeats, ...]; None for each where there are none."""
    return [jax.tree.map(lambda a, i=i: a[i], sides) for i in range(repeats)]
