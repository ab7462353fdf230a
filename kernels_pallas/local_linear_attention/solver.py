"""A tile of rows on chip: softmax weights against all keys that its rows see, and conjugate gradients with them.

Everything is transposed, keys by rows and channels by rows, so that numbers of a row take one lane, and sums over keys
or channels are plain operations on registers. Weights of the tile stay in fast memory, so that an iteration is two
products with the keys and no more: `t = k . y - mean . y`, and `sum p t k`.

The matrix unit multiplies bfloat16. Keys are that already where inputs are; directions are rounded to it before
anything is made of them, so that products with them are exact and steps, residuals and solutions agree; weights times
`t` go as two bfloat16 numbers, the second what the first leaves. Float32 inputs are multiplied in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.tpu_plan import HIDDEN, Plan, in_bounds
from kernels_pallas.local_linear_attention.plan import Solver
from kernels_pallas.mosaic import product

ALL = slice(None)
TOP, TOTAL, SQUARE, ENOUGH, COUNT, CENTRE, SECOND_CENTRE, MEAN = range(8)  # rows of "numbers"


def pieces(x, dtype) -> list[Any]:
    """Numbers of a dtype that add up to the float32 x, to twice its digits."""
    if dtype == jnp.float32:
        return [x]
    first = x.astype(dtype)
    return [first, (x - first.astype(jnp.float32)).astype(dtype)]


def over_rows(x):
    """Sum over channels, [1, rows]."""
    return x.sum(0, keepdims=True)


class RowTile:
    """One tile of rows against its key tiles; `refs` hold what `scratch` and the kernels ask for."""

    def __init__(self, plan: Plan, solver: Solver, refs: dict[str, Any], bounds: tuple):
        self.plan, self.solver, self.refs = plan, solver, refs
        self.first, _, _, self.end, _ = bounds
        blocks = plan.blocks
        self.row_parts = [slice(r, r + blocks.sub_rows) for r in range(0, blocks.rows, blocks.sub_rows)]
        self.key_parts = [slice(c, c + blocks.sub_keys) for c in range(0, blocks.keys, blocks.sub_keys)]

    def number(self, n: int, rows: slice = ALL):
        return self.refs["numbers"][n : n + 1, rows]

    def keep(self, n: int, x, rows: slice = ALL) -> None:
        self.refs["numbers"][n : n + 1, rows] = x

    def at(self, tile, part: slice):
        """Where those keys of a tile are."""
        blocks = self.plan.blocks
        return pl.ds(pl.multiple_of(tile * blocks.keys + part.start, blocks.sub_keys), blocks.sub_keys)

    def each(self, work: Callable[[Any, slice], None]) -> None:
        """`work(tile, rows)` for all key tiles and parts of the rows."""

        def turn(tile, carry):
            for rows in self.row_parts:
                work(tile, rows)
            return carry

        lax.fori_loop(self.first, self.end, turn, 0)

    def sweep(self, name: str, ask: Callable[..., None], finish: Callable[..., Any]) -> None:
        """Sums `finish(tile, slot, keys, rows)` over all keys, in refs[name].

        What it needs `ask(tile, slot, keys, rows)` has put into the slot: that of the next tile in one block of code
        with the end of the one before, part by part, so that nothing waits for products. Slots are 0 and 1 in turn.
        """
        r, count = self.refs, self.end - self.first
        r[name][...] = jnp.zeros_like(r[name])

        def block(tile, slot: int, finishes: bool, following=None) -> None:
            for rows in self.row_parts:
                total = None
                for keys in self.key_parts:
                    if following is not None:
                        ask(following, slot ^ finishes, keys, rows)
                    if finishes:
                        more = finish(tile, slot, keys, rows)
                        total = more if total is None else total + more
                if finishes:
                    r[name][:, rows] += total

        def turn(u, carry):
            tile = self.first + 2 * u
            block(tile, 0, True, tile + 1)
            # Behind the last tile it is asked for once more, which costs less than code without it.
            block(tile + 1, 1, True, jnp.minimum(tile + 2, self.end - 1))
            return carry

        @pl.when(count > 0)
        def _():
            block(None, 0, False, self.first)
            lax.fori_loop(0, count >> 1, turn, 0)
            pl.when(count & 1 == 1)(lambda: block(self.end - 1, 0, True))

    def logits(self, tile, keys: slice, rows: slice):
        """In log2 units, [keys, rows]; hidden ones `HIDDEN`."""
        plan, r = self.plan, self.refs
        s = product(r["k"][self.at(tile, keys), :], r["qs"][rows, :], 1, 1)
        if plan.low or plan.high:
            low = r["bounds"][0:1, rows] if plan.low else None
            high = r["bounds"][1:2, rows] if plan.high else None
            key = tile * plan.blocks.keys + keys.start + lax.broadcasted_iota(jnp.int32, s.shape, 0)
            s = jnp.where(in_bounds(key, low, high), s, HIDDEN)
        return s

    def along(self, tile, keys: slice, vectors: list[Any]):
        """`k . y`, [keys, rows], y the sum of some vectors [channels, rows]."""
        k = self.refs["k"][self.at(tile, keys), :]
        if len(vectors) == 1:
            return product(k, vectors[0], 1, 0)
        if k.shape[1] % 128 == 0:  # one product, as deep as the matrix units of v6e and TPU7x are
            return product(jnp.concatenate([k] * len(vectors), 1), jnp.concatenate(vectors, 0), 1, 0)
        return sum(product(k, y, 1, 0) for y in vectors)

    def of_keys(self, tile, keys: slice, weights):
        """`sum weights k` over those keys, [channels, rows]."""
        k_t = self.refs["k_t"][tile, :, keys]
        return sum(product(k_t, w, 1, 0) for w in pieces(weights, k_t.dtype))

    def add_of_keys(self, name: str, tile, rows: slice, weights: Callable[[slice], Any]) -> None:
        """Adds `sum weights k` over a tile to a sum of that name."""
        self.refs[name][:, rows] += sum(self.of_keys(tile, keys, weights(keys)) for keys in self.key_parts)

    def begin(self) -> None:
        """Queries of the tile, scaled, and no sums."""
        plan, r = self.plan, self.refs
        q = r["q"][...]
        r["qs"][...] = (q.astype(jnp.float32) * plan.fold).astype(q.dtype)
        r["mean"][...] = jnp.zeros_like(r["mean"])

    def solve(self):
        """Solves `(sum p (k - mean)(k - mean)^T + ridge) x = b`, b in "residual", x to "solution"; iterations run.

        A row is left as it is from the iteration on at which it is done; the loop is left when all rows are.
        """
        r = self.refs
        b = r["residual"][...]
        square = over_rows(b * b)
        r["solution"][...] = jnp.zeros_like(b)
        r["direction"][...] = b.astype(r["direction"].dtype)
        self.keep(SQUARE, square)
        self.keep(ENOUGH, square * self.solver.tolerance**2)
        self.keep(COUNT, jnp.zeros_like(square))

        def iterate(carry):
            self.covariance()
            return carry[0] + 1, self.step()

        unfinished = lambda carry: (carry[0] < self.solver.iterations) & (carry[1] > 0)
        busy = jnp.max(jnp.where(square > self.number(ENOUGH), 1.0, 0.0))
        return lax.while_loop(unfinished, iterate, (jnp.int32(0), busy))[0]

    def covariance(self) -> None:
        """`sum p (k - mean)(k - mean)^T y` of the direction y, in "image"."""
        r = self.refs
        self.keep(CENTRE, over_rows(r["mean"][...] * r["direction"][...].astype(jnp.float32)))

        def ask(tile, slot: int, keys: slice, rows: slice) -> None:
            r["fits"][slot, keys, rows] = self.along(tile, keys, [r["direction"][:, rows]])

        def finish(tile, slot: int, keys: slice, rows: slice):
            around = r["fits"][slot, keys, rows] - self.number(CENTRE, rows)
            return self.of_keys(tile, keys, r["weights"][tile, keys, rows] * around)

        self.sweep("image", ask, finish)

    def step(self):
        """One step along the direction, and the next direction; above 0 where any row is not done."""
        return functools.reduce(jnp.maximum, [self.step_of(rows) for rows in self.row_parts])

    def step_of(self, rows: slice):
        r = self.refs
        y, residual = r["direction"][:, rows].astype(jnp.float32), r["residual"][:, rows]
        square, enough = self.number(SQUARE, rows), self.number(ENOUGH, rows)
        image = r["image"][:, rows] + r["ridge"][:, rows] * y
        curvature = over_rows(y * image)
        # Rounding can make the curvature of a direction of almost no length zero or negative.
        live = (square > enough) & (curvature > 0)
        step = jnp.where(live, over_rows(residual * y) / jnp.where(live, curvature, 1.0), 0.0)
        r["solution"][:, rows] += step * y
        residual -= step * image
        r["residual"][:, rows] = residual
        new = over_rows(residual * residual)
        ratio = jnp.where(live, new / jnp.where(live, square, 1.0), 0.0)
        r["direction"][:, rows] = jnp.where(live, residual + ratio * y, y).astype(r["direction"].dtype)
        new = jnp.where(live, new, square)
        self.keep(SQUARE, new, rows)
        self.keep(COUNT, self.number(COUNT, rows) + jnp.where(live, 1.0, 0.0), rows)
        return jnp.max(jnp.where(new > enough, 1.0, 0.0))

    def relative_residual(self):
        """Of the last system solved, [1, rows]."""
        enough = self.number(ENOUGH)
        square = enough / self.solver.tolerance**2
        return jnp.sqrt(self.number(SQUARE) / jnp.where(square > 0, square, 1.0))


def turn_keys(refs: dict[str, Any], names: dict[str, str]) -> None:
    """Keys or values of a head, [keys, width], tile by tile as [width, keys]."""

    def turn(tile, carry):
        for name, to in names.items():
            tiles, _, keys = refs[to].shape
            at = pl.ds(pl.multiple_of(tile * keys, keys), keys)
            refs[to][tile] = refs[name][at, :].T
        return carry

    first = next(iter(names.values()))
    lax.fori_loop(0, refs[first].shape[0], turn, 0)
