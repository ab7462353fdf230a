"""Sequence parallelism: the positions of each sequence split over devices, each device with one run of them.

What a device needs of the others' positions, by the kind of op: all keys and values (`all_gather`), what came before
as a sum (`exclusive_scan`), or the state that the device before it ends with (`hand_over`). All of it is used inside
`partition.local`, on arrays that it has split along the logical axis "seq".

Shapes: `B` batch, `T` positions of a device, `P` devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.parallel import partition

Tree = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class SequenceParallel:
    """A sequence in `count` runs of positions, one per device along the mesh axis `name`, in order."""

    name: str
    count: int

    def index(self) -> jax.Array:
        """Which run this device has, from 0."""
        return jax.lax.axis_index(self.name)

    def all_gather(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The whole of an array of which each device has a run of the positions, `axis`."""
        return jax.lax.all_gather(x, self.name, axis=axis, tiled=True)

    def own(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """This device's run of an array that it has whole: the inverse of `all_gather`."""
        length = x.shape[axis] // self.count
        return jax.lax.dynamic_slice_in_dim(x, self.index() * length, length, axis)

    def sum(self, x: jax.Array) -> jax.Array:
        """Of what all devices have."""
        return jax.lax.psum(x, self.name)

    def max(self, x: jax.Array) -> jax.Array:
        """Of what all devices have; has no gradient."""
        return jax.lax.pmax(x, self.name)

    def from_previous(self, x: Tree) -> Tree:
        """What the device before this one has; zeros on the first."""
        after = [(i, i + 1) for i in range(self.count - 1)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.name, after), x)

    def from_last(self, x: Tree) -> Tree:
        """What the last device has."""
        last = self.index() == self.count - 1
        return jax.tree.map(lambda a: jax.lax.psum(jnp.where(last, a, jnp.zeros_like(a)), self.name), x)

    def local_documents(self, documents_BT: jax.Array) -> jax.Array:
        """Indices of documents counted from that in which the run before ended: 0 where it goes on.

        `documents_BT` are of `attnlab.ops.documents.document_index`, of which the first run keeps its own.
        """
        return documents_BT - self.from_previous(documents_BT[:, -1:])

    def exclusive_scan(self, join: Callable[[Tree, Tree], Tree], own: Tree, start: Tree) -> tuple[Tree, Tree]:
        """What all runs before this one amount to, and what all runs together do.

        Args:
          join: associative, from what came before and a run's own to both together.
          own: this run's.
          start: what came before the first run; like what `join` returns.
        """
        everyone = jax.tree.map(lambda x: jax.lax.all_gather(x, self.name), own)
        index, before, all_so_far = self.index(), start, start
        for i in range(self.count):
            before = jax.tree.map(lambda new, old, i=i: jnp.where(index == i, new, old), all_so_far, before)
            all_so_far = join(all_so_far, jax.tree.map(lambda x, i=i: x[i], everyone))
        return before, all_so_far

    def linear_scan(
        self, run: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]], v_BTHe: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """o [B, T, H, e] of a recurrence that is linear in its state [B, H, d, e], and the state after all runs.

        Each run begins from nothing, and adds what the state of those before gives: what is read where the state
        begins as the identity and all values are 0, d more columns of values.

        Args:
          run: from values and the state before them to what reads them and the state after.
          state: before the first run.
        """
        (B, T, H, e), d = v_BTHe.shape, state.shape[2]
        columns = jnp.concatenate([v_BTHe, jnp.zeros((B, T, H, d), v_BTHe.dtype)], axis=-1)
        start = jnp.broadcast_to(jnp.eye(d, e + d, k=e, dtype=v_BTHe.dtype), (B, H, d, e + d))
        o, end = run(columns, start)
        join = lambda before, own: own[..., e:] @ before + own[..., :e]
        before, after = self.exclusive_scan(join, end, state)
        return o[..., :e] + jnp.einsum("bthd,bhde->bthe", o[..., e:], before), after

    def zigzag(self, x: jax.Array, undo: bool = False) -> jax.Array:
        """Positions [B, T, ...] in zig-zag order, so that every device has as much causal work: of 2P pieces the
        i-th and the last but i. Each device keeps as many; their order among the devices alone changes.

        Args:
          x: T is even.
          undo: from zig-zag order back.
        """
        P = self.count
        # Piece h stands in half h % 2 of device h // 2; in each half every device sends one piece and receives one.
        to = lambda h: h if h < P else 2 * P - 1 - h
        halves = jnp.split(x, 2, axis=1)
        moves = [[(h // 2, to(h)) for h in range(half, 2 * P, 2)] for half in (0, 1)]
        if undo:
            moves = [[(b, a) for a, b in pairs] for pairs in moves]
        return jnp.concatenate([jax.lax.ppermute(y, self.name, m) for y, m in zip(halves, moves)], axis=1)

    def order(self, length: int, zigzag: bool) -> np.ndarray:
        """The positions that the devices have, one device after the other: [length]."""
        if not zigzag:
            return np.arange(length)
        pieces = np.arange(length).reshape(2 * self.count, -1)
        # Of each device first the piece that came from a first half, as `zigzag` leaves them.
        of_device = [sorted((i, 2 * self.count - 1 - i), key=lambda h: h % 2) for i in range(self.count)]
        return np.concatenate([pieces[h] for pair in of_device for h in pair])

    def hand_over(
        self, step: Callable[[Tree, Tree], tuple[Tree, Tree]], state: Tree, inputs: Tree
    ) -> tuple[Tree, Tree]:
        """A recurrence that cannot be split: each run begins with the state in which the run before it ended.

        Rows are independent: while one device is at a row, the next is at the row before, so that B rows take
        B + P - 1 steps instead of B P.

        Args:
          step: `(state, inputs)` of one row, [1, ...], to the state after this device's positions and the outputs.
          state: before the first position, [B, ...].
          inputs: of this device's positions, [B, ...].

        Returns:
          the state after the last position, and this device's outputs [B, ...].
        """
        rows, index = jax.tree.leaves(inputs)[0].shape[0], self.index()
        pick = lambda tree, row: jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1, 0), tree)

        def one_row(arriving: Tree, t: jax.Array) -> tuple[Tree, Tree]:
            row = jnp.clip(t - index, 0, rows - 1)
            begin = (index == 0) | (t < index)  # before its first row a device has nothing to do: it must stay finite
            before = jax.tree.map(lambda a, b: jnp.where(begin, a, b), pick(state, row), arriving)
            after, out = step(before, pick(inputs, row))
            return self.from_previous(after), (after, out)

        first = jax.tree.map(lambda a: jnp.zeros_like(a[:1]), state)
        _, (after, out) = jax.lax.scan(one_row, first, jnp.arange(rows + self.count - 1))
        mine = lambda a: jax.lax.dynamic_slice_in_dim(a[:, 0], index, rows, 0)
        return self.from_last(jax.tree.map(mine, after)), jax.tree.map(mine, out)


def here() -> SequenceParallel | None:
    """Inside `partition.local`: how the positions are split; None where a device has all of them."""
    split = partition.here("seq")
    if split is None:
        return None
    (name,) = split.names
    return SequenceParallel(name, split.count)


def splits(length: int) -> bool:
    """Whether `partition.local` will split `length` positions over devices."""
    ways = partition.ways("seq")
    return ways > 1 and length % ways == 0
