"""The forward on TPU: a tile of rows stands in fast memory while the whole embedding goes by."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import tuning
from kernels_pallas.cross_entropy.plan import LANES, Plan, part, two_by_two
from kernels_pallas.mosaic import Slots, product

NAME, VALUE = "cross_entropy_forward", "cross_entropy_value"  # with the sums for the gradient, and without
_HIDDEN = -1e30  # a logit that there is not
_SUMS = "total", "right", "acc"


class Tile:
    """A tile of rows against a tile of columns of the embedding."""

    def __init__(self, plan: Plan, r: dict[str, Any]):
        self.plan, self.r = plan, r
        self.tile = pl.program_id(1)  # not inside `pl.when`, where the interpreter does not know it
        self.ragged = plan.shape[2] % plan.sizes.columns != 0
        self.kernel = r["kernel"][...]
        if self.ragged:  # anything may stand behind the last column
            self.kernel = jnp.where(self.column((1, plan.sizes.columns)) < plan.shape[2], self.kernel, 0)

    def column(self, shape: tuple[int, int]) -> jax.Array:
        """Of the embedding."""
        return self.tile * self.plan.sizes.columns + lax.broadcasted_iota(jnp.int32, shape, 1)

    def run(self) -> None:
        """Everything."""
        pl.when(self.tile == 0)(self.begin)
        two_by_two(self.plan.sizes.rows, self.ask, self.finish)
        pl.when(self.tile == self.plan.forward_tiles[1] - 1)(self.end)

    def begin(self) -> None:
        """What is summed over the tiles of columns, and the rows' targets along sublanes."""
        r = self.r
        r["peak"][...] = jnp.full_like(r["peak"], _HIDDEN)
        for name in _SUMS:
            if name in r:
                r[name][...] = jnp.zeros_like(r[name])
        targets = r["targets"][...]
        r["own"][...] = jnp.broadcast_to(targets, (8, targets.shape[1])).T[:, :1]

    def rows(self, first: Any) -> Any:
        """A part's."""
        size = part(self.plan.sizes.rows)
        return pl.ds(pl.multiple_of(first, size), size)

    def ask(self, first: Any) -> jax.Array:
        """A part's logits."""
        return product(self.r["hidden"][self.rows(first), :], self.kernel, 1, 0)

    def finish(self, first: Any, logits: jax.Array) -> None:
        """Adds what they say."""
        r, rows, column = self.r, self.rows(first), self.column(logits.shape)
        if self.ragged:
            logits = jnp.where(column < self.plan.shape[2], logits, _HIDDEN)
        before = r["peak"][rows, :]
        peak = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        shrink, p = jnp.exp(before - peak), jnp.exp(logits - peak)
        here = column == r["own"][rows, :]
        r["peak"][rows, :] = peak
        r["total"][rows, :] = r["total"][rows, :] * shrink + jnp.sum(p, axis=1, keepdims=True)
        r["right"][rows, :] += jnp.sum(jnp.where(here, logits, 0), axis=1, keepdims=True)
        if "acc" in r:
            others = jnp.where(here, 0, p).astype(self.kernel.dtype)
            r["acc"][rows, :] = r["acc"][rows, :] * shrink + product(others, self.kernel, 1, 1)

    def end(self) -> None:
        """What the tiles came to."""
        r = self.r
        along = lambda column: jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]
        r["lse"][...] = along(r["peak"][...] + jnp.log(r["total"][...]))
        r["logit"][...] = along(r["right"][...])
        if "acc" in r:
            r["others"][...] = (r["acc"][...] / r["total"][...]).astype(r["others"].dtype)


def _kernel(plan: Plan, names: tuple[str, ...], *refs) -> None:
    Tile(plan, dict(zip(names, refs, strict=True))).run()


def run(plan: Plan, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, *, save: bool) -> dict[str, jax.Array]:
    """`lse` and `logit` [N] of `kernels_pallas.cross_entropy.gradient`; with `save` also `others` [N, D]."""
    (N, D, V), s = plan.shape, plan.sizes
    slots = Slots()
    of_rows = pl.BlockSpec((s.rows, D), lambda i, j: (i, 0))
    along = pl.BlockSpec((1, s.rows), lambda i, j: (0, i))
    slots.input("hidden", hidden, of_rows)
    slots.input("kernel", kernel, pl.BlockSpec((D, s.columns), lambda i, j: (0, j)))
    slots.input("targets", targets[None], along)
    for name in ("lse", "logit"):
        slots.output(name, (1, N), jnp.float32, along)
    if save:
        slots.output("others", (N, D), hidden.dtype, of_rows)
        slots.scratch("acc", (s.rows, D))
    for name in ("peak", "total", "right"):
        slots.scratch(name, (s.rows, 1))
    slots.scratch("own", (s.rows, 1), jnp.int32)
    moved = hidden.dtype.itemsize * D * (N * (1 + save) + V * plan.forward_tiles[0]) + 3 * 4 * N
    out = slots.call(
        functools.partial(_kernel, plan, slots.names()),
        grid=plan.forward_tiles,
        semantics=("parallel", "arbitrary"),
        name=NAME if save else VALUE,
        scope="cross_entropy",
        vmem=tuning.vmem_limit(plan.kind),
        interpret=plan.interpret,
        cost=pl.CostEstimate(flops=2 * N * D * V * (1 + save), transcendentals=N * V, bytes_accessed=moved),
    )
    return out | {"lse": out["lse"][0], "logit": out["logit"][0]}
