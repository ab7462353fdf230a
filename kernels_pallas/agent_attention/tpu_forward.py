"""The forward on TPU: one pass over the positions, the agents' averages of a group of heads in fast memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.agent_attention.chunk import LOWEST, TINY, State, Step, across, sum_over_lanes, times
from kernels_pallas.agent_attention.plan import LANES, AgentBlocks, AgentPlan, forward_flops
from kernels_pallas.linear_recurrence.chunk import Unit, lockstep
from kernels_pallas.mosaic import product

NAME = "agent_attention_forward"


class Forward(Step):
    """A step of the grid; states of a block's heads stay values from chunk to chunk."""

    def run(self) -> None:
        """Everything."""
        plan, r, heads = self.plan, self.r, range(self.heads)

        @pl.when(self.first)
        def _():
            self.fill_tables()
            for h in heads:
                given = plan.given
                r["high"][h] = self.column(r["log_given"][0, h]) if given else jnp.full(r["high"].shape[1:], LOWEST)
                r["values"][h] = r["values_given"][0, h] if given else jnp.zeros(r["values"].shape[1:], jnp.float32)

        for name in ("high", "values"):
            r[f"{name}_before"][...] = r[name][...]
        self.state = [self.of_log(r["high"][h], r["values"][h]) for h in heads]
        for h in heads if "log_saved" in r else ():
            r["log_saved"][0, 0, h] = self.as_row(self.state[h].high)
            r["values_saved"][0, 0, h] = self.state[h].values
        for m in range(plan.sizes.chunks):
            lockstep(self.unit(m, h) for h in heads)
        for h in heads:
            self.keep(h, self.normal(self.state[h]))

        @pl.when(jnp.max(self.hit) > 0)
        def _():
            self.each_head(self.again)

        @pl.when(self.last)
        def _():
            for h in heads:
                r["log_end"][0, h] = self.as_row(r["high"][h])
            r["values_end"][0] = r["values"][...]

    def keep(self, h: Any, state: State) -> None:
        """For the next block."""
        self.r["high"][h], self.r["values"][h] = state.high, state.values

    def unit(self, m: int, h: int) -> Unit:
        """A chunk of a head, in phases."""
        C, dtype = self.plan.sizes.chunk, self.r["q"].dtype
        q, k, v = (self.load(name, m, h) for name in ("q", "k", "v"))
        logits = product(self.r["agents"][0, h], jnp.concatenate([k, q]), 1, 1)
        yield
        sight, (high, total0, values0), weights, _ = self.weigh(m, h, logits[:, :C])
        raw, sum_of_raw = self.raw_shares(logits[:, C:])
        yield
        up_to = self.of_all("sums", m, h, lambda x: self.sums(x, sight))
        totals = up_to + times(across(total0, C), sight.enters)
        self.note(totals, h)
        shares = (raw * self.inverse(jnp.maximum(totals, TINY) * sum_of_raw)).astype(dtype)
        pairs = product(shares, jnp.concatenate([weights, values0.astype(dtype)], 1), 0, 0)
        yield
        near = jnp.where(sight.pairs, pairs[:, :C], 0).astype(dtype)
        staying = weights if sight.stays is None else (weights * sight.stays).astype(dtype)
        out = product(jnp.concatenate([near, staying]), v, 1, 0)
        stay = sum_over_lanes(staying)
        yield
        far = pairs[:, C:] if sight.read is None else jnp.where(sight.read, pairs[:, C:], 0)
        self.store("o", m, h, out[:C] + far)
        carry = sight.carry
        self.state[h] = State(high, times(total0, carry) + stay, times(values0, carry) + out[C:])

    def again(self, h: Any) -> None:
        """A head's block by `levels`."""
        e, C, dtype = self.plan.shape[4], self.plan.sizes.chunk, self.r["q"].dtype

        def chunk(m, carried):
            state = self.of_log(*carried)
            q, k, v = (self.load(name, m, h) for name in ("q", "k", "v"))
            logits = product(self.r["agents"][0, h], jnp.concatenate([k, q]), 1, 1)
            keys, sight = self.seen(logits[:, :C], m), self.sight(m)
            raw, sum_of_raw = self.raw_shares(logits[:, C:])

            def use(weights, keep, totals, now, o):
                shares = jnp.where(now, raw / (totals * sum_of_raw), 0).astype(dtype)
                before = (state.values * across(keep, e)).astype(dtype)
                pairs = product(shares, jnp.concatenate([weights, before], 1), 0, 0)
                far = pairs[:, C:] if sight.read is None else jnp.where(sight.read, pairs[:, C:], 0)
                return o + product(jnp.where(sight.pairs, pairs[:, :C], 0).astype(dtype), v, 1, 0) + far

            self.store("o", m, h, self.levels(m, h, keys, state, use, jnp.zeros((C, e), jnp.float32)))
            state = self.normal(self.end(m, keys, v, state)[2])
            return state.high, state.values

        before = self.r["high_before"][h], self.r["values_before"][h]
        high, values = lax.fori_loop(0, self.plan.sizes.chunks, chunk, before)
        self.keep(h, self.of_log(high, values))


def _kernel(plan: AgentPlan, heads: int, names: tuple[str, ...], *refs) -> None:
    Forward(plan, dict(zip(names, refs, strict=True)), heads=heads, backward=False).run()


def run(plan: AgentPlan, arrays: Mapping[str, Any], *, save: bool) -> dict[str, jax.Array]:
    """See `kernels_pallas.agent_attention.gradient`; with `save` also what the backward reads."""
    (B, T, H, _, e), heads, rows = plan.shape, plan.sizes.forward_heads, plan.rows
    blocks = AgentBlocks(plan, heads, reverse=False)
    blocks.given(arrays)
    if plan.given:
        blocks.input("log_given", arrays["log"], blocks.states(1, rows))
        blocks.input("values_given", arrays["values"], blocks.states(rows, e))
    blocks.output("o", (B, T, H * e), arrays["v"].dtype, blocks.positions(e))
    blocks.output("log_end", (B, H, 1, rows), jnp.float32, blocks.states(1, rows))
    blocks.output("values_end", (B, H, rows, e), jnp.float32, blocks.states(rows, e))
    if save:
        blocks.output("log_saved", (B, plan.blocks, H, 1, rows), jnp.float32, blocks.saved_states(1, rows))
        blocks.output("values_saved", (B, plan.blocks, H, rows, e), jnp.float32, blocks.saved_states(rows, e))
    for suffix in ("", "_before"):
        blocks.scratch(f"high{suffix}", (heads, rows, LANES), jnp.float32)
        blocks.scratch(f"values{suffix}", (heads, rows, e), jnp.float32)
    for name in () if plan.documents else ("pairs", "ones"):
        blocks.scratch(name, (plan.sizes.chunk, plan.sizes.chunk), jnp.float32)
    return blocks.run(functools.partial(_kernel, plan, heads, blocks.names()), NAME, forward_flops(plan))
