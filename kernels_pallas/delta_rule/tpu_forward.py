"""The forward on TPU: one pass over the positions, the states of a group of heads in fast memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.delta_rule import channels
from kernels_pallas.delta_rule.chunk import DeltaStep
from kernels_pallas.delta_rule.inverse import unit_lower_inverse
from kernels_pallas.delta_rule.plan import DeltaBlocks, forward_flops, kernel_name
from kernels_pallas.linear_recurrence.chunk import Unit, lockstep
from kernels_pallas.linear_recurrence.plan import Plan
from kernels_pallas.mosaic import product


class Forward(DeltaStep):
    """A step of the grid; states of a block's heads stay values from chunk to chunk."""

    def run(self) -> None:
        """Everything."""
        plan, r, heads = self.plan, self.r, range(self.heads)

        @pl.when(self.first)
        def _():
            r["state"][...] = r["given"][0] if plan.given else jnp.zeros_like(r["state"])

        if "state_saved" in r:
            r["state_saved"][0, 0] = r["state"][...]
        self.state = [r["state"][h] for h in heads]
        for m in range(plan.sizes.chunks):
            lockstep(self.unit(m, h) for h in heads)
        for h in heads:
            r["state"][h] = self.state[h]

        @pl.when(self.last)
        def _():
            r["state_end"][0] = r["state"][...]

    def unit(self, m: int, h: int) -> Unit:
        """A chunk of a head, in phases. Errors `e` solve (I + N diag(beta)) e = v - what is read at k."""
        (*_, d, e), C, dtype = self.plan.shape, self.plan.sizes.chunk, self.r["q"].dtype
        q, k, v = (self.load(name, m, h) for name in ("q", "k", "v"))
        decayed = channels.forward if self.plan.channels else type(self).by_position
        overlap, p, seen, write, carry = yield from decayed(self, m, h, q, k, self.state[h])
        inverse = yield from unit_lower_inverse(overlap * self.r["beta"][0, h, m], dtype)
        inverse = inverse.astype(dtype)
        if "inverse_saved" in self.r:
            self.r["inverse_saved"][0, h, 0, :, m * C : (m + 1) * C] = inverse
        error = product(inverse, (v - seen[:C]).astype(dtype), 1, 0)
        yield
        u = (error * self.beta(m, h)).astype(dtype)
        near = product(p, u, 1, 0)
        new = product((k * write[:, :d]).astype(dtype), u, 0, 0)
        yield
        self.store("o", m, h, near + seen[C:])
        self.state[h] = self.state[h] * carry[:, :e] + new

    def by_position(self, m: int, h: int, q: jax.Array, k: jax.Array, state: jax.Array):
        """Of a chunk, in phases: overlaps of keys, below the diagonal, and scores [C, C], what is read at keys and
        queries [2 C, e], what passes of a position to the state after the chunk [C, at least d], and of the state
        before."""
        C, e = self.plan.sizes.chunk, self.plan.shape[4]
        kq = jnp.concatenate([k, q])
        both, seen = product(kq, k, 1, 1), product(kq, state.astype(k.dtype), 1, 0)
        self.columns(m, h, C)  # asked for before it is waited for
        yield
        pairs, read, write, carry = self.weights(m, h)
        seen = jnp.concatenate([seen[at] * read[:, :e] for at in (slice(C), slice(C, None))])
        return both[:C] * pairs, (both[C:] * pairs).astype(k.dtype), seen, write, carry


def _kernel(plan: Plan, heads: int, names: tuple[str, ...], *refs) -> None:
    Forward(plan, dict(zip(names, refs, strict=True)), heads=heads, backward=False).run()


def run(plan: Plan, arrays: Mapping[str, Any], *, save: bool) -> dict[str, jax.Array]:
    """See `kernels_pallas.delta_rule.gradient`; with `save` also what the backward reads."""
    (B, T, H, d, e), heads = plan.shape, plan.sizes.forward_heads
    blocks = DeltaBlocks(plan, heads, reverse=False)
    blocks.given(arrays)
    if plan.given:
        blocks.input("given", arrays["state"], blocks.states(d, e))
    blocks.output("o", (B, T, H * e), arrays["v"].dtype, blocks.positions(e))
    blocks.output("state_end", (B, H, d, e), jnp.float32, blocks.states(d, e))
    if save:
        blocks.output("state_saved", (B, plan.blocks, H, d, e), jnp.float32, blocks.saved_states(d, e))
        blocks.output("inverse_saved", blocks.inverse_shape(), arrays["q"].dtype, blocks.inverses())
    blocks.scratch("state", (heads, d, e), jnp.float32)
    kernel = functools.partial(_kernel, plan, heads, blocks.names())
    return blocks.run(kernel, kernel_name(plan.channels, "forward"), forward_flops(plan))
