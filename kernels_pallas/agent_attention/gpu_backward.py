"""The backward for Hopper: one sweep against the positions, from what the forward kept of each chunk.

It carries the gradients of an agent's sum of weights and of its weighted values, for a sum that is 1 at a chunk's edge:
they are sums over queries, and what a key adds to them is its weight there. Two warpgroups compute. One has queries by
agents: their shares, the sums of weights up to each, dq, and the gradients that are carried. The other has keys by
agents: their weights, dk, dv, and the agents' gradient. They meet twice a chunk: once the keys' weights and what is
carried are there, and once what each query asks of them is. Gradients go out from where their arrays came in.

With s the shares of agents, w the weights of keys against the chunk's high, t the sums of w up to a query, r = s / t,
g = do . v of pairs and N an agent's weighted values up to a query, o = sum_a r N:

    ds = do . N / t,   dt = -r ds,   dw_j = sum_i r_i g_ij + dt_i   over the queries i that see j.

Shapes: as in `gpu_forward`.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.agent_attention.chunk import NEVER, TINY
from kernels_pallas.agent_attention.gpu_forward import AGENTS, BEHIND, CARRY, CHUNK, HIGH, KEEP, KEPT, Facts
from kernels_pallas.hopper import COLUMNS, LAYOUT, ROWS, added, by_column, by_row, product, put

NAME = "agent_attention_backward"
_STAGES = 2  # chunks in flight
_PAIRS = (CHUNK, CHUNK)  # also agents and positions, either way round
_MATRICES = ("weights_s", "read_s", "dtotals_s", "entering_s", "pairs_s")  # of positions and agents
_LN2 = math.log(2)


def backward(
    device: hopper.Device,
    facts: Facts,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    agents: jax.Array,
    limits: jax.Array | None,
    states: jax.Array,
    numbers: jax.Array,
    do: jax.Array,
    dtotal: jax.Array,
    dvalues: jax.Array,
) -> tuple[jax.Array, ...]:
    """dq, dk, dv, the agents' gradient [B, H, M, d], and dtotal and dvalues before the first position, these float32.

    Args:
      agents, limits: as of `gpu_forward.forward`, which gives states and numbers.
      do: [B, T, H, e].
      dtotal, dvalues: gradients of an agent's sum of weights [B, H, M] and of its weighted values [B, H, M, e] after
        the last position, where the sum is 1.
    """
    (B, T, H, d), e = q.shape, v.shape[3]
    launch = _Backward(device, facts, d, e, T // CHUNK, q.dtype)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    run = device.kernel(
        NAME,
        launch.body,
        by_lanes=True,
        sums_bytes=4 * AGENTS * 4,  # a column's sum of each warp
        out_type=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
            of(B, H, AGENTS, d),
            of(B, H, AGENTS),
            of(B, H, AGENTS, e),
        ],
        scratch_types=launch.scratch(limits is not None),
        grid=(H, B),
        grid_names=("h", "b"),
        num_threads=3,
        thread_name="wg",
    )
    places = jnp.arange(CHUNK, dtype=jnp.int32)
    return run(q, k, v, agents, places, limits, states, numbers, do, dtotal, dvalues, hopper.hidden_zero())


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What a launch's code is made from."""

    device: hopper.Device
    facts: Facts
    d: int
    e: int
    chunks: int
    dtype: Any

    def scratch(self, packed: bool) -> dict[str, Any]:
        tiles = lambda *shape: hopper.tiles(shape, self.dtype)
        return {
            "q_s": tiles(_STAGES, CHUNK, self.d),
            "k_s": tiles(_STAGES, CHUNK, self.d),
            "v_s": tiles(_STAGES, CHUNK, self.e),
            "do_s": tiles(_STAGES, CHUNK, self.e),
            "numbers_s": plgpu.SMEM((_STAGES, len(KEPT), AGENTS), jnp.float32),
            "limits_s": plgpu.SMEM((_STAGES, CHUNK), jnp.int32) if packed else None,
            # Of each of these one, at the place that `hopper.hidden_zero` says.
            "agents_s": tiles(1, AGENTS, self.d),
            "state_s": tiles(1, AGENTS, self.e),  # there is no room for those of two chunks
            "dvalues_s": tiles(1, AGENTS, self.e),
            "dtotal_s": plgpu.SMEM((2, AGENTS), jnp.float32),
            **{name: tiles(1, CHUNK, AGENTS) for name in _MATRICES},
            "places_s": plgpu.SMEM((1, CHUNK), jnp.int32),
            "here": hopper.barriers(_STAGES, 5 + packed),
            "free": hopper.barriers(_STAGES, 2),
            "state_here": hopper.barriers(1),
            "state_free": hopper.barriers(1),
            "met": hopper.barriers(1, 2),
            "taken": hopper.barriers(1),
            "start": hopper.barriers(1, 3),
        }

    def body(
        self, q, k, v, agents, places, limits, states, numbers, do, dtotal, dvalues, zero, dq, dk, dv, dagents,
        dtotal_start, dvalues_start, **scratch: Any,
    ) -> None:  # fmt: skip
        h, b, wg = (lax.axis_index(name) for name in ("h", "b", "wg"))
        t = types.SimpleNamespace(
            q=q, k=k, v=v, agents=agents, places=places, limits=limits, states=states, numbers=numbers, do=do,
            dtotal=dtotal, dvalues=dvalues, zero=zero, dq=dq, dk=dk, dv=dv, dagents=dagents, dtotal_start=dtotal_start,
            dvalues_start=dvalues_start, h=h, b=b, **scratch,
        )  # fmt: skip
        t.slot = lambda i: lax.rem(i, _STAGES)
        for side, compute in enumerate((self.queries, self.keys)):
            pl.when(wg == side)(lambda compute=compute: compute(t))
        pl.when(wg == 2)(lambda: self.copy(t))

    def copy(self, t: Any) -> None:
        """The third warpgroup: fetches what is there once, and fills the ring of chunks."""
        self.device.set_registers(hopper.REGISTERS[1], action="decrease")
        own = t.b if t.agents.shape[0] > 1 else t.b & 0
        once = (t.agents.at[own, t.h], t.agents_s), (t.places, t.places_s), (t.dtotal.at[t.b, t.h], t.dtotal_s)
        for source, target in once:
            plgpu.copy_gmem_to_smem(source, target.at[0], t.start.at[0])

        def chunk(i: jax.Array) -> None:
            at, n = t.slot(i), self.chunks - 1 - i
            rows = pl.ds(n * CHUNK, CHUNK)
            fetch = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
            for source, target in ((t.k, t.k_s), (t.v, t.v_s), (t.q, t.q_s), (t.do, t.do_s)):
                fetch(source.at[t.b, rows, t.h], target)
            fetch(t.numbers.at[t.b, t.h, n], t.numbers_s)
            if t.limits is not None:
                fetch(t.limits.at[t.b, rows], t.limits_s)
            plgpu.barrier_wait(t.state_free.at[0])
            state_s = t.state_s.at[0, pl.ds(0, self.facts.rows)]
            plgpu.copy_gmem_to_smem(t.states.at[t.b, t.h, n], state_s, t.state_here.at[0])

        hopper.fill_ring(_STAGES, self.chunks, t.free, chunk)
        plgpu.barrier_wait(t.state_free.at[0])

    def queries(self, t: Any) -> None:
        """The first warpgroup."""
        device = self.device
        device.set_registers(hopper.REGISTERS[0], action="increase")
        if self.facts.rows < AGENTS:  # what no copy fills may be anything
            t.state_s.at[0][...] = device.zeros(AGENTS, self.e).astype(self.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(t.state_free.at[0])
        dvalues = device.load(t.dvalues.at[t.b, t.h], LAYOUT, optimized=False)
        plgpu.barrier_wait(t.start.at[0])
        dvalues = lax.fori_loop(0, self.chunks, lambda i, carry: _Queries(self, t, i).run(carry), dvalues)
        zero = t.zero[0]  # or the addresses are kept from the beginning
        t.dvalues_start.at[t.b + zero, t.h + zero][...] = dvalues
        plgpu.copy_smem_to_gmem(t.dtotal_s.at[self.chunks & 1], t.dtotal_start.at[t.b + zero, t.h + zero])
        plgpu.wait_smem_to_gmem(0)

    def keys(self, t: Any) -> None:
        """The second."""
        device = self.device
        device.set_registers(hopper.REGISTERS[0], action="increase")
        plgpu.barrier_wait(t.start.at[0])
        step = lambda i, carry: _Keys(self, t, i).run(carry)
        dagents = lax.fori_loop(0, self.chunks, step, device.zeros(AGENTS, self.d))
        zero = t.zero[0]
        t.dagents.at[t.b + zero, t.h + zero][...] = dagents
        plgpu.wait_smem_to_gmem(0)


class _Chunk:
    """A chunk in a warpgroup."""

    def __init__(self, launch: _Backward, t: Any, i: jax.Array):
        self.launch, self.device, self.facts, self.dtype, self.t = launch, launch.device, launch.facts, launch.dtype, t
        self.at, self.n = t.slot(i), launch.chunks - 1 - i
        self.first = self.n * CHUNK
        zero = lax.min(i, t.zero[0])
        for name in ("q", "k", "v", "do"):
            setattr(self, name, getattr(t, f"{name}_s").at[self.at])
        for name in ("agents_s", "state_s", "dvalues_s", "places_s", *_MATRICES):
            setattr(self, name, getattr(t, name).at[zero])
        self.dtotal_s = [t.dtotal_s.at[(i + n) & 1] for n in (0, 1)]  # behind the chunk, and before it
        self.scale = self.facts.rate * _LN2

    def meet(self) -> None:
        """Both warpgroups see what the other wrote."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.t.met.at[0])
        plgpu.barrier_wait(self.t.met.at[0])

    def number(self, which: int, layout: Any) -> jax.Array:
        """Of agents."""
        return self.device.load(self.t.numbers_s.at[self.at, which], layout)

    def place(self, layout: Any) -> jax.Array:
        """Of positions in the chunk; from memory, as many numbers would stay in registers."""
        return self.device.load(self.places_s, layout)

    def limit(self, layout: Any) -> jax.Array:
        """First positions of documents, from the chunk's first."""
        return self.device.load(self.t.limits_s.at[self.at], layout) - self.first

    def last(self) -> jax.Array:
        """The limit of the document that goes on behind the chunk."""
        return self.t.limits_s[self.at, CHUNK - 1] - self.first

    def send(self, memory: Any, x: jax.Array, out: Any) -> None:
        """A gradient, from where its array was."""
        put(memory, x)
        plgpu.copy_smem_to_gmem(memory, out.at[self.t.b, pl.ds(self.first, CHUNK), self.t.h])

    def leave(self) -> None:
        """The chunk's memory, once gradients are copied."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()  # puts plain reads and writes before the copies that overwrite it
        plgpu.barrier_arrive(self.t.free.at[self.at])


class _Queries(_Chunk):
    """Queries by agents."""

    def run(self, dvalues: jax.Array) -> jax.Array:
        """The gradient of weighted values before the chunk, from that behind it."""
        t, device, dtype = self.t, self.device, self.dtype
        plgpu.barrier_wait(t.here.at[self.at])
        put(self.dvalues_s, dvalues)
        shares = self.shares()
        self.meet()
        ones = jnp.where(self.seen(), 1.0, 0.0).astype(dtype)
        totals = added(device, self.kept(), (ones, self.weights_s))
        inverse = jnp.exp2(-jnp.log2(jnp.maximum(totals, TINY)))
        read = shares * inverse
        self.read_s[...], self.entering_s[...] = read.astype(dtype), (read * self.kept()).astype(dtype)
        dshares = self.asked() * inverse
        dtotals = -shares * inverse * dshares
        self.dtotals_s[...] = dtotals.astype(dtype)
        kept = self.kept()
        before = (dtotals * kept).sum(axis=0)
        self.dtotal_s[1][...] = device.load(self.dtotal_s[0], COLUMNS) * self.number(CARRY, COLUMNS) + before
        dlogits = shares * (dshares - by_row((shares * dshares).sum(axis=1), _PAIRS))
        dlogits = (dlogits * self.scale).astype(dtype)
        self.pairs_s[...] = dlogits  # which nobody needs any more
        self.meet()
        dq = product(device, dlogits, self.agents_s, (CHUNK, self.launch.d))
        plgpu.barrier_wait(t.taken.at[0])
        self.send(self.q, dq, t.dq)
        dvalues = dvalues * by_row(self.number(CARRY, ROWS), dvalues.shape)
        dvalues = added(device, dvalues, (self.entering_s.T, self.do))
        self.leave()
        return dvalues

    def shares(self) -> jax.Array:
        """Of agents for each query."""
        logits = product(self.device, self.q, self.agents_s.T, _PAIRS) * self.facts.rate
        if self.facts.agents < AGENTS:
            logits = jnp.where(by_column(self.place(COLUMNS), _PAIRS) < self.facts.agents, logits, NEVER)
        raw = jnp.exp2(logits - by_row(logits.max(axis=1), _PAIRS))
        return raw * by_row(1.0 / raw.sum(axis=1), _PAIRS)

    def seen(self) -> jax.Array:
        """Pairs of queries and the keys that they see."""
        row, column = by_row(self.place(ROWS), _PAIRS), by_column(self.place(COLUMNS), _PAIRS)
        seen = row >= column
        if self.t.limits is not None:
            seen &= column >= by_row(self.limit(ROWS), _PAIRS)
        return seen

    def kept(self) -> jax.Array:
        """What sums before the chunk weigh in those up to each query."""
        keep = by_column(self.number(KEEP, COLUMNS), _PAIRS)
        return keep if self.t.limits is None else jnp.where(by_row(self.limit(ROWS) < 0, _PAIRS), keep, 0.0)

    def asked(self) -> jax.Array:
        """do . N of queries and agents."""
        t, device = self.t, self.device
        plgpu.barrier_wait(t.state_here.at[0])
        far = product(device, self.do, self.state_s.T, _PAIRS)
        plgpu.barrier_arrive(t.state_free.at[0])
        return added(device, far * self.kept(), (self.pairs_s.T, self.weights_s))


class _Keys(_Chunk):
    """Keys by agents."""

    def run(self, dagents: jax.Array) -> jax.Array:
        """The agents' gradient, with the chunk's."""
        t, device, dtype, launch = self.t, self.device, self.dtype, self.launch
        plgpu.barrier_wait(t.here.at[self.at])
        logits = product(device, self.k, self.agents_s.T, _PAIRS) * self.facts.rate
        if self.facts.length % CHUNK:
            logits = jnp.where(by_row(self.place(ROWS), _PAIRS) < self.facts.length - self.first, logits, NEVER)
        weights = jnp.exp2(logits - by_column(self.number(HIGH, COLUMNS), _PAIRS))
        self.weights_s[...] = weights.astype(dtype)
        after = (weights * self.behind()).astype(dtype)
        pairs = self.pairs(product(device, self.v, self.do.T, _PAIRS))
        self.pairs_s[...] = pairs
        self.meet()
        asked = product(device, self.v, self.dvalues_s.T, _PAIRS)
        asked = (asked + by_column(device.load(self.dtotal_s[0], COLUMNS), _PAIRS)) * self.behind()
        self.meet()
        dagents = added(device, dagents, (self.pairs_s.T, self.q))
        asked = added(device, asked, (pairs, self.read_s), (self.pairs(1.0), self.dtotals_s))
        weights = device.load(self.weights_s, LAYOUT).astype(jnp.float32)
        dlogits = (weights * asked * self.scale).astype(dtype)
        near = self.pairs(product(device, self.weights_s, self.read_s.T, _PAIRS))
        put(self.weights_s, dlogits)
        dv = added(device, device.zeros(CHUNK, launch.e), (after, self.dvalues_s), (near, self.do))
        plgpu.barrier_arrive(t.taken.at[0])
        self.send(self.v, dv, t.dv)
        dk = product(device, self.weights_s, self.agents_s, (CHUNK, launch.d))
        dagents = added(device, dagents, (self.weights_s.T, self.k))
        self.send(self.k, dk, t.dk)
        self.leave()
        return dagents

    def behind(self) -> jax.Array:
        """What keys' weights are multiplied with in the sums behind the chunk."""
        behind = by_column(self.number(BEHIND, COLUMNS), _PAIRS)
        return (
            behind if self.t.limits is None else jnp.where(by_row(self.place(ROWS), _PAIRS) >= self.last(), behind, 0.0)
        )

    def pairs(self, x: Any) -> jax.Array:
        """0 where queries (columns) do not see keys."""
        row, column = by_row(self.place(ROWS), _PAIRS), by_column(self.place(COLUMNS), _PAIRS)
        seen = row <= column
        if self.t.limits is not None:
            seen &= row >= by_column(self.limit(COLUMNS), _PAIRS)
        return jnp.where(seen, x, 0.0).astype(self.dtype)
