"""The embedding's gradient on TPU: a tile of the embedding stands in fast memory while all rows go by.

Logits are columns by rows here, so that what is known of a row lies along lanes, as in memory. The tile is turned once,
and its gradient when the last row is done.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import tuning
from kernels_pallas.cross_entropy.plan import Plan, part, two_by_two
from kernels_pallas.mosaic import Slots, product

NAME = "cross_entropy_backward"
_ROWS = "targets", "lse", "scale", "slope"


class Tile:
    """A tile of columns of the embedding against a tile of rows."""

    def __init__(self, plan: Plan, r: dict[str, Any]):
        self.plan, self.r = plan, r
        self.tile, self.step = pl.program_id(0), pl.program_id(1)
        self.hidden = self.seen("hidden", 0)
        self.targets, self.lse, self.scale, self.slope = (self.seen(name, 1) for name in _ROWS)

    def seen(self, name: str, axis: int) -> jax.Array:
        """Zeros behind the last row, where anything may be."""
        x, N, rows = self.r[name][...], self.plan.shape[0], self.plan.sizes.backward_rows
        if N % rows == 0:
            return x
        row = lax.broadcasted_iota(jnp.int32, (rows, 1) if axis == 0 else (1, rows), axis)
        return jnp.where(self.step * rows + row < N, x, 0)

    def run(self) -> None:
        """Everything."""
        pl.when(self.step == 0)(self.begin)
        two_by_two(self.plan.sizes.backward_columns, self.ask, self.finish)
        pl.when(self.step == self.plan.backward_tiles[1] - 1)(self.end)

    def begin(self) -> None:
        """The tile turned, and nothing summed."""
        self.r["turned"][...] = self.r["kernel"][...].T
        self.r["acc"][...] = jnp.zeros_like(self.r["acc"])

    def columns(self, first: Any) -> Any:
        """A part's."""
        size = part(self.plan.sizes.backward_columns)
        return pl.ds(pl.multiple_of(first, size), size)

    def ask(self, first: Any) -> jax.Array:
        """A part's logits."""
        return product(self.r["turned"][self.columns(first), :], self.hidden, 1, 1)

    def finish(self, first: Any, logits: jax.Array) -> None:
        """Adds what they say."""
        first_column = self.tile * self.plan.sizes.backward_columns + first
        column = first_column + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        dlogits = jnp.exp(logits - self.lse) * self.scale + jnp.where(column == self.targets, self.slope, 0)
        self.r["acc"][self.columns(first), :] += product(dlogits.astype(self.hidden.dtype), self.hidden, 1, 0)

    def end(self) -> None:
        """What the rows came to."""
        self.r["dkernel"][...] = self.r["acc"][...].T.astype(self.r["dkernel"].dtype)


def _kernel(plan: Plan, names: tuple[str, ...], *refs) -> None:
    Tile(plan, dict(zip(names, refs, strict=True))).run()


def run(plan: Plan, hidden: jax.Array, kernel: jax.Array, **rows: jax.Array) -> jax.Array:
    """The embedding's gradient [D, V] where that of row n's logits is `scale_n p_n`, and the target's `slope_n` more.

    `rows`: targets, lse, scale and slope, each [N].
    """
    (N, D, V), s = plan.shape, plan.sizes
    slots, column_tiles = Slots(), plan.backward_tiles[0]
    of_columns = pl.BlockSpec((D, s.backward_columns), lambda j, i: (0, j))
    slots.input("hidden", hidden, pl.BlockSpec((s.backward_rows, D), lambda j, i: (i, 0)))
    slots.input("kernel", kernel, of_columns)
    for name in _ROWS:
        slots.input(name, rows[name][None], pl.BlockSpec((1, s.backward_rows), lambda j, i: (0, i)))
    slots.output("dkernel", (D, V), plan.gradient, of_columns)
    slots.scratch("acc", (s.backward_columns, D))
    slots.scratch("turned", (s.backward_columns, D), hidden.dtype)
    itemsize, of_gradient = hidden.dtype.itemsize, jnp.dtype(plan.gradient).itemsize
    moved = D * V * (itemsize + of_gradient) + N * column_tiles * (D * itemsize + 4 * len(_ROWS))
    return slots.call(
        functools.partial(_kernel, plan, slots.names()),
        grid=plan.backward_tiles,
        semantics=("parallel", "arbitrary"),
        name=NAME,
        scope="cross_entropy",
        vmem=tuning.vmem_limit(plan.kind),
        interpret=plan.interpret,
        cost=pl.CostEstimate(flops=4 * N * D * V, transcendentals=N * V, bytes_accessed=moved),
    )["dkernel"]
