"""A chunk in which every channel decays at its own rate: pairs of positions meet at a place between them.

A weight of a pair is to be a product of one of either position, channel by channel, for all pairs to be a product of
matrices. Blocks of 1, 2, 4, ... positions are joined two by two; pairs across a joint meet there: the later one has
what passes from the joint to it, the earlier one what passes from it to the joint. Both are 1 or less at any decay, and
no sum of logarithms is a difference. `attnlab.ops.channel_decay` is the same in XLA.

Rows that ask of keys are the queries, and where keys ask of earlier ones (the delta rule's overlaps) they, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.linear_recurrence.chunk import Masks, Step, iota, over_lanes, over_sublanes
from kernels_pallas.mosaic import product

_SUBLANES = 8
_TILE = 16  # sublanes of bfloat16
Tiles = list[jax.Array]  # of so many rows


class Decays:
    """What passes in a chunk.

    Attributes, the last three of them once `joints` has ended:
      logs: to base 2, [C, d] float32; C is 16 times a power of two.
      read: [C, d], of the state before the chunk to a position.
      write: [C, d], of a position to the state after the chunk.
      kept: [1, d], of the state before in the state after.
    """

    def __init__(self, logs: jax.Array, masks: Masks):
        self.logs, self.masks = logs, masks

    def joints(self, *arrays: jax.Array) -> Iterator[tuple[int, Tiles, list[Tiles]]]:
        """By the size of the blocks that are joined: what passes to a position from the joint before it, or from it to
        the joint behind, and arrays [C, d] times that, in their dtypes.

        All are tiles of 16 positions: blocks that lie in one are joined while it is in registers.
        """
        logs, rows = _tiles(self.logs), [_tiles(x) for x in arrays]
        found: dict[int, tuple[Tiles, list[Tiles]]] = {1 << n: ([], [[] for _ in rows]) for n in range(4)}
        weigh = lambda weight, i: [(x[i] * weight).astype(x[i].dtype) for x in rows]
        # Of a position's block: the sums up to it, behind it, and of all, which all its rows have.
        upto, behind, total = list(logs), [jnp.zeros_like(x) for x in logs], list(logs)
        for i in range(len(logs)):
            for size, (weights, products) in found.items():
                weights.append(jnp.exp2(_either(behind[i], upto[i], size)))
                for known, new in zip(products, weigh(weights[-1], i)):
                    known.append(new)
                other = _exchanged(total[i], size)
                upto[i] = _either(upto[i], upto[i] + other, size)
                behind[i] = _either(behind[i] + other, behind[i], size)
                total[i] += other
        yield from ((size, *x) for size, x in found.items())
        size = _TILE
        while size < len(logs) * _TILE:
            n = size // _TILE
            second = [i // n % 2 == 1 for i in range(len(logs))]
            weights = [jnp.exp2(u if later else b) for later, u, b in zip(second, upto, behind)]
            yield size, weights, [list(x) for x in zip(*(weigh(w, i) for i, w in enumerate(weights)))]
            other = [total[i // n ^ 1] for i in range(len(logs))]
            upto = [x + more if later else x for later, x, more in zip(second, upto, other)]
            behind = [x if later else x + more for later, x, more in zip(second, behind, other)]
            total, size = [x + y for x, y in zip(total[::2], total[1::2])], 2 * size
        read, write = (jnp.exp2(jnp.concatenate(x)) for x in (upto, behind))
        kept = jnp.exp2(total[0][:1])
        if self.masks.read is not None:
            read, write, kept = (jnp.where(mask, x, 0) for mask, x in zip(self.masks[1:4], (read, write, kept)))
        self.read, self.write, self.kept = read, write, kept


def _tiles(x: jax.Array) -> Tiles:
    return [x[i : i + _TILE] for i in range(0, x.shape[0], _TILE)]


def _either(first: jax.Array, second: jax.Array, size: int) -> jax.Array:
    """Rows of a tile from one or the other: of every two blocks of `size` which they are in."""
    if size == _SUBLANES:
        return jnp.concatenate([first[:size], second[size:]])
    return jnp.where((iota(first.shape, 0) & size) != 0, second, first)


def _exchanged(x: jax.Array, size: int) -> jax.Array:
    """A tile, every two blocks of `size` rows exchanged."""
    if size == _SUBLANES:
        return jnp.concatenate([x[size:], x[:size]])
    turned = lambda by: pltpu.roll(x.reshape(-1, _SUBLANES, x.shape[1]), by, 1).reshape(x.shape)
    return _either(turned(_SUBLANES - size), turned(size), size)


def _half(tiles: Tiles, size: int, second: int) -> jax.Array:
    """Of every two blocks of `size` rows one; all rows, where blocks are smaller than a tile."""
    n = size // _TILE
    return jnp.concatenate([x for i, x in enumerate(tiles) if n == 0 or i // n % 2 == second])


def scores(
    step: Step, decays: Decays, q: jax.Array, k: jax.Array, *, overlaps: bool
) -> Generator[None, None, list[jax.Array]]:
    """[C, C], queries by keys, in phases: of queries, before them of keys with earlier ones if they are asked for."""
    eye = step.row == step.col
    found = [jnp.where(eye, over_lanes(_wide(q) * _wide(k)), 0)]
    found = [jnp.zeros_like(found[0]), *found] if overlaps else found
    for size, _, (met, asked) in decays.joints(k, q):
        asking = [_half(x, size, 1) for x in ((met, asked) if overlaps else (asked,))]
        new = product(jnp.concatenate(asking), jnp.concatenate(met), 1, 1)
        yield
        put, n = functools.partial(_joined, step, size), len(new) // len(found)
        found = [_on_halves(put, size, 1, x, new[i * n : (i + 1) * n]) for i, x in enumerate(found)]
    return [_seen(step, decays, x) for x in found]


class Pairs:
    """Pairs of a chunk in the backward: keys by queries."""

    def __init__(self, step: Step, decays: Decays, k: jax.Array):
        self.step, self.decays, self.k = step, decays, k
        self.weights = {size: weights for size, weights, _ in decays.joints()}

    def scores(self, q: jax.Array, *, overlaps: bool) -> Generator[None, None, list[jax.Array]]:
        """[C, C], in phases: of queries, behind them of keys with earlier ones if they are asked for."""
        step, k, C, dtype = self.step, self.k, self.step.plan.sizes.chunk, self.k.dtype
        self.keys, self.asking = {}, {}  # at joints, by the size of what they join
        found = [jnp.where(step.row == step.col, over_lanes(_wide(q) * _wide(k)), 0)]
        found += [jnp.zeros_like(found[0])] * overlaps
        for size, weights in self.weights.items():
            asked, met = ([(x * w).astype(dtype) for x, w in zip(_tiles(y), weights)] for y in (q, k))
            self.keys[size], self.asking[size] = _half(met, size, 0), jnp.concatenate(asked + met * overlaps)
            new = product(self.keys[size], self.asking[size], 1, 1)
            yield
            put = functools.partial(_joined, step, size)
            found = [_on_halves(put, size, 0, x, new[:, i * C : (i + 1) * C]) for i, x in enumerate(found)]
        return [_seen(step, self.decays, x).astype(dtype) for x in found]

    def gradients(
        self, q: jax.Array, own: jax.Array, *slopes: jax.Array
    ) -> Generator[None, None, tuple[list[jax.Array], jax.Array]]:
        """Of what asks, and of keys that are asked of, [C, d] each, in phases.

        Args:
          own: [C, 1], of scores of a position with itself; in the first of `slopes`, too.
          slopes: of all that `scores` gave.
        """
        C, dtype = self.step.plan.sizes.chunk, q.dtype
        slopes = [_seen(self.step, self.decays, x) for x in slopes]
        asking, written = [own * self.k, *(jnp.zeros(q.shape, jnp.float32) for _ in slopes[1:])], own * q
        add = lambda rows, own, new: own + new
        for size, weights in self.weights.items():
            only = lambda rows, x: _joined(self.step, size, rows, 0.0, x)
            s = jnp.concatenate([_of_halves(only, size, 0, x).astype(dtype) for x in slopes], 1)
            asked, new = product(s, self.keys[size], 0, 0), product(s, self.asking[size], 1, 0)
            yield
            earlier, later = (_half(weights, size, n) for n in (0, 1))
            parts = (_halves(asked[i * C : (i + 1) * C], size, 1) for i in range(len(slopes)))
            asking = [_on_halves(add, size, 1, x, part * later) for x, part in zip(asking, parts)]
            written = _on_halves(add, size, 0, written, new * earlier)
        return asking, written

    def store_decay(self, m: int, h: int, passed: jax.Array, written: jax.Array, kept: jax.Array) -> None:
        """Writes the gradient of the log decays.

        Args:
          passed: [C, d], what a position asks for of what is before it, less what is asked for of what it writes.
          written: [C, d], what is asked for behind the chunk of what it writes.
          kept: [d, e], of the state, before `Decays.kept`.
        """
        step, C = self.step, self.step.plan.sizes.chunk
        kept = step.times_rows(jnp.ones((1, kept.shape[1]), jnp.float32), kept, 1) * self.decays.kept
        behind = over_sublanes(written) + kept
        rest = passed + jnp.where(iota((C, 1), 0) == C - 1, behind, 0)
        mask = step.row <= step.col  # columns: later positions
        if step.plan.documents:  # the first position of a document carries nothing over
            here = step.row + step.start(m)
            mask &= (here >= step.r["starts"][0, m]) & (here != self.decays.masks.begins)
        mask, total = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16), jnp.zeros_like(rest)
        for _ in range(3 if self.k.dtype == jnp.float32 else 2):  # bfloat16 parts
            part = rest.astype(jnp.bfloat16)
            total, rest = total + product(mask, part, 1, 0), rest - part
        step.store("dlogs", m, h, total)


def _seen(step: Step, decays: Decays, x: jax.Array) -> jax.Array:
    """Pairs of one document."""
    return jnp.where(decays.masks.pairs, x, 0) if step.plan.documents else x


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _halves(x: jax.Array, size: int, second: int) -> jax.Array:
    """The first or the second of every two blocks of `size` rows; all rows, where blocks are smaller than a tile."""
    return _of_halves(lambda at, own: own, size, second, x)


def _of_halves(change: Callable[..., jax.Array], size: int, second: int, x: jax.Array) -> jax.Array:
    """`change(rows, own)` of these."""
    if size < _TILE:
        return change(slice(None), x)
    at = (slice(i, i + size) for i in range(size * second, x.shape[0], 2 * size))
    return jnp.concatenate([change(rows, x[rows]) for rows in at])


def _on_halves(change: Callable[..., jax.Array], size: int, second: int, x: jax.Array, new: jax.Array) -> jax.Array:
    """`x` with `change(rows, own, new)` in place of these; `new` has their rows only."""
    if size < _TILE:
        return change(slice(None), x, new)
    blocks, news = ([y[i : i + size] for i in range(0, y.shape[0], size)] for y in (x, new))
    for n, i in enumerate(range(second, len(blocks), 2)):
        blocks[i] = change(slice(i * size, (i + 1) * size), blocks[i], news[n])
    return jnp.concatenate(blocks)


def _joined(step: Step, size: int, rows: slice, own: jax.Array | float, new: jax.Array) -> jax.Array:
    """Rows of pairs with `new` for those that meet at joints of blocks of `size`."""
    return jnp.where(step.meets[rows] == size, new, own)
