"""The forward on Hopper: a warpgroup takes the state of a head, for 64 of its values, through the chunks in order.

The state is an accumulator; errors, what is written, and the state in the dtype of the inputs pass through shared
memory, where tensor cores read them. Decays weigh what is written, not keys, which stay as they came.
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
    sweep_memory,
    values,
)
from kernels_pallas.hopper import LAYOUT, put

NAME = "delta_rule_forward"


def forward(
    device: hopper.Device,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    inverses: jax.Array,
    scores: jax.Array,
    numbers: jax.Array,
    state: jax.Array | None,
    *,
    save: bool,
) -> dict[str, jax.Array]:
    """o and state_end; with `save` also the states before each chunk, [B, H, N, d, e], and errors [B, N C, H, e], both
    in the dtype of q. For the arrays see `gpu_chunk` and `gpu_pairs`."""
    (B, _, H, d), e, N = q.shape, v.shape[3], numbers.shape[2]
    of = jax.ShapeDtypeStruct
    out = {"o": of(v.shape, q.dtype), "state_end": of((B, H, d, e), jnp.float32)}
    if save:
        out |= {"states": of((B, H, N, d, e), q.dtype), "errors": of(v.shape, q.dtype)}
    launch = _Forward(device, N, d, q.dtype, save)
    run = device.kernel(
        NAME,
        launch.body,
        out_type=list(out.values()),
        scratch_types=launch.scratch(),
        by_lanes=True,
        grid=(e // E, H, B),
        grid_names=("j", "h", "b"),
    )
    return dict(zip(out, run(q, k, v, inverses, scores, numbers, state)))


@dataclasses.dataclass(frozen=True)
class _Forward:
    """What a launch's code is made from."""

    device: hopper.Device
    chunks: int
    d: int
    dtype: Any
    save: bool

    def scratch(self) -> dict[str, Any]:
        tiles = ("asked_s", *(["error_s"] if self.save else []), "u_s", "written_s", "o_s")
        return sweep_memory(self.d, self.dtype, "v_s", "state_s", tiles)

    def body(self, q, k, v, inverses, scores, numbers, state, o, state_end, *rest: Any, **scratch: Any) -> None:
        states, errors = rest if self.save else (None, None)
        j, h, b = (lax.axis_index(name) for name in ("j", "h", "b"))
        t = types.SimpleNamespace(
            q=q, k=k, v=v, inverses=inverses, scores=scores, numbers=numbers, o=o, states=states, errors=errors,
            j=j, h=h, b=b, **scratch,
        )  # fmt: skip
        for n in range(min(SLOTS, self.chunks)):
            self.fetch(t, jnp.int32(n))
        carry = self.device.zeros(self.d, E)
        if state is not None:
            carry = self.device.load(state.at[b, h, :, values(j)], LAYOUT, optimized=False)
        carry = lax.fori_loop(0, self.chunks, lambda n, carry: self.step(t, n, carry), carry)
        plgpu.wait_smem_to_gmem(0)
        state_end.at[b, h, :, values(j)][...] = carry

    def fetch(self, t: Any, n: jax.Array) -> None:
        at = n & (SLOTS - 1)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
        copy(t.k.at[t.b, chunk(n), t.h], t.k_s)
        copy(t.numbers.at[t.b, t.h, n], t.numbers_s)
        copy(t.v.at[t.b, chunk(n), t.h, values(t.j)], t.v_s)
        copy(t.inverses.at[t.b, t.h, n], t.inverse_s)
        copy(t.q.at[t.b, chunk(n), t.h], t.q_s)
        copy(t.scores.at[t.b, t.h, n], t.p_s)

    def step(self, t: Any, n: jax.Array, state: jax.Array) -> jax.Array:
        """A chunk: the state after it. Errors `x` solve (I + N diag(beta)) x = v - what is read at k."""
        device, at = self.device, n & (SLOTS - 1)
        q, k, numbers = t.q_s.at[at], t.k_s.at[at], t.numbers_s.at[at]
        plgpu.barrier_wait(t.here.at[at])
        if self.save:
            self.wait_for_stores()
        put(t.state_s, state)
        if self.save:
            plgpu.copy_smem_to_gmem(t.state_s, t.states.at[t.b, t.h, n, :, values(t.j)])
        read = per_row(device, numbers, READ)
        v = device.load(t.v_s.at[at], LAYOUT)

        def written(refs: Any) -> None:
            seen, error, far, kept = refs
            device.wgmma(seen, k, t.state_s)
            asked = v.astype(jnp.float32) - device.read(seen) * read
            put(t.asked_s, asked)
            device.wgmma(error, t.inverse_s.at[at], t.asked_s)
            device.wgmma(far, q, t.state_s)  # nobody waits for it yet
            error = device.read(error, 1)
            if self.save:
                kept[...] = error.astype(self.dtype)
            u = error * per_row(device, numbers, BETA)
            t.written_s[...] = (u * per_row(device, numbers, WRITE)).astype(self.dtype)
            put(t.u_s, u)

        start = device.start(device.zeros(C, E))
        none = device.zeros(C, E).astype(self.dtype) if self.save else ()
        _, _, far, error = device.state(written)((start, start, start, none))
        carry = numbers[READ, C - 1]

        def results(refs: Any) -> None:
            o, state = refs
            device.wgmma(o, t.p_s.at[at], t.u_s)
            device.wgmma(state, k.T, t.written_s)
            if self.save:
                self.wait_for_stores()
                put(t.error_s, error)
                plgpu.copy_smem_to_gmem(t.error_s, t.errors.at[t.b, chunk(n), t.h, values(t.j)])
            o = device.read(o, 1)
            self.wait_for_stores()
            put(t.o_s, o)
            plgpu.copy_smem_to_gmem(t.o_s, t.o.at[t.b, chunk(n), t.h, values(t.j)])

        _, state = device.state(results)((device.start(far * read), device.start(state * carry)))
        plgpu.commit_smem()  # orders what was read from the slot before the copies over it
        pl.when(n + SLOTS < self.chunks)(lambda: self.fetch(t, n + SLOTS))
        return state

    def wait_for_stores(self) -> None:
        """Until what is written next has been copied out: a chunk copies so many tiles, the others may be under way."""
        plgpu.wait_smem_to_gmem(2 if self.save else 0, wait_read_only=True)
