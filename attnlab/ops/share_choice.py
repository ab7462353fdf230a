"""Choices among scored entries by their share of a pool: the fewest of the best that make up so much of it.

Shapes: `L` pools, `M` entries of a pool. Pools are split by documents: entries of different ones never compete.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.ops.masks import Array


def by_share(
    scores_LM: jax.Array, own_LM: Array, valid_LM: Array, document_LM: Array, documents: int, threshold: float
) -> jax.Array:
    """Which entries are chosen, bool [L, M]: their own ones, and of the others the best until all reach a share.

    Scores become `(s - min) / (max - min)` over the valid entries of a document (a range of 1e-6 or less: they are not
    divided). What is chosen is the own entries and the shortest run of the others, the highest first, whose sum with
    the own ones' is at least `threshold` of the document's sum. One other entry is chosen in any case; where no run
    reaches it, all are.

    Args:
      scores_LM: fp32 or wider. own_LM, valid_LM: bool; own ones are valid. document_LM: int32, below `documents`.
      documents: how many documents there may be.
    """
    shared = _shared(scores_LM, valid_LM, document_LM, documents)
    total, own = (_sums(jnp.where(of, shared, 0), document_LM, documents) for of in (valid_LM, own_LM))
    rest = jnp.maximum(threshold * total - own, 0)
    others = valid_LM & ~own_LM
    order, document = _sorted(jnp.where(others, shared, -1), document_LM)
    take = lambda x: jnp.take_along_axis(jnp.broadcast_to(x, order.shape), order, axis=1)
    value = take(jnp.where(others, shared, 0))
    running = jnp.cumsum(value, axis=1)
    first = _changes(document)
    start = jax.lax.cummax(jnp.where(first, running - value, -jnp.inf), axis=1)
    before = running - value - start  # of the document's better ones
    wanted = (before < take_rows(rest, document)) | first
    return own_LM | (others & _unsorted(wanted, order))


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


def _sums(x: jax.Array, document: Array, documents: int) -> jax.Array:
    """[L, documents]."""
    rows = jnp.arange(len(x))[:, None]
    return jnp.zeros((len(x), documents), x.dtype).at[rows, document].add(x)


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
