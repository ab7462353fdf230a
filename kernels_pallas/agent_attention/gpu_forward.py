"""The forward for Hopper: one sweep over the positions, each computing warpgroup with columns of a head's averages.

Weights of keys lie by agents, those of queries by positions. An agent's average over the keys before the chunk stays in
registers, with the logarithm of its sum of weights. Inside a chunk weights are 2^(logit - high), against an agent's
largest logit up to the chunk's end. Where a position sees only much smaller ones, so that its sum leaves float32's
comfort, its output is not exact: the smallest sum is an output of its own.

For the backward it keeps what was before each chunk: averages as products have them, and what weights are against.

Shapes: B batch, T positions, H heads, d and e widths, M agents, C positions of a chunk, N chunks, W computing
warpgroups of E columns. T is a multiple of C, d of 64 and e of W E.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.agent_attention.chunk import LOWEST, NEVER, TINY
from kernels_pallas.hopper import COLUMNS, LAYOUT, ROWS, added, by_column, by_row, product

NAME = "agent_attention_forward"
CHUNK = 64  # C: rows of the tensor cores' tile
AGENTS = 64  # M: as well; fewer are filled up
COLUMNS_EACH = 64  # E
_STAGES = 2  # chunks in flight
_PAIRS = (CHUNK, CHUNK)  # also agents and positions, either way round
KEPT = KEEP, CARRY, HIGH, BEHIND = range(4)  # of a chunk's agents: what is before weighs so much inside and behind it,
# the largest logit, and what weights in it are multiplied with behind it


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is static of a head.

    Attributes:
      agents: m, those that are not filled up.
      rate: powers of two that a logit before it is scaled stands for.
      length: of a row, without what it was filled up by.
    """

    agents: int
    rate: float
    length: int

    @property
    def rows(self) -> int:
        """Of agents in what is kept: whole tiles."""
        return -(-self.agents // 8) * 8


def forward(
    device: hopper.Device,
    facts: Facts,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    agents: jax.Array,
    limits: jax.Array | None,
    log: jax.Array | None,
    values: jax.Array | None,
    *,
    save: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """o [B, T, H, e], after the last position log [B, H, M] and values [B, H, M, e], and the smallest sums of weights
    of positions [B, H, C], those three in float32. With `save` also the averages before each chunk [B, H, N, rows, e]
    in the dtype of v, and the numbers that `KEPT` names, [B, H, N, 4, M] float32.

    Args:
      agents: [B or 1, H, M, d].
      limits: [B, T] int32, the first position of each position's document, -1 where the state is of it; None: of all.
      log, values: before the first position, as after the last; logarithms of base 2; None: of nothing.
    """
    (B, T, H, d), e = q.shape, v.shape[3]
    launch = _Forward(device, facts, d, min(e // COLUMNS_EACH, 2), T // CHUNK, q.dtype)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    run = device.kernel(
        NAME,
        launch.body,
        by_lanes=True,
        out_type=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            of(B, H, AGENTS),
            of(B, H, AGENTS, e),
            of(B, H, CHUNK),
            jax.ShapeDtypeStruct((B, H, T // CHUNK, facts.rows, e), v.dtype) if save else None,
            of(B, H, T // CHUNK, len(KEPT), AGENTS) if save else None,
        ],
        scratch_types=launch.scratch(limits is not None, save),
        grid=(e // (launch.warpgroups * COLUMNS_EACH), H, B),
        grid_names=("e", "h", "b"),
        num_threads=launch.warpgroups + 1,
        thread_name="wg",
    )
    places = jnp.arange(CHUNK, dtype=jnp.int32)
    return run(q, k, v, agents, places, limits, log, values, hopper.hidden_zero())


@dataclasses.dataclass(frozen=True)
class _Forward:
    """What a launch's code is made from."""

    device: hopper.Device
    facts: Facts
    d: int
    warpgroups: int
    chunks: int
    dtype: Any

    def scratch(self, packed: bool, save: bool) -> dict[str, Any]:
        W, tiles = self.warpgroups, lambda *shape: hopper.tiles(shape, self.dtype)
        rows = plgpu.SMEM((W, AGENTS), jnp.float32)
        return {
            "q_s": tiles(_STAGES, CHUNK, self.d),
            "k_s": tiles(_STAGES, CHUNK, self.d),
            "v_s": tiles(_STAGES, CHUNK, W * COLUMNS_EACH),
            "agents_s": tiles(AGENTS, self.d),
            "limits_s": plgpu.SMEM((_STAGES, CHUNK), jnp.int32) if packed else None,
            "weights_s": tiles(W, AGENTS, CHUNK),
            "state_s": tiles(W, AGENTS, COLUMNS_EACH),
            "o_s": tiles(W, CHUNK, COLUMNS_EACH),
            "keep_s": rows,  # what averages before the chunk weigh
            "numbers_s": plgpu.SMEM((len(KEPT), AGENTS), jnp.float32) if save else None,
            "places_s": plgpu.SMEM((CHUNK,), jnp.int32),
            "end_s": plgpu.SMEM((2, AGENTS), jnp.float32),
            "here": hopper.barriers(_STAGES, 3 + packed),
            "free": hopper.barriers(_STAGES, W),
            "start": hopper.barriers(1, 2),
        }

    def body(
        self, q, k, v, agents, places, limits, log, values, zero, o, log_end, values_end, least, states, numbers,
        **scratch: Any,
    ) -> None:  # fmt: skip
        e, h, b, wg = (lax.axis_index(name) for name in ("e", "h", "b", "wg"))
        t = types.SimpleNamespace(
            q=q, k=k, v=v, agents=agents, places=places, limits=limits, log=log, values=values, zero=zero, o=o,
            log_end=log_end, values_end=values_end, least=least, states=states, numbers=numbers, e=e, h=h, b=b, wg=wg,
            **scratch,
        )  # fmt: skip
        t.part = e * self.warpgroups + wg
        t.columns = pl.ds(t.part * COLUMNS_EACH, COLUMNS_EACH)
        t.slot = lambda i: lax.rem(i, _STAGES)
        pl.when(wg < self.warpgroups)(lambda: self.compute(t))
        pl.when(wg == self.warpgroups)(lambda: self.copy(t))

    def set_registers(self, which: int, action: str) -> None:
        """Only three warpgroups start with less than they may have."""
        if self.warpgroups == 2:
            self.device.set_registers(hopper.REGISTERS[which], action=action)

    def copy(self, t: Any) -> None:
        """The last warpgroup: fetches the agents, and fills the ring of chunks."""
        self.set_registers(1, "decrease")
        width = self.warpgroups * COLUMNS_EACH
        own = t.b if t.agents.shape[0] > 1 else t.b & 0
        plgpu.copy_gmem_to_smem(t.agents.at[own, t.h], t.agents_s, t.start.at[0])
        plgpu.copy_gmem_to_smem(t.places, t.places_s, t.start.at[0])

        def chunk(i: jax.Array) -> None:
            at, rows = t.slot(i), pl.ds(i * CHUNK, CHUNK)
            fetch = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
            fetch(t.k.at[t.b, rows, t.h], t.k_s)
            fetch(t.q.at[t.b, rows, t.h], t.q_s)
            fetch(t.v.at[t.b, rows, t.h, pl.ds(t.e * width, width)], t.v_s)
            if t.limits is not None:
                fetch(t.limits.at[t.b, rows], t.limits_s)

        hopper.fill_ring(_STAGES, self.chunks, t.free, chunk)

    def compute(self, t: Any) -> None:
        """A computing warpgroup: its columns, chunk by chunk."""
        self.set_registers(0, "increase")
        device = self.device
        state, log = device.zeros(AGENTS, COLUMNS_EACH), device.full(AGENTS, LOWEST)
        if t.log is not None:
            state = device.load(t.values.at[t.b, t.h, :, t.columns], LAYOUT, optimized=False)
            log = device.load(t.log.at[t.b, t.h], ROWS, optimized=False)
        plgpu.barrier_wait(t.start.at[0])
        step = lambda i, carry: _Chunk(self, t, i, *carry).run()
        carry = state, log, device.full(CHUNK, jnp.inf), jnp.int32(-1)
        state, log, least, _ = lax.fori_loop(0, self.chunks, step, carry)
        zero = t.zero[0]  # or the addresses of the state before are kept till here
        t.values_end.at[t.b + zero, t.h + zero, :, t.columns][...] = state

        @pl.when(t.part == 0)
        def _() -> None:
            for n, (x, out) in enumerate(((log, t.log_end), (least, t.least))):
                t.end_s.at[n][...] = x
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(t.end_s.at[n], out.at[t.b + zero, t.h + zero])

        plgpu.wait_smem_to_gmem(0)


class _Chunk:
    """A chunk in a warpgroup."""

    def __init__(self, launch: _Forward, t: Any, i: jax.Array, state: Any, log: Any, least: Any, before: Any):
        self.launch, self.device, self.facts, self.t = launch, launch.device, launch.facts, t
        self.i, self.at, self.state, self.log, self.least, self.before = i, t.slot(i), state, log, least, before
        self.zero = lax.min(i, t.zero[0])
        wg = t.wg + self.zero
        self.q, self.k = t.q_s.at[self.at], t.k_s.at[self.at]
        self.v = t.v_s.at[self.at, :, pl.ds(wg * COLUMNS_EACH, COLUMNS_EACH)]
        for name in ("weights_s", "state_s", "o_s", "keep_s"):
            setattr(self, name, getattr(t, name).at[wg])

    def run(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The state behind the chunk, the smallest sums up to it and the limit of its document."""
        t, device, launch = self.t, self.device, self.launch
        plgpu.barrier_wait(t.here.at[self.at])
        self.follows = self.limits = None
        last = self.before
        if t.limits is not None:
            self.limits, last = device.load(t.limits_s.at[self.at], ROWS), t.limits_s[self.at, CHUNK - 1]
            self.follows = self.limits == self.before
        logits = product(device, t.agents_s, self.k.T, _PAIRS) * self.facts.rate
        if self.facts.length % CHUNK:
            logits = jnp.where(self.column() < self.facts.length - self.i * CHUNK, logits, NEVER)
        high = jnp.maximum(self.log, logits.max(axis=1))
        weights = jnp.exp2(logits - by_row(high, _PAIRS)).astype(launch.dtype)
        keep = jnp.exp2(self.log - high)
        self.weights_s[...], self.keep_s[...], self.state_s[...] = weights, keep, self.state.astype(launch.dtype)
        plgpu.commit_smem()
        if t.states is not None:
            rows = pl.ds(0, self.facts.rows)
            plgpu.copy_smem_to_gmem(self.state_s.at[rows], t.states.at[t.b, t.h, self.i, :, t.columns])
        state, log = self.behind(logits, last, high, weights, keep)
        o = self.output()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.o_s[...] = o.astype(launch.dtype)
        if t.numbers is not None:
            self.keep_numbers(keep, high, log, last)
        plgpu.commit_smem()  # also puts plain reads of the ring before the copies that overwrite it
        plgpu.barrier_arrive(t.free.at[self.at])
        plgpu.copy_smem_to_gmem(self.o_s, t.o.at[t.b, pl.ds(self.i * CHUNK, CHUNK), t.h, t.columns])
        return state, log, self.least, last

    def keep_numbers(self, keep: Any, high: Any, log: Any, last: Any) -> None:
        """Those that `KEPT` names, by the first warpgroup."""
        t = self.t

        @pl.when(t.part == 0)
        def _() -> None:
            carry = jnp.exp2(self.log - log)
            carry = carry if self.limits is None else jnp.where(last == self.before, carry, 0.0)
            for n, x in enumerate((keep, carry, high, jnp.exp2(high - log))):
                t.numbers_s.at[n][...] = x
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(t.numbers_s, t.numbers.at[t.b, t.h, self.i])

    def column(self) -> jax.Array:
        """Of the chunk; from memory, as the numbers of all columns would stay in registers."""
        return by_column(self.device.load(self.t.places_s, COLUMNS), _PAIRS)

    def behind(self, logits: Any, last: Any, high: Any, weights: Any, keep: Any) -> tuple[jax.Array, jax.Array]:
        """The averages and the logarithms of their sums behind the chunk, of its last document."""
        if self.limits is not None:  # its own high: another's may be far above
            logits = jnp.where(self.column() >= last - self.i * CHUNK, logits, NEVER)
            log = jnp.where(last == self.before, self.log, LOWEST)
            high = jnp.maximum(log, logits.max(axis=1))
            weights = jnp.exp2(logits - by_row(high, _PAIRS)).astype(self.launch.dtype)
            keep = jnp.exp2(log - high)
        total = keep + weights.astype(jnp.float32).sum(axis=1)
        shape = self.state.shape
        state = added(self.device, self.state * by_row(keep, shape), (weights, self.v))
        return state * by_row(1.0 / total, shape), high + jnp.log2(total)

    def output(self) -> jax.Array:
        """The warpgroup's columns."""
        device, dtype = self.device, self.launch.dtype
        ones = jnp.where(self.seen(), 1.0, 0.0).astype(dtype)
        totals = added(device, self.kept(), (ones, self.weights_s.T))
        self.least = jnp.minimum(self.least, totals.min(axis=1))
        read = self.shares() * jnp.exp2(-jnp.log2(jnp.maximum(totals, TINY)))
        near = jnp.where(self.seen(), product(device, read.astype(dtype), self.weights_s, _PAIRS), 0.0).astype(dtype)
        far = (read * self.kept()).astype(dtype)
        return added(device, device.zeros(CHUNK, COLUMNS_EACH), (far, self.state_s), (near, self.v))

    def kept(self) -> jax.Array:
        """What agents' averages before the chunk weigh, for each position."""
        keep = by_column(self.device.load(self.keep_s, COLUMNS), _PAIRS)
        return keep if self.follows is None else jnp.where(by_row(self.follows, _PAIRS), keep, 0.0)

    def shares(self) -> jax.Array:
        """Of agents for each query."""
        device, facts = self.device, self.facts
        logits = product(device, self.q, self.t.agents_s.T, _PAIRS) * facts.rate
        if facts.agents < AGENTS:
            logits = jnp.where(self.column() < facts.agents, logits, NEVER)
        raw = jnp.exp2(logits - by_row(logits.max(axis=1), _PAIRS))
        return raw * by_row(1.0 / raw.sum(axis=1), _PAIRS)

    def seen(self) -> jax.Array:
        """The pairs of a position with itself and those before it in its document."""
        row, column = by_row(self.device.load(self.t.places_s, ROWS), _PAIRS), self.column()
        seen = row >= column
        if self.limits is not None:
            seen &= column >= by_row(self.limits - self.i * CHUNK, _PAIRS)
        return seen
