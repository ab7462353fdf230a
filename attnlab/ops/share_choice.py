"""Choices among scored entries by their share of a pool: the fewest of the best that make up so much of it.

Shapes: `L` pools, `M` entries of a pool. Pools are split by documents: entries of different ones never compete.

A pool may have more entries than floats of 32 bits can count. So shares are added as integers, exactly and in any
order: what a document chooses depends to the last bit on its own entries alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.ops.masks import Array

_ONE = 31  # a share of 1 is 2^31 as an integer


def by_share(
    scores_LM: jax.Array, own_LM: Array, valid_LM: Array, document_LM: Array, documents: int, threshold: float
) -> jax.Array:
    """Which entries are chosen, bool [L, M]: their own ones, and of the others the best until all reach a share.

    Scores become `(s - min) / (max - min)` over the valid entries of a document (a range of 1e-6 or less: they are not
    divided). What is chosen is the own entries and the shortest run of the others, the highest first, whose sum with
    the own ones' is at least `threshold` of the document's sum. One other entry is chosen in any case. Where no run
    reaches it, all are: above a threshold of 1, and where all scores are equal, unless it is 0.

    Args:
      scores_LM: fp32 or wider. own_LM, valid_LM: bool; own ones are valid. document_LM: int32, below `documents`.
      documents: how many documents there may be.
    """
    if threshold > 1:
        return jnp.broadcast_to(jnp.asarray(valid_LM), scores_LM.shape)
    shared = _shared(scores_LM, valid_LM, document_LM, documents)
    others = valid_LM & ~own_LM
    order, document = _sorted(jnp.where(others, shared, -1), document_LM)
    digits, bits = _digits(shared)
    rest, own = (_sums(jnp.where(of, digits, 0), document_LM, documents) for of in (others, own_LM))
    take = lambda x: jnp.take_along_axis(jnp.broadcast_to(x, digits.shape), order[None], axis=2)
    before, first = _before(take(jnp.where(others, digits, 0)), document), _changes(document)
    before, rest, own = (_float(x, bits, scores_LM.dtype) for x in (before, rest, own))
    total = rest + own
    wanted = jnp.where(total > 0, threshold * total - own, threshold)
    return own_LM | (others & _unsorted((before < take_rows(wanted, document)) | first, order))


def best(scores_LM: jax.Array, own_LM: Array, valid_LM: Array, document_LM: Array, most_LD: jax.Array) -> jax.Array:
    """Which entries are among the `most_LD` best of their document, own ones before all others: bool [L, M]."""
    rank = jnp.where(own_LM, jnp.inf, scores_LM)
    order, document = _sorted(jnp.where(valid_LM, rank, -jnp.inf), document_LM)
    place = jnp.arange(order.shape[1], dtype=jnp.int32)[None]
    place -= jax.lax.cummax(jnp.where(_changes(document), place, 0), axis=1)
    return valid_LM & _unsorted(place < take_rows(most_LD, document), order)


def take_rows(x_LD: jax.Array, index_LM: jax.Array) -> jax.Array:
    """[L, M]."""
    return jnp.take_along_axis(jnp.broadcast_to(x_LD, (len(index_LM), x_LD.shape[1])), index_LM, axis=1)


def _shared(scores: jax.Array, valid: Array, document: Array, documents: int) -> jax.Array:
    """Scores from 0 to 1, by document."""
    rows = jnp.arange(len(scores))[:, None]
    extreme = lambda of, fill: getattr(jnp.full((len(scores), documents), fill, scores.dtype).at[rows, document], of)(
        jnp.where(valid, scores, fill)
    )
    low, high = extreme("min", jnp.inf), extreme("max", -jnp.inf)
    wide = jnp.where(high - low > 1e-6, high - low, 1)
    return (scores - take_rows(low, document)) / take_rows(wide, document)


def _digits(shared_LM: jax.Array) -> tuple[jax.Array, int]:
    """Shares in units of 2^-31 as digits of base 2^bits, the lowest first: uint32 [digits, L, M], and bits.

    A digit of all M entries together is below 2^32: their sums are exact.
    """
    bits = 32 - shared_LM.shape[1].bit_length()
    number = jnp.round(jnp.clip(shared_LM, 0, 1) * 2.0**_ONE).astype(jnp.uint32)
    digits = [number >> shift for shift in range(0, _ONE, bits)]
    return jnp.stack([*(x & (2**bits - 1) for x in digits[:-1]), digits[-1]]), bits


def _float(digits: jax.Array, bits: int, dtype: jnp.dtype) -> jax.Array:
    """What sums of digits say, in shares."""
    return sum(x.astype(dtype) * 2.0 ** (bits * i - _ONE) for i, x in enumerate(digits))


def _sums(digits: jax.Array, document: Array, documents: int) -> jax.Array:
    """[digits, L, documents]."""
    rows = jnp.arange(digits.shape[1])[:, None]
    return jnp.zeros((*digits.shape[:2], documents), digits.dtype).at[:, rows, document].add(digits)


def _before(digits: jax.Array, document_LM: jax.Array) -> jax.Array:
    """Of entries sorted by document, the sum of those before each in its document, [digits, L, M]."""
    earlier = jax.lax.cumsum(digits, axis=2) - digits
    return earlier - jax.lax.cummax(jnp.where(_changes(document_LM), earlier, 0), axis=2)


def _sorted(x: jax.Array, document: Array) -> tuple[jax.Array, jax.Array]:
    """By document, the highest first, of equal ones the first: their order, and the documents in it."""
    document = jnp.broadcast_to(document, x.shape)
    number = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape)
    document, _, order = jax.lax.sort((document, -x, number), dimension=1, num_keys=3)
    return order, document


def _changes(document: jax.Array) -> jax.Array:
    """Which entries are the first of their document."""
    return jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _unsorted(x: jax.Array, order: jax.Array) -> jax.Array:
    rows = jnp.arange(len(x))[:, None]
    return jnp.zeros_like(x).at[rows, order].set(x)
