"""The gradient of W and S on Hopper: a warpgroup takes it, for 64 of their columns, through the groups in reverse.

It leaves, for `gpu_backward_groups`, the gradients of steps and those of the states after groups.
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
from kernels_pallas.hopper import LAYOUT, added, barriers
from kernels_pallas.neural_memory import gpu_norm, gpu_numbers
from kernels_pallas.neural_memory.gpu_group import (
    PAIRS,
    SLOTS,
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
from kernels_pallas.neural_memory.gpu_numbers import (
    AFTER,
    EARLY,
    FRESH,
    KEPT,
    LAST_KAPPA,
    LAST_MOVED,
    MOVED,
    READ,
    RHO,
    RHO_EARLY,
    RHO_READ,
    ROWS,
    THETA,
)

NAME = "neural_memory_backward"
F32 = jnp.float32


NORMED = "misses", "normed", "normed_read", "inverses"


def backward(
    shape: Shape, q, k, dy, numbers, table, bounds, d_end, d_before, of_norm: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Gradients of steps [B, T, H, d], not yet times theta, and of the states after groups [B, H, slots, 2, d, d], in
    the dtype of q; of the initial states of each row and of the state before the first position [B, H, 2, d, d].

    With a norm also, as gradients of steps, those of what the matrix says of keys (`dsaid`) and queries (`dread`), and
    of what the memory says of keys (`dmisses`).

    Args: as of `gpu_forward.forward`; d_end [B, H, 2, d, d], d_before [B, H, d, d]; of_norm: `NORMED`, as
      `gpu_forward.again` gives them; {} without a norm.
    """
    (B, T, H, d), of = q.shape, jax.ShapeDtypeStruct
    state = of((B, H, 2, d, d), F32)
    out = {"dsteps": of(q.shape, q.dtype), "dstates": of((B, H, gpu_numbers.slots(T), 2, d, d), q.dtype)}
    out |= {"dinitial": state, "dcarried": state}
    if shape.normed:
        out |= dict.fromkeys(("dsaid", "dread", "dmisses"), out["dsteps"])
    ring = shape.tile(SLOTS, width=d)
    tiles = {f"{name}_s": shape.tile(SLOTS) for name in NORMED[:3]} if shape.normed else {}
    more = tiles | ({"inverses_s": plgpu.SMEM((SLOTS, 2, ROWS), F32)} if shape.normed else {})
    run = shape.device.kernel(
        NAME,
        _Backward(shape).body,
        by_lanes=True,
        out_type=list(out.values()),
        scratch_types={
            "q_s": ring, "k_s": ring, "dy_s": shape.tile(SLOTS), "numbers_s": numbers_memory(SLOTS),
            "dstate_s": shape.states(), "pairs_s": shape.tile(6),
            "out_s": plgpu.SMEM((4 if shape.normed else 1, ROWS, E), shape.dtype),
            "here": barriers(SLOTS, 4 + len(more)), **more,
        },
        grid=(d // E, H, B),
        grid_names=("j", "h", "b"),
    )  # fmt: skip
    arrays = [of_norm.get(name) for name in NORMED]
    return dict(zip(out, run(q, k, dy, numbers, table, bounds, d_end, d_before, *arrays, hopper.hidden_zero())))


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What a launch's code is made from."""

    shape: Shape

    def body(
        self, q, k, dy, numbers, table, bounds, d_end, d_before, misses, normed, normed_read, inverses, zero,
        dsteps, dstates, dinitial, dcarried, *rest: Any, **scratch: Any,
    ) -> None:  # fmt: skip
        j, h, b = (lax.axis_index(name) for name in ("j", "h", "b"))
        t = types.SimpleNamespace(
            q=q, k=k, dy=dy, numbers=numbers, table=table, d_before=d_before, dstates=dstates, found=(dsteps, *rest),
            misses=misses, normed=normed, normed_read=normed_read, inverses=inverses,
            dinitial=dinitial, columns=columns(j), h=h, b=b, count=bounds[b, bounds.shape[1] - 1],
            zero=zero[0], **scratch,
        )  # fmt: skip
        for i in range(SLOTS):
            pl.when(i < t.count)(lambda i=i: self.fetch(t, jnp.int32(i)))
        none = self.shape.device.zeros(self.shape.d, E)
        for i in range(2):
            t.dstate_s.at[i][...] = none.astype(self.shape.dtype)
            dinitial.at[b, h, i, :, t.columns][...] = none
        plgpu.commit_smem()
        each_state(plgpu.copy_smem_to_gmem, t.dstate_s, dstates.at[b, h, dstates.shape[2] - 1, :, :, t.columns])
        state = tuple(self.load(d_end.at[b, h, i, :, t.columns]) for i in range(2))
        state = lax.fori_loop(0, t.count, lambda i, state: self.group(t, i, *state), state)
        for i in range(2):
            dcarried.at[b, h, i, :, t.columns][...] = state[i]
        plgpu.wait_smem_to_gmem(0)

    def load(self, memory: Any) -> jax.Array:
        return self.shape.device.load(memory, LAYOUT, optimized=False)

    def fetch(self, t: Any, i: jax.Array) -> None:
        """The i-th group from the last."""
        n, at = t.count - 1 - i, i & (SLOTS - 1)
        rows = pl.ds(t.table[t.b, n, gpu_numbers.TILE], ROWS)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
        copy(t.k.at[t.b, rows, t.h], t.k_s)
        copy(t.q.at[t.b, rows, t.h], t.q_s)
        copy(t.numbers.at[t.b, t.h, :, rows], t.numbers_s)
        copy(t.dy.at[t.b, rows, t.h, t.columns], t.dy_s)
        if self.shape.normed:
            for source, target in ((t.misses, t.misses_s), (t.normed, t.normed_s), (t.normed_read, t.normed_read_s)):
                copy(source.at[t.b, rows, t.h, t.columns], target)
            copy(t.inverses.at[t.b, t.h, n], t.inverses_s)

    def group(self, t: Any, i: jax.Array, dw: jax.Array, ds: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradients of W and S before a group, 0 where it starts from others."""
        device, n, at, dtype = self.shape.device, t.count - 1 - i, i & (SLOTS - 1), self.shape.dtype
        plgpu.barrier_wait(t.here.at[at])
        z = lax.min(i, t.zero)
        group, q, k = Group(self.shape, t.table, t.b, n, t.numbers_s.at[at], z), t.q_s.at[at], t.k_s.at[at]
        dstate = [t.dstate_s.at[z + index] for index in range(2)]
        moved, read, near, asked, first, second = (t.pairs_s.at[z + index] for index in range(6))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        of_group = group.masked(load(self.shape, t.dy_s.at[at]))
        norm = None
        if self.shape.normed:
            inverse = [device.load(t.inverses_s.at[at, index], hopper.ROWS) for index in range(2)]
            norm = t.normed_s.at[at], inverse[0], t.misses_s.at[at]
            of_group = gpu_norm.pulled(load(self.shape, t.normed_read_s.at[at]), inverse[1], of_group)
        for memory, x in ((dstate[0], dw), (dstate[1], ds), (moved, group.moved()), (asked, of_group)):
            memory[...] = x.astype(dtype)
        plgpu.commit_smem()
        keeps = (n + 1 == t.count) | (t.table[t.b, lax.min(n + 1, t.count - 1), FRESH] == 0)
        target = t.dstates.at[t.b, t.h, group.of(AFTER), :, :, t.columns]
        pl.when(keeps)(lambda: each_state(plgpu.copy_smem_to_gmem, t.dstate_s, target))
        read[...] = group.near(moved, product(device, q, k.T, PAIRS), early=False)
        if self.shape.several:
            near[...] = group.near(moved, product(device, k, k.T, PAIRS), early=True)
        plgpu.commit_smem()
        dstep = self.steps(group, k, dstate, (read.T, asked), near, (first, second), norm)
        error, *dmiss = self.said(group, dstep, norm)
        asks = load(self.shape, asked)
        found = [dstep] if norm is None else [dstep, error, asks, *dmiss]
        for index, x in enumerate(found):
            t.out_s.at[z + index][...] = x.astype(dtype)
        plgpu.commit_smem()
        for index, target in enumerate(t.found):
            group.store(t.out_s.at[z + index], target.at[t.b, :, t.h, t.columns])
        weighted = (
            (first, error * jnp.exp2(group.per_row(EARLY))),
            (second, asks * jnp.exp2(group.per_row(READ))),
            (moved, error * group.per_row(RHO_EARLY)),
            (read, asks * group.per_row(RHO_READ)),
        )
        for memory, x in weighted:
            memory[...] = x.astype(dtype)
        plgpu.commit_smem()

        def before(refs: Any) -> None:
            for ref, memory in zip(refs, ((first, second), (moved, read))):
                device.wgmma(ref, k.T, memory[0])
                device.wgmma(ref, q.T, memory[1])

        beta, h = jnp.exp2(group.of_last(KEPT)), jnp.exp2(group.of_last(MOVED))
        starts = device.start(beta * dw), device.start(group.of_last(RHO) * dw + h * ds)
        dw, ds = device.state(before)(starts)
        plgpu.commit_smem()  # orders what was read from the slot before the copies over it
        pl.when(i + SLOTS < t.count)(lambda: self.fetch(t, i + SLOTS))
        d_before = lambda: (dw + self.load(t.d_before.at[t.b, t.h, :, t.columns]), ds)
        dw, ds = lax.cond(n + 1 == t.count, d_before, lambda: (dw, ds))
        fresh, none = group.of(FRESH) > 0, device.zeros(self.shape.d, E)
        pl.when(fresh)(lambda: self.add_initial(t, dw, ds))
        return lax.cond(fresh, lambda: (none, none), lambda: (dw, ds))

    def add_initial(self, t: Any, dw: jax.Array, ds: jax.Array) -> None:
        """Adds to what is asked of the row's initial state."""
        for index, x in enumerate((dw, ds)):
            memory = t.dinitial.at[t.b, t.h, index, :, t.columns]
            memory[...] = self.load(memory) + x

    def steps(
        self, group: Group, k: Any, dstate: list[Any], read: tuple[Any, Any], near: Any, memory: Any, norm: Any
    ) -> jax.Array:
        """The gradients of what is learned, of each position: by what reads it, and by the state after the group."""
        device, rate = self.shape.device, self.shape.rate
        far = product(device, k, dstate[0], (ROWS, E)) * (-rate * group.per_row(LAST_KAPPA))
        far += product(device, k, dstate[1], (ROWS, E)) * (-rate * group.per_row(LAST_MOVED))
        start = added(device, far, read)
        found = start
        for i in range(self.shape.chunks - 1):
            put(memory[i % 2], self.said(group, found, norm)[0])
            found = added(device, start, (near.T, memory[i % 2]))
        return found

    def said(self, group: Group, dstep: jax.Array, norm: Any) -> tuple[jax.Array, ...]:
        """Gradients of what the matrix says of keys; with a norm, also of what the memory says of them."""
        error = group.masked(dstep * group.per_row(THETA))
        if norm is None:
            return (error,)
        normed, inverse, misses = norm
        w, error = gpu_norm.slopes(load(self.shape, normed), inverse, load(self.shape, misses), error)
        return error, w
