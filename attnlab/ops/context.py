"""Context parallelism: the positions of each sequence split over devices, each device with one run of them.

What a device needs of the others' positions, by the kind of op: all keys and values (`Parts.gathered`), what came
before as a sum (`Parts.running`), or the state that the device before it ends with (`Parts.handed_on`). All of it is
used inside `partition.local`, on arrays that it has split along the logical axis "seq".

Shapes: `B` batch, `T` positions of a device, `P` devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.masks import Mask
from attnlab.parallel import partition

Tree = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class Parts:
    """A sequence in `count` parts, one per device along the mesh axis `name`, in order."""

    name: str
    count: int

    def index(self) -> jax.Array:
        """Which part this device has, from 0."""
        return jax.lax.axis_index(self.name)

    def gathered(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The whole of an array of which each device has a part of the positions, `axis`."""
        return jax.lax.all_gather(x, self.name, axis=axis, tiled=True)

    def previous(self, x: Tree) -> Tree:
        """What the device before this one has; zeros on the first."""
        after = [(i, i + 1) for i in range(self.count - 1)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.name, after), x)

    def of_last(self, x: Tree) -> Tree:
        """What the last device has."""
        last = self.index() == self.count - 1
        return jax.tree.map(lambda a: jax.lax.psum(jnp.where(last, a, jnp.zeros_like(a)), self.name), x)

    def documents(self, documents_BT: jax.Array) -> jax.Array:
        """Indices of documents counted from that in which the part before ended: 0 where it goes on.

        `documents_BT` are of `attnlab.ops.documents.document_index`, of which the first part keeps its own.
        """
        return documents_BT - self.previous(documents_BT[:, -1:])

    def running(self, join: Callable[[Tree, Tree], Tree], own: Tree, start: Tree) -> tuple[Tree, Tree]:
        """What all parts before this one amount to, and what all parts together do.

        Args:
          join: associative, from what came before and a part's own to both together.
          own: this part's.
          start: what came before the first part; like what `join` returns.
        """
        everyone = jax.tree.map(lambda x: jax.lax.all_gather(x, self.name), own)
        index, before, all_so_far = self.index(), start, start
        for i in range(self.count):
            before = jax.tree.map(lambda new, old, i=i: jnp.where(index == i, new, old), all_so_far, before)
            all_so_far = join(all_so_far, jax.tree.map(lambda x, i=i: x[i], everyone))
        return before, all_so_far

    def dealt(self, x: jax.Array, back: bool = False) -> jax.Array:
        """Positions [B, T, ...] exchanged so that every device has as much causal work: of 2P runs the i-th and the
        last but i. Each device keeps as many; their order among the devices alone changes.

        Args:
          x: T is even.
          back: undoes it.
        """
        P = self.count
        # Run h stands in half h % 2 of device h // 2; in each half every device sends one run and receives one.
        to = lambda h: h if h < P else 2 * P - 1 - h
        halves = jnp.split(x, 2, axis=1)
        moves = [[(h // 2, to(h)) for h in range(half, 2 * P, 2)] for half in (0, 1)]
        if back:
            moves = [[(b, a) for a, b in pairs] for pairs in moves]
        return jnp.concatenate([jax.lax.ppermute(y, self.name, m) for y, m in zip(halves, moves)], axis=1)

    def order(self, length: int, dealt: bool) -> np.ndarray:
        """The positions that the devices have, one device after the other: [length]."""
        runs = np.arange(length).reshape(2 * self.count, -1) if dealt else np.arange(length)
        if not dealt:
            return runs
        # Of each device first the run that came from a first half, as `dealt` leaves them.
        of_device = [sorted((i, 2 * self.count - 1 - i), key=lambda h: h % 2) for i in range(self.count)]
        return np.concatenate([runs[h] for pair in of_device for h in pair])

    def handed_on(
        self, step: Callable[[Tree, Tree], tuple[Tree, Tree]], state: Tree, inputs: Tree
    ) -> tuple[Tree, Tree]:
        """A recurrence that cannot be split: each part begins with the state in which the part before it ended.

        Rows are independent: while one device is at a row, the next is at the row before, so that B rows take
        B + P - 1 turns instead of B P.

        Args:
          step: `(state, inputs)` of one row, [1, ...], to the state after this device's positions and the outputs.
          state: before the first position, [B, ...].
          inputs: of this device's positions, [B, ...].

        Returns:
          the state after the last position, and this device's outputs [B, ...].
        """
        rows, index = jax.tree.leaves(inputs)[0].shape[0], self.index()
        pick = lambda tree, row: jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1, 0), tree)

        def turn(arriving: Tree, t: jax.Array) -> tuple[Tree, Tree]:
            row = jnp.clip(t - index, 0, rows - 1)
            begin = (index == 0) | (t < index)  # before its first row a device has nothing to do: it must stay finite
            before = jax.tree.map(lambda a, b: jnp.where(begin, a, b), pick(state, row), arriving)
            after, out = step(before, pick(inputs, row))
            return self.previous(after), (after, out)

        first = jax.tree.map(lambda a: jnp.zeros_like(a[:1]), state)
        _, (after, out) = jax.lax.scan(turn, first, jnp.arange(rows + self.count - 1))
        mine = lambda a: jax.lax.dynamic_slice_in_dim(a[:, 0], index, rows, 0)
        return self.of_last(jax.tree.map(mine, after)), jax.tree.map(mine, out)


def parts() -> Parts | None:
    """Inside `partition.local`: how the positions are split; None where a device has all of them."""
    split = partition.here("seq")
    if split is None:
        return None
    (name,) = split.names
    return Parts(name, split.count)


def split(length: int) -> bool:
    """Whether `local` will split `length` positions over devices."""
    ways = partition.ways("seq")
    return ways > 1 and length % ways == 0


def deals(mask: Mask, length: int) -> bool:
    """Whether a device's `length` queries are dealt out: those that stand later see more keys."""
    return mask.causal and mask.window is None and length % 2 == 0


def attend(
    run: Callable[..., tuple[jax.Array, ...]],
    queries: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    sinks_H: jax.Array | None,
    mask: Mask,
    *,
    static: bool = False,
    ranks: tuple[int, ...] = (4,),
) -> tuple[jax.Array, ...]:
    """Attention on each device's own batch, heads and queries, against all keys, which are gathered.

    Args:
      run: `(queries, keys, sinks, mask)` to a tuple of arrays [B, T, H, ...] like the queries. Where these are split,
        query t of a device is not key t, and the mask is of intervals alone.
      queries: each [B, T, H, ...].
      keys: keys, values and the like, each [B, S, K, d] or [B, S].
      sinks_H: one for each query head, or None.
      mask: of the whole sequence.
      static: whether `run` wants the static part of the mask as it is, and finds out itself which queries it has.
      ranks: numbers of axes of what `run` returns.
    """
    (T, H), (S, K) = queries[0].shape[1:3], keys[0].shape[1:3]
    seq = "seq" if split(T) else None
    dealing = bool(seq) and deals(mask, T // partition.ways("seq"))
    if seq and not static:
        mask = Mask(*mask.bounds(T, S))
    # Groups of query heads stay with their key head: both are split alike, or neither; a lone key head is everybody's.
    n_heads = partition.ways("heads")
    whole = H % n_heads or (K % n_heads and K > 1)
    q_heads, kv_heads = None if whole else "heads", None if whole or K == 1 else "kv_heads"
    k_seq = seq if S % partition.ways("seq") == 0 else None
    of_queries, of_keys = ("batch", seq, q_heads, None), ("batch", k_seq, kv_heads, None)
    n = len(queries)

    def on_device(*arrays: Any) -> tuple[jax.Array, ...]:
        queries, keys, (sinks, start, end) = arrays[:n], arrays[n:-3], arrays[-3:]
        deal = lambda x, back=False: x
        if k_seq:
            keys = tuple(map(parts().gathered, keys))
        if dealing:
            deal = parts().dealt
        bounds = (None if x is None else deal(x) for x in (start, end))
        part = Mask(*bounds, causal=mask.causal, window=mask.window, documents=mask.documents)
        return tuple(deal(o, back=True) for o in run(tuple(map(deal, queries)), keys, sinks, part))

    arrays = (*queries, *keys, sinks_H, mask.k_start, mask.k_end)
    rows = ("batch", seq)
    axes = (*(of_queries[: x.ndim] for x in queries), *(of_keys[: x.ndim] for x in keys), (q_heads,), rows, rows)
    return partition.local(on_device, arrays, axes, [of_queries[:rank] for rank in ranks])
