"""The gradient of the state on Hopper: a warpgroup takes it, for 64 of a head's values, through the chunks in reverse.

It leaves the gradient of the state after each chunk for `gpu_backward_chunks`, and that of the values.
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
from kernels_pallas.delta_rule.gpu_chunk import (
    BETA,
    READ,
    SLOTS,
    WRITE,
    C,
    E,
    chunk,
    per_row,
    product,
    sweep_memory,
    values,
)
from kernels_pallas.hopper import LAYOUT, put

NAME = "delta_rule_backward_states"


def backward(
    device: hopper.Device,
    q: jax.Array,
    k: jax.Array,
    inverses: jax.Array,
    scores: jax.Array,
    numbers: jax.Array,
    do: jax.Array,
    dstate_end: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dv [B, N C, H, e], gradients of the states after each chunk [B, H, N, d, e], both in the dtype of q, and that of
    the state before the first position, float32. For the arrays see `gpu_chunk` and `gpu_pairs`."""
    (B, _, H, d), e, N = q.shape, do.shape[3], numbers.shape[2]
    of = jax.ShapeDtypeStruct
    launch = _States(device, N, d, q.dtype)
    run = device.kernel(
        NAME,
        launch.body,
        out_type=[of(do.shape, q.dtype), of((B, H, N, d, e), q.dtype), of((B, H, d, e), jnp.float32)],
        scratch_types=launch.scratch(),
        by_lanes=True,
        grid=(e // E, H, B),
        grid_names=("j", "h", "b"),
    )
    return run(q, k, inverses, scores, numbers, do, dstate_end)


@dataclasses.dataclass(frozen=True)
class _States:
    """What a launch's code is made from."""

    device: hopper.Device
    chunks: int
    d: int
    dtype: Any

    def scratch(self) -> dict[str, Any]:
        return sweep_memory(self.d, self.dtype, "do_s", "dstate_s", ("read_do_s", "du_s", "dv_s", "read_dv_s"))

    def body(self, q, k, inverses, scores, numbers, do, dstate_end, dv, dstates, dstate_start, **scratch: Any) -> None:
        j, h, b = (lax.axis_index(name) for name in ("j", "h", "b"))
        t = types.SimpleNamespace(
            q=q, k=k, inverses=inverses, scores=scores, numbers=numbers, do=do, dv=dv, dstates=dstates,
            j=j, h=h, b=b, **scratch,
        )  # fmt: skip
        for i in range(min(SLOTS, self.chunks)):
            self.fetch(t, jnp.int32(i))
        carry = self.device.load(dstate_end.at[b, h, :, values(j)], LAYOUT, optimized=False)
        carry = lax.fori_loop(0, self.chunks, lambda i, carry: self.step(t, i, carry), carry)
        plgpu.wait_smem_to_gmem(0)
        dstate_start.at[b, h, :, values(j)][...] = carry

    def fetch(self, t: Any, i: jax.Array) -> None:
        """The i-th chunk from the last."""
        n, at = self.chunks - 1 - i, i & (SLOTS - 1)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
        copy(t.k.at[t.b, chunk(n), t.h], t.k_s)
        copy(t.do.at[t.b, chunk(n), t.h, values(t.j)], t.do_s)
        copy(t.scores.at[t.b, t.h, n], t.p_s)
        copy(t.numbers.at[t.b, t.h, n], t.numbers_s)
        copy(t.inverses.at[t.b, t.h, n], t.inverse_s)
        copy(t.q.at[t.b, chunk(n), t.h], t.q_s)

    def step(self, t: Any, i: jax.Array, dstate: jax.Array) -> jax.Array:
        """A chunk: the gradient of the state before it.

        u = beta x is written, where (I + N diag(beta)) x = w: with du the gradient of u by outputs and the state after,
        that of w, and of v, is (I + N diag(beta))^-T (beta du).
        """
        device, n, at = self.device, self.chunks - 1 - i, i & (SLOTS - 1)
        q, k, numbers = t.q_s.at[at], t.k_s.at[at], t.numbers_s.at[at]
        plgpu.barrier_wait(t.here.at[at])
        read = per_row(device, numbers, READ)
        t.read_do_s[...] = (device.load(t.do_s.at[at], LAYOUT).astype(jnp.float32) * read).astype(self.dtype)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # dv of the chunk before may be under way
        put(t.dstate_s, dstate)
        plgpu.copy_smem_to_gmem(t.dstate_s, t.dstates.at[t.b, t.h, n, :, values(t.j)])

        def products(refs: Any) -> None:
            far, near, before = refs
            device.wgmma(far, k, t.dstate_s)
            device.wgmma(near, t.p_s.at[at].T, t.do_s.at[at])
            device.wgmma(before, q.T, t.read_do_s)  # nobody waits for it yet
            far = device.read(far, 1) * per_row(device, numbers, WRITE)
            put(t.du_s, (device.read(near, 1) + far) * per_row(device, numbers, BETA))
            dv = product(device, t.inverse_s.at[at].T, t.du_s, (C, E))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            t.dv_s[...] = dv.astype(self.dtype)
            put(t.read_dv_s, -dv * read)
            device.wgmma(before, k.T, t.read_dv_s)
            plgpu.copy_smem_to_gmem(t.dv_s, t.dv.at[t.b, chunk(n), t.h, values(t.j)])

        start, carry = device.start(device.zeros(C, E)), numbers[READ, C - 1]
        *_, dstate = device.state(products)((start, start, device.start(dstate * carry)))
        plgpu.commit_smem()  # orders what was read from the slot before the copies over it
        pl.when(i + SLOTS < self.chunks)(lambda: self.fetch(t, i + SLOTS))
        return dstate
