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
from kernels_pallas.neural_memory import gpu_norm
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
    placed,
    renewed,
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
# Behind the state's copy. What is in them first; then dy_s has gradients at what the layers said, second_s what comes
# into the second layer of queries, and q_s what goes back through it.
_TILES = (
    "q_s", "k_s", "dy_s", "said_s", "backs_s", "first_s", "second_s", "moved_s", "inputs_s", "step1_s", "step2_s",
    "pair1_s", "pair2_s", "given_s",
)  # fmt: skip
_READ, _LEARN = (READ, RHO_READ), (EARLY, RHO_EARLY)


def backward(
    shape: DeepShape, q, k, dy, numbers, table, bounds, d_end, d_before, left: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """dq, and three parts of dk [B, T, H, d], without what a norm's residual adds; `dmisses`, the gradient of what the
    memory says of keys, so minus that of the values; `found` [B, H, N, 13, 64] float32 of groups, by the names of
    `gpu_backward_groups`; the gradients of the initial states of each row, and of the state before the first position
    [B, H, 4, d, d].

    Args: as of `gpu_deep_forward.forward`; d_end, d_before [B, H, 4, d, d]; left: what `gpu_deep_forward.again` left.
    """
    (B, _, H, d), of = q.shape, jax.ShapeDtypeStruct
    rows, state = of(q.shape, q.dtype), of((B, H, 4, d, d), F32)
    out = dict.fromkeys(("dq", "dk_after", "dk_read", "dk", "dmisses"), rows)
    out |= {"found": of((B, H, table.shape[1], names.FOUND, ROWS), F32), "dinitial": state, "dcarried": state}
    run = shape.device.kernel(
        NAME,
        lambda *refs, **scratch: _Backward(shape).body(list(out), *refs, **scratch),
        by_lanes=True,
        sums_bytes=4 * ROWS * 4,  # a column's sum of each warp
        out_type=list(out.values()),
        scratch_types={
            "tiles_s": shape.tile(4 + len(_TILES)), "master_s": shape.masters(), "numbers_s": numbers_memory(),
            "inverses_s": plgpu.SMEM((2, ROWS), F32), "found_s": plgpu.SMEM((names.FOUND, ROWS), F32),
            "out_s": plgpu.SMEM((1, ROWS, E), shape.dtype),
            "here": barriers(1, 12 + 2 * shape.normed), "later_here": barriers(1, 3 + shape.normed),
            "state_here": barriers(1, 4), "again_here": barriers(1, 2) if shape.several else None,
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
            q=q, k=k, dy=dy, numbers=numbers, table=table, d_before=d_before, h=h, b=b, zero=zero[0], z=0,
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
        rows += [(t.said_read, t.first_s), (t.errors, t.steps_s[1])]
        if self.shape.normed:
            rows.append((t.normed_read, t.second_s))
            copy(t.inverses.at[t.b, t.h, n], t.inverses_s)
        for source, target in rows:
            copy(source.at[t.b, group.rows, t.h], target)
        copy(t.numbers.at[t.b, t.h, :, group.rows], t.numbers_s)
        for which in SQUARES:
            copy(t.states.at[t.b, t.h, group.of(BEFORE), which], t.tiles_s.at[which])

    def fetch_misses(self, t: Any, group: Group) -> None:
        """What the gradient of the steps' error needs, in place of what queries read; and what keys said again."""
        plgpu.commit_smem()
        rows = [(t.misses, t.first_s), (t.normed, t.second_s)] if self.shape.normed else [(t.errors, t.first_s)]
        rows += [(t.said, t.said_s), (t.backs, t.backs_s)]
        for source, target in rows:
            plgpu.copy_gmem_to_smem(source.at[t.b, group.rows, t.h], target, t.later_here.at[0])

    def group(self, t: Any, i: jax.Array) -> None:
        """Gradients of a group, and of W and S before it."""
        n = t.count - 1 - i
        group = Group(self.shape, t.table, t.b, n, t.numbers_s, lax.min(i, t.zero))
        t = placed(t, t.tiles_s, ("",) * 4 + _TILES, group)
        t.n, t.steps_s, t.pairs_s = n, (t.step1_s, t.step2_s), (t.pair1_s, t.pair2_s)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()  # orders what was read before the copies over it
        self.fetch(t, n, group)
        plgpu.barrier_wait(t.here.at[0])
        self.open(t)
        self.queries(t)
        self.fetch_misses(t, group)
        plgpu.barrier_wait(t.later_here.at[0])
        self.keys(t)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(t.found_s, t.found.at[t.b, t.h, n])
        pl.when(n + 1 == t.count)(lambda: self.add_before(t))
        pl.when(group.of(FRESH) > 0)(lambda: self.begin(t))

    def master(self, t: Any, which: int) -> jax.Array:
        return self.shape.device.load(t.master_s.at[t.z + which], LAYOUT)

    def add_before(self, t: Any) -> None:
        for which in SQUARES:
            asked = self.shape.device.load(t.d_before.at[t.b, t.h, which], LAYOUT, optimized=False)
            t.master_s.at[t.z + which][...] = self.master(t, which) + asked

    def begin(self, t: Any) -> None:
        """Adds to what is asked of the row's initial state; nothing is asked of the state before."""
        for which in SQUARES:
            memory = t.dinitial.at[t.b, t.h, which]
            memory[...] = self.shape.device.load(memory, LAYOUT, optimized=False) + self.master(t, which)
            t.master_s.at[t.z + which][...] = self.shape.device.zeros(*SQUARE)

    def open(self, t: Any) -> None:
        """What came into the second layer and the steps, of keys and queries, of what was left of them."""
        shape, group = self.shape, renewed(t)
        asked = load(shape, t.dy_s)
        if shape.normed:
            inverse = shape.device.load(t.inverses_s.at[1], hopper.ROWS)
            asked = gpu_norm.pulled(load(shape, t.second_s), inverse, asked)
        t.dy_s[...] = group.masked(asked).astype(shape.dtype)
        t.second_s[...] = group.masked(gelu(load(shape, t.first_s))).astype(shape.dtype)
        z = load(shape, t.said_s)
        t.inputs_s[...] = group.masked(gelu(z)).astype(shape.dtype)
        t.step1_s[...] = group.masked(gelu_slope(z) * load(shape, t.backs_s)).astype(shape.dtype)
        t.step2_s[...] = group.masked(load(shape, t.step2_s) * group.per_row(THETA)).astype(shape.dtype)
        put(t.moved_s, renewed(t).moved())

    def find(self, t: Any, which: int, x: jax.Array, *, first: bool, layout: Any = hopper.ROWS) -> None:
        memory = t.found_s.at[which]
        if not first:
            x += self.shape.device.load(memory, layout)
            plgpu.commit_smem()  # several threads have the same number: all read before any writes
        memory[...] = x

    def after(self, t: Any, layer: int, of_steps: Any, *, first: bool) -> list[tuple[jax.Array, Any]]:
        """Adds, in memory, what the state after the group asks of a layer's steps; and that is asked of the state
        before. Returns factors of what it asks of what came into the layer."""
        device, shape, rate, group = self.shape.device, self.shape, -self.shape.rates[layer], renewed(t)
        inputs, steps = (t.k_s, t.inputs_s)[layer], t.steps_s[layer]
        before = lambda i: load(shape, t.tiles_s.at[t.z + 2 * layer + i])
        master, memory = lambda i: self.master(t, 2 * layer + i), lambda i: t.master_s.at[t.z + 2 * layer + i]
        w = master(0)
        replace(t.pairs_s[0], w)
        self.find(t, names.BETA, (w * before(0)).sum(axis=1), first=first)
        self.find(t, names.RHO, (w * before(1)).sum(axis=1), first=first)
        s = master(1)
        put(t.pairs_s[1], s)
        self.find(t, names.H, (s * before(1)).sum(axis=1), first=first)
        memory(1)[...] = group.of_last(RHO) * master(0) + jnp.exp2(group.of_last(MOVED)) * s
        memory(0)[...] = jnp.exp2(group.of_last(KEPT)) * master(0)
        factors = []
        for i, (number, which) in enumerate(((LAST_KAPPA, names.KAPPA), (LAST_MOVED, names.LEFT))):
            learned, scale = product(device, inputs, t.pairs_s[i], SQUARE), rate * renewed(t).per_row(number)
            self.find(t, which, rate * (load(shape, steps) * learned).sum(axis=1), first=first)
            of_steps[...] = (load(shape, of_steps) + scale * learned).astype(shape.dtype)
            factors.append(((load(shape, steps) * scale).astype(shape.dtype), t.pairs_s[i].T))
        return factors

    def pairs(self, t: Any, layer: int, rows: Any, others: Any, steps: Any, given: Any, *, early: bool, i: Any = 0):
        """Puts into memory, and returns, the gradient of `x X^T` and what was its sum's factor of D."""
        device, rate = self.shape.device, self.shape.rates[layer]
        plgpu.commit_smem()
        for memory, (a, b) in zip(t.pairs_s, ((given, steps), (rows, others))):
            scored = -rate * product(device, a, b.T, PAIRS)
            memory[...] = (renewed(t, i).kappa(t.moved_s, early=early) * scored).astype(self.shape.dtype)
        plgpu.commit_smem()
        return t.pairs_s

    def of_kappa(self, t: Any, factors: list[tuple[Any, ...]], *, early: bool) -> None:
        """What the gradient of a kappa asks of logarithms of what is kept, and of what is left of momentum.

        factors: of each sum of pairs, as of `pairs`.
        """
        device, total, slopes = self.shape.device, *t.pairs_s
        for n, (layer, rows, others, steps, given) in enumerate(factors):
            # Stores in between: no product then starts while numbers of the one before are still to be read.
            replace(slopes, -self.shape.rates[layer] * product(device, given, steps.T, PAIRS))
            x = load(self.shape, slopes) * product(device, rows, others.T, PAIRS)
            put(total, x + load(self.shape, total) if n else x)
        kept = renewed(t).kept(early=early)
        replace(t.pair2_s, kept)
        x = kept * product(device, total, t.moved_s.T, PAIRS)
        self.find(t, names.EARLY if early else names.READ, x.sum(axis=1), first=False)
        self.find(t, names.KEPT, -x.sum(axis=0), first=not early, layout=COLUMNS)
        x = renewed(t).moved() * product(device, t.pair2_s.T, total, PAIRS)
        self.find(t, names.MOVED, x.sum(axis=1), first=not early)
        self.find(t, names.MOVED_AS_OLDER, -x.sum(axis=0), first=not early, layout=COLUMNS)

    def read_sums(self, t: Any, layer: int, rows: Any, given: Any, ways: Any, *, first: bool) -> None:
        """What rows that a layer reads ask of how much is left of W and S."""
        found = {READ: (names.READ, names.RHO_READ), EARLY: (names.EARLY, names.RHO_EARLY)}[ways[0]]
        for i in range(1 + (ways == _READ or self.shape.several)):
            x = load(self.shape, given) * product(self.shape.device, rows, t.tiles_s.at[t.z + 2 * layer + i], SQUARE)
            x = x.sum(axis=1)
            self.find(t, found[i], x if i else x * jnp.exp2(renewed(t).row(ways[0])), first=first)

    def push(self, t: Any, layer: int, factors: list[tuple[Any, Any]], ways: Any) -> None:
        """Adds to what is asked of W and S before the group, of inputs and what is given to outputs of a layer."""
        for inputs, given in factors:
            parts = scaled(renewed(t), load(self.shape, given), *ways)
            for i, (memory, x) in enumerate(zip(t.pairs_s, parts)):
                replace(memory, x)
                start = self.master(t, 2 * layer + i)
                t.master_s.at[t.z + 2 * layer + i][...] = added(self.shape.device, start, (inputs.T, memory))

    def queries(self, t: Any) -> None:
        """Stores dq, and what of dk goes by the state after the group, and by queries; leaves what is asked of the
        inputs of the second layer, and of steps, where `learned` takes it."""
        device, shape, none, g = self.shape.device, self.shape, self.shape.device.zeros(*SQUARE), t.second_s
        # What keys said is read again behind the queries: its memory has gradients, as registers are few.
        of_second, of_inputs, of_first = t.said_s, t.backs_s, t.first_s
        second = 1, g, t.inputs_s, t.step2_s, t.dy_s
        p, near = self.pairs(t, *second, early=False)
        of_second[...] = product(device, near.T, t.dy_s, SQUARE).astype(shape.dtype)
        of_inputs[...] = product(device, p.T, g, SQUARE).astype(shape.dtype)
        through = far(renewed(t), load(shape, t.dy_s), *_READ, t.tiles_s, 1, back=True)
        dg = added(device, none, (p, t.inputs_s), *through)
        replace(t.given_s, renewed(t).masked(dg * gelu_slope(load(shape, t.first_s))))
        self.read_sums(t, 1, g, t.dy_s, _READ, first=True)
        factors = self.after(t, 1, of_second, first=True)
        of_inputs[...] = added(device, load(shape, of_inputs), *factors).astype(shape.dtype)
        self.push(t, 1, [(g, t.dy_s)], _READ)
        first = 0, t.q_s, t.k_s, t.step1_s, t.given_s
        p, near = self.pairs(t, *first, early=False)
        of_first[...] = product(device, near.T, t.given_s, SQUARE).astype(shape.dtype)
        self.store(t, product(device, p.T, t.q_s, SQUARE), t.dk_read)
        through = far(renewed(t), load(shape, t.given_s), *_READ, t.tiles_s, 0, back=True)
        self.store(t, added(device, none, (p, t.k_s), *through), t.dq)
        self.read_sums(t, 0, t.q_s, t.given_s, _READ, first=False)
        factors = self.after(t, 0, of_first, first=False)
        self.store(t, added(device, none, *factors), t.dk_after)
        self.push(t, 0, [(t.q_s, t.given_s)], _READ)
        self.of_kappa(t, [second, first], early=False)
        plgpu.commit_smem()
        for source, target in zip((of_inputs, of_first, of_second), (t.dy_s, t.given_s, t.q_s)):
            target[...] = source[...]

    def keys(self, t: Any) -> None:
        """Stores the rest of dk, and `dmisses`; adds to gradients of W and S, and to what is found."""
        device, shape, back, said, first = self.shape.device, self.shape, t.q_s, t.dy_s, t.given_s
        factors, of_first = [], (0, t.k_s, t.k_s, t.step1_s, first)
        if shape.several:
            self.chunks_before(t, of_first)
        self.learned(t, shape.chunks, last=True)
        if shape.several:
            p, _ = self.pairs(t, *of_first, early=True)
            factors = [(p, t.k_s), (p.T, t.k_s)]
        factors += far(renewed(t), load(shape, first), *_LEARN, t.tiles_s, 0, back=True)
        self.store(t, added(device, device.zeros(*SQUARE), *factors), t.dk)
        self.read_sums(t, 0, t.k_s, first, _LEARN, first=True)
        self.read_sums(t, 1, t.inputs_s, said, _LEARN, first=False)
        self.read_sums(t, 1, back, t.step2_s, _LEARN, first=False)
        self.push(t, 0, [(t.k_s, first)], _LEARN)
        self.push(t, 1, [(t.inputs_s, said), (back, t.step2_s)], _LEARN)
        if shape.several:
            self.of_kappa(t, [of_first, *self.of_second(t)], early=True)
        else:
            self.find(t, names.RHO_EARLY, device.full(ROWS, 0.0), first=True)

    def of_second(self, t: Any) -> tuple[tuple[Any, ...], ...]:
        """The second layer's sums of pairs where it learns: forth, and back (`pairs`)."""
        return (1, t.inputs_s, t.inputs_s, t.step2_s, t.dy_s), (1, t.step2_s, t.step2_s, t.inputs_s, t.q_s)

    def chunks_before(self, t: Any, of_first: tuple[Any, ...]) -> None:
        """Adds to what is asked of inputs and steps, which `learned` takes, what later chunks ask."""
        device, shape, back, said, first = self.shape.device, self.shape, t.q_s, t.dy_s, t.given_s
        forth, back_again = self.of_second(t)
        # What queries and the state after ask, where the first layer's state and outputs were.
        bases = t.tiles_s.at[t.z], t.tiles_s.at[t.z + 1], t.out_s.at[t.z]
        start = lambda base: device.load(base, LAYOUT, optimized=False).astype(F32)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for base, asked in zip(bases, (said, first, back)):
            base[...] = asked[...]

        @pl.loop(0, shape.chunks - 1)
        def _(i: jax.Array) -> None:
            self.learned(t, i)
            p, near = self.pairs(t, *back_again, early=True, i=i)
            of_inputs = added(device, start(bases[0]), (near.T, back))
            replace(back, added(device, start(bases[2]), (p.T, t.step2_s)))
            p, near = self.pairs(t, *forth, early=True, i=i)
            put(back, added(device, load(shape, back), (near.T, said)))
            replace(said, added(device, of_inputs, (p.T, t.inputs_s)))
            _, near = self.pairs(t, *of_first, early=True, i=i)
            replace(first, added(device, start(bases[1]), (near.T, first)))

        plgpu.commit_smem()
        for which in range(2):
            source = t.states.at[t.b, t.h, t.group.of(BEFORE), which]
            plgpu.copy_gmem_to_smem(source, t.tiles_s.at[which], t.again_here.at[0])
        plgpu.barrier_wait(t.again_here.at[0])

    def learned(self, t: Any, i: Any, *, last: bool = False) -> None:
        """In place of what is asked of the second layer's inputs (`dy_s`), and of both layers' steps (`given_s`,
        `q_s`), gradients at what it said, at what the first one said, and at what went back through the second.

        The last time stores `dmisses`.
        """
        device, shape, several = self.shape.device, self.shape, self.shape.several
        back, said, first = t.q_s, t.dy_s, t.given_s
        forth, back_again = self.of_second(t)
        of_second = load(shape, back)
        replace(back, renewed(t, i).masked(load(shape, first) * gelu_slope(load(shape, t.said_s))))
        factors = [(self.pairs(t, *back_again, early=True, i=i)[0], t.step2_s)] if several else []
        factors += far(renewed(t, i), load(shape, back), *_LEARN, t.tiles_s, 1)
        dsaid = self.through_error(t, i, added(device, of_second, *factors), last=last)
        of_inputs = load(shape, said)
        replace(said, renewed(t, i).masked(dsaid))
        factors = [(self.pairs(t, *forth, early=True, i=i)[0], t.inputs_s)] if several else []
        factors += far(renewed(t, i), load(shape, said), *_LEARN, t.tiles_s, 1, back=True)
        z, of_inputs = load(shape, t.said_s), added(device, of_inputs, *factors)
        x = of_inputs * gelu_slope(z) + load(shape, first) * gelu_bend(z) * load(shape, t.backs_s)
        replace(first, renewed(t, i).masked(x))

    def through_error(self, t: Any, i: Any, dsecond: jax.Array, *, last: bool) -> jax.Array:
        """The gradient at what the layers say of keys; the last time stores that at what the memory says of them."""
        shape, e = self.shape, load(self.shape, t.first_s)
        derror = dmiss = dsaid = dsecond * renewed(t, i).per_row(THETA)
        if shape.normed:
            x, inverse = load(shape, t.second_s), shape.device.load(t.inverses_s.at[0], hopper.ROWS)
            if last:
                self.find(t, names.THETA, (dsecond * gpu_norm.pulled(x, inverse, e)).sum(axis=1), first=True)
            dmiss, dsaid = gpu_norm.slopes(x, inverse, e, derror)
        elif last:
            self.find(t, names.THETA, (dsecond * e).sum(axis=1), first=True)
        if last:
            self.store(t, dmiss, t.dmisses)
        return dsaid

    def store(self, t: Any, x: jax.Array, target: Any) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put(t.out_s.at[t.z], x)
        t.group.store(t.out_s.at[t.z], target.at[t.b, :, t.h])
