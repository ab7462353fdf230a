"""A chunk of agent attention inside a kernel: what its positions and agents see, and how their weights are made.

Agents lie along sublanes and positions along lanes: both softmaxes then fill registers, and a sum over positions up to
each is a product with the matrix of pairs. Logits are in units of products: a weight is 2^(rate (logit - high)), where
`high` is an agent's largest logit up to the chunk's end. Where one sees only much smaller ones, so that its sum leaves
float32's comfort, the chunk is done again (`Step.levels`) against the largest of those that have no sum yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas.agent_attention.plan import LANES, AgentPlan
from kernels_pallas.linear_recurrence import chunk as linear
from kernels_pallas.linear_recurrence.chunk import iota, over_sublanes
from kernels_pallas.mosaic import product

LOWEST = -1e30  # the largest logit of nothing
NEVER = -3e38  # the logit of a key that is not there: far below `LOWEST`
TINY = 2.0**-80  # sums below are made again


class State(NamedTuple):
    """An agent's average over the keys so far: `values / total`.

    Attributes:
      high: [rows, 128], the logit that weights are against, the same in all lanes.
      total: [rows, 128], the sum of weights, as well.
      values: [rows, e], the sum of weighted values.
    """

    high: jax.Array
    total: jax.Array
    values: jax.Array


class Sight(NamedTuple):
    """What sees what in a chunk; None: everything.

    Attributes:
      pairs: [C, C] bool; queries along sublanes, in the backward keys.
      ones: [C, C], the same as numbers, keys along sublanes.
      enters: [1, C], 1 where a position's document goes on from before the chunk, else 0.
      stays: [1, C], 1 where a key is of the document that goes on behind it.
      carry: [1, 1], 1 where that document was before it, too.
      read, write: [C, 1] bool, `enters` and `stays` as columns.
    """

    pairs: jax.Array
    ones: jax.Array
    enters: jax.Array | None = None
    stays: jax.Array | None = None
    carry: jax.Array | None = None
    read: jax.Array | None = None
    write: jax.Array | None = None


def across(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128] of equal lanes, in another width."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def over_lanes(x: jax.Array) -> jax.Array:
    """The largest along lanes, [rows, 1]."""
    return jnp.max(x, axis=1, keepdims=True)


def sum_over_lanes(x: jax.Array) -> jax.Array:
    """[rows, 1], in float32."""
    return jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)


def times(x: jax.Array, by: jax.Array | None) -> jax.Array:
    """A product with a mask of numbers; None: ones."""
    return x if by is None else x * by


class Step(linear.Step):
    """A step of the grid: a block of positions of a group of heads."""

    plan: AgentPlan
    state: list[State]

    def __init__(self, plan: AgentPlan, r: dict[str, Any], *, heads: int, backward: bool):
        super().__init__(plan, r, heads=heads, backward=backward)
        self.rate = plan.scale * math.log2(math.e)
        self.exact = r["q"].dtype == jnp.float32
        self.hit = jnp.zeros((plan.rows, plan.sizes.chunk), jnp.float32)
        self._sights: dict[int, Sight] = {}
        self._left: dict[tuple[str, int], dict[int, jax.Array]] = {}
        self._made: dict[tuple[str, int], jax.Array] = {}

    def fill_tables(self) -> None:
        """The pairs of a document that is everywhere, once for a sequence."""
        if not self.plan.documents:
            tables = {"ones": self.row <= self.col, "pairs": self.row >= self.col}
            for name in tables.keys() & self.r.keys():
                self.r[name][...] = jnp.where(tables[name], 1.0, 0.0)

    def place(self, name: str, m: Any, h: Any) -> tuple[Any, ...]:
        """Where a chunk of a head is, either of them a number or a loop's."""
        C, width = self.plan.sizes.chunk, self.r[name].shape[2] // self.heads
        part = lambda i, size: pl.ds(i * size if isinstance(i, int) else pl.multiple_of(i * size, size), size)
        return 0, part(m, C), part(h, width)

    def each_head(self, do: Callable[[Any], None]) -> None:
        """Heads one after the other: by a loop, where they are whole registers wide."""
        if any(width % LANES for width in self.plan.shape[3:]):
            for h in range(self.heads):
                do(h)
        else:
            lax.fori_loop(0, self.heads, lambda h, _: do(h), None)

    def sight(self, m: Any) -> Sight:
        """Of chunk `m`."""
        if isinstance(m, int) and m in self._sights:
            return self._sights[m]
        dtype = self.r["q"].dtype
        if not self.plan.documents:
            ones = self.r["ones"][...]
            pairs = ones if self.backward else self.r["pairs"][...]
            sight = Sight(pairs > 0, ones.astype(dtype))
        else:
            masks, own = self._make_masks(m), self.r["starts"][0, m]
            start, number = self.start(m), lambda mask: jnp.where(mask, 1.0, 0.0)
            stays = number(iota(own.shape, 1) + start >= own[:, -1:])
            enters, carry = number(own < start), number(masks.carry)
            ones = (self.row <= self.col) & (self.row + start >= own)
            sight = Sight(masks.pairs, number(ones).astype(dtype), enters, stays, carry, masks.read, masks.write)
        if isinstance(m, int):
            self._sights[m] = sight
        return sight

    def seen(self, logits: jax.Array, m: Any) -> jax.Array:
        """Of keys up to the last position."""
        if not self.plan.ragged:
            return logits
        return jnp.where(iota((1, logits.shape[1]), 1) < self.plan.shape[1] - self.start(m), logits, NEVER)

    def raw_shares(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights of agents for each query, [rows, C], and their sums [1, C]."""
        if self.plan.rows > self.plan.agents:
            logits = jnp.where(iota((logits.shape[0], 1), 0) < self.plan.agents, logits, NEVER)
        raw = jnp.exp2((logits - jnp.max(logits, axis=0, keepdims=True)) * self.rate)
        return raw, over_sublanes(raw)

    def inverse(self, x: jax.Array) -> jax.Array:
        """1 / x, as exactly as products are."""
        return compat.reciprocal(x, approx=not self.exact)

    def weigh(self, m: int, h: int, logits: jax.Array) -> tuple[Sight, State, jax.Array, jax.Array]:
        """Of a chunk by its logits of keys: the sight, `state` of the head against the high up to the chunk's end, the
        weights of its keys, whose rows are left for sums, and what the state before weighs."""
        sight, (high0, total0, values0) = self.sight(m), self.state[h]
        keys = self.seen(logits, m)
        high = jnp.maximum(high0, over_lanes(keys))
        weights = jnp.exp2((keys - across(high, keys.shape[1])) * self.rate).astype(self.r["q"].dtype)
        keep = jnp.exp2((high0 - high) * self.rate)
        self.leave_rows("sums", m, h, weights)
        return sight, State(high, total0 * keep, values0 * across(keep, values0.shape[1])), weights, keep

    def of_all(self, name: str, m: int, h: int, by: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`by` of a head's rows, made for those of all heads at once: what is multiplied is loaded once. Before the
        lockstep's last yield every head has left its rows, by `leave_rows`."""
        key = name, m
        if key not in self._made:
            rows = self._left.pop(key)
            self._made[key] = by(jnp.concatenate([rows[n] for n in range(self.heads)]))
        size = self.plan.rows
        return self._made[key][h * size : (h + 1) * size]

    def leave_rows(self, name: str, m: int, h: int, x: jax.Array) -> None:
        """See `of_all`."""
        self._left.setdefault((name, m), {})[h] = x

    def sums(self, weights: jax.Array, sight: Sight) -> jax.Array:
        """Of weights up to each position, [rows, C]."""
        return product(weights, sight.ones, 1, 0)

    def note(self, totals: jax.Array, h: int) -> None:
        """Remembers sums that are too small."""
        small = jnp.where(totals < TINY, 1.0, 0.0)
        if self.plan.shape[2] % self.heads:
            small = jnp.where(self.first_head + h < self.plan.shape[2], small, 0.0)
        self.hit = jnp.maximum(self.hit, small)

    def normal(self, state: State) -> State:
        """The same average, of one weight of 1."""
        some = state.total > 0
        total = jnp.where(some, state.total, 1.0)
        high = jnp.where(some, state.high + jnp.log2(total) / self.rate, LOWEST)
        return State(high, jnp.where(some, 1.0, 0.0), state.values / across(total, state.values.shape[1]))

    def of_log(self, high: jax.Array, values: jax.Array) -> State:
        """The normal state of a high that is below `LOWEST / 2` only over nothing."""
        return State(high, jnp.where(high > LOWEST / 2, 1.0, 0.0), values)

    def column(self, row: jax.Array) -> jax.Array:
        """[1, rows] as [rows, 128]."""
        return self.spread(row, LANES)

    def as_row(self, x: jax.Array) -> jax.Array:
        """The opposite."""
        rows = self.plan.rows
        eye = iota((rows, rows), 0) == iota((rows, rows), 1)
        return over_sublanes(jnp.where(eye, across(x, rows), 0))

    # Chunks that are done again, with the numbers of chunks that loops have.

    def levels(self, m: Any, h: Any, logits: jax.Array, state: State, use: Callable[..., Any], found: Any) -> Any:
        """Calls `use(weights, keep, totals, now, found)` against one high after the other; returns the last `found`.

        weights [rows, C] of keys, keep [rows, 128] of the state before; totals [rows, C] up to each position, and
        whether that is the level at which it is `now` [rows, C] well above 0. Each level settles the positions of the
        largest logit that is left.
        """
        sight, C = self.sight(m), self.plan.sizes.chunk
        high0, total0, _ = state
        there = iota(logits.shape, 1) < self.plan.shape[1] - self.start(m)
        there &= self.first_head + h < self.plan.shape[2]

        def level(carried):
            count, _, pending, found = carried
            left = pending > 0
            entering = over_lanes(times(pending, sight.enters)) > 0
            high = jnp.where(entering, high0, NEVER)
            high = jnp.maximum(high, over_lanes(jnp.where(left, logits, NEVER)))
            power = lambda x: jnp.exp2(jnp.minimum(x, 0) * self.rate)
            weights = jnp.where(left, power(logits - across(high, C)), 0).astype(self.r["q"].dtype)
            keep = jnp.where(entering, power(high0 - high), 0)
            totals = self.sums(weights, sight) + times(across(total0 * keep, C), sight.enters)
            now = left & (totals >= TINY)
            found = use(weights, keep, jnp.maximum(totals, TINY), now, found)
            pending = jnp.where(now, 0.0, pending)
            return count + 1, jnp.max(pending), pending, found

        more = lambda carried: (carried[0] <= C) & (carried[1] > 0)  # not numbers may never be settled
        pending = jnp.where(there, 1.0, 0.0)
        return lax.while_loop(more, level, (jnp.int32(0), jnp.max(pending), pending, found))[3]

    def end(self, m: Any, logits: jax.Array, v: jax.Array, state: State) -> tuple[jax.Array, jax.Array, State]:
        """Weights of the chunk's keys [rows, C] and of the state before [rows, 128] in that after, and that one."""
        sight, C, dtype = self.sight(m), self.plan.sizes.chunk, v.dtype
        stays = jnp.ones((1, C), jnp.float32) if sight.stays is None else sight.stays
        carry = jnp.ones((1, 1), jnp.float32) if sight.carry is None else sight.carry
        logits = jnp.where(stays > 0, logits, NEVER)
        high = jnp.maximum(jnp.where(carry > 0, state.high, LOWEST), over_lanes(logits))
        weights = jnp.exp2((logits - across(high, C)) * self.rate).astype(dtype)
        keep = jnp.where(carry > 0, jnp.exp2(jnp.minimum(state.high - high, 0) * self.rate), 0)
        total = state.total * keep + sum_over_lanes(weights)
        values = state.values * across(keep, v.shape[1]) + product(weights, v, 1, 0)
        return weights, keep, State(high, total, values)
