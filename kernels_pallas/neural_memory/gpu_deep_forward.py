"""The forward of a memory of two layers on Hopper: a warpgroup takes the groups of a row in order.

As in `gpu_forward`, steps are taken for all rows at once, as often as a group has chunks, and each time those of one
more chunk are right. With W and S before the group, and coefficients of `gpu_numbers`, a position's layers are

    z = beta x W + rho x S - rate (kappa . x X^T) D        X, D: what came into the layer, and its steps, of the group

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
from kernels_pallas.hopper import added, barriers, product, put
from kernels_pallas.neural_memory import gpu_norm, gpu_numbers
from kernels_pallas.neural_memory.gpu_deep_group import (
    F32,
    SQUARE,
    W1,
    DeepShape,
    far,
    fill,
    gelu,
    gelu_slope,
    keep,
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
    """What the backward reads of the groups, in the dtype of k: the states before them, `states` [B, H, slots, 4, d, d];
    `said`, what the first layer says of keys, `said_read` of queries, `backs`, the gradient at its activations, and
    `errors`, that at the outputs [B, T, H, d].

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
            "numbers_s": numbers_memory(SLOTS), "master_s": shape.masters(), "state_s": shape.tile(4),
            "moved_s": shape.tile(), "near_s": shape.tile(), "inputs_s": shape.tile(), "steps_s": shape.tile(2),
            "out_s": plgpu.SMEM((ROWS, E), shape.dtype), "here": barriers(SLOTS, 4), "state_here": barriers(1, 4),
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
            q=q, k=k, v=v, numbers=numbers, table=table, h=h, b=b, zero=zero[0], count=bounds[b, bounds.shape[1] - 1],
            initial=initial, out=types.SimpleNamespace(**dict(zip(names, out))), **scratch,
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
        keep(t.state_s, t.out.states, (t.b, t.h, t.out.states.shape[2] - 3))

    def copy(self, t: Any) -> None:
        """The state in the dtype of products."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for which in range(4):
            t.state_s.at[which][...] = self.master(t, which).astype(self.shape.dtype)
        plgpu.commit_smem()

    def master(self, t: Any, which: int) -> jax.Array:
        return self.shape.device.load(t.master_s.at[which], hopper.LAYOUT)

    def fetch(self, t: Any, n: jax.Array) -> None:
        at = n & (SLOTS - 1)
        rows = pl.ds(t.table[t.b, n, gpu_numbers.TILE], ROWS)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
        for source, target in ((t.q, t.q_s), (t.k, t.k_s), (t.v, t.v_s)):
            copy(source.at[t.b, rows, t.h], target)
        copy(t.numbers.at[t.b, t.h, :, rows], t.numbers_s)

    def group(self, t: Any, n: jax.Array, high: jax.Array) -> None:
        """Outputs of a group, and W and S after it."""
        at, z = n & (SLOTS - 1), lax.min(n, t.zero)
        plgpu.barrier_wait(t.here.at[at])
        group = Group(self.shape, t.table, t.b, n, t.numbers_s.at[at], z)
        pl.when(group.of(FRESH) > 0)(lambda: self.begin(t))
        self.copy(t)
        self.keep_states(t, n, group)
        q, k, v = (x.at[at] for x in (t.q_s, t.k_s, t.v_s))
        put(t.moved_s, group.moved())
        if self.shape.several:
            put(t.near_s, self.near(t, group, 0, product(self.shape.device, k, k.T, PAIRS), early=True))
        self.learn(t, n, group, k, v)
        self.read(t, n, group, q, k)
        if self.again and self.shape.normed:
            plgpu.copy_smem_to_gmem(t.inverse_s, t.out.inverses.at[t.b, t.h, n])
        self.update(t, group, k)
        pl.when(n + SLOTS < high)(lambda: self.fetch(t, n + SLOTS))

    def keep_states(self, t: Any, n: jax.Array, group: Group) -> None:
        """What is asked for of the state before the group."""
        if self.again:
            pl.when(group.of(FRESH) == 0)(lambda: keep(t.state_s, t.out.states, (t.b, t.h, group.of(BEFORE))))
            return
        pl.when(n == t.count - 1)(lambda: keep(t.master_s, t.out.before, (t.b, t.h)))
        if self.saves:
            saved = group.of(SAVED)
            pl.when(saved >= 0)(lambda: keep(t.master_s, t.out.saved, (t.b, t.h, saved)))

    def near(self, t: Any, group: Group, layer: int, scored: jax.Array, *, early: bool) -> jax.Array:
        return group.near(t.moved_s, self.shape.rates[layer] * scored, early=early)

    def learn(self, t: Any, n: jax.Array, group: Group, k: Any, v: Any) -> None:
        """Leaves what comes into the second layer, and the steps of both."""
        device, shape, none = self.shape.device, self.shape, self.shape.device.zeros(*SQUARE)
        a, (first, second), ways = t.inputs_s, (t.steps_s.at[i] for i in range(2)), (EARLY, RHO_EARLY)
        start = added(device, none, *far(group, load(shape, k), *ways, t.state_s, 0))
        for i in range(shape.chunks):
            z = start if i == 0 else added(device, start, (t.near_s, first))
            replace(a, group.masked(gelu(z)))
            factors = far(group, load(shape, a), *ways, t.state_s, 1)
            if i:
                factors.append((self.near(t, group, 1, product(device, a, a.T, PAIRS), early=True), second))
            said = added(device, none, *factors)
            error, *about = self.error(said, k, v)
            replace(second, group.masked(error * group.per_row(THETA)))
            factors = far(group, load(shape, second), *ways, t.state_s, 1, back=True)
            if i:
                scored = product(device, second, second.T, PAIRS)
                factors.append((self.near(t, group, 1, scored, early=True), a))
            back = added(device, none, *factors)
            replace(first, group.masked(gelu_slope(z) * back))
        if not self.again:
            return
        found = {"said": z, "backs": back, "errors": error} | dict(zip(("misses", "normed"), about))
        for name, x in found.items():
            self.store(t, group, x, getattr(t.out, name))
        if shape.normed:
            t.inverse_s.at[0][...] = about[2]

    def error(self, said: jax.Array, k: Any, v: Any) -> tuple[jax.Array, ...]:
        """The loss' gradient at what the layers say of keys; with a norm also e, x and `inverse`."""
        if not self.shape.normed:
            return (said - load(self.shape, v),)
        x, inverse = gpu_norm.normalized(said, self.shape.epsilon)
        e = load(self.shape, k) + x - load(self.shape, v)
        return gpu_norm.pulled(x, inverse, e), e, x, inverse

    def read(self, t: Any, n: jax.Array, group: Group, q: Any, k: Any) -> None:
        """Stores what the group's queries read."""
        device, shape, ways, none = self.shape.device, self.shape, (READ, RHO_READ), self.shape.device.zeros(*SQUARE)
        near = self.near(t, group, 0, product(device, q, k.T, PAIRS), early=False)
        z = added(device, none, *far(group, load(shape, q), *ways, t.state_s, 0), (near, t.steps_s.at[0]))
        if self.again:
            self.store(t, group, z, t.out.said_read)
            if not shape.normed:
                return
        g = gelu(z)
        near = self.near(t, group, 1, product(device, g.astype(shape.dtype), t.inputs_s.T, PAIRS), early=False)
        said = added(device, none, *far(group, g, *ways, t.state_s, 1), (near, t.steps_s.at[1]))
        if not shape.normed:
            self.store(t, group, said, t.out.y)
            return
        x, inverse = gpu_norm.normalized(said, shape.epsilon)
        if self.again:
            t.inverse_s.at[1][...] = inverse
            self.store(t, group, x, t.out.normed_read)
        else:
            self.store(t, group, load(shape, q) + x, t.out.y)

    def store(self, t: Any, group: Group, x: jax.Array, target: Any) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put(t.out_s, x)
        group.store(t.out_s, target.at[t.b, :, t.h])

    def update(self, t: Any, group: Group, k: Any) -> None:
        """W and S after the group."""
        device = self.shape.device
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # copies of the state are read
        beta, h = jnp.exp2(group.of_last(KEPT)), jnp.exp2(group.of_last(MOVED))
        for layer, inputs in enumerate((k, t.inputs_s)):
            steps, rate = t.steps_s.at[layer], self.shape.rates[layer]
            step = load(self.shape, steps)
            replace(t.near_s, step * (-rate * group.per_row(LAST_KAPPA)))
            put(steps, step * (-rate * group.per_row(LAST_MOVED)))
            w, s = (self.master(t, W1 + 2 * layer + i) for i in range(2))
            w = added(device, beta * w + group.of_last(RHO) * s, (inputs.T, t.near_s))
            s = added(device, h * s, (inputs.T, steps))
            for i, x in enumerate((w, s)):
                t.master_s.at[W1 + 2 * layer + i][...] = x
        plgpu.commit_smem()  # orders what was read, and the states, before copies
