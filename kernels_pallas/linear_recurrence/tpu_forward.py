"""The forward on TPU: one pass over the positions, the states of a group of heads in fast memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.linear_recurrence import channels
from kernels_pallas.linear_recurrence.chunk import Step, Unit, lockstep, staggered
from kernels_pallas.linear_recurrence.plan import Blocks, Plan, as_rows, forward_flops, from_rows, kernel_name
from kernels_pallas.mosaic import product


class Forward(Step):
    """A step of the grid; states of a block's heads stay values from chunk to chunk."""

    def run(self) -> None:
        """Everything."""
        plan, r, heads = self.plan, self.r, range(self.heads)
        names = {"state": "given"} | ({"sums": "given_sums"} if plan.column else {})

        @pl.when(self.first)
        def _():
            for name, given in names.items():
                r[name][...] = r[given][0] if plan.given else jnp.zeros_like(r[name])
            self.fill_tables()

        for name in names:
            if f"{name}_saved" in r:
                r[f"{name}_saved"][0, 0] = r[name][...]
        self.state = [r["state"][h] for h in heads]
        self.sums = [r["sums"][h] for h in heads] if plan.column else []
        units = [[self.unit(m, h) for h in heads] for m in range(plan.sizes.chunks)]
        if plan.shared:
            staggered(units, phases=4, ahead=2)
        else:
            for of_chunk in units:
                lockstep(of_chunk)
        for h in heads:
            r["state"][h] = self.state[h]
            if plan.column:
                r["sums"][h] = self.sums[h]

        @pl.when(self.last)
        def _():
            for name in names:
                r[f"{name}_end"][0] = r[name][...]

    def unit(self, m: int, h: int) -> Unit:
        """A chunk of a head, in phases."""
        (*_, e), dtype = self.plan.shape, self.r["q"].dtype
        q = self.keys("q", m, h, masked=False)  # rows behind the end are nobody's
        k, u = self.keys("k", m, h), self.load("u", m, h)
        decayed = type(self).by_channel if self.plan.channels else type(self).by_position
        p, asked, read, written, carry = yield from decayed(self, m, h, q, k)
        far = product(asked, self.state[h].astype(dtype), 1, 0)
        near = product(p, u, 1, 0)
        new = product(written, u, 0, 0)
        yield
        self.store("o", m, h, near + (far if read is None else far * read[:, :e]))
        self.state[h] = new + self.state[h] * carry[:, :e]
        if self.plan.column:
            self._column(m, h, q, p, written, carry)

    def by_position(self, m: int, h: int, q: jax.Array, k: jax.Array):
        """Of a chunk, in phases: weighted scores [C, C], what reads the state before and what that is weighted with,
        what is written, [C, d] each, and what passes of the state before."""
        scores = self.scores(m, q, k)
        yield
        pairs, read, write, carry = self.weights(m, h)
        p, written = (scores * pairs).astype(q.dtype), (k * write[:, : k.shape[1]]).astype(q.dtype)
        yield
        return p, q, read, written, carry

    def by_channel(self, m: int, h: int, q: jax.Array, k: jax.Array):
        """`by_position` where channels have their own decays, which are in what reads."""
        decays = channels.Decays(self.load("logs", m, h), self.masks(m))
        (p,) = yield from channels.scores(self, decays, q, k, overlaps=False)
        asked, written = ((x * weight).astype(q.dtype) for x, weight in ((q, decays.read), (k, decays.write)))
        carry = self.spread(decays.kept, self.plan.shape[4])
        return p.astype(q.dtype), asked, None, written, carry

    def _column(self, m: int, h: int, q, p, written, carry) -> None:
        """The values' last column, of which a chunk is a row, and the state a row over keys."""
        z, sums = self.r["z"][0, h, m], self.sums[h]
        self.r["oz"][0, h, m] = self.times_rows(z, p, 1) + self.read_row(m, h) * self.times_rows(sums, q, 1)
        self.sums[h] = carry[:, :1] * sums + self.times_rows(z, written, 0)


def _kernel(plan: Plan, heads: int, names: tuple[str, ...], *refs) -> None:
    Forward(plan, dict(zip(names, refs, strict=True)), heads=heads, backward=False).run()


def run(plan: Plan, arrays: Mapping[str, Any], *, save: bool) -> dict[str, jax.Array]:
    """See `kernels_pallas.linear_recurrence.gradient`; with `save` also what the backward reads."""
    (B, T, H, d, e), heads = plan.shape, plan.sizes.forward_heads
    blocks = Blocks(plan, heads, reverse=False)
    blocks.gates(arrays)
    for name, spec in (("q", blocks.keys()), ("k", blocks.keys()), ("u", blocks.positions(e))):
        blocks.input(name, arrays[name], spec)
    states = {"state": (d, e)}
    if plan.column:
        blocks.input("z", as_rows(plan, arrays["z"]), blocks.rows())
        states["sums"] = (1, d)
    if plan.given:
        for name, shape in states.items():
            blocks.input({"state": "given", "sums": "given_sums"}[name], arrays[name], blocks.states(*shape))
    blocks.output("o", (B, T, H * e), arrays["q"].dtype, blocks.positions(e))
    if plan.column:
        rows = (B, H, plan.blocks * plan.sizes.chunks, 1, plan.sizes.chunk)
        blocks.output("oz", rows, jnp.float32, blocks.rows())
    for name, shape in states.items():
        blocks.output(f"{name}_end", (B, H, *shape), jnp.float32, blocks.states(*shape))
        if save:
            saved = (B, plan.blocks, H, *shape)
            blocks.output(f"{name}_saved", saved, jnp.float32, blocks.saved_states(*shape))
        blocks.scratch(name, (heads, *shape), jnp.float32)
    blocks.tables()
    kernel = functools.partial(_kernel, plan, heads, blocks.names())
    out = blocks.run(kernel, kernel_name(plan.channels, "forward"), forward_flops(plan))
    if plan.column:
        out["oz"] = from_rows(plan, out["oz"])
    return out
