"""Scans over chunks that begin anew with every document, for rows in which documents begin anywhere.

A chunk step takes from each row the next run of positions that need the same state before them: either the rest of the
chunk in which the row stands, or, where a document begins, a window of one chunk's length, whose documents are all in
their first chunks and begin from the same initial state. A row of T positions takes T / C steps and at most two more
for each document; never more than 3 (T // C + 1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any  # a pytree of arrays


def _group(steps: int) -> int:
    """Steps between checkpoints; the backward pass computes what is between again, one group at a time.

    Kept at once are a state of each group and what the gradients of one group's steps need, about three states a step:
    together least for sqrt(steps / 3).
    """
    return max(4, math.isqrt(steps // 3))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkStep:
    """One step's positions: at most C of each row, in its first slots.

    Attributes:
      documents_BC: document of each slot; -1 in empty ones.
      position_BC: position of each slot within its document.
      fresh_B: whether a document begins in the first slot; then every slot's document begins in the step.
      last_B: the last slot that is taken, 0 where none is.
      taken_B: whether the row takes any slot.
    """

    documents_BC: jax.Array
    position_BC: jax.Array
    fresh_B: jax.Array
    last_B: jax.Array
    taken_B: jax.Array

    def seen(self) -> jax.Array:
        """bool [B, C, C]: slot i precedes or is slot t, in the same document."""
        length = self.documents_BC.shape[1]
        same = self.documents_BC[:, :, None] == self.documents_BC[:, None]
        return same & jnp.tril(jnp.ones((length, length), bool))

    def kept(self) -> jax.Array:
        """bool [B, C]: the slot is taken."""
        return self.documents_BC >= 0

    def at_last(self, rows_BHC: jax.Array) -> jax.Array:
        """[B, H, ...]: the rows [B, H, C, ...] of the last slot."""
        index = self.last_B.reshape(-1, *[1] * (rows_BHC.ndim - 1))
        return jnp.take_along_axis(rows_BHC, index, axis=2)[:, :, 0]


def choose_rows(where_B: jax.Array, a: Tree, b: Tree) -> Tree:
    """a in the rows named, else b; rows of a may be one for all."""
    return jax.tree.map(lambda x, y: jnp.where(where_B.reshape(-1, *[1] * (y.ndim - 1)), x, y), a, b)


def scan_aligned(
    body: Callable[[Tree, Tree, ChunkStep], tuple[Tree, Tree]], state: Tree, inputs: Tree, chunk: int
) -> tuple[Tree, Tree]:
    """`scan_chunk_steps` for rows that are one document each, from its beginning.

    T is padded to whole chunks of min(chunk, T) positions.
    """
    B, T = jax.tree.leaves(inputs)[0].shape[:2]
    chunk = min(chunk, T)
    steps = -(-T // chunk)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, steps * chunk - T)] + [(0, 0)] * (x.ndim - 2))
    cut = lambda x: jnp.moveaxis(pad(x).reshape(B, steps, chunk, *x.shape[2:]), 1, 0)
    position_NC = jnp.arange(steps * chunk, dtype=jnp.int32).reshape(steps, chunk)
    rows = lambda x: jnp.broadcast_to(x[:, None], (steps, B, *x.shape[1:]))
    order = ChunkStep(
        documents_BC=rows(jnp.where(position_NC < T, 0, -1)),
        position_BC=rows(position_NC),
        fresh_B=rows(jnp.arange(steps) == 0),
        last_B=rows(jnp.minimum(T - 1 - position_NC[:, 0], chunk - 1)),
        taken_B=jnp.ones((steps, B), bool),
    )
    group = max(g for g in range(1, _group(steps) + 1) if steps % g == 0)
    state, out = _scan(body, state, (jax.tree.map(cut, inputs), order), steps, group)
    return state, jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(B, steps * chunk, *y.shape[3:])[:, :T], out)


def scan_chunk_steps(
    body: Callable[[Tree, Tree, ChunkStep], tuple[Tree, Tree]],
    state: Tree,
    inputs: Tree,
    chunk: int,
    documents_BT: jax.Array,
    position_BT: jax.Array,
) -> tuple[Tree, Tree]:
    """Runs `body` over the steps of packed rows.

    Args:
      body: `(state, inputs of a step, step)` to the state after it and outputs [B, C, ...]. Inputs in slots that are
        not taken are copies of others; outputs there are not used.
      state: pytree of arrays, before the first position.
      inputs: pytree of arrays [B, T, ...].
      chunk: C; less where T is less.
      documents_BT: of `attnlab.ops.documents.document_index`.
      position_BT: of `positions_in_documents`.

    Returns:
      The state after the last position, and outputs [B, T, ...].
    """
    B, T = documents_BT.shape
    if T == 1:
        new_B = position_BT[:, 0] == 0
        step = ChunkStep(documents_BT, position_BT, new_B, jnp.zeros((B,), jnp.int32), jnp.ones((B,), bool))
        return body(state, inputs, step)
    length = min(chunk, T)
    start_NB, taken_NB = plan(documents_BT, position_BT, chunk)
    slot_C = jnp.arange(length, dtype=jnp.int32)
    kept_NBC = slot_C < taken_NB[..., None]
    index_NBC = jnp.minimum(start_NB[..., None] + slot_C, T - 1)
    gather = lambda x: _rows(x, index_NBC)
    order = ChunkStep(
        documents_BC=jnp.where(kept_NBC, gather(documents_BT), -1),
        position_BC=gather(position_BT),
        fresh_B=(taken_NB > 0) & (gather(position_BT)[..., 0] == 0),
        last_B=jnp.maximum(taken_NB - 1, 0),
        taken_B=taken_NB > 0,
    )
    count = jnp.sum(jnp.any(order.taken_B, axis=1))
    state, out = _scan(body, state, (jax.tree.map(gather, inputs), order), count, _group(start_NB.shape[0]))

    begins_BT = jax.vmap(lambda s: jnp.zeros((T,), jnp.int32).at[s].add(1, mode="drop"), in_axes=1)(start_NB)
    step_BT = jnp.cumsum(begins_BT, axis=1) - 1
    offset_BT = jnp.arange(T) - jnp.take_along_axis(start_NB.T, step_BT, axis=1)
    place = lambda y: jax.vmap(lambda rows, n, c: rows[n, c], in_axes=(1, 0, 0))(y, step_BT, offset_BT)
    return state, jax.tree.map(place, out)


def steps_bound(length: int, chunk: int) -> int:
    """How many steps the documents of a row of so many positions can need."""
    return min(length, 3 * (length // chunk + 1))


def plan(documents_BT: jax.Array, position_BT: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """First position [N, B] and number of positions [N, B] of each step; a row that is done stands at T and takes 0."""
    B, T = documents_BT.shape
    t = jnp.arange(T, dtype=jnp.int32)[None]
    ends = jnp.pad(documents_BT[:, 1:] != documents_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end_BT = jax.lax.cummin(jnp.where(ends, t + 1, T), axis=1, reverse=True)
    rest_BT = jnp.minimum(t + chunk - position_BT % chunk, end_BT)
    following_BT = jnp.where(position_BT == 0, jnp.minimum(t + chunk, T), rest_BT)
    following_BT = jnp.pad(following_BT, ((0, 0), (0, 1)), constant_values=T)

    def step(start_B, _):
        next_B = jnp.take_along_axis(following_BT, start_B[:, None], axis=1)[:, 0]
        return next_B, (start_B, next_B - start_B)

    zero_B = following_BT[:, 0] * 0  # laid out over devices as the rows are
    return jax.lax.scan(step, zero_B, length=steps_bound(T, chunk))[1]


def _rows(x_BT: jax.Array, index_NBC: jax.Array) -> jax.Array:
    """x[b, index[n, b, c]]: [N, B, C, ...]."""
    return jax.vmap(lambda x, index: x[index], in_axes=(0, 1), out_axes=1)(x_BT, index_NBC)


def _scan(body, state: Tree, xs: Tree, count: int | jax.Array, group: int) -> tuple[Tree, Tree]:
    """Scan with a checkpoint every `group` steps. Groups from step `count` on, where it is an array, are skipped."""
    steps = jax.tree.leaves(xs)[0].shape[0]
    groups = -(-steps // group)

    def step(state, x):
        return body(state, *x)

    if steps == 1:
        state, out = step(state, jax.tree.map(lambda x: x[0], xs))
        return state, jax.tree.map(lambda y: y[None], out)

    def fill(x):  # steps of which no row takes anything
        return jnp.pad(x, [(0, groups * group - steps)] + [(0, 0)] * (x.ndim - 1)).reshape(groups, group, *x.shape[1:])

    run = lambda state, x: jax.lax.scan(step, state, x)

    def run_if_any(state, first, x):
        _, out = jax.eval_shape(run, state, x)
        skip = lambda state, x: (state, jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), out))
        return jax.lax.cond(first < count, run, skip, state, x)

    @jax.checkpoint
    def step_group(state, inputs):
        first, x = inputs
        return run(state, x) if isinstance(count, int) else run_if_any(state, first, x)

    first_G = jnp.arange(groups) * group
    state, out = jax.lax.scan(step_group, state, (first_G, jax.tree.map(fill, xs)))
    return state, jax.tree.map(lambda y: y.reshape(groups * group, *y.shape[2:])[:steps], out)
