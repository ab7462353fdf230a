"""The backward on TPU: one pass from the last position to the first.

It carries the gradient of the averages' sums. The averages before each chunk of a block are made again from those that
the forward saved before the block. Pairs are keys by queries. Sums are against highs that gradients do not see: with
`S` the sum of weights and `N` that of weighted values, an average `N / S` is the same against any.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.agent_attention.chunk import TINY, State, Step, across, sum_over_lanes, times
from kernels_pallas.agent_attention.plan import LANES, AgentBlocks, AgentPlan, backward_flops
from kernels_pallas.linear_recurrence.chunk import Unit, lockstep, over_sublanes
from kernels_pallas.mosaic import product

NAME = "agent_attention_backward"


class Kept(NamedTuple):
    """What a chunk of a head keeps of its forward, `total0` and `values0` against the chunk's high."""

    queries: jax.Array
    weights: jax.Array
    totals: jax.Array
    keep: jax.Array
    total0: jax.Array
    values0: jax.Array


class Backward(Step):
    """A step of the grid; states and their gradients of a block's heads stay values from chunk to chunk."""

    def run(self) -> None:
        """Everything."""
        plan, r, heads, chunks = self.plan, self.r, range(self.heads), range(self.plan.sizes.chunks)

        @pl.when(self.first)
        def _():
            self.fill_tables()
            r["dagents"][...] = jnp.zeros_like(r["dagents"])
            r["dvalues"][...] = r["dvalues_end"][0]
            for h in heads:
                r["dtotal"][h] = self.column(r["dtotal_end"][0, h])

        for name in ("dvalues", "dtotal"):
            r[f"{name}_before"][...] = r[name][...]
        r["dagents_before"][...] = r["dagents"][0]
        self.state = [self.saved(h) for h in heads]
        self.kept: dict[tuple[int, int], Kept] = {}
        for m in chunks:
            lockstep(self.forward_unit(m, h) for h in heads)
        self.dstate = [self.of_normal(self.state[h].total, r["dtotal"][h], r["dvalues"][h]) for h in heads]
        self.dagents = [r["dagents"][0, h] for h in heads]
        for m in reversed(chunks):
            lockstep(self.unit(m, h) for h in heads)
        for h in heads:
            self.leave(h, self.dagents[h], *self.dstate[h])

        @pl.when(jnp.max(self.hit) > 0)
        def _():
            self.each_head(self.again)

        @pl.when(self.last)
        def _():
            if plan.given:
                r["dvalues_start"][0] = r["dvalues"][...]
                for h in heads:
                    r["dtotal_start"][0, h] = self.as_row(r["dtotal"][h])

    def saved(self, h: Any) -> State:
        """Before the block."""
        return self.of_log(self.column(self.r["log_saved"][0, 0, h]), self.r["values_saved"][0, 0, h])

    def of_normal(self, total: jax.Array, dtotal: jax.Array, dvalues: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradients of a state's sums by those of its normal state's: what its high changes drops out."""
        inverse = 1 / jnp.maximum(total, TINY)
        return dtotal * inverse, dvalues * across(inverse, dvalues.shape[1])

    def leave(self, h: Any, dagents: jax.Array, dtotal: jax.Array, dvalues: jax.Array) -> None:
        """For the block before."""
        self.r["dagents"][0, h], self.r["dtotal"][h], self.r["dvalues"][h] = dagents, dtotal, dvalues

    def forward_unit(self, m: int, h: int) -> Unit:
        """A chunk's weights, and the state after it."""
        C, dtype = self.plan.sizes.chunk, self.r["q"].dtype
        q, k, v = (self.load(name, m, h) for name in ("q", "k", "v"))
        logits = product(self.r["agents"][0, h], jnp.concatenate([k, q]), 1, 1)
        yield
        sight, (high, total0, values0), weights, keep = self.weigh(m, h, logits[:, :C])
        staying = times(weights, sight.stays).astype(dtype)
        new, stay = product(staying, v, 1, 0), sum_over_lanes(staying)
        yield
        up_to = self.of_all("sums", m, h, lambda x: self.sums(x, sight))
        totals = up_to + times(across(total0, C), sight.enters)
        self.note(totals, h)
        self.kept[m, h] = Kept(logits[:, C:], weights, jnp.maximum(totals, TINY), keep, total0, values0)
        self.state[h] = State(high, times(total0, sight.carry) + stay, times(values0, sight.carry) + new)

    def unit(self, m: int, h: int) -> Unit:
        """A chunk of a head, in phases.

        With s the shares of agents, t the sums of weights up to a position and g = do . v of pairs, o = sum_a s N / t.
        """
        e, C, dtype = self.plan.shape[4], self.plan.sizes.chunk, self.r["q"].dtype
        q, k, v, do = (self.load(name, m, h) for name in ("q", "k", "v", "do"))
        kept, sight = self.kept.pop((m, h)), self.sight(m)
        weights, agents = kept.weights, self.r["agents"][0, h]
        slopes = product(jnp.concatenate([v, kept.values0.astype(dtype)]), do, 1, 1)
        yield
        dtotal, dvalues = self.dstate[h]
        dvalues_ = dvalues.astype(dtype)
        pairs = jnp.where(sight.pairs, slopes[:C], 0).astype(dtype)
        raw, sum_of_raw = self.raw_shares(kept.queries)
        inverse, shares = self.inverse(kept.totals), raw * self.inverse(sum_of_raw)
        read = shares * inverse
        read_ = read.astype(dtype)
        asked = product(weights, pairs, 1, 0) + times(slopes[C:], sight.enters)
        passed = product(weights, jnp.concatenate([read_, dvalues_], 1), 0, 0)
        far = product(dvalues_, v, 1, 1)
        yield
        dshares = asked * inverse
        dtotals = -read * dshares
        seen = jnp.where(sight.pairs, passed[:, :C], 0).astype(dtype)
        entering = times(read, sight.enters).astype(dtype)
        self.leave_rows("behind", m, h, dtotals.astype(dtype))
        near = product(read_, pairs, 1, 1)
        written = product(jnp.concatenate([seen, entering]), do, 1, 0)
        behind = sum_over_lanes(times(dtotals, sight.enters))
        yield
        after = passed[:, C:] if sight.write is None else jnp.where(sight.write, passed[:, C:], 0)
        self.store("dv", m, h, written[:C] + after)
        near += self.of_all("behind", m, h, lambda x: product(x, sight.ones, 1, 1))
        dkeys = weights * (near + times(far + across(dtotal, C), sight.stays))
        dlogits = self.dlogits(shares, dshares, dkeys)
        dkq, dagents = product(dlogits, agents, 0, 0), product(dlogits, jnp.concatenate([k, q]), 1, 0)
        yield
        self.store("dk", m, h, dkq[:C])
        self.store("dq", m, h, dkq[C:])
        self.dagents[h] += dagents
        dtotal, dvalues = times(dtotal, sight.carry) + behind, times(dvalues, sight.carry) + written[C:]
        self.dstate[h] = dtotal * kept.keep, dvalues * across(kept.keep, e)

    def dlogits(self, shares: jax.Array, dshares: jax.Array, dkeys: jax.Array) -> jax.Array:
        """Of keys and queries, [rows, 2 C]."""
        dqueries = shares * (dshares - over_sublanes(shares * dshares))
        return (jnp.concatenate([dkeys, dqueries], 1) * self.plan.scale).astype(self.r["q"].dtype)

    def again(self, h: Any) -> None:
        """A head's block by `levels`."""
        r, chunks = self.r, self.plan.sizes.chunks

        def forward(m, state):
            high, values = state
            r["high_again"][m], r["values_again"][m] = high, values
            k, v = self.load("k", m, h), self.load("v", m, h)
            keys = self.seen(product(r["agents"][0, h], k, 1, 1), m)
            state = self.normal(self.end(m, keys, v, self.of_log(high, values))[2])
            return state.high, state.values

        start = self.saved(h)
        lax.fori_loop(0, chunks, forward, (start.high, start.values))
        carried = r["dagents_before"][h], r["dtotal_before"][h], r["dvalues_before"][h]
        chunk = lambda n, carried: self.chunk_again(chunks - 1 - n, h, *carried)
        self.leave(h, *lax.fori_loop(0, chunks, chunk, carried))

    def chunk_again(self, m: Any, h: Any, dagents: jax.Array, dtotal: jax.Array, dvalues: jax.Array):
        """The gradients before a chunk, of agents and of a normal state's sums, from those after it."""
        e, C, dtype = self.plan.shape[4], self.plan.sizes.chunk, self.r["q"].dtype
        q, k, v, do = (self.load(name, m, h) for name in ("q", "k", "v", "do"))
        agents, sight = self.r["agents"][0, h], self.sight(m)
        logits = product(agents, jnp.concatenate([k, q]), 1, 1)
        keys = self.seen(logits[:, :C], m)
        raw, sum_of_raw = self.raw_shares(logits[:, C:])
        shares = raw / sum_of_raw
        state = self.of_log(self.r["high_again"][m], self.r["values_again"][m])
        pairs = jnp.where(sight.pairs, product(v, do, 1, 1), 0).astype(dtype)

        def use(weights, keep, totals, now, found):
            dshares, dkeys, dv, dtotal, dvalues = found
            read = jnp.where(now, shares / totals, 0)
            read_, before = read.astype(dtype), (state.values * across(keep, e)).astype(dtype)
            asked = product(weights, pairs, 1, 0) + times(product(before, do, 1, 1), sight.enters)
            own = jnp.where(now, asked / totals, 0)
            dtotals = -read * own
            behind = sum_over_lanes(times(dtotals, sight.enters))
            seen = jnp.where(sight.pairs, product(weights, read_, 0, 0), 0).astype(dtype)
            read_before = product(times(read, sight.enters).astype(dtype), do, 1, 0)
            return (
                dshares + own,
                dkeys + weights * (product(read_, pairs, 1, 1) + product(dtotals.astype(dtype), sight.ones, 1, 1)),
                dv + product(seen, do, 1, 0),
                dtotal + behind * keep,
                dvalues + read_before * across(keep, e),
            )

        weights, keep, after = self.end(m, keys, v, state)
        dtotal, dvalues = self.of_normal(after.total, dtotal, dvalues)
        dvalues_ = dvalues.astype(dtype)
        found = (
            jnp.zeros(keys.shape, jnp.float32),
            weights * (product(dvalues_, v, 1, 1) + across(dtotal, C)),
            product(weights, dvalues_, 0, 0),
            dtotal * keep,
            dvalues * across(keep, e),
        )
        dshares, dkeys, dv, dtotal, dvalues = self.levels(m, h, keys, state, use, found)
        dlogits = self.dlogits(shares, dshares, dkeys)
        dkq = product(dlogits, agents, 0, 0)
        for name, x in (("dv", dv), ("dk", dkq[:C]), ("dq", dkq[C:])):
            self.store(name, m, h, x)
        return dagents + product(dlogits, jnp.concatenate([k, q]), 1, 0), dtotal, dvalues


def _kernel(plan: AgentPlan, heads: int, names: tuple[str, ...], *refs) -> None:
    Backward(plan, dict(zip(names, refs, strict=True)), heads=heads, backward=True).run()


def run(plan: AgentPlan, arrays: Mapping[str, Any], saved: Mapping[str, Any], cotangents: Mapping[str, Any]):
    """See `kernels_pallas.agent_attention.gradient`; gradients by the names of the arrays that they are of."""
    (B, T, H, d, e), heads, rows = plan.shape, plan.sizes.backward_heads, plan.rows
    blocks = AgentBlocks(plan, heads, reverse=True)
    blocks.given(arrays)
    blocks.input("do", cotangents["o"], blocks.positions(e))
    blocks.input("log_saved", saved["log_saved"], blocks.saved_states(1, rows))
    blocks.input("values_saved", saved["values_saved"], blocks.saved_states(rows, e))
    blocks.input("dtotal_end", cotangents["total"], blocks.states(1, rows))
    blocks.input("dvalues_end", cotangents["values"], blocks.states(rows, e))
    for name, width in (("q", d), ("k", d), ("v", e)):
        blocks.output(f"d{name}", (B, T, H * width), arrays[name].dtype, blocks.positions(width))
    blocks.output("dagents", (B, H, rows, d), jnp.float32, blocks.states(rows, d))
    if plan.given:
        blocks.output("dtotal_start", (B, H, 1, rows), jnp.float32, blocks.states(1, rows))
        blocks.output("dvalues_start", (B, H, rows, e), jnp.float32, blocks.states(rows, e))
    for suffix in ("", "_before"):
        blocks.scratch(f"dtotal{suffix}", (heads, rows, LANES), jnp.float32)
        blocks.scratch(f"dvalues{suffix}", (heads, rows, e), jnp.float32)
    blocks.scratch("dagents_before", (heads, rows, d), jnp.float32)
    blocks.scratch("high_again", (plan.sizes.chunks, rows, LANES), jnp.float32)
    blocks.scratch("values_again", (plan.sizes.chunks, rows, e), jnp.float32)
    if not plan.documents:
        blocks.scratch("ones", (plan.sizes.chunk, plan.sizes.chunk), jnp.float32)
    return blocks.run(functools.partial(_kernel, plan, heads, blocks.names()), NAME, backward_flops(plan))
