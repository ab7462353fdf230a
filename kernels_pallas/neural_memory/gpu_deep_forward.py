"""The forward of a memory of two layers on Hopper: a warpgroup takes the groups of a row in order.

As in `gpu_forward`, steps are taken for all rows at once, as often as a group has chunks, and each time those of one
more chunk are right. With W and S before the group, and coefficients of `gpu_numbers`, a position's layers are

    z = beta x W + rho x S - rate (kappa . x X^T) D        X, D: what came into the layer, and its steps, of the group

The backward runs it again (`again`), each segment by itself from the state that was saved before it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.hopper import added, barriers, product, put
from kernels_pallas.neural_memory import gpu_norm, gpu_numbers
from kernels_pallas.neural_memory.gpu_deep_group import (
    F32,
    SQUARE,
    DeepShape,
    far,
    fill,
    gelu,
    gelu_slope,
    keep,
    placed,
    renewed,
    replace,
)
from kernels_pallas.neural_memory.gpu_group import PAIRS, SLOTS, E, Group, load, numbers_memory
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

_TILES = "moved_s", "near_s", "inputs_s", "first_s", "second_s"  # behind the state's copy
NAME, AGAIN = "neural_memory_deep_forward", "neural_memory_deep_again"


def forward(shape: DeepShape, q, k, v, numbers, table, bounds, initial, carried, *, save: bool) -> dict[str, jax.Array]:
    """y [B, T, H, d]; `end` [B, H, 4, d, d], W and S of both layers after the last position, and `before`, those before
    the last group; with `save` also those before segments that begin inside a document, [B, H, segments, 4, d, d].

    Args:
      q, k, v: [B, T, H, d], at least 64 positions; numbers, table, bounds: see `gpu_numbers`.
      initial, carried: W and S (`gpu_deep_group`) [1 or B, H, 4, d, d], and [B, H, 4, d, d] or None, float32.
    """
    (B, _, H, d), of = q.shape, jax.ShapeDtypeStruct
    state = of((B, H, 4, d, d), F32)
    out = {"y": of(q.shape, q.dtype), "end": state, "before": state}
    if save:
        out["saved"] = of((B, H, bounds.shape[1] - 1, 4, d, d), F32)
    run = _Forward(shape, again=False, saves=save).kernel(NAME, (1, H, B), out)
    return dict(zip(out, run(q, k, v, numbers, table, bounds, initial, carried, hopper.hidden_zero())))


def again(shape: DeepShape, q, k, v, numbers, table, bounds, initial, saved) -> dict[str, jax.Array]:
    """What the backward reads of the groups, in the dtype of k: the states before them, `states`
    [B, H, slots, 4, d, d]; what the first layer says of keys, `said`, and of queries, `said_read`, the gradient at its
    activations, `backs`, and that at the outputs, `errors` [B, T, H, d].

    With a norm also `misses`, `normed`, `normed_read` and `inverses`, as `gpu_forward.again`.
    """
    (B, T, H, d), of = k.shape, jax.ShapeDtypeStruct
    out = dict.fromkeys(("said", "backs", "said_read", "errors"), of(k.shape, k.dtype))
    out["states"] = of((B, H, gpu_numbers.slots(T), 4, d, d), k.dtype)
    if shape.normed:
        out |= dict.fromkeys(("misses", "normed", "normed_read"), out["errors"])
        out["inverses"] = of((B, H, table.shape[1], 2, ROWS), F32)
    run = _Forward(shape, again=True, saves=False).kernel(AGAIN, (bounds.shape[1] - 1, H, B), out)
    return dict(zip(out, run(q, k, v, numbers, table, bounds, initial, saved, hopper.hidden_zero())))


@dataclasses.dataclass(frozen=True)
class _Forward:
    """What a launch's code is made from."""

    shape: DeepShape
    again: bool
    saves: bool

    def kernel(self, name: str, grid: tuple[int, ...], out: dict[str, Any]) -> Any:
        shape = self.shape
        scratch = {
            "q_s": shape.tile(SLOTS), "k_s": shape.tile(SLOTS), "v_s": shape.tile(SLOTS),
            "numbers_s": numbers_memory(SLOTS), "master_s": shape.masters(), "tiles_s": shape.tile(4 + len(_TILES)),
            "out_s": plgpu.SMEM((1, ROWS, E), shape.dtype), "here": barriers(SLOTS, 4), "state_here": barriers(1, 4),
        }  # fmt: skip
        if self.again and shape.normed:
            scratch["inverse_s"] = plgpu.SMEM((2, ROWS), F32)
        body = lambda *refs, **scratch: self.body(list(out), *refs, **scratch)
        return shape.device.kernel(
            name, body, by_lanes=True, out_type=list(out.values()), scratch_types=scratch,
            grid=grid, grid_names=("j", "h", "b"),
        )  # fmt: skip

    def body(self, names, q, k, v, numbers, table, bounds, initial, start, zero, *out: Any, **scratch: Any) -> None:
        segment, h, b = (lax.axis_index(name) for name in ("j", "h", "b"))
        t = types.SimpleNamespace(
            q=q, k=k, v=v, numbers=numbers, table=table, h=h, b=b, zero=zero[0], z=0, initial=initial,
            count=bounds[b, bounds.shape[1] - 1], out=types.SimpleNamespace(**dict(zip(names, out))), **scratch,
        )  # fmt: skip
        low, high = (bounds[b, segment], bounds[b, segment + 1]) if self.again else (jnp.int32(0), t.count)
        for i in range(SLOTS):
            pl.when(low + i < high)(lambda i=i: self.fetch(t, low + i))
        if self.again:
            pl.when(segment == 0)(lambda: self.keep_initial(t))
            fill(start, (b, h, segment), t.master_s, t.state_here.at[0])
        elif start is None:
            self.begin(t)
        else:
            fill(start, (b, h), t.master_s, t.state_here.at[0])
        pl.loop(low, high)(lambda n: self.group(t, n, high))
        if not self.again:
            plgpu.commit_smem()
            keep(t.master_s, t.out.end, (b, h))
        plgpu.wait_smem_to_gmem(0)

    def begin(self, t: Any) -> None:
        """The state is the initial one."""
        row = t.b if t.initial.shape[0] > 1 else t.b & 0
        fill(t.initial, (row, t.h), t.master_s, t.state_here.at[0])

    def keep_initial(self, t: Any) -> None:
        """The initial state among those of groups."""
        self.begin(t)
        self.copy(t)
        keep(t.tiles_s, t.out.states, (t.b, t.h, t.out.states.shape[2] - 3))

    def copy(self, t: Any) -> None:
        """The state in the dtype of products."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for which in range(4):
            t.tiles_s.at[t.z + which][...] = self.master(t, which).astype(self.shape.dtype)
        plgpu.commit_smem()

    def master(self, t: Any, which: int) -> jax.Array:
        return self.shape.device.load(t.master_s.at[t.z + which], hopper.LAYOUT)

    def fetch(self, t: Any, n: jax.Array) -> None:
        at = n & (SLOTS - 1)
        rows = pl.ds(t.table[t.b, n, gpu_numbers.TILE], ROWS)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
        for source, target in ((t.q, t.q_s), (t.k, t.k_s), (t.v, t.v_s)):
            copy(source.at[t.b, rows, t.h], target)
        copy(t.numbers.at[t.b, t.h, :, rows], t.numbers_s)

    def group(self, t: Any, n: jax.Array, high: jax.Array) -> None:
        """Outputs of a group, and W and S after it."""
        at = n & (SLOTS - 1)
        plgpu.barrier_wait(t.here.at[at])
        group = Group(self.shape, t.table, t.b, n, t.numbers_s.at[at], lax.min(n, t.zero))
        rings, t = t, placed(t, t.tiles_s, ("",) * 4 + _TILES, group)
        t.n, t.q_s, t.k_s, t.v_s = n, *(x.at[at] for x in (t.q_s, t.k_s, t.v_s))
        pl.when(group.of(FRESH) > 0)(lambda: self.begin(t))
        self.copy(t)
        self.keep_states(t, n, group)
        put(t.moved_s, group.moved())
        if self.shape.several:
            near = self.near(t, renewed(t), 0, product(self.shape.device, t.k_s, t.k_s.T, PAIRS), early=True)
            for memory, x in ((t.near_s, near), (t.first_s, 0 * near), (t.second_s, 0 * near)):
                memory[...] = x
            plgpu.commit_smem()
            pl.loop(0, self.shape.chunks)(lambda i: self.learn(t, i))
        else:
            self.learn(t, 0)
        self.read(t)
        if self.again and self.shape.normed:
            plgpu.copy_smem_to_gmem(t.inverse_s, t.out.inverses.at[t.b, t.h, n])
        self.update(t)
        pl.when(n + SLOTS < high)(lambda: self.fetch(rings, n + SLOTS))

    def keep_states(self, t: Any, n: jax.Array, group: Group) -> None:
        """What is asked for of the state before the group."""
        if self.again:
            pl.when(group.of(FRESH) == 0)(lambda: keep(t.tiles_s, t.out.states, (t.b, t.h, group.of(BEFORE))))
            return
        pl.when(n == t.count - 1)(lambda: keep(t.master_s, t.out.before, (t.b, t.h)))
        if self.saves:
            saved = group.of(SAVED)
            pl.when(saved >= 0)(lambda: keep(t.master_s, t.out.saved, (t.b, t.h, saved)))

    def near(self, t: Any, group: Group, layer: int, scored: jax.Array, *, early: bool) -> jax.Array:
        return group.near(t.moved_s, self.shape.rates[layer] * scored, early=early)

    def learn(self, t: Any, i: jax.Array) -> None:
        """Leaves what comes into the second layer, and the steps of both; those of one more chunk are right."""
        device, shape, none, ways = self.shape.device, self.shape, self.shape.device.zeros(*SQUARE), (EARLY, RHO_EARLY)
        a, first, second, several = t.inputs_s, t.first_s, t.second_s, self.shape.several
        scored = lambda x: self.near(t, renewed(t, i), 1, product(device, x, x.T, PAIRS), early=True)
        near = [(t.near_s, first)] if several else []
        z = added(device, none, *far(renewed(t, i), load(shape, t.k_s), *ways, t.tiles_s, 0), *near)
        replace(a, renewed(t, i).masked(gelu(z)))
        near = [(scored(a), second)] if several else []
        said = added(device, none, *far(renewed(t, i), load(shape, a), *ways, t.tiles_s, 1), *near)
        error, *about = self.error(said, t.k_s, t.v_s)
        group = renewed(t, i)
        replace(second, group.masked(error * group.per_row(THETA)))
        stores = functools.partial(self.leave, t, i)
        stores("errors", error)
        if shape.normed and self.again:
            stores("misses", about[0])
            stores("normed", about[1])
            t.inverse_s.at[0][...] = about[2]
        near = [(scored(second), a)] if several else []
        back = added(device, none, *far(renewed(t, i), load(shape, second), *ways, t.tiles_s, 1, back=True), *near)
        replace(first, renewed(t, i).masked(gelu_slope(z) * back))
        stores("said", z)
        stores("backs", back)

    def leave(self, t: Any, i: Any, name: str, x: jax.Array) -> None:
        """Stores what the backward reads, the last time."""
        if self.again:
            store = lambda: self.store(t, x, getattr(t.out, name))
            pl.when(i == self.shape.chunks - 1)(store) if self.shape.several else store()

    def error(self, said: jax.Array, k: Any, v: Any) -> tuple[jax.Array, ...]:
        """The loss' gradient at what the layers say of keys; with a norm also e, x and `inverse`."""
        if not self.shape.normed:
            return (said - load(self.shape, v),)
        x, inverse = gpu_norm.normalized(said, self.shape.epsilon)
        e = load(self.shape, k) + x - load(self.shape, v)
        return gpu_norm.pulled(x, inverse, e), e, x, inverse

    def read(self, t: Any) -> None:
        """Stores what the group's queries read."""
        device, shape, ways, none = self.shape.device, self.shape, (READ, RHO_READ), self.shape.device.zeros(*SQUARE)
        near = self.near(t, renewed(t), 0, product(device, t.q_s, t.k_s.T, PAIRS), early=False)
        z = added(device, none, *far(renewed(t), load(shape, t.q_s), *ways, t.tiles_s, 0), (near, t.first_s))
        if self.again:
            self.store(t, z, t.out.said_read)
            if not shape.normed:
                return
        g = gelu(z)
        near = self.near(t, renewed(t), 1, product(device, g.astype(shape.dtype), t.inputs_s.T, PAIRS), early=False)
        said = added(device, none, *far(renewed(t), g, *ways, t.tiles_s, 1), (near, t.second_s))
        if not shape.normed:
            self.store(t, said, t.out.y)
            return
        x, inverse = gpu_norm.normalized(said, shape.epsilon)
        if self.again:
            t.inverse_s.at[1][...] = inverse
            self.store(t, x, t.out.normed_read)
        else:
            self.store(t, load(shape, t.q_s) + x, t.out.y)

    def store(self, t: Any, x: jax.Array, target: Any) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put(t.out_s.at[t.z], x)
        t.group.store(t.out_s.at[t.z], target.at[t.b, :, t.h])

    def update(self, t: Any) -> None:
        """W and S after the group."""
        device = self.shape.device
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # copies of the state are read
        for layer, (inputs, steps) in enumerate(((t.k_s, t.first_s), (t.inputs_s, t.second_s))):
            rate, group = self.shape.rates[layer], renewed(t)
            beta, h = jnp.exp2(group.of_last(KEPT)), jnp.exp2(group.of_last(MOVED))
            step = load(self.shape, steps)
            replace(t.near_s, step * (-rate * group.per_row(LAST_KAPPA)))
            put(steps, step * (-rate * group.per_row(LAST_MOVED)))
            w, s = (self.master(t, 2 * layer + i) for i in range(2))
            starts = beta * w + group.of_last(RHO) * s, h * s
            for i, (start, given) in enumerate(zip(starts, (t.near_s, steps))):
                t.master_s.at[t.z + 2 * layer + i][...] = added(device, start, (inputs.T, given))
        plgpu.commit_smem()  # orders what was read, and the states, before copies
