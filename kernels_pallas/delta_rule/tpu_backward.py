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

from kernels_pallas.delta_rule.plan import DeltaBlocks, backward_flops
from kernels_pallas.linear_recurrence.chunk import Step, Unit, lockstep, total
from kernels_pallas.linear_recurrence.plan import Plan, from_rows
from kernels_pallas.mosaic import product

NAME = "delta_rule_backward"
_wide = lambda x: x.astype(jnp.float32)


class Backward(Step):
    """A step of the grid; states and their gradients of a block's heads stay values from chunk to chunk."""

    def run(self) -> None:
        """Everything."""
        r, heads, chunks = self.r, range(self.heads), range(self.plan.sizes.chunks)

        @pl.when(self.first)
        def _():
            r["dstate"][...] = r["dstate_end"][0]

        self.states = {(0, h): r["state_saved"][0, 0, h] for h in heads}
        self.errors: dict[tuple[int, int], jax.Array] = {}
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

    def beta(self, m: int, h: int) -> jax.Array:
        """[C, e]"""
        return self.spread(self.r["beta"][0, h, m], self.plan.shape[4])

    def forward_unit(self, m: int, h: int) -> Unit:
        """A chunk's errors, and the state after it."""
        (*_, d, e), dtype = self.plan.shape, self.r["q"].dtype
        k, v = self.load("k", m, h), self.load("v", m, h)
        _, read, write, carry = self.weights(m, h)
        seen = product(k, self.states[m, h].astype(dtype), 1, 0)
        yield
        error = product(self.inverse(m, h), (v - seen * read[:, :e]).astype(dtype), 1, 0)
        self.errors[m, h] = error
        yield
        if m + 1 < self.plan.sizes.chunks:
            u = (error * self.beta(m, h)).astype(dtype)
            new = product((k * write[:, :d]).astype(dtype), u, 0, 0)
            yield
            self.states[m + 1, h] = self.states[m, h] * carry[:, :e] + new

    def unit(self, m: int, h: int) -> Unit:
        """A chunk of a head, in phases.

        u = beta e is written, where (I + N diag(beta)) e = w. With du the gradient of u by outputs and the state after,
        that of w, and of v, is dv = (I + N diag(beta))^-T (beta du), and that of beta e (du - N^T dv).
        """
        (*_, d, e), C, dtype = self.plan.shape, self.plan.sizes.chunk, self.r["q"].dtype
        q, k, do = (self.load(name, m, h) for name in ("q", "k", "do"))
        error, beta = self.errors.pop((m, h)), self.beta(m, h)
        u = (error * beta).astype(dtype)
        scores, slopes = product(k, jnp.concatenate([q, k]), 1, 1), product(u, do, 1, 1)
        yield
        pairs, read, write, carry = self.weights(m, h)
        before, after = self.states[m, h].astype(dtype), self.dstate[h].astype(dtype)
        p = (scores[:, :C] * pairs).astype(dtype)
        overlap = jnp.where(self.row < self.col, scores[:, C:] * pairs, 0).astype(dtype)
        du = product(p, do, 1, 0) + product((k * write[:, :d]).astype(dtype), after, 1, 0)
        yield
        dv = product(self.inverse(m, h), (du * beta).astype(dtype), 0, 0)
        yield
        self.store("dv", m, h, dv)
        back = (-dv).astype(dtype)
        dbeta = error * (du + product(overlap, back, 1, 0))
        self.r["dbeta"][0, h, m] = self.times_rows(jnp.ones((1, e), jnp.float32), dbeta, 1)
        turned = jnp.where(self.row < self.col, product(u, back, 1, 1) * pairs, 0)
        yield
        s = jnp.concatenate([(slopes * pairs).astype(dtype), turned.astype(dtype)], 1)
        both = jnp.concatenate([do, back])
        near, near_written = product(s, k, 0, 0), product(s, jnp.concatenate([q, k]), 1, 0)
        far, far_written = product(both, before, 1, 1), product(u, after, 1, 1)
        asked = jnp.concatenate([q * read[:, :d], k * read[:, :d]]).astype(dtype)
        new = product(asked, both, 0, 0)
        yield
        dq, dk_read = (near[at] + far[at] * read[:, :d] for at in (slice(C), slice(C, None)))
        far_written = far_written * write[:, :d]
        dk_written = near_written + far_written
        self.store("dq", m, h, dq)
        self.store("dk", m, h, dk_read + dk_written)
        if self.plan.wants_decay:
            passed = _wide(q) * dq + _wide(k) * (dk_read - dk_written)
            behind = total(_wide(k) * far_written) + total(self.states[m, h] * self.dstate[h] * carry[:, :e])
            self.store_decay(m, h, passed, behind)
        self.dstate[h] = self.dstate[h] * carry[:, :e] + new


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
    for name in ("dbeta", "dlogs") if plan.wants_decay else ("dbeta",):
        rows = (B, H, plan.blocks * plan.sizes.chunks, 1, plan.sizes.chunk)
        blocks.output(name, rows, jnp.float32, blocks.rows())
    if plan.given:
        blocks.output("dstate_start", (B, H, d, e), jnp.float32, blocks.states(d, e))
    blocks.scratch("dstate", (heads, d, e), jnp.float32)
    out = blocks.run(functools.partial(_kernel, plan, heads, blocks.names()), NAME, backward_flops(plan))
    return out | {name: from_rows(plan, out[name]) for name in ("dbeta", "dlogs") if name in out}
