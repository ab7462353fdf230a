"""The forward of a matrix that learns, on Hopper: a warpgroup takes 64 of its columns through the groups in order.

W and S are accumulators; copies in the dtype of products pass through shared memory once a group. Steps of a chunk
depend on those of the group's chunks before it: they are taken for all rows at once, as often as there are chunks, and
each time those of one more chunk are right.

The backward runs it again (`again`), each segment by itself from the state that was saved before it.
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
    BEFORE,
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
    SAVED,
    THETA,
)

NAME, AGAIN = "neural_memory_forward", "neural_memory_again"
F32 = jnp.float32


def forward(shape: Shape, q, k, v, numbers, table, bounds, initial, carried, *, save: bool) -> dict[str, jax.Array]:
    """y [B, T, H, d]; `end` [B, H, 2, d, d], W and S after the last position, and `before` [B, H, d, d], W before the
    last group; with `save` also the states before segments that begin inside a document, [B, H, segments, 2, d, d].

    Args:
      q, k, v: [B, T, H, d], at least 64 positions; numbers, table, bounds: see `gpu_numbers`.
      initial, carried: W and S [1 or B, H, 2, d, d], and [B, H, 2, d, d] or None, float32.
    """
    (B, _, H, d), of = q.shape, jax.ShapeDtypeStruct
    out = {"y": of(q.shape, q.dtype), "end": of((B, H, 2, d, d), F32), "before": of((B, H, d, d), F32)}
    if save:
        out["saved"] = of((B, H, bounds.shape[1] - 1, 2, d, d), F32)
    launch = _Forward(shape, again=False, saves=save)
    found = launch.kernel(NAME, (d // E, H, B), out)(
        q, k, v, numbers, table, bounds, initial, carried, hopper.hidden_zero()
    )  # fmt: skip
    return dict(zip(out, found))


def again(shape: Shape, q, k, v, numbers, table, bounds, initial, saved) -> dict[str, jax.Array]:
    """Errors [B, T, H, d], and the states before groups [B, H, slots, 2, d, d], in the dtype of k.

    With a norm (`gpu_norm`) also, as errors, e (`misses`) and x where keys are learned (`normed`) and where queries
    read (`normed_read`); and both of `inverse` [B, H, N, 2, 64], float32, of rows of groups.
    """
    (B, T, H, d), of = k.shape, jax.ShapeDtypeStruct
    out = {"errors": of(k.shape, k.dtype), "states": of((B, H, gpu_numbers.slots(T), 2, d, d), k.dtype)}
    if shape.normed:
        out |= dict.fromkeys(("misses", "normed", "normed_read"), out["errors"])
        out["inverses"] = of((B, H, table.shape[1], 2, ROWS), F32)
    launch = _Forward(shape, again=True, saves=False)
    grid = (d // E * (bounds.shape[1] - 1), H, B)
    arrays = q if shape.normed else None, k, v, numbers, table, bounds, initial, saved, hopper.hidden_zero()
    return dict(zip(out, launch.kernel(AGAIN, grid, out)(*arrays)))


@dataclasses.dataclass(frozen=True)
class _Forward:
    """What a launch's code is made from."""

    shape: Shape
    again: bool
    saves: bool

    @property
    def reads(self) -> bool:
        """Whether queries are asked: again only for what the norm's gradient needs."""
        return self.shape.normed or not self.again

    def kernel(self, name: str, grid: tuple[int, ...], out: dict[str, Any]) -> Any:
        shape, wide = self.shape, self.shape.d
        scratch = {
            "k_s": shape.tile(SLOTS, width=wide), "v_s": shape.tile(SLOTS), "numbers_s": numbers_memory(SLOTS),
            "state_s": shape.states(), "pairs_s": shape.tile(4),
            "out_s": plgpu.SMEM((4 if self.again and shape.normed else 1, ROWS, E), shape.dtype),
            "here": barriers(SLOTS, 3 + self.reads),
        }  # fmt: skip
        if self.reads:
            scratch["q_s"] = shape.tile(SLOTS, width=wide)
        if self.again and shape.normed:
            scratch["inverse_s"] = plgpu.SMEM((2, ROWS), F32)
        return shape.device.kernel(
            name, self.body, by_lanes=True, out_type=list(out.values()), scratch_types=scratch,
            grid=grid, grid_names=("j", "h", "b"),
        )  # fmt: skip

    def body(self, q, k, v, numbers, table, bounds, initial, start, zero, *out: Any, **scratch: Any) -> None:
        j, h, b = (lax.axis_index(name) for name in ("j", "h", "b"))
        t = types.SimpleNamespace(
            q=q, k=k, v=v, numbers=numbers, table=table, initial=initial, h=h, b=b, out=out, zero=zero[0], **scratch
        )
        tiles = self.shape.d // E
        segment, j = lax.div(j, tiles), lax.rem(j, tiles)
        t.columns = columns(j)
        t.count = bounds[b, bounds.shape[1] - 1]
        low, high = (bounds[b, segment], bounds[b, segment + 1]) if self.again else (jnp.int32(0), t.count)
        for i in range(SLOTS):
            pl.when(low + i < high)(lambda i=i: self.fetch(t, low + i))
        if self.again:
            self.keep_initial(t, segment == 0)
            w, s = self.states(start.at[b, h, segment], t.columns)
        elif start is None:
            w, s = self.initial(t)
        else:
            w, s = self.states(start.at[b, h], t.columns)
        w, s = lax.fori_loop(low, high, lambda n, state: self.group(t, n, high, *state), (w, s))
        if not self.again:
            for index, x in enumerate((w, s)):
                out[1].at[b, h, index, :, t.columns][...] = x
        plgpu.wait_smem_to_gmem(0)

    def states(self, memory: Any, columns: Any) -> tuple[jax.Array, jax.Array]:
        return tuple(
            self.shape.device.load(memory.at[i, :, columns], LAYOUT, optimized=False) for i in range(2)
        )  # W and S

    def initial(self, t: Any) -> tuple[jax.Array, jax.Array]:
        row = t.b if t.initial.shape[0] > 1 else t.b & 0
        return self.states(t.initial.at[row, t.h], t.columns)

    def keep_initial(self, t: Any, where: jax.Array) -> None:
        """The initial state among those of groups."""

        @pl.when(where)
        def _() -> None:
            for i, x in enumerate(self.initial(t)):
                t.state_s.at[i][...] = x.astype(self.shape.dtype)
            plgpu.commit_smem()
            states = t.out[1]
            target = states.at[t.b, t.h, states.shape[2] - 3, :, :, t.columns]
            each_state(plgpu.copy_smem_to_gmem, t.state_s, target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def fetch(self, t: Any, n: jax.Array) -> None:
        at = n & (SLOTS - 1)
        rows = pl.ds(t.table[t.b, n, gpu_numbers.TILE], ROWS)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
        copy(t.k.at[t.b, rows, t.h], t.k_s)
        copy(t.numbers.at[t.b, t.h, :, rows], t.numbers_s)
        copy(t.v.at[t.b, rows, t.h, t.columns], t.v_s)
        if self.reads:
            copy(t.q.at[t.b, rows, t.h], t.q_s)

    def group(self, t: Any, n: jax.Array, high: jax.Array, w: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """W and S after a group."""
        device, at, dtype, z = self.shape.device, n & (SLOTS - 1), self.shape.dtype, lax.min(n, t.zero)
        plgpu.barrier_wait(t.here.at[at])
        group = Group(self.shape, t.table, t.b, n, t.numbers_s.at[at], z)
        w, s = lax.cond(group.of(FRESH) > 0, lambda: self.initial(t), lambda: (w, s))
        if not self.again:
            self.keep_states(t, n, group, w, s)
        k, state = t.k_s.at[at], [t.state_s.at[z + i] for i in range(2)]
        outs = [t.out_s.at[z + i] for i in range(t.out_s.shape[0])]
        first, second, near, read = (t.pairs_s.at[z + i] for i in range(4))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for memory, x in ((first, group.moved()), (state[0], w), (state[1], s)):
            memory[...] = x.astype(dtype)
        plgpu.commit_smem()
        if self.again:
            target = t.out[1].at[t.b, t.h, group.of(BEFORE), :, :, t.columns]
            pl.when(group.of(FRESH) == 0)(lambda: each_state(plgpu.copy_smem_to_gmem, t.state_s, target))
        if self.reads:
            q = t.q_s.at[at]
            read[...] = group.near(first, product(device, q, k.T, PAIRS), early=False)
        if self.shape.several:
            near[...] = group.near(first, product(device, k, k.T, PAIRS), early=True)
        memory = second, first
        z = self.said(group, k, t.v_s.at[at], state, near, memory)
        error, *about = self.error(z, k, t.v_s.at[at])
        step = group.masked(error * group.per_row(THETA))
        memory = memory[::-1] if self.shape.several else memory
        found = [error, *about[:2]] if self.again else []
        if self.again and self.shape.normed:
            t.inverse_s.at[0][...] = about[2]
        if self.reads:
            put(memory[0], step)
            found += self.read(t, added(device, self.far(group, q, state), (read, memory[0])), q)
        for out, x in zip(outs, found, strict=True):
            out[...] = x.astype(dtype)
        rate = self.shape.rate
        plgpu.commit_smem()
        for out, target in zip(outs, (t.out[0], *t.out[2:5]) if self.again else t.out):
            group.store(out, target.at[t.b, :, t.h, t.columns])
        if self.again and self.shape.normed:
            plgpu.copy_smem_to_gmem(t.inverse_s, t.out[5].at[t.b, t.h, n])
        memory[1][...] = (step * (-rate * group.per_row(LAST_KAPPA))).astype(dtype)
        put(memory[0], step * (-rate * group.per_row(LAST_MOVED)))
        beta, h = jnp.exp2(group.of_last(KEPT)), jnp.exp2(group.of_last(MOVED))

        def after(refs: Any) -> None:
            device.wgmma(refs[0], k.T, memory[1])
            device.wgmma(refs[1], k.T, memory[0])

        starts = device.start(beta * w + group.of_last(RHO) * s), device.start(h * s)
        w, s = device.state(after)(starts)
        plgpu.commit_smem()  # orders what was read from the slot before the copies over it
        pl.when(n + SLOTS < high)(lambda: self.fetch(t, n + SLOTS))
        return w, s

    def keep_states(self, t: Any, n: jax.Array, group: Group, w: jax.Array, s: jax.Array) -> None:
        """What is asked for of the state before the group, in float32."""

        @pl.when(n == t.count - 1)
        def _() -> None:
            t.out[2].at[t.b, t.h, :, t.columns][...] = w

        if self.saves:

            @pl.when(group.of(SAVED) >= 0)
            def _() -> None:
                for i, x in enumerate((w, s)):
                    t.out[3].at[t.b, t.h, group.of(SAVED), i, :, t.columns][...] = x

    def said(self, group: Group, k: Any, v: Any, state: list[Any], near: Any, memory: tuple[Any, Any]) -> jax.Array:
        """What the matrix says of keys, less the values where there is no norm."""
        device = self.shape.device
        start = product(device, k, state[0], (ROWS, E)) * jnp.exp2(group.per_row(EARLY))
        if self.shape.several:
            start += product(device, k, state[1], (ROWS, E)) * group.per_row(RHO_EARLY)
        if not self.shape.normed:
            start -= load(self.shape, v)
        z = start
        for i in range(self.shape.chunks - 1):
            put(memory[i % 2], group.masked(self.error(z, k, v)[0] * group.per_row(THETA)))
            z = added(device, start, (near, memory[i % 2]))
        return z

    def error(self, z: jax.Array, k: Any, v: Any) -> tuple[jax.Array, ...]:
        """The loss' gradient at what the matrix says; with a norm also e, x and `inverse`."""
        if not self.shape.normed:
            return (z,)
        x, inverse = gpu_norm.normalized(z, self.shape.epsilon)
        e = load(self.shape, k) + x - load(self.shape, v)
        return gpu_norm.pulled(x, inverse, e), e, x, inverse

    def read(self, t: Any, z: jax.Array, q: Any) -> list[jax.Array]:
        """y, of what the matrix says of queries; again x, and keeps `inverse`."""
        if not self.shape.normed:
            return [z]
        x, inverse = gpu_norm.normalized(z, self.shape.epsilon)
        if not self.again:
            return [load(self.shape, q) + x]
        t.inverse_s.at[1][...] = inverse
        return [x]

    def far(self, group: Group, q: Any, state: list[Any]) -> jax.Array:
        """What queries read of the state before the group."""
        kept, moved = (product(self.shape.device, q, x, (ROWS, E)) for x in state)
        return kept * jnp.exp2(group.per_row(READ)) + moved * group.per_row(RHO_READ)
