"""The backward on TPU: one pass from the last position to the first.

It carries the gradient of the state. The states before each chunk of a block are made again from the one that the
forward saved before the block. Scores are keys by queries, so that only one of a chunk's matrices of pairs is turned.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.linear_recurrence import channels
from kernels_pallas.linear_recurrence.chunk import Step, Unit, lockstep, over_lanes, staggered, total
from kernels_pallas.linear_recurrence.plan import Blocks, Plan, as_rows, backward_flops, from_rows, kernel_name
from kernels_pallas.mosaic import product

_wide = lambda x: x.astype(jnp.float32)


class Backward(Step):
    """A step of the grid; states and their gradients of a block's heads stay values from chunk to chunk."""

    def run(self) -> None:
        """Everything."""
        plan, r, heads, chunks = self.plan, self.r, range(self.heads), range(self.plan.sizes.chunks)
        names = ("state", "sums") if plan.column else ("state",)

        @pl.when(self.first)
        def _():
            for name in names:
                r[f"d{name}"][...] = r[f"d{name}_end"][0]
            self.fill_tables()

        self.states = {(0, h): r["state_saved"][0, 0, h] for h in heads}
        self.sums = {(0, h): r["sums_saved"][0, 0, h] for h in heads} if plan.column else {}
        self.joined: dict[tuple[int, int], channels.Pairs] = {}
        again = self.forward_unit_by_channel if plan.channels else self.forward_unit
        unit = self.unit_by_channel if plan.channels else self.unit
        for m in chunks[:-1]:
            lockstep(again(m, h) for h in heads)
        self.dstate = [r["dstate"][h] for h in heads]
        self.dsums = [r["dsums"][h] for h in heads] if plan.column else []
        units = [[unit(m, h) for h in heads] for m in reversed(chunks)]
        if plan.shared:
            staggered(units, phases=5, ahead=2)
        else:
            for of_chunk in units:
                lockstep(of_chunk)
        for h in heads:
            r["dstate"][h] = self.dstate[h]
            if plan.column:
                r["dsums"][h] = self.dsums[h]

        @pl.when(self.last)
        def _():
            for name in names if plan.given else ():
                r[f"d{name}_start"][0] = r[f"d{name}"][...]

    def forward_unit(self, m: int, h: int) -> Unit:
        """The state after a chunk of a head."""
        (*_, d, e), dtype = self.plan.shape, self.r["q"].dtype
        _, _, write, carry = self.weights(m, h)
        written = (self.keys("k", m, h) * write[:, :d]).astype(dtype)
        new = product(written, self.load("u", m, h), 0, 0)
        yield
        self.states[m + 1, h] = self.states[m, h] * carry[:, :e] + new
        if self.plan.column:
            self.sums[m + 1, h] = carry[:, :1] * self.sums[m, h] + self.times_rows(self.r["z"][0, h, m], written, 0)

    def pairs_of(self, m: int, h: int) -> channels.Pairs:
        """A chunk whose channels have their own decays."""
        if (m, h) not in self.joined:
            decays = channels.Decays(self.load("logs", m, h), self.masks(m))
            self.joined[m, h] = channels.Pairs(self, decays, self.load("k", m, h))
        return self.joined[m, h]

    def forward_unit_by_channel(self, m: int, h: int) -> Unit:
        """`forward_unit` where channels have their own decays."""
        pairs, u = self.pairs_of(m, h), self.load("u", m, h)
        new = product((pairs.k * pairs.decays.write).astype(u.dtype), u, 0, 0)
        yield
        self.states[m + 1, h] = self.states[m, h] * self.spread(pairs.decays.kept, u.shape[1]) + new

    def unit_by_channel(self, m: int, h: int) -> Unit:
        """`unit` where channels have their own decays."""
        (*_, e), dtype, pairs = self.plan.shape, self.r["q"].dtype, self.pairs_of(m, h)
        q, u, do = (self.load(name, m, h) for name in ("q", "u", "do"))
        k, read, write = pairs.k, pairs.decays.read, pairs.decays.write
        slopes = product(u, do, 1, 1)
        (p,) = yield from pairs.scores(q, overlaps=False)
        before, after = self.states[m, h].astype(dtype), self.dstate[h].astype(dtype)
        far_q, far_k = product(do, before, 1, 1) * read, product(u, after, 1, 1) * write
        du = product(p, do, 1, 0) + product((k * write).astype(dtype), after, 1, 0)
        new = product((q * read).astype(dtype), do, 0, 0)
        yield
        self.store("du", m, h, du)
        (dq,), dk = yield from pairs.gradients(q, over_lanes(_wide(u) * _wide(do)), slopes)
        dq, dk = dq + far_q, dk + far_k
        self.store("dq", m, h, dq)
        self.store("dk", m, h, dk)
        if self.plan.wants_decay:
            passed = _wide(q) * dq - _wide(k) * dk
            pairs.store_decay(m, h, passed, _wide(k) * far_k, self.states[m, h] * self.dstate[h])
        self.dstate[h] = self.dstate[h] * self.spread(pairs.decays.kept, e) + new
        del self.joined[m, h]

    def unit(self, m: int, h: int) -> Unit:
        """A chunk of a head, in phases."""
        (*_, d, e), dtype = self.plan.shape, self.r["q"].dtype
        (q, k), (u, do) = (self.keys(name, m, h) for name in "qk"), (self.load(name, m, h) for name in ("u", "do"))
        scores, slopes = self.scores(m, k, q), product(u, do, 1, 1)
        column = Column(self, m, h) if self.plan.column else None
        yield
        pairs, read, write, carry = self.weights(m, h)
        if column is not None:
            slopes += column.slopes()
        p, s = (scores * pairs).astype(dtype), (slopes * pairs).astype(dtype)
        yield
        near = product(s, k, 0, 0), product(s, q, 1, 0), product(p, do, 1, 0)
        yield
        before, after = self.states[m, h].astype(dtype), self.dstate[h].astype(dtype)
        asked = (q * read[:, :d]).astype(dtype)
        far = product(do, before, 1, 1), product(u, after, 1, 1), product(k, after, 1, 0)
        new = product(asked, do, 0, 0)
        yield
        dq, dk_far = far[0] * read[:, :d], far[1] * write[:, :d]
        if column is not None:
            dq += read[:, :d] * column.far_queries()
            dk_far += write[:, :d] * column.far_keys()
        dq, dk = near[0] + dq, near[1] + dk_far
        self.store_keys("q", m, h, dq)
        self.store_keys("k", m, h, dk)
        self.store("du", m, h, near[2] + far[2] * write[:, :e])
        if self.plan.wants_decay:
            behind = total(_wide(k) * dk_far) + total(self.states[m, h] * self.dstate[h] * carry[:, :e])
            if column is not None:
                behind += carry[:, :1] * over_lanes(self.sums[m, h] * self.dsums[h])
            self.store_decay(m, h, _wide(q) * dq - _wide(k) * dk, behind)
        self.dstate[h] = self.dstate[h] * carry[:, :e] + new
        if column is not None:
            column.finish(p, k, asked, carry)


class Column:
    """The values' last column of a chunk of a head, in the backward."""

    def __init__(self, step: Backward, m: int, h: int):
        self.step, self.m, self.h = step, m, h
        self.z, self.doz = (step.r[name][0, h, m] for name in ("z", "doz"))
        (*_, d, _), C = step.plan.shape, step.plan.sizes.chunk
        self.z_column, self.doz_column = step.spread(self.z, max(C, d)), step.spread(self.doz, d)

    def slopes(self):
        """[C, C], keys by queries: what the column adds to the gradient of a pair's weighted score."""
        return self.z_column[:, : self.z.shape[1]] * self.doz

    def far_queries(self):
        """[C, d]: gradient of queries from the state before the chunk, unweighted."""
        return self.doz_column * self.step.sums[self.m, self.h]

    def far_keys(self):
        """[C, d]: gradient of keys from behind the chunk, unweighted."""
        dsums = self.step.dsums[self.h]
        return self.z_column[:, : dsums.shape[1]] * dsums

    def finish(self, p, k, asked, carry) -> None:
        """The column's own gradient, and that of the sums before the chunk."""
        step, m, h = self.step, self.m, self.h
        dsums = step.dsums[h]
        far = step.write_row(m, h) * step.times_rows(dsums, k, 1)
        step.r["dz"][0, h, m] = step.times_rows(self.doz, p, 1) + far
        step.dsums[h] = carry[:, :1] * dsums + step.times_rows(self.doz, asked, 0)


def _kernel(plan: Plan, heads: int, names: tuple[str, ...], *refs) -> None:
    Backward(plan, dict(zip(names, refs, strict=True)), heads=heads, backward=True).run()


def run(plan: Plan, arrays: Mapping[str, Any], saved: Mapping[str, Any], cotangents: Mapping[str, Any]):
    """See `kernels_pallas.linear_recurrence.gradient`; gradients by the names of the arrays that they are of."""
    (B, T, H, d, e), heads = plan.shape, plan.sizes.backward_heads
    blocks = Blocks(plan, heads, reverse=True)
    blocks.gates(arrays)
    for name, spec in (("q", blocks.keys()), ("k", blocks.keys()), ("u", blocks.positions(e))):
        blocks.input(name, arrays[name], spec)
    blocks.input("do", cotangents["o"], blocks.positions(e))
    rows = (B, H, plan.blocks * plan.sizes.chunks, 1, plan.sizes.chunk)
    states = {"state": (d, e)}
    if plan.column:
        states["sums"] = (1, d)
        blocks.input("z", as_rows(plan, arrays["z"]), blocks.rows())
        blocks.input("doz", as_rows(plan, cotangents["oz"]), blocks.rows())
    of_keys, of_blocks = blocks.key_gradients()
    for name in "qk":
        blocks.output(f"d{name}", of_keys, jnp.float32 if plan.shared else arrays[name].dtype, of_blocks)
    blocks.output("du", (B, T, H * e), arrays["u"].dtype, blocks.positions(e))
    by_rows = [n for n, wanted in (("dz", plan.column), ("dlogs", plan.wants_decay and not plan.channels)) if wanted]
    for name in by_rows:
        blocks.output(name, rows, jnp.float32, blocks.rows())
    if plan.wants_decay and plan.channels:
        blocks.output("dlogs", (B, T, H * d), jnp.float32, blocks.positions(d))
    for name, shape in states.items():
        blocks.input(f"{name}_saved", saved[f"{name}_saved"], blocks.saved_states(*shape))
        blocks.input(f"d{name}_end", cotangents[f"{name}_end"], blocks.states(*shape))
        if plan.given:
            blocks.output(f"d{name}_start", (B, H, *shape), jnp.float32, blocks.states(*shape))
        blocks.scratch(f"d{name}", (heads, *shape), jnp.float32)
    blocks.tables()
    kernel = functools.partial(_kernel, plan, heads, blocks.names())
    out = blocks.run(kernel, kernel_name(plan.channels, "backward"), backward_flops(plan))
    if plan.shared:
        out |= {f"d{name}": out[f"d{name}"].sum(1).astype(arrays[name].dtype) for name in "qk"}
    return out | {name: from_rows(plan, out[name]) for name in by_rows}
