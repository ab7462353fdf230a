"""Gradients of queries, keys, strengths and decays on Hopper, of all chunks at once: two warpgroups make one chunk's.

`gpu_forward` left the state before the chunk and the errors in it, `gpu_backward` the gradients of the state after it
and of the values. The first warpgroup makes dq and both matrices of pairs, the second dk.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.delta_rule.gpu_chunk import (
    BETA,
    READ,
    SLOTS,
    WRITE,
    C,
    E,
    chunk,
    numbers_memory,
    pair_weights,
    per_column,
    per_row,
    values,
)
from kernels_pallas.hopper import LAYOUT, ROWS, added, put

NAME = "delta_rule_backward_chunks"
# Rows of what is found per position: what its query asks for, what its key does less what is asked of what it writes,
# the gradient of its strength, and, summed over these rows, what is asked for behind the chunk of what was written in
# it, and of the state before it, not decayed.
ASKED, KEPT, DBETA, WRITTEN, CARRIED = range(5)


def backward_chunks(
    device: hopper.Device,
    q: jax.Array,
    k: jax.Array,
    numbers: jax.Array,
    states: jax.Array,
    errors: jax.Array,
    do: jax.Array,
    dv: jax.Array,
    dstates: jax.Array,
    *,
    documents: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk in the dtype of q, and numbers per position, [B, H, N, 5, C] float32. For the arrays see `gpu_chunk`,
    `gpu_forward` and `gpu_backward`."""
    (B, _, H, d), e, N = q.shape, do.shape[3], numbers.shape[2]
    of = jax.ShapeDtypeStruct
    launch = _Chunks(device, documents, d, e // E, q.dtype)
    run = device.kernel(
        NAME,
        launch.body,
        out_type=[of(q.shape, q.dtype), of(q.shape, q.dtype), of(numbers.shape, jnp.float32)],
        scratch_types=launch.scratch(),
        by_lanes=True,
        grid=(N, H, B),
        grid_names=("n", "h", "b"),
        num_threads=2,
        thread_name="wg",
    )
    return run(q, k, numbers, states, errors, do, dv, dstates)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """What a launch's code is made from; `tiles`: of a head's values."""

    device: hopper.Device
    documents: bool
    d: int
    tiles: int
    dtype: Any

    def scratch(self) -> dict[str, Any]:
        ring = lambda rows: hopper.tiles((SLOTS, rows, E), self.dtype)
        keys, pairs = hopper.tiles((C, self.d), self.dtype), hopper.tiles((C, C), self.dtype)
        return {
            "q_s": keys, "k_s": keys, "dq_s": keys, "dk_s": keys, "numbers_s": numbers_memory(),
            "state_s": ring(self.d), "dstate_s": ring(self.d), "do_s": ring(C), "error_s": ring(C), "dv_s": ring(C),
            "slopes_s": pairs, "turned_s": pairs, "strong_s": pairs, "found_s": numbers_memory(),
            "here": hopper.barriers(1, 3), "tile_here": hopper.barriers(SLOTS, 5),
            "tile_free": hopper.barriers(SLOTS, 2), "pairs_here": hopper.barriers(1),
        }  # fmt: skip

    def body(self, q, k, numbers, states, errors, do, dv, dstates, dq, dk, found, **scratch: Any) -> None:
        n, h, b, wg = (lax.axis_index(name) for name in ("n", "h", "b", "wg"))
        t = types.SimpleNamespace(
            q=q, k=k, numbers=numbers, states=states, errors=errors, do=do, dv=dv, dstates=dstates, dq=dq, dk=dk,
            found=found, n=n, h=h, b=b, **scratch,
        )  # fmt: skip

        @pl.when(wg == 0)
        def _() -> None:
            for j in range(min(SLOTS, self.tiles)):
                self.fetch(t, jnp.int32(j))
            for source, target in ((k, t.k_s), (q, t.q_s)):
                plgpu.copy_gmem_to_smem(source.at[b, chunk(n), h], target, t.here.at[0])
            plgpu.copy_gmem_to_smem(numbers.at[b, h, n], t.numbers_s, t.here.at[0])
            self.queries(t)

        pl.when(wg == 1)(lambda: self.keys(t))

    def fetch(self, t: Any, j: jax.Array) -> None:
        at = j & (SLOTS - 1)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.tile_here.at[at])
        for source, target in ((t.do, t.do_s), (t.errors, t.error_s), (t.dv, t.dv_s)):
            copy(source.at[t.b, chunk(t.n), t.h, values(j)], target)
        for source, target in ((t.states, t.state_s), (t.dstates, t.dstate_s)):
            copy(source.at[t.b, t.h, t.n, :, values(j)], target)

    def over_tiles(self, t: Any, carry: Any, step: Callable[[Any, Any, Any], None], *, fetches: bool) -> Any:
        """`step(slot, accumulators, others)` on each tile of values; `carry` begins both."""

        def follow(j: jax.Array) -> None:
            """Fetches the tile after the j-th into the memory of that before, once both warpgroups have read it."""
            plgpu.barrier_wait(t.tile_free.at[(j - 1) & (SLOTS - 1)])
            pl.when(j + 1 < self.tiles)(lambda: self.fetch(t, j + 1))

        def tile(j: jax.Array, carry: Any) -> Any:
            at = j & (SLOTS - 1)
            if fetches:
                pl.when(j > 0)(lambda: follow(j))
            plgpu.barrier_wait(t.tile_here.at[at])
            accumulators, others = carry
            run = self.device.state(lambda refs: step(at, *refs))
            carry = run((tuple(map(self.device.start, accumulators)), others))
            plgpu.commit_smem()  # orders what was read from the slot before the copies over it
            plgpu.barrier_arrive(t.tile_free.at[at])
            return carry

        carry = lax.fori_loop(0, self.tiles, tile, carry)
        if fetches:
            follow(jnp.int32(self.tiles))
        return carry

    def queries(self, t: Any) -> None:
        """The first warpgroup, which also fetches."""
        device, zeros = self.device, self.device.zeros

        def step(at: jax.Array, accumulators: Any, others: Any) -> None:
            del others
            slopes, turned, dq = accumulators
            device.wgmma(slopes, t.do_s.at[at], t.error_s.at[at].T)
            device.wgmma(turned, t.dv_s.at[at], t.error_s.at[at].T)
            device.wgmma(dq, t.do_s.at[at], t.state_s.at[at].T)

        (slopes, turned, dq), _ = self.over_tiles(
            t, ((zeros(C, C), zeros(C, C), zeros(C, self.d)), ()), step, fetches=True
        )
        plgpu.barrier_wait(t.here.at[0])
        weights, beta = pair_weights(device, t.numbers_s, self.documents), per_column(device, t.numbers_s, BETA)
        slopes = slopes * weights
        t.slopes_s[...] = slopes.astype(self.dtype)
        turned = jnp.where(device.iota((C, C), 0) > device.iota((C, C), 1), -turned * weights, 0.0)
        t.turned_s[...] = turned.astype(self.dtype)
        put(t.strong_s, turned * beta)
        plgpu.barrier_arrive(t.pairs_here.at[0])
        start = dq * per_row(device, t.numbers_s, READ, self.d)
        dq = added(device, start, ((slopes * beta).astype(self.dtype), t.k_s))
        t.found_s.at[ASKED][...] = self.along(t.q_s, dq)
        put(t.dq_s, dq)
        plgpu.copy_smem_to_gmem(t.dq_s, t.dq.at[t.b, chunk(t.n), t.h])
        plgpu.copy_smem_to_gmem(t.found_s.at[ASKED], t.found.at[t.b, t.h, t.n, ASKED])
        plgpu.wait_smem_to_gmem(0)

    def keys(self, t: Any) -> None:
        """The second. dk is what keys are read with, and, times beta, what they write with, of which k . is dbeta."""
        device, zeros = self.device, self.device.zeros

        def step(at: jax.Array, accumulators: Any, carried: Any) -> None:
            asked, written = accumulators
            device.wgmma(asked, t.dv_s.at[at], t.state_s.at[at].T)
            device.wgmma(written, t.error_s.at[at], t.dstate_s.at[at].T)
            load = lambda ref, i: device.load(ref.at[at, chunk(i)], LAYOUT).astype(jnp.float32)
            for i in range(self.d // C):
                carried[...] = carried[...] + (load(t.state_s, i) * load(t.dstate_s, i)).sum(axis=1)

        carry = (zeros(C, self.d), zeros(C, self.d)), device.full(C, 0.0)
        (asked, written), carried = self.over_tiles(t, carry, step, fetches=False)
        plgpu.barrier_wait(t.here.at[0])
        number = lambda which: device.load(t.numbers_s.at[which], ROWS)
        rows = lambda which: per_row(device, t.numbers_s, which, self.d)
        asked, written = -asked * rows(READ), written * rows(WRITE)
        t.found_s.at[WRITTEN][...] = self.along(t.k_s, written) * number(BETA)
        t.found_s.at[CARRIED][...] = carried
        plgpu.barrier_wait(t.pairs_here.at[0])
        asked = added(device, asked, (t.strong_s, t.k_s))
        written = added(device, written, (t.slopes_s.T, t.q_s), (t.turned_s.T, t.k_s))
        dbeta = self.along(t.k_s, written)
        t.found_s.at[DBETA][...] = dbeta
        t.found_s.at[KEPT][...] = self.along(t.k_s, asked) - dbeta * number(BETA)
        put(t.dk_s, asked + written * rows(BETA))
        plgpu.copy_smem_to_gmem(t.dk_s, t.dk.at[t.b, chunk(t.n), t.h])
        others = pl.ds(KEPT, CARRIED)
        plgpu.copy_smem_to_gmem(t.found_s.at[others], t.found.at[t.b, t.h, t.n, others])
        plgpu.wait_smem_to_gmem(0)

    def along(self, memory: Any, x: jax.Array) -> jax.Array:
        """The product of each row of memory with that of x, [C]."""
        return (self.device.load(memory, LAYOUT).astype(jnp.float32) * x).sum(axis=1)
