"""The backward on TPU: one pass from the last position to the first.

It carries the gradient of the state. The states before each chunk of a block, and the errors in it, are made again from
the state that the forward saved before the block and the inverses that it saved. Pairs are keys by queries.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.delta_rule import channels
from kernels_pallas.delta_rule.chunk import DeltaStep
from kernels_pallas.delta_rule.plan import DeltaBlocks, backward_flops, kernel_name
from kernels_pallas.linear_recurrence.chunk import Unit, lockstep, over_lanes, total
from kernels_pallas.linear_recurrence.plan import Plan, from_rows
from kernels_pallas.mosaic import product

_wide = lambda x: x.astype(jnp.float32)


class Backward(DeltaStep):
    """A step of the grid; states and their gradients of a block's heads stay values from chunk to chunk."""

    def run(self) -> None:
        """Everything."""
        r, heads, chunks = self.r, range(self.heads), range(self.plan.sizes.chunks)

        @pl.when(self.first)
        def _():
            r["dstate"][...] = r["dstate_end"][0]

        self.states = {(0, h): r["state_saved"][0, 0, h] for h in heads}
        self.errors: dict[tuple[int, int], jax.Array] = {}
        self.chunks: dict[tuple[int, int], ByPosition | channels.Chunk] = {}
        for m in chunks:
            lockstep(self.forward_unit(m, h) for h in heads)
        self.dstate = [r["dstate"][h] for h in heads]
        for m in reversed(chunks):
            lockstep(self.unit(m, h) for h in heads)
        for h in heads:
            r["dstate"][h] = self.dstate[h]

        @pl.when(self.last)
        def _():
            if self.plan.given:
                r["dstate_start"][0] = r["dstate"][...]

    def inverse(self, m: int, h: int) -> jax.Array:
        C = self.plan.sizes.chunk
        return self.r["inverse_saved"][0, h, 0, :, m * C : (m + 1) * C]

    def forward_unit(self, m: int, h: int) -> Unit:
        """A chunk's errors, and the state after it."""
        (*_, d, e), dtype = self.plan.shape, self.r["q"].dtype
        v = self.load("v", m, h)
        chunk = self.chunks[m, h] = (channels.Chunk if self.plan.channels else ByPosition)(self, m, h)
        seen = chunk.seen(self.states[m, h].astype(dtype))
        yield
        error = product(self.inverse(m, h), (v - seen).astype(dtype), 1, 0)
        self.errors[m, h] = error
        yield
        if m + 1 < self.plan.sizes.chunks:
            u = (error * self.beta(m, h)).astype(dtype)
            new = product((chunk.k * chunk.write[:, :d]).astype(dtype), u, 0, 0)
            yield
            self.states[m + 1, h] = self.states[m, h] * chunk.carry[:, :e] + new

    def unit(self, m: int, h: int) -> Unit:
        """A chunk of a head, in phases.

        u = beta e is written, where (I + N diag(beta)) e = w. With du the gradient of u by outputs and the state after,
        that of w, and of v, is dv = (I + N diag(beta))^-T (beta du), and that of beta e (du - N^T dv).
        """
        (*_, d, e), C, dtype = self.plan.shape, self.plan.sizes.chunk, self.r["q"].dtype
        q, do, chunk = self.load("q", m, h), self.load("do", m, h), self.chunks.pop((m, h))
        error, beta, k = self.errors.pop((m, h)), self.beta(m, h), chunk.k
        u = (error * beta).astype(dtype)
        slopes = product(u, do, 1, 1)
        p, overlap = yield from chunk.pairs(q)
        before, after = self.states[m, h].astype(dtype), self.dstate[h].astype(dtype)
        read, write = chunk.read[:, :d], chunk.write[:, :d]
        du = product(p, do, 1, 0) + product((k * write).astype(dtype), after, 1, 0)
        yield
        dv = product(self.inverse(m, h), (du * beta).astype(dtype), 0, 0)
        yield
        self.store("dv", m, h, dv)
        back = (-dv).astype(dtype)
        dbeta = error * (du + product(overlap, back, 1, 0))
        self.r["dbeta"][0, h, m] = self.times_rows(jnp.ones((1, e), jnp.float32), dbeta, 1)
        turned = product(u, back, 1, 1)
        yield
        both = jnp.concatenate([do, back])
        far, far_written = product(both, before, 1, 1), product(u, after, 1, 1) * write
        new = product(jnp.concatenate([q * read, k * read]).astype(dtype), both, 0, 0)
        dq, dk_read, dk_written = yield from chunk.gradients(q, over_lanes(_wide(u) * _wide(do)), slopes, turned)
        dq, dk_read, dk_written = dq + far[:C] * read, dk_read + far[C:] * read, dk_written + far_written
        self.store("dq", m, h, dq)
        self.store("dk", m, h, dk_read + dk_written)
        if self.plan.wants_decay:
            passed = _wide(q) * dq + _wide(k) * (dk_read - dk_written)
            chunk.store_decay(passed, _wide(k) * far_written, self.states[m, h] * self.dstate[h])
        self.dstate[h] = self.dstate[h] * chunk.carry[:, :e] + new


class ByPosition:
    """A chunk of a head where all channels decay alike.

    Attributes:
      k: its keys.
      read, write, carry: as in `Weights`.
    """

    def __init__(self, step: DeltaStep, m: int, h: int):
        self.step, self.m, self.h, self.k = step, m, h, step.load("k", m, h)
        self.of_pairs, self.read, self.write, self.carry = step.weights(m, h)

    def seen(self, state: jax.Array) -> jax.Array:
        """What is read at the keys, [C, e]."""
        return product(self.k, state, 1, 0) * self.read[:, : state.shape[1]]

    def pairs(self, q: jax.Array):
        """Scores and overlaps of keys, [C, C], keys by queries, in phases."""
        C, dtype = self.step.plan.sizes.chunk, q.dtype
        self.both = jnp.concatenate([q, self.k])
        found = product(self.k, self.both, 1, 1)
        yield
        overlap = jnp.where(self.step.row < self.step.col, found[:, C:] * self.of_pairs, 0)
        return (found[:, :C] * self.of_pairs).astype(dtype), overlap.astype(dtype)

    def gradients(self, q: jax.Array, own: jax.Array, slopes: jax.Array, turned: jax.Array):
        """Of queries, of keys where they are read and where they are written, by the chunk's pairs, [C, d], in phases.

        Args:
          own: [C, 1], of scores of a position with itself; in `slopes`, too.
          slopes, turned: of scores and overlaps, [C, C], keys by queries.
        """
        del own
        C, dtype = self.step.plan.sizes.chunk, q.dtype
        turned = jnp.where(self.step.row < self.step.col, turned * self.of_pairs, 0)
        s = jnp.concatenate([(slopes * self.of_pairs).astype(dtype), turned.astype(dtype)], 1)
        asked, written = product(s, self.k, 0, 0), product(s, self.both, 1, 0)
        yield
        return asked[:C], asked[C:], written

    def store_decay(self, passed: jax.Array, written: jax.Array, kept: jax.Array) -> None:
        """The gradient of the log decays.

        Args:
          passed: [C, d], what a position asks for of what is before it, less what is asked for of what it writes.
          written: [C, d], what is asked for behind the chunk of what it writes.
          kept: [d, e], of the state, before `carry`.
        """
        behind = total(written) + total(kept * self.carry[:, : kept.shape[1]])
        self.step.store_decay(self.m, self.h, passed, behind)


def _kernel(plan: Plan, heads: int, names: tuple[str, ...], *refs) -> None:
    Backward(plan, dict(zip(names, refs, strict=True)), heads=heads, backward=True).run()


def run(plan: Plan, arrays: Mapping[str, Any], saved: Mapping[str, Any], cotangents: Mapping[str, Any]):
    """See `kernels_pallas.delta_rule.gradient`; gradients by the names of the arrays that they are of."""
    (B, T, H, d, e), heads = plan.shape, plan.sizes.backward_heads
    blocks = DeltaBlocks(plan, heads, reverse=True)
    blocks.given(arrays)
    blocks.input("do", cotangents["o"], blocks.positions(e))
    blocks.input("state_saved", saved["state_saved"], blocks.saved_states(d, e))
    blocks.input("inverse_saved", saved["inverse_saved"], blocks.inverses())
    blocks.input("dstate_end", cotangents["state_end"], blocks.states(d, e))
    for name, width in (("q", d), ("k", d), ("v", e)):
        blocks.output(f"d{name}", (B, T, H * width), arrays[name].dtype, blocks.positions(width))
    rows = (B, H, plan.blocks * plan.sizes.chunks, 1, plan.sizes.chunk)
    by_rows = ["dbeta", "dlogs"] if plan.wants_decay and not plan.channels else ["dbeta"]
    for name in by_rows:
        blocks.output(name, rows, jnp.float32, blocks.rows())
    if plan.wants_decay and plan.channels:
        blocks.output("dlogs", (B, T, H * d), jnp.float32, blocks.positions(d))
    if plan.given:
        blocks.output("dstate_start", (B, H, d, e), jnp.float32, blocks.states(d, e))
    blocks.scratch("dstate", (heads, d, e), jnp.float32)
    kernel = functools.partial(_kernel, plan, heads, blocks.names())
    out = blocks.run(kernel, kernel_name(plan.channels, "backward"), backward_flops(plan))
    return out | {name: from_rows(plan, out[name]) for name in by_rows}
