"""The backward on TPU: one sweep against the positions, the states of a grid step computed again from its first.

Everything in flow attention is bilinear in queries and keys, so that both gradients within a chunk come from one
matrix: dq = W k, dk = W^T q. With u the weighted values, dp the gradient of `q S`, m = N / O, r = N / I, and a, b, dO,
dI the gradients of O^ / N, I^ / N, O and I,

    W[t, s] = dp_t . u_s + b_t m_s + dI_t  (s <= t)   +   r_t a_s + dO_s  (t <= s),

and what crosses a chunk's edge is products with S, its gradient, and the four vectors of sums and their gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.flow_attention.plan import (
    D_PLAIN,
    D_WEIGHTED,
    F32,
    NN,
    NT,
    ONES,
    PLAIN,
    TN,
    WEIGHTED,
    Blocks,
    Place,
    Plan,
    features,
    fill_tables,
    iota,
    kept,
    left,
    place,
    product,
    product_and_rows,
    repeated,
    right,
    row_sums,
    rows_product,
    stack,
    tile,
    times,
)


class Numbers:
    """What the forward saved of a chunk's positions, and what follows from it; stacks [rows, C]."""

    def __init__(self, plan: Plan, r: dict[str, Any], p: Place, m: int):
        at, G = slice(m * plan.chunk, (m + 1) * plan.chunk), plan.group
        found = {}
        for i, name in enumerate(name for name in plan.saved if name != "outgoing"):
            found[name] = r["numbers"][0, 0, i * G : (i + 1) * G, at]
        if plan.rule.competition:
            found["outgoing"] = r["outgoing"][0, 0, :, at]
        fill = lambda x: jnp.concatenate([x, jnp.ones((plan.rows - G, plan.chunk), F32)], 0) if plan.rows > G else x
        self.found = {name: kept(p.valid, fill(x), 1.0) for name, x in found.items()}
        N, self.inflow = p.count, self.found["inflow"]
        self.scale = 1 / self.inflow
        if plan.rule.allocation:
            self.outflow = self.found["outflow"]
            self.emit = kept(p.valid, N / self.outflow)
            self.closed = jax.nn.sigmoid(-self.found["received"])
            self.scale *= jax.nn.sigmoid(self.found["received"])
        if plan.rule.competition:
            clip = plan.rule.clip
            self.take = kept(p.valid, N / self.inflow)
            self.inside = jnp.abs(self.found["outgoing"]) < clip
            self.rival = kept(p.valid, jnp.exp(jnp.clip(self.found["outgoing"], -clip, clip)))
            self.rivals = self.found["rivals"]
            self.share = N * self.rival / self.rivals


def again(plan: Plan, r: dict[str, Any], p: Place, m: int) -> None:
    """The weighted values of a chunk, and the state after it."""
    numbers, k, u = Numbers(plan, r, p, m), features(plan, r, p, "k", m), features(plan, r, p, "v", m)
    if plan.rule.competition:
        share = numbers.share.T
        u = [(v.astype(F32) * share[:, h : h + 1]).astype(plan.dtype) for h, v in enumerate(u)]
    for h in range(plan.group):
        r["u"][m, h] = u[h]
        r["narrow"][m, h] = r["S"][h].astype(plan.dtype)
    if m + 1 < plan.chunks:
        for h in range(plan.group):
            new = product(k[h], kept(p.written_column, u[h]), TN)
            r["S"][h] = new + times(r["S"][h], p.carry)


class Chunk:
    """One chunk of a group of heads in reverse, each phase over all heads."""

    def __init__(self, plan: Plan, refs: dict[str, Any], p: Place, m: int):
        self.plan, self.refs, self.p, self.m = plan, refs, p, m
        self.heads = range(plan.group)
        self.q, self.k, self.v, self.do = (features(plan, refs, p, name, m) for name in ("q", "k", "v", "do"))
        self.n = Numbers(plan, refs, p, m)
        self.low_ones, self.up_ones = (refs[name][...].astype(plan.dtype) for name in ("low", "up"))
        self.vectors = [[self.tile_of(h, n) for h in self.heads] for n in range(2)]

    def tile_of(self, h: int, n: int):
        """A head's vectors that meet queries (0) or keys (1), and in the last rows the gradients that do."""
        saved, row = self.refs["vectors"], iota((8, self.plan.d), 0)
        at = 4 * h + 2 * n
        plain, weighted = saved[0, self.m, 0, at : at + 1], saved[0, self.m, 0, at + 1 : at + 2]
        out = jnp.where(row == ONES, 1.0, self.refs["d_sums"][h, n])
        return jnp.where(row == PLAIN, plain, jnp.where(row == WEIGHTED, weighted, out))

    def write(self, name: str, h: int, x) -> None:
        width = x.shape[1]
        at = slice(self.m * self.plan.chunk, (self.m + 1) * self.plan.chunk)
        self.refs[name][0, at, h * width : (h + 1) * width] = x.astype(self.refs[name].dtype)

    def products(self) -> None:
        """What needs nothing but the numbers: pairs, and the values' gradient."""
        plan, r, p, dt = self.plan, self.refs, self.p, self.plan.dtype
        scale, rule = self.n.scale.T, self.plan.rule
        self.dp = [(do.astype(F32) * scale[:, h : h + 1]).astype(dt) for h, do in enumerate(self.do)]
        self.u = [r["u"][self.m, h] for h in self.heads]
        pairs = [product_and_rows(*x, NT) for x in zip(self.q, self.vectors[1], self.k)]
        self.of_k = [rows for _, rows in pairs]
        self.of_q = [rows_product(x, q, NT) for x, q in zip(self.vectors[0], self.q)]
        low, up = r["low"][...], r["up"][...]
        wide = [a * low for a, _ in pairs]
        self.lower = [x.astype(dt) for x in wide]
        self.upper = [(a * up).astype(dt) for a, _ in pairs] if rule.competition else []
        self.values = [product(dp, u, NT) for dp, u in zip(self.dp, self.u)]
        z = [row_sums((a * x).astype(dt)) for a, x in zip(wide, self.values)]
        self.dq_far = [product(dp, r["narrow"][self.m, h], NT) for h, dp in enumerate(self.dp)]
        far = [row_sums((q.astype(F32) * x).astype(dt)) for q, x in zip(self.q, self.dq_far)]
        self.delta = stack(plan, z) + times(stack(plan, far), p.follows)
        share = self.n.share.T if rule.competition else None
        sums = []
        for h in self.heads:
            k = kept(p.written_column, self.k[h])
            dv = product(self.lower[h], self.dp[h], TN) + product(k, r["dS"][h].astype(dt))
            if rule.competition:
                dv *= share[:, h : h + 1]
                sums.append(row_sums((self.v[h].astype(F32) * dv).astype(dt)))
            self.write("dv", h, dv)
        self.d_share = stack(plan, sums) if rule.competition else None  # times the share itself

    def reverse(self, x):
        """Running sums against the positions of a stack of numbers, within the chunk."""
        return rows_product(x, self.low_ones)

    def numbers(self) -> None:
        """The gradients of the flows."""
        plan, p, n, rule = self.plan, self.p, self.n, self.plan.rule
        near = lambda x, matrices, dims: stack(
            plan, [rows_product(repeated(x, h), a, dims) for h, a in enumerate(matrices)]
        )
        far = lambda rows, i: times(stack(plan, rows, i), p.written)
        of_keys, of_queries, eps = stack(plan, self.of_k, ONES), stack(plan, self.of_q, ONES), rule.epsilon
        zero = jnp.zeros_like(n.inflow)
        self.a = self.b = self.d_outflow = run_a = run_b = zero
        d_inflow = self.delta
        if rule.allocation:
            self.b = kept(p.valid, self.delta * n.closed / p.count)
            run_b = self.reverse(self.b)
            d_emit = near(self.b, self.lower, NN) + far(self.of_k, D_WEIGHTED) + eps * of_keys * run_b
            self.d_outflow = -d_emit * n.emit / n.outflow
        if rule.competition:
            after = times(self.refs["d_rivals"][...], p.written)
            later = self.reverse(kept(p.valid, -self.d_share / n.rivals)) + after
            self.new_rivals = later[:, :1]
            d_outgoing = jnp.where(n.inside, self.d_share + n.rival * later, 0) + self.d_out()
            self.a = kept(p.valid, d_outgoing / p.count)
            run_a = self.reverse(self.a)
            d_take = near(self.a, self.upper, NT) + far(self.of_q, D_WEIGHTED) + eps * of_queries * run_a
            d_inflow = d_inflow + d_take * n.take
        self.d_inflow = kept(p.valid, -d_inflow / n.inflow)
        run_in, run_out = self.reverse(self.d_inflow), self.reverse(self.d_outflow)
        # What epsilon adds to every channel of dq and of dk.
        self.dq_all = eps * (self.b + self.d_inflow + run_out + (n.take * run_a if rule.competition else 0))
        self.dk_all = eps * (self.a + self.d_outflow + run_in + (n.emit * run_b if rule.allocation else 0))
        self.starts = [{D_WEIGHTED: run_a, D_PLAIN: run_out}, {D_WEIGHTED: run_b, D_PLAIN: run_in}]

    def d_out(self):
        plan = self.plan
        x = self.refs["d_outgoing"][0, 0, :, self.m * plan.chunk : (self.m + 1) * plan.chunk]
        if plan.rows > plan.group:
            x = jnp.concatenate([x, jnp.zeros((plan.rows - plan.group, plan.chunk), F32)], 0)
        return kept(self.p.valid, x)

    def gradients(self) -> None:
        """dq and dk, and the gradients of what stands before the chunk."""
        plan, r, p, n, dt = self.plan, self.refs, self.p, self.n, self.plan.dtype
        low, up = r["low"][...], r["up"][...]
        emit = {WEIGHTED: n.emit} if plan.rule.allocation else {}
        take = {D_WEIGHTED: n.take} if plan.rule.competition else {}
        of_rows = {PLAIN: self.d_inflow, WEIGHTED: self.b, ONES: self.dq_all, D_PLAIN: 1.0, **take}
        of_columns = {PLAIN: self.d_outflow, WEIGHTED: self.a, ONES: self.dk_all, D_PLAIN: 1.0}
        if plan.rule.allocation:
            of_columns[D_WEIGHTED] = n.emit
        for h in self.heads:
            rows = tile(h, of_rows, p.count)
            below = right(tile(h, {PLAIN: 1.0, **emit}, p.count), dt)
            above = right(tile(h, {D_WEIGHTED: self.a, D_PLAIN: self.d_outflow}, p.count), dt)
            x = left(rows, dt)
            w = (self.values[h] + product(x, below, TN)) * low + product(x, above, TN) * up
            w = w.astype(dt)
            back = tile(h, {D_WEIGHTED: self.a, D_PLAIN: self.d_outflow}, p.count)
            dq, sums = product_and_rows(w, times(back, p.follows), self.k[h])
            dq += times_column(p.follows_column, self.dq_far[h])
            dq += product(left(self.across(rows), dt), right(self.vectors[0][h], dt), TN)
            self.write("dq", h, dq)
            self.carry(h, 0, sums)
            back = tile(h, {D_WEIGHTED: self.b, D_PLAIN: self.d_inflow}, p.count)
            dk, sums = product_and_rows(w.T, times(back, p.follows), self.q[h])
            dk += product(kept(p.written_column, self.u[h]), r["dS"][h].astype(dt), NT)
            columns = self.across(tile(h, of_columns, p.count))
            dk += product(left(columns, dt), right(self.vectors[1][h], dt), TN)
            self.write("dk", h, dk)
            self.carry(h, 1, sums)
        for h in self.heads:
            new = product(kept(p.follows_column, self.q[h]), self.dp[h], TN)
            r["dS"][h] = new + times(r["dS"][h], p.carry)
        if plan.rule.competition:
            r["d_rivals"][...] = jnp.broadcast_to(times(self.new_rivals, p.first), r["d_rivals"].shape)

    def across(self, rows):
        """[8, C] with 0 where a row does not reach over the chunk's edge: to what is before, or what is behind."""
        if not self.plan.packed:
            return rows
        row = iota(rows.shape, 0)
        return rows * jnp.where(row == ONES, 1.0, jnp.where(row < ONES, self.p.follows, self.p.written))

    def carry(self, h: int, n: int, sums) -> None:
        """The gradients of vectors before the chunk, from `sums` over its positions."""
        r, p, row = self.refs, self.p, iota((8, self.plan.d), 0)
        for i, x in self.starts[n].items():
            first = times(x[h : h + 1, :1], p.first)
            sums += jnp.where(row == i, self.plan.rule.epsilon * first, 0.0)
        r["d_sums"][h, n] = sums + times(r["d_sums"][h, n], p.carry)


def times_column(where, x):
    return x if where is None else jnp.where(where, x, 0)


def kernel(plan: Plan, r: dict[str, Any], scalars) -> None:
    b, turn = pl.program_id(0), pl.program_id(2)
    step = plan.steps - 1 - turn

    @pl.when(turn == 0)
    def _():
        r["dS"][...], r["d_sums"][...] = r["dS_after"][0], r["d_sums_after"][0]
        r["d_rivals"][...] = r["d_rivals_after"][0, 0]
        if not plan.packed:
            fill_tables(plan, r)

    r["S"][...] = r["states"][0, 0]
    for m in range(plan.chunks):
        again(plan, r, place(plan, r, scalars, b, step, m), m)
    for m in reversed(range(plan.chunks)):
        chunk = Chunk(plan, r, place(plan, r, scalars, b, step, m), m)
        chunk.products()
        chunk.numbers()
        chunk.gradients()

    if plan.given:

        @pl.when(turn == plan.steps - 1)
        def _():
            r["dS_before"][0], r["d_sums_before"][0] = r["dS"][...], r["d_sums"][...]
            r["d_rivals_before"][0, 0] = r["d_rivals"][...]


def flops(plan: Plan) -> float:
    """Of the products of pairs, values and states; not of the rows of numbers beside them."""
    pairs = 2 * plan.chunk * (3 * plan.d + 2 * plan.e)
    return plan.batch * plan.heads * plan.length * (pairs + 10.0 * plan.d * plan.e)


def run(
    plan: Plan, q_BTw, k_BTw, v_BTw, do_BTw, marks, scalars, saved, d_outgoing, after, *, vmem, interpret
) -> dict[str, jax.Array]:
    """dq, dk, dv, and with `plan.given` the gradients of the state before: "dS_before" [B, H, d, e], "d_sums_before"
    [B, H, 2, 8, d] (rows `D_WEIGHTED` and `D_PLAIN`), "d_rivals_before" [B, groups, rows, chunk].

    `saved`: what the forward gave; `d_outgoing` as its "outgoing"; `after`: gradients of the state after, by the same
    names.
    """
    B, H, G, C, d, e = plan.batch, plan.heads, plan.group, plan.chunk, plan.d, plan.e
    groups = H // G
    slots = Blocks(plan, reverse=True)
    for name, x in (("q", q_BTw), ("k", k_BTw), ("v", v_BTw), ("do", do_BTw)):
        slots.read(name, "wide", x, (1, plan.block, x.shape[2] // groups))
    if plan.packed:
        slots.read("marks", "marks", marks, (1, 3, plan.block))
    slots.read("numbers", "rows", saved["numbers"], (1, 1, saved["numbers"].shape[2], plan.block))
    if plan.rule.competition:
        slots.read("outgoing", "rows", saved["outgoing"], (1, 1, G, plan.block))
        slots.read("d_outgoing", "rows", d_outgoing, (1, 1, G, plan.block))
    slots.read("vectors", "step", saved["vectors"], (1, plan.chunks, 1, 4 * G, d))
    slots.read("states", "step", saved["states"], (1, 1, G, d, e))
    slots.read("dS_after", "state", after["S"], (1, G, d, e))
    slots.read("d_sums_after", "state", after["sums"], (1, G, 2, 8, d))
    slots.read("d_rivals_after", "state", after["rivals"], (1, 1, plan.rows, C))
    for name, x in (("dq", q_BTw), ("dk", k_BTw), ("dv", v_BTw)):
        slots.write(name, "wide", x.shape, x.dtype, (1, plan.block, x.shape[2] // groups))
    if plan.given:
        slots.write("dS_before", "state", (B, H, d, e), F32, (1, G, d, e))
        slots.write("d_sums_before", "state", (B, H, 2, 8, d), F32, (1, G, 2, 8, d))
        slots.write("d_rivals_before", "state", (B, groups, plan.rows, C), F32, (1, 1, plan.rows, C))
    slots.scratch("u", (plan.chunks, G, C, e), plan.dtype)
    slots.scratch("narrow", (plan.chunks, G, d, e), plan.dtype)
    for name in ("S", "dS"):
        slots.scratch(name, (G, d, e))
    slots.scratch("d_sums", (G, 2, 8, d))
    slots.scratch("d_rivals", (plan.rows, C))
    for name in ("low", "up"):
        slots.scratch(name, (C, C))
    return slots.run(kernel, scalars, name="flow_backward", flops=flops(plan), vmem=vmem, interpret=interpret)
