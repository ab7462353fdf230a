"""The gradient of a memory of two layers on Hopper: a warpgroup takes the groups of a row in reverse.

`gpu_deep_forward.again` left the states before groups and what their positions said. The gradients of W and S stay in
shared memory, in float32. What later chunks of a group ask of earlier ones is found as the forward finds steps: for all
rows at once, as often as there are chunks.

Three sums over pairs of positions are differentiated alike (`_Backward.pairs`), with rows x that read, rows X that were
learned, and what the sum gives, `z = -rate (kappa . x X^T) D`: of both layers, and, backwards through the second one,
with steps as x and X, and inputs as D.
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
from kernels_pallas.hopper import COLUMNS, LAYOUT, added, barriers, product, put
from kernels_pallas.neural_memory import gpu_backward_groups as names
from kernels_pallas.neural_memory import gpu_norm, gpu_numbers
from kernels_pallas.neural_memory.gpu_deep_group import (
    F32,
    SQUARE,
    SQUARES,
    DeepShape,
    far,
    fill,
    gelu,
    gelu_bend,
    gelu_slope,
    keep,
    replace,
    scaled,
)
from kernels_pallas.neural_memory.gpu_group import PAIRS, E, Group, load, numbers_memory
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
    THETA,
)

NAME = "neural_memory_deep_backward"
LEFT = "said", "backs", "said_read", "errors", "states", "misses", "normed", "normed_read", "inverses"
_READ, _LEARN = (READ, RHO_READ), (EARLY, RHO_EARLY)


def backward(
    shape: DeepShape, q, k, dy, numbers, table, bounds, d_end, d_before, left: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """dq, dk [B, T, H, d], without what a norm's residual adds; `dmisses`, the gradient of what the memory says of keys,
    so minus that of the values; `found` [B, H, N, 13, 64] float32 of groups, by the names of `gpu_backward_groups`; the
    gradients of the initial states of each row and of the state before the first position [B, H, 4, d, d].

    Args: as of `gpu_deep_forward.forward`; d_end, d_before [B, H, 4, d, d]; left: what `gpu_deep_forward.again` left.
    """
    (B, _, H, d), of = q.shape, jax.ShapeDtypeStruct
    rows, state = of(q.shape, q.dtype), of((B, H, 4, d, d), F32)
    out = dict.fromkeys(("dq", "dk", "dmisses"), rows)
    out |= {"found": of((B, H, table.shape[1], names.FOUND, ROWS), F32), "dinitial": state, "dcarried": state}
    tile = shape.tile()
    run = shape.device.kernel(
        NAME,
        lambda *refs, **scratch: _Backward(shape).body(list(out), *refs, **scratch),
        by_lanes=True,
        sums_bytes=4 * ROWS * 4,  # a column's sum of each warp
        out_type=list(out.values()),
        scratch_types={
            "q_s": tile, "k_s": tile, "dy_s": tile, "said_s": tile, "backs_s": tile, "first_s": tile, "second_s": tile,
            "moved_s": tile, "inputs_s": tile, "steps_s": shape.tile(2), "pairs_s": shape.tile(2), "given_s": tile,
            "state_s": shape.tile(4), "master_s": shape.masters(), "numbers_s": numbers_memory(),
            "inverses_s": plgpu.SMEM((2, ROWS), F32), "found_s": plgpu.SMEM((names.FOUND, ROWS), F32),
            "out_s": plgpu.SMEM((ROWS, E), shape.dtype),
            "here": barriers(1, 12 + 2 * shape.normed), "later_here": barriers(1, 1 + shape.normed),
            "state_here": barriers(1, 4),
        },
        grid=(H, B),
        grid_names=("h", "b"),
    )  # fmt: skip
    arrays = [left.get(name) for name in LEFT]
    return dict(zip(out, run(q, k, dy, numbers, table, bounds, d_end, d_before, *arrays, hopper.hidden_zero())))


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What a launch's code is made from."""

    shape: DeepShape

    def body(self, outs, q, k, dy, numbers, table, bounds, d_end, d_before, *refs: Any, **scratch: Any) -> None:
        h, b = (lax.axis_index(name) for name in ("h", "b"))
        left, zero, out = refs[: len(LEFT)], refs[len(LEFT)], refs[len(LEFT) + 1 :]
        t = types.SimpleNamespace(
            q=q, k=k, dy=dy, numbers=numbers, table=table, d_before=d_before, h=h, b=b, zero=zero[0],
            count=bounds[b, bounds.shape[1] - 1], **dict(zip(LEFT, left)), **dict(zip(outs, out)), **scratch,
        )  # fmt: skip
        for which in SQUARES:
            t.dinitial.at[b, h, which][...] = self.shape.device.zeros(*SQUARE)
        fill(d_end, (b, h), t.master_s, t.state_here.at[0])
        pl.loop(0, t.count)(lambda i: self.group(t, i))
        plgpu.commit_smem()
        keep(t.master_s, t.dcarried, (b, h))
        plgpu.wait_smem_to_gmem(0)

    def fetch(self, t: Any, n: jax.Array, group: Group) -> None:
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, t.here.at[0])
        rows = [(t.q, t.q_s), (t.k, t.k_s), (t.dy, t.dy_s), (t.said, t.said_s), (t.backs, t.backs_s)]
        rows += [(t.said_read, t.first_s), (t.errors, t.steps_s.at[1])]
        if self.shape.normed:
            rows.append((t.normed_read, t.second_s))
            copy(t.inverses.at[t.b, t.h, n], t.inverses_s)
        for source, target in rows:
            copy(source.at[t.b, group.rows, t.h], target)
        copy(t.numbers.at[t.b, t.h, :, group.rows], t.numbers_s)
        for which in SQUARES:
            copy(t.states.at[t.b, t.h, group.of(BEFORE), which], t.state_s.at[which])

    def fetch_misses(self, t: Any, group: Group) -> None:
        """What the gradient of the steps' error needs, in place of what queries read."""
        plgpu.commit_smem()
        rows = [(t.misses, t.first_s), (t.normed, t.second_s)] if self.shape.normed else [(t.errors, t.first_s)]
        for source, target in rows:
            plgpu.copy_gmem_to_smem(source.at[t.b, group.rows, t.h], target, t.later_here.at[0])

    def group(self, t: Any, i: jax.Array) -> None:
        """Gradients of a group, and of W and S before it."""
        n = t.count - 1 - i
        group = Group(self.shape, t.table, t.b, n, t.numbers_s, lax.min(i, t.zero))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()  # orders what was read before the copies over it
        self.fetch(t, n, group)
        plgpu.barrier_wait(t.here.at[0])
        self.open(t, group)
        of_steps, of_inputs = zip(*(self.after(t, group, layer) for layer in range(2)))
        (dk, *of_inputs), of_steps = self.queries(t, group, of_inputs, of_steps)
        self.fetch_misses(t, group)
        plgpu.barrier_wait(t.later_here.at[0])
        self.keys(t, group, dk, of_inputs[0], of_steps)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(t.found_s, t.found.at[t.b, t.h, n])
        pl.when(n + 1 == t.count)(lambda: self.add_before(t))
        pl.when(group.of(FRESH) > 0)(lambda: self.begin(t))

    def master(self, t: Any, which: int) -> jax.Array:
        return self.shape.device.load(t.master_s.at[which], LAYOUT)

    def add_before(self, t: Any) -> None:
        for which in SQUARES:
            asked = self.shape.device.load(t.d_before.at[t.b, t.h, which], LAYOUT, optimized=False)
            t.master_s.at[which][...] = self.master(t, which) + asked

    def begin(self, t: Any) -> None:
        """Adds to what is asked of the row's initial state; nothing is asked of the state before."""
        for which in SQUARES:
            memory = t.dinitial.at[t.b, t.h, which]
            memory[...] = self.shape.device.load(memory, LAYOUT, optimized=False) + self.master(t, which)
            t.master_s.at[which][...] = self.shape.device.zeros(*SQUARE)

    def open(self, t: Any, group: Group) -> None:
        """What came into the second layer and the steps, of keys and queries, of what was left of them."""
        shape = self.shape
        asked = load(shape, t.dy_s)
        if shape.normed:
            inverse = shape.device.load(t.inverses_s.at[1], hopper.ROWS)
            asked = gpu_norm.pulled(load(shape, t.second_s), inverse, asked)
        z = load(shape, t.said_s)
        found = (
            (t.dy_s, asked), (t.second_s, gelu(load(shape, t.first_s))), (t.inputs_s, gelu(z)),
            (t.steps_s.at[0], gelu_slope(z) * load(shape, t.backs_s)),
            (t.steps_s.at[1], load(shape, t.steps_s.at[1]) * group.per_row(THETA)), (t.moved_s, group.moved()),
        )  # fmt: skip
        for memory, x in found:
            memory[...] = group.masked(x).astype(shape.dtype)
        plgpu.commit_smem()

    def find(self, t: Any, which: int, x: jax.Array, *, first: bool, layout: Any = hopper.ROWS) -> None:
        memory = t.found_s.at[which]
        memory[...] = x if first else x + self.shape.device.load(memory, layout)

    def after(self, t: Any, group: Group, layer: int) -> tuple[jax.Array, jax.Array]:
        """What the state after the group asks of a layer's steps and of what came into it; and of the state before."""
        device, shape, rate = self.shape.device, self.shape, -self.shape.rates[layer]
        inputs, steps = (t.k_s, t.inputs_s)[layer], t.steps_s.at[layer]
        masters = [self.master(t, 2 * layer + i) for i in range(2)]
        plgpu.commit_smem()
        for i, x in enumerate(masters):
            t.pairs_s.at[i][...] = x.astype(shape.dtype)
        plgpu.commit_smem()
        before = [load(shape, t.state_s.at[2 * layer + i]) for i in range(2)]
        ends = ((names.BETA, 0, 0), (names.RHO, 0, 1), (names.H, 1, 1))
        for which, i, j in ends:
            self.find(t, which, (masters[i] * before[j]).sum(axis=1), first=layer == 0)
        w, s = masters
        beta, h = jnp.exp2(group.of_last(KEPT)), jnp.exp2(group.of_last(MOVED))
        for i, x in enumerate((beta * w, group.of_last(RHO) * w + h * s)):
            t.master_s.at[2 * layer + i][...] = x
        step, of_steps, factors = load(shape, steps), device.zeros(*SQUARE), []
        for i, (number, which) in enumerate(((LAST_KAPPA, names.KAPPA), (LAST_MOVED, names.LEFT))):
            learned, scale = product(device, inputs, t.pairs_s.at[i], SQUARE), rate * group.per_row(number)
            self.find(t, which, rate * (step * learned).sum(axis=1), first=layer == 0)
            of_steps += scale * learned
            factors.append(((step * scale).astype(shape.dtype), t.pairs_s.at[i].T))
        return of_steps, added(device, device.zeros(*SQUARE), *factors)

    def pairs(
        self, t: Any, group: Group, rate: float, rows: Any, others: Any, steps: Any, given: Any, *, early: bool
    ) -> jax.Array:
        """Puts into `pairs_s` the gradient of `x X^T` and what was its sum's factor of D; returns that of kappa."""
        device = self.shape.device
        slopes, scored = product(device, given, steps.T, PAIRS), product(device, rows, others.T, PAIRS)
        kappa = -rate * group.kappa(t.moved_s, early=early)
        plgpu.commit_smem()
        for i, x in enumerate((slopes, scored)):
            t.pairs_s.at[i][...] = (kappa * x).astype(self.shape.dtype)
        plgpu.commit_smem()
        return -rate * slopes * scored

    def read_sums(self, t: Any, group: Group, layer: int, rows: Any, given: Any, ways: Any, *, first: bool) -> None:
        """What rows that a layer reads ask of how much is left of W and S."""
        found = {READ: (names.READ, names.RHO_READ), EARLY: (names.EARLY, names.RHO_EARLY)}[ways[0]]
        weights = jnp.exp2(group.per_row(ways[0])), group.per_row(ways[1])
        for i in range(1 + (ways == _READ or self.shape.several)):
            x = load(self.shape, given) * product(self.shape.device, rows, t.state_s.at[2 * layer + i], SQUARE)
            self.find(t, found[i], (x if i else x * weights[0]).sum(axis=1), first=first)

    def push(self, t: Any, group: Group, layer: int, factors: list[tuple[Any, Any]], ways: Any) -> None:
        """Adds to what is asked of W and S before the group, of inputs and what is given to outputs of a layer."""
        for inputs, given in factors:
            plgpu.commit_smem()
            parts = scaled(group, load(self.shape, given), *ways)
            for i, x in enumerate(parts):
                t.pairs_s.at[i][...] = x
            plgpu.commit_smem()
            for i in range(len(parts)):
                start = self.master(t, 2 * layer + i)
                t.master_s.at[2 * layer + i][...] = added(self.shape.device, start, (inputs.T, t.pairs_s.at[i]))

    def queries(self, t: Any, group: Group, of_inputs: Any, of_steps: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """Stores dq; adds to the gradients of what came into layers, and of steps."""
        device, shape, none = self.shape.device, self.shape, self.shape.device.zeros(*SQUARE)
        (dk, da), (dfirst, dsecond) = of_inputs, of_steps
        (first, second), (p, near), g = (t.steps_s.at[i] for i in range(2)), (t.pairs_s.at[i] for i in range(2)), t.second_s
        dkappa = self.pairs(t, group, shape.rates[1], g, t.inputs_s, second, t.dy_s, early=False)
        dsecond = added(device, dsecond, (near.T, t.dy_s))
        da = added(device, da, (p.T, g))
        dg = added(device, none, (p, t.inputs_s), *far(group, load(shape, t.dy_s), *_READ, t.state_s, 1, back=True))
        self.read_sums(t, group, 1, g, t.dy_s, _READ, first=True)
        replace(t.given_s, group.masked(dg * gelu_slope(load(shape, t.first_s))))
        self.push(t, group, 1, [(g, t.dy_s)], _READ)
        dkappa += self.pairs(t, group, shape.rates[0], t.q_s, t.k_s, first, t.given_s, early=False)
        dfirst = added(device, dfirst, (near.T, t.given_s))
        dk = added(device, dk, (p.T, t.q_s))
        dq = added(device, none, (p, t.k_s), *far(group, load(shape, t.given_s), *_READ, t.state_s, 0, back=True))
        self.store(t, group, dq, t.dq)
        self.read_sums(t, group, 0, t.q_s, t.given_s, _READ, first=False)
        self.push(t, group, 0, [(t.q_s, t.given_s)], _READ)
        self.of_kappa(t, group, dkappa, early=False)
        return [dk, da], [dfirst, dsecond]

    def of_kappa(self, t: Any, group: Group, dkappa: jax.Array, *, early: bool) -> None:
        """What the gradient of a kappa asks of logarithms of what is kept, and of what is left of momentum."""
        device, kept = self.shape.device, group.kept(early=early)
        plgpu.commit_smem()
        for i, x in enumerate((dkappa, kept)):
            t.pairs_s.at[i][...] = x.astype(self.shape.dtype)
        plgpu.commit_smem()
        x = kept * product(device, t.pairs_s.at[0], t.moved_s.T, PAIRS)
        self.find(t, names.EARLY if early else names.READ, x.sum(axis=1), first=False)
        self.find(t, names.KEPT, -x.sum(axis=0), first=not early, layout=COLUMNS)
        x = group.moved() * product(device, t.pairs_s.at[1].T, t.pairs_s.at[0], PAIRS)
        self.find(t, names.MOVED, x.sum(axis=1), first=not early)
        self.find(t, names.MOVED_AS_OLDER, -x.sum(axis=0), first=not early, layout=COLUMNS)

    def keys(self, t: Any, group: Group, dk: jax.Array, da: jax.Array, of_steps: list[jax.Array]) -> None:
        """Stores dk and `dmisses`; adds to gradients of W and S, and to what is found."""
        device, shape, base = self.shape.device, self.shape, (da, *of_steps)
        asked = base
        if shape.several:
            asked = lax.fori_loop(0, shape.chunks - 1, lambda _, x: self.learned(t, group, base, x), base)
        dkappa, dmiss = self.learned(t, group, base, asked, last=True)
        self.store(t, group, dmiss, t.dmisses)
        back, said, first = t.q_s, t.dy_s, t.given_s
        factors = far(group, load(shape, first), *_LEARN, t.state_s, 0, back=True)
        if shape.several:
            dkappa += self.pairs(t, group, shape.rates[0], t.k_s, t.k_s, t.steps_s.at[0], first, early=True)
            factors += [(t.pairs_s.at[0], t.k_s), (t.pairs_s.at[0].T, t.k_s)]
        self.store(t, group, added(device, dk, *factors), t.dk)
        self.read_sums(t, group, 0, t.k_s, first, _LEARN, first=True)
        self.read_sums(t, group, 1, t.inputs_s, said, _LEARN, first=False)
        self.read_sums(t, group, 1, back, t.steps_s.at[1], _LEARN, first=False)
        self.push(t, group, 0, [(t.k_s, first)], _LEARN)
        self.push(t, group, 1, [(t.inputs_s, said), (back, t.steps_s.at[1])], _LEARN)
        if shape.several:
            self.of_kappa(t, group, dkappa, early=True)
        else:
            self.find(t, names.RHO_EARLY, device.full(ROWS, 0.0), first=True)

    def learned(self, t: Any, group: Group, base: Any, asked: Any, *, last: bool = False) -> Any:
        """From gradients of the second layer's inputs, and of both layers' steps: what with `base` these are for the
        chunks before, or, the last time, kappa's gradient of the second layer, and `dmisses`.

        Leaves gradients, at what went back through the second layer in `q_s`, at what it said in `dy_s`, and at what
        the first one said in `given_s`.
        """
        device, shape, rate = self.shape.device, self.shape, self.shape.rates[1]
        (da, dfirst, dsecond), (second, a) = asked, (t.steps_s.at[1], t.inputs_s)
        (p, near), back, said = (t.pairs_s.at[i] for i in range(2)), t.q_s, t.dy_s
        da_late, dfirst_late, dsecond_late = base
        z = load(shape, t.said_s)
        replace(back, group.masked(dfirst * gelu_slope(z)))
        dkappa, factors = None, far(group, load(shape, back), *_LEARN, t.state_s, 1)
        if shape.several:
            dkappa = self.pairs(t, group, rate, second, second, a, back, early=True)
            factors.append((p, second))
            if not last:
                dsecond_late = added(device, dsecond_late, (p.T, second))
                da_late = added(device, da_late, (near.T, back))
        dsecond = added(device, dsecond, *factors)
        dmiss = dsaid = self.through_error(t, group, dsecond, last=last)
        if shape.normed:
            dmiss, dsaid = dsaid
        replace(said, group.masked(dsaid))
        factors = far(group, load(shape, said), *_LEARN, t.state_s, 1, back=True)
        if shape.several:
            more = self.pairs(t, group, rate, a, a, second, said, early=True)
            dkappa += more
            factors.append((p, a))
            if not last:
                dsecond_late = added(device, dsecond_late, (near.T, said))
                da_late = added(device, da_late, (p.T, a))
        da = added(device, da, *factors)
        z = load(shape, t.said_s)
        replace(t.given_s, group.masked(da * gelu_slope(z) + dfirst * gelu_bend(z) * load(shape, t.backs_s)))
        if last:
            return dkappa, dmiss
        self.pairs(t, group, shape.rates[0], t.k_s, t.k_s, t.steps_s.at[0], t.given_s, early=True)
        return da_late, added(device, dfirst_late, (near.T, t.given_s)), dsecond_late

    def through_error(self, t: Any, group: Group, dsecond: jax.Array, *, last: bool) -> Any:
        """Gradients at what the layers say of keys; with a norm also, before it, at what the memory says of them."""
        shape, derror = self.shape, dsecond * group.per_row(THETA)
        e = load(shape, t.first_s)
        if not shape.normed:
            if last:
                self.find(t, names.THETA, (dsecond * e).sum(axis=1), first=True)
            return derror
        x, inverse = load(shape, t.second_s), shape.device.load(t.inverses_s.at[0], hopper.ROWS)
        if last:
            self.find(t, names.THETA, (dsecond * gpu_norm.pulled(x, inverse, e)).sum(axis=1), first=True)
        return gpu_norm.slopes(x, inverse, e, derror)

    def store(self, t: Any, group: Group, x: jax.Array, target: Any) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put(t.out_s, x)
        group.store(t.out_s, target.at[t.b, :, t.h])
