"""The forward on TPU: one sweep over the positions, in chunks, with every sum of a head on chip.

With L the pairs j <= i of `q k^T` and U those j >= i, sums over the chunk are those of their rows and columns: I is
`L 1`, O `1 U`, I^ `L (N / O)` and O^ `(N / I) U`; running sums of numbers are products with a triangle of ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.flow_attention.plan import (
    CARRIED,
    F32,
    ONES,
    PLAIN,
    WEIGHTED,
    Blocks,
    Place,
    Plan,
    features,
    fill_tables,
    iota,
    kept,
    lane_sums,
    place,
    product,
    product_and_rows,
    repeated,
    rows_product,
    stack,
    tile,
    times,
)


class Chunk:
    """One chunk of a group of heads, each phase over all heads."""

    def __init__(self, plan: Plan, refs: dict[str, Any], p: Place, m: int):
        self.plan, self.refs, self.p, self.m = plan, refs, p, m
        self.at = slice(m * plan.chunk, (m + 1) * plan.chunk)
        self.q, self.k, self.v = (features(plan, refs, p, name, m) for name in "qkv")
        self.k_t = [k.T for k in self.k]
        self.up = refs["up"][...].astype(plan.dtype)
        self.numbers: dict[str, jax.Array] = {}

    def vectors(self, n: int) -> list[jax.Array]:
        """Each head's tile of sums before the chunk that meet queries (0) or keys (1)."""
        return [self.refs["sums"][h, n] for h in range(self.plan.group)]

    def running(self, numbers: dict[str, jax.Array]) -> list[jax.Array]:
        """Running sums of stacks of numbers, with what came before, by one product."""
        near = rows_product(jnp.concatenate(list(numbers.values()), 0), self.up)
        found = []
        for i, name in enumerate(numbers):
            at = self.refs["carried"].at[CARRIED.index(name)]
            out = near[i * self.plan.rows : (i + 1) * self.plan.rows] + times(at[...], self.p.follows)
            at[...] = jnp.broadcast_to(out[:, -1:], out.shape)
            found.append(out)
        return found

    def flows(self) -> Iterator[None]:
        """All numbers of the chunk's positions, and the vectors after it; yields where it waits for products."""
        plan, p, rule, N, n = self.plan, self.p, self.plan.rule, self.p.count, self.numbers
        eps, dt = rule.epsilon, plan.dtype
        pairs = [product_and_rows(q, x, k) for q, x, k in zip(self.q, self.vectors(1), self.k_t)]
        of_k = [rows for _, rows in pairs]
        of_q = [rows_product(x, q.T) for x, q in zip(self.vectors(0), self.q)]
        yield
        far = lambda rows, i: times(stack(plan, rows, i), p.follows)
        of_keys, of_queries = stack(plan, of_k, ONES), stack(plan, of_q, ONES)
        all_keys, all_queries = self.running({"keys": of_keys, "queries": of_queries})
        low, up = self.refs["low"][...], self.refs["up"][...]
        near_in = lane_sums(plan, lows := [a * low for a, _ in pairs])
        uppers = [a * up for a, _ in pairs] if rule.allocation or rule.competition else []
        near_out = stack(plan, [x.sum(0, keepdims=True) for x in uppers]) if rule.allocation else None
        self.low, upper = [x.astype(dt) for x in lows], [x.astype(dt) for x in uppers]
        yield
        extra = lambda own, sums: eps * (own + sums) + eps * eps * plan.width
        inflow = n["inflow"] = near_in + far(of_q, PLAIN) + extra(of_queries, all_keys)
        scale, share, weighted = 1 / inflow, None, {}
        emit = take = None
        if rule.allocation:
            n["outflow"] = near_out + far(of_k, PLAIN) + extra(of_keys, all_queries)
            emit = kept(p.valid, N / n["outflow"])
            near_in = [rows_product(repeated(emit, h), x.T) for h, x in enumerate(self.low)]
            weighted["weighted keys"] = emit * of_keys
        if rule.competition:
            take = kept(p.valid, N / inflow)
            near_out = [rows_product(repeated(take, h), x) for h, x in enumerate(upper)]
            weighted["weighted queries"] = take * of_queries
        sums = dict(zip(weighted, self.running(weighted))) if weighted else {}
        self.after(0, self.k, emit)
        self.after(1, self.q, take)
        yield
        if rule.allocation:
            own = extra(of_queries, sums["weighted keys"])
            n["received"] = (stack(plan, near_in) + far(of_q, WEIGHTED) + own) / N
            scale *= jax.nn.sigmoid(n["received"])
        if rule.competition:
            own = extra(of_keys, sums["weighted queries"])
            n["outgoing"] = (stack(plan, near_out) + far(of_k, WEIGHTED) + own) / N
            rival = kept(p.valid, jnp.exp(jnp.clip(n["outgoing"], -rule.clip, rule.clip)))
            (n["rivals"],) = self.running({"rivals": rival})
            yield
            share = kept(p.valid, N * rival / n["rivals"]).T
        self.scale, self.u = scale.T, self.v
        if share is not None:
            self.u = [(v.astype(F32) * share[:, h : h + 1]).astype(dt) for h, v in enumerate(self.v)]
        yield

    def after(self, n: int, x: list[jax.Array], weight: jax.Array | None) -> None:
        """The vectors after the chunk that meet queries (0) or keys (1)."""
        plan, p = self.plan, self.p
        row, ref = iota((8, plan.d), 0), self.refs["sums"]
        for h in range(plan.group):
            entries = {PLAIN: 1.0} if weight is None else {PLAIN: 1.0, WEIGHTED: weight}
            new = rows_product(times(tile(h, entries, p.count), p.written), x[h])
            ref[h, n] = jnp.where(row == ONES, 1.0, times(ref[h, n], p.carry) + new)

    def outputs(self) -> Iterator[None]:
        """The weighted sums of values, and the state after the chunk, head by head."""
        plan, p, r, dt = self.plan, self.p, self.refs, self.plan.dtype
        for h in range(plan.group):
            q, u = kept(p.follows_column, self.q[h]), self.u[h]
            both = jnp.concatenate([self.low[h], q], 1)
            o = product(both, jnp.concatenate([u, r["S"][h].astype(dt)], 0)) * self.scale[:, h : h + 1]
            r["o"][0, self.at, h * plan.e : (h + 1) * plan.e] = o.astype(r["o"].dtype)
            new = product(self.k_t[h], kept(p.written_column, u))
            r["S"][h] = new + times(r["S"][h], p.carry)
            yield

    def save(self) -> None:
        plan, r = self.plan, self.refs
        if plan.rule.competition:
            r["outgoing"][0, 0, :, self.at] = self.numbers["outgoing"][: plan.group]
        if not plan.save:
            return
        names = [name for name in plan.saved if name != "outgoing"]
        for i, name in enumerate(names):
            r["numbers"][0, 0, i * plan.group : (i + 1) * plan.group, self.at] = self.numbers[name][: plan.group]


def save_vectors(plan: Plan, r: dict[str, Any], m: int) -> None:
    """Before the chunk: sources, emitted, sinks and absorbed of each head."""
    for h in range(plan.group):
        for n in range(2):
            r["vectors"][0, m, 0, 4 * h + 2 * n : 4 * h + 2 * n + 2] = r["sums"][h, n, :2]


def kernel(plan: Plan, r: dict[str, Any], scalars) -> None:
    b, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for name in ("S", "sums", "carried"):
            r[name][...] = r[f"{name}_before"][0] if plan.given else jnp.zeros_like(r[name])
        if not plan.given:
            for h in range(plan.group):
                for n in range(2):
                    r["sums"][h, n, ONES : ONES + 1] = jnp.ones((1, plan.d), F32)
        if not plan.packed:
            fill_tables(plan, r)

    if plan.save:
        r["states"][0, 0] = r["S"][...]
    outputs: Iterator[None] = iter(())  # of the chunk before, done while the products of a chunk are waited for
    for m in range(plan.chunks):
        if plan.save:
            save_vectors(plan, r, m)
        chunk = Chunk(plan, r, place(plan, r, scalars, b, step, m), m)
        for _ in itertools.zip_longest(chunk.flows(), outputs):
            pass
        chunk.save()
        outputs = chunk.outputs()
    for _ in outputs:
        pass

    @pl.when(step == plan.steps - 1)
    def _():
        r["S_after"][0], r["sums_after"][0] = r["S"][...], r["sums"][...]
        r["rivals_after"][0, 0] = r["carried"][CARRIED.index("rivals")]


def flops(plan: Plan) -> float:
    """Of the products of pairs, values and states; not of the rows of numbers beside them."""
    return 2.0 * plan.batch * plan.heads * plan.length * (plan.chunk * (plan.d + plan.e) + 2 * plan.d * plan.e)


def run(
    plan: Plan, q_BTw: jax.Array, k_BTw: jax.Array, v_BTw: jax.Array, marks, scalars, before, *, vmem, interpret
) -> dict[str, jax.Array]:
    """Outputs by name.

    o [B, T, H e]; "outgoing" [B, groups, group, positions] (with competition); the state after the last position,
    "S_after" [B, H, d, e], "sums_after" [B, H, 2, 8, d], "rivals_after" [B, groups, rows, chunk]; if `plan.save` also
    "numbers" [B, groups, names * group, positions], "vectors" [B, chunks, groups, 4 group, d] before each chunk and
    "states" [B, steps, H, d, e] before each step. `before`: a state of the same form, with "carried"; `marks` and
    `scalars`: of `layout.places`.
    """
    B, H, G, C, d, e = plan.batch, plan.heads, plan.group, plan.chunk, plan.d, plan.e
    groups, positions = H // G, plan.steps * plan.block
    slots = Blocks(plan, reverse=False)
    for name, x in (("q", q_BTw), ("k", k_BTw), ("v", v_BTw)):
        slots.read(name, "wide", x, (1, plan.block, x.shape[2] // groups))
    if plan.packed:
        slots.read("marks", "marks", marks, (1, 3, plan.block))
    if plan.given:
        slots.read("S_before", "state", before["S"], (1, G, d, e))
        slots.read("sums_before", "state", before["sums"], (1, G, 2, 8, d))
        slots.read("carried_before", "state", before["carried"], (1, len(CARRIED), plan.rows, C))
    slots.write("o", "wide", v_BTw.shape, v_BTw.dtype, (1, plan.block, G * e))
    if plan.rule.competition:
        slots.write("outgoing", "rows", (B, groups, G, positions), F32, (1, 1, G, plan.block))
    if plan.save:
        kinds = len([name for name in plan.saved if name != "outgoing"])
        slots.write("numbers", "rows", (B, groups, kinds * G, positions), F32, (1, 1, kinds * G, plan.block))
        shape = (B, plan.steps * plan.chunks, groups, 4 * G, d)
        slots.write("vectors", "step", shape, F32, (1, plan.chunks, 1, 4 * G, d))
        slots.write("states", "step", (B, plan.steps, H, d, e), F32, (1, 1, G, d, e))
    slots.write("S_after", "state", (B, H, d, e), F32, (1, G, d, e))
    slots.write("sums_after", "state", (B, H, 2, 8, d), F32, (1, G, 2, 8, d))
    slots.write("rivals_after", "state", (B, groups, plan.rows, C), F32, (1, 1, plan.rows, C))
    slots.scratch("S", (G, d, e))
    slots.scratch("sums", (G, 2, 8, d))
    slots.scratch("carried", (len(CARRIED), plan.rows, C))
    for name in ("low", "up"):
        slots.scratch(name, (C, C))
    return slots.run(kernel, scalars, name="flow_forward", flops=flops(plan), vmem=vmem, interpret=interpret)
