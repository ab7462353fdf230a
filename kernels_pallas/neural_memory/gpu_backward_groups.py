"""Gradients of queries, keys and gates on Hopper, of all groups at once: a warpgroup makes a group's.

`gpu_forward.again` left the state before the group and its errors, `gpu_backward` the gradients of the state after it
and of the steps. Tiles of 64 of the memory's outputs are taken one after the other, first for the queries, then for the
keys.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.hopper import added, barriers
from kernels_pallas.neural_memory import gpu_numbers
from kernels_pallas.neural_memory.gpu_group import (
    PAIRS,
    E,
    Group,
    Shape,
    columns,
    each_state,
    load,
    numbers_memory,
    product,
    put,
)
from kernels_pallas.neural_memory.gpu_numbers import AFTER, BEFORE, LAST_KAPPA, LAST_MOVED, ROWS

NAME = "neural_memory_backward_groups"
F32 = jnp.float32
# Rows of what is found of positions: gradients of their numbers (`gpu_numbers`), those of logarithms without the factor
# log 2; of MOVED in two parts; and, summed over 64, of how much of W is in W after the group, of S in W, of S in S.
KEPT, MOVED, MOVED_AS_OLDER, READ, EARLY, THETA, RHO_READ, RHO_EARLY, KAPPA, LEFT, BETA, RHO, H = range(13)
FOUND = 13


def backward_groups(shape: Shape, q, k, dy, numbers, table, bounds, errors, states, dsteps, dstates, dsaid):
    """dq, dk [B, T, H, d] in the dtype of q, and numbers [B, H, N, FOUND, 64] float32 of the groups that there are.

    Args: as of `gpu_forward.forward` and `gpu_backward.backward`, and what they leave; with a norm dy is what
      the matrix reads of queries gets (`dread`), and dsaid what it says of keys; without one that is None.
    """
    (B, _, H, d), N, of = q.shape, table.shape[1], jax.ShapeDtypeStruct
    pair, wide, tile = shape.tile(), shape.tile(width=d), shape.tile()
    out = plgpu.SMEM((ROWS, d), shape.dtype)
    run = shape.device.kernel(
        NAME,
        _Groups(shape).body,
        by_lanes=True,
        sums_bytes=4 * ROWS * 4,  # a column's sum of each warp
        out_type=[of(q.shape, q.dtype), of(q.shape, q.dtype), of((B, H, N, FOUND, ROWS), F32)],
        scratch_types={
            "q_s": wide, "k_s": wide, "numbers_s": numbers_memory(), "error_s": tile, "dstep_s": tile, "dy_s": tile,
            "state_s": shape.states(), "dstate_s": shape.states(), "step_s": tile, "moved_s": pair, "asked_s": pair,
            "kept_s": [pair, pair][: shape.several + 1], "dkappa_s": [pair, pair][: shape.several + 1],
            "dq_s": out, "dk_s": out, "found_s": plgpu.SMEM((FOUND, ROWS), F32), "here": barriers(1, 3),
            "tile_here": barriers(1, 7 + shape.normed), "dsaid_s": tile if shape.normed else None,
        },
        grid=(N, H, B),
        grid_names=("n", "h", "b"),
    )  # fmt: skip
    return run(q, k, dy, numbers, table, bounds, errors, states, dsteps, dstates, dsaid, hopper.hidden_zero())


@dataclasses.dataclass(frozen=True)
class _Groups:
    """What a launch's code is made from."""

    shape: Shape

    def body(
        self, q, k, dy, numbers, table, bounds, errors, states, dsteps, dstates, dsaid, zero, dq, dk, found,
        **scratch: Any,
    ) -> None:  # fmt: skip
        n, h, b = (lax.axis_index(name) for name in ("n", "h", "b"))
        t = types.SimpleNamespace(
            q=q, k=k, dy=dy, numbers=numbers, errors=errors, states=states, dsteps=dsteps, dstates=dstates,
            dsaid=dsaid, table=table, dq=dq, dk=dk, found=found, n=n, h=h, b=b, zero=zero[0], phase=0, **scratch,
        )  # fmt: skip
        t.group = Group(self.shape, table, b, n, t.numbers_s)
        pl.when(n < bounds[b, bounds.shape[1] - 1])(lambda: self.run(t))

    def group(self, t: Any) -> Group:
        """The group for one step more: nothing that the compiler made of it before lives on in registers."""
        t.phase += 1
        zero = lax.min(t.n + t.phase, t.zero)
        return Group(self.shape, t.table, t.b, t.n, t.numbers_s, zero, zero)

    def fetch(self, t: Any, j: int) -> None:
        """A tile of outputs."""
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, t.tile_here.at[0])
        rows = [(t.errors, t.error_s), (t.dsteps, t.dstep_s), (t.dy, t.dy_s)]
        rows += [(t.dsaid, t.dsaid_s)] if self.shape.normed else []
        for source, target in rows:
            copy(source.at[t.b, t.group.rows, t.h, columns(j)], target)
        each_state(copy, t.states.at[t.b, t.h, t.group.of(BEFORE), :, :, columns(j)], t.state_s)
        each_state(copy, t.dstates.at[t.b, t.h, t.group.of(AFTER), :, :, columns(j)], t.dstate_s)

    def run(self, t: Any) -> None:
        device, group, tiles, dtype = self.shape.device, t.group, self.shape.d // E, self.shape.dtype
        for source, target in ((t.q, t.q_s), (t.k, t.k_s)):
            plgpu.copy_gmem_to_smem(source.at[t.b, group.rows, t.h], target, t.here.at[0])
        plgpu.copy_gmem_to_smem(t.numbers.at[t.b, t.h, :, group.rows], t.numbers_s, t.here.at[0])
        self.fetch(t, 0)
        plgpu.barrier_wait(t.here.at[0])
        t.moved_s[...] = group.moved().astype(dtype)
        start = device.zeros(ROWS, self.shape.d), device.zeros(*PAIRS)
        zeros = lambda count: (device.full(ROWS, 0.0),) * count
        carry = *start, *zeros(2)
        for j in range(tiles):
            self.arrive(t, j, again=j > 0)
            carry = self.queries(t, *carry)
        older = self.pairs_of_queries(t, *carry)
        carry = *start, zeros(8)
        for j in reversed(range(tiles)):
            if j < tiles - 1:
                self.arrive(t, j, again=True)
            carry = self.keys(t, *carry)
        self.pairs_of_keys(t, older, *carry)
        plgpu.copy_smem_to_gmem(t.found_s, t.found.at[t.b, t.h, t.n])
        group.store(t.dq_s, t.dq.at[t.b, :, t.h])
        group.store(t.dk_s, t.dk.at[t.b, :, t.h])
        plgpu.wait_smem_to_gmem(0)

    def arrive(self, t: Any, j: int, again: bool) -> None:
        """Waits for a tile, which replaces another if `again`; puts its steps into memory."""
        if again:
            plgpu.commit_smem()  # orders what was read before the copies over it
            self.fetch(t, j)
        plgpu.barrier_wait(t.tile_here.at[0])
        group = self.group(t)
        put(t.step_s, group.masked(load(self.shape, t.error_s) * group.per_row(gpu_numbers.THETA)))

    def queries(self, t: Any, dq: jax.Array, slopes: jax.Array, dread: jax.Array, drho: jax.Array) -> tuple:
        """Adds a tile of outputs: to dq by the state, to the gradient of near weights, and to those of far ones."""
        device, group, narrow = self.shape.device, self.group(t), lambda x: x.astype(self.shape.dtype)
        asked = group.masked(load(self.shape, t.dy_s))
        by_w, by_s = asked * jnp.exp2(group.per_row(gpu_numbers.READ)), asked * group.per_row(gpu_numbers.RHO_READ)
        dq = added(device, dq, (narrow(by_w), t.state_s.at[0].T), (narrow(by_s), t.state_s.at[1].T))
        slopes = added(device, slopes, (narrow(asked), t.step_s.T))
        dread += (by_w * product(device, t.q_s, t.state_s.at[0], PAIRS)).sum(axis=1)
        drho += (asked * product(device, t.q_s, t.state_s.at[1], PAIRS)).sum(axis=1)
        return dq, slopes, dread, drho

    def pairs_of_queries(
        self, t: Any, dq: jax.Array, slopes: jax.Array, dread: jax.Array, drho: jax.Array
    ) -> jax.Array:
        """The rest of dq; what READ asks of KEPT."""
        device, rate = self.shape.device, self.shape.rate
        scored = product(device, t.q_s, t.k_s.T, PAIRS)
        dkappa = -rate * slopes * scored
        dscored = self.group(t).near(t.moved_s, slopes, early=False)
        t.asked_s[...] = dscored
        t.dq_s[...] = added(device, dq, (dscored, t.k_s)).astype(self.shape.dtype)
        newer, older = self.of_kappa(t, 0, dkappa)
        t.found_s.at[READ][...] = newer + dread
        t.found_s.at[RHO_READ][...] = drho
        return older

    def of_kappa(self, t: Any, index: int, dkappa: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the gradient of a kappa is for logarithms of what is kept, of rows and of columns."""
        device, narrow = self.shape.device, dkappa.astype(self.shape.dtype)
        kept = self.group(t).kept(early=index == 1)
        t.kept_s[index][...] = kept.astype(self.shape.dtype)
        put(t.dkappa_s[index], narrow)
        x = kept * product(device, narrow, t.moved_s.T, PAIRS)
        return x.sum(axis=1), x.sum(axis=0)

    def keys(self, t: Any, dk: jax.Array, slopes: jax.Array, sums: tuple[jax.Array, ...]) -> tuple:
        """Adds a tile of outputs: to dk by both states, to the gradient of near weights, and to sums of positions."""
        device, group, narrow = self.shape.device, self.group(t), lambda x: x.astype(self.shape.dtype)
        (w, s), (dw, ds) = ([x.at[i] for i in range(2)] for x in (t.state_s, t.dstate_s))
        theta, early, rho, kappa, left, *ends = sums
        learned = lambda state: product(device, t.k_s, state, PAIRS)
        dstep = load(self.shape, t.dstep_s)
        theta += (dstep * load(self.shape, t.error_s)).sum(axis=1)
        dz = load(self.shape, t.dsaid_s) if self.shape.normed else dstep * group.per_row(gpu_numbers.THETA)
        dz = group.masked(dz)
        by_w = dz * jnp.exp2(group.per_row(gpu_numbers.EARLY))
        dk = added(device, dk, (narrow(by_w), w.T))
        early += (by_w * learned(w)).sum(axis=1)
        if self.shape.several:
            dk = added(device, dk, (narrow(dz * group.per_row(gpu_numbers.RHO_EARLY)), s.T))
            rho += (dz * learned(s)).sum(axis=1)
            slopes = added(device, slopes, (narrow(dz), t.step_s.T))
        step = -self.shape.rate * load(self.shape, t.step_s)
        dk = added(device, dk, (narrow(step * group.per_row(LAST_KAPPA)), dw.T))
        kappa += (step * learned(dw)).sum(axis=1)
        dk = added(device, dk, (narrow(step * group.per_row(LAST_MOVED)), ds.T))
        left += (step * learned(ds)).sum(axis=1)
        for i in range(self.shape.d // ROWS):
            at = pl.ds(i * ROWS, ROWS)
            for index, (a, b) in enumerate(((dw, w), (dw, s), (ds, s))):
                ends[index] += (load(self.shape, a.at[at]) * load(self.shape, b.at[at])).sum(axis=1)
        return dk, slopes, (theta, early, rho, kappa, left, *ends)

    def pairs_of_keys(self, t: Any, older: jax.Array, dk: jax.Array, slopes: jax.Array, sums: tuple) -> None:
        """The rest of dk, and of what is found."""
        device, rate, dtype = self.shape.device, self.shape.rate, self.shape.dtype
        theta, early, *rest = sums
        dk = added(device, dk, (t.asked_s.T, t.q_s))
        if self.shape.several:
            dkappa = -rate * slopes * product(device, t.k_s, t.k_s.T, PAIRS)
            newer, older_ = self.of_kappa(t, 1, dkappa)
            early, older = early + newer, older + older_
            dscored = self.group(t).near(t.moved_s, slopes, early=True)
            put(t.dy_s, dscored)
            dk = added(device, dk, (dscored, t.k_s), (t.dy_s.T, t.k_s))
        t.dk_s[...] = dk.astype(dtype)
        pairs = [(kept.T, dkappa) for kept, dkappa in zip(t.kept_s, t.dkappa_s)]
        x = self.group(t).moved() * added(device, device.zeros(*PAIRS), *pairs)
        found = {MOVED: x.sum(axis=1), MOVED_AS_OLDER: -x.sum(axis=0), KEPT: -older, THETA: theta, EARLY: early}
        found |= dict(zip((RHO_EARLY, KAPPA, LEFT, BETA, RHO, H), rest))
        for row, numbers in found.items():
            t.found_s.at[row][...] = numbers
        plgpu.commit_smem()
