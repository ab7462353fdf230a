"""The forward for Hopper: one sweep over the positions, every sum of a head on chip.

Two warpgroups compute, a third copies chunks to them. The flows of queries and those of keys are the same sums with the
two exchanged: I and I^ are what a query makes of the keys so far, O and O^ what a key makes of the queries so far. So a
warpgroup has the chunk's pairs by queries, the other the same by keys; both add up rows, and they meet twice a chunk,
to exchange the weights of the second flows and those of the output. Each then makes 64 columns of it: the first alone
where there are no more.

Products are the tensor cores'; what meets a vector, sums of features and their products with rows, is float32.

Shapes: B batch, T positions, H heads, d and e widths, C positions of a chunk, N chunks. T is a multiple of C, d and e
of 64 and at most 128.
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
from kernels_pallas.flow_attention.plan import Rule
from kernels_pallas.hopper import COLUMNS, LAYOUT, ROWS, by_column, by_row

CHUNK = 64  # C: rows of the tensor cores' tile
TILE = 64  # columns of a tile of shared memory, and of a warpgroup's output
WIDEST = 2 * TILE
_STAGES = 2  # chunks in flight
_PARTS = 16  # columns of the product that makes sums of features: of 8 or more, three are used
NUMBERS = ("scale", "share", "outgoing")  # of positions, that are written
VECTORS = ("sources", "emitted", "sinks", "absorbed")  # sums that meet queries, then those that meet keys


def forward(
    device: hopper.Device,
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    counts: jax.Array,
    limits: jax.Array | None,
    vectors: jax.Array,
    rivals: jax.Array,
    pairs: jax.Array | None,
    *,
    width: int,
    save: bool,
) -> tuple[jax.Array | None, ...]:
    """o [B, T, H, e], the numbers [B, H, 3, T], after the last position vectors, rivals and pairs, and with `save` what
    positions weigh in the second flows [B, H, 2, T] and the vectors before each chunk [B, H, N, 4, d], in float32.

    Args:
      counts: [B or 1, T] float32, each position's number in its document; 0 of what positions were filled up by.
      limits: [B, T] int32, the first position of each position's document, -1 where the state is of it; None: of all.
      vectors, rivals, pairs: before the first position, [B, H, 4, d], [B, H] and [B, H, d, e], float32; None: nothing.
      width: of features, without what it was filled up by.
    """
    (B, T, H, d), e = q.shape, v.shape[3]
    launch = _Forward(device, rule, width, d, e, T // CHUNK, q.dtype)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    run = device.kernel(
        "flow_forward",
        launch.body,
        by_lanes=True,
        out_type=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            of(B, H, len(NUMBERS), T),
            of(B, H, len(VECTORS), d),
            of(B, H, CHUNK),
            of(B, H, d, e),
            of(B, H, 2, T) if save else None,
            of(B, H, T // CHUNK, len(VECTORS), d) if save else None,
        ],
        scratch_types=launch.scratch(limits is not None),
        grid=(H, B),
        grid_names=("h", "b"),
        num_threads=3,
        thread_name="wg",
    )
    found = run(q, k, v, counts, limits, vectors, rivals, pairs, hopper.hidden_zero())
    o, numbers, vectors, rivals, pairs, *kept = found
    return o, numbers, vectors, rivals[..., -1], pairs, *kept


@dataclasses.dataclass(frozen=True)
class _Forward:
    """What a launch's code is made from."""

    device: hopper.Device
    rule: Rule
    width: int
    d: int
    e: int
    chunks: int
    dtype: Any

    def scratch(self, packed: bool) -> dict[str, Any]:
        tiles, rows = hopper.tiles, lambda n, dtype=jnp.float32: plgpu.SMEM((n, CHUNK), dtype)
        parts = self.e // TILE
        return {
            "q_s": tiles((_STAGES, CHUNK, self.d), self.dtype),
            "k_s": tiles((_STAGES, CHUNK, self.d), self.dtype),
            "v_s": tiles((_STAGES, CHUNK, self.e), self.dtype),
            "counts_s": rows(_STAGES),
            "limits_s": rows(_STAGES, jnp.int32) if packed else None,
            "vectors_s": plgpu.SMEM((len(VECTORS), self.d), jnp.float32),
            "weights_s": rows(2),  # of the second flows: N / I, N / O
            "numbers_s": rows(3),
            "kept_s": rows(2),  # what a warpgroup needs later: in registers it would spill
            "own_s": rows(2),  # what a warpgroup turns from rows into columns
            "pairs_s": tiles((_STAGES, CHUNK, CHUNK), self.dtype),  # the other warpgroup may be at the chunk before
            "rows_s": tiles((2, CHUNK, CHUNK), self.dtype),
            "state_s": tiles((parts, self.d, TILE), self.dtype),
            "u_s": tiles((parts, CHUNK, TILE), self.dtype),
            "written_s": tiles((parts, CHUNK, TILE), self.dtype) if packed else None,
            "o_s": tiles((parts, CHUNK, TILE), self.dtype),
            "here": hopper.barriers(_STAGES, 4 + packed),
            "free": hopper.barriers(_STAGES, 2),
            "met": hopper.barriers(1, 2),
            "start": hopper.barriers(2, 2),
        }

    def body(
        self, q, k, v, counts, limits, vectors, rivals, pairs, zero, o, numbers, vectors_end, rivals_end, pairs_end,
        weights, chunk_vectors, **scratch: Any,
    ) -> None:  # fmt: skip
        h, b, wg = (lax.axis_index(name) for name in ("h", "b", "wg"))
        t = types.SimpleNamespace(
            q=q, k=k, v=v, counts=counts, limits=limits, vectors=vectors, rivals=rivals, pairs=pairs, o=o,
            numbers=numbers, vectors_end=vectors_end, rivals_end=rivals_end, pairs_end=pairs_end, weights=weights,
            chunk_vectors=chunk_vectors, h=h, b=b, zero=zero, **scratch,
        )  # fmt: skip
        t.slot = lambda i: lax.rem(i, _STAGES)
        for side in (0, 1):
            pl.when(wg == side)(lambda side=side: self.compute(t, side))
        pl.when(wg == 2)(lambda: self.copy(t))

    def copy(self, t: Any) -> None:
        """The third warpgroup: fills the ring of chunks."""
        self.device.set_registers(hopper.REGISTERS[1], action="decrease")

        def chunk(i: jax.Array) -> None:
            at, rows = t.slot(i), pl.ds(i * CHUNK, CHUNK)
            fetch = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
            for source, target in ((t.q, t.q_s), (t.k, t.k_s), (t.v, t.v_s)):
                fetch(source.at[t.b, rows, t.h], target)
            fetch(t.counts.at[t.b if t.counts.shape[0] > 1 else t.b & 0, rows], t.counts_s)
            if t.limits is not None:
                fetch(t.limits.at[t.b, rows], t.limits_s)

        hopper.fill_ring(_STAGES, self.chunks, t.free, chunk)

    def compute(self, t: Any, side: int) -> None:
        """A warpgroup: flows of queries (0) or of keys (1), and its columns of the output where there are so many."""
        self.device.set_registers(hopper.REGISTERS[0], action="increase")
        own, mine = (2 * side, 2 * side + 1), pl.ds(side * TILE, TILE)
        for n in own:
            plgpu.copy_gmem_to_smem(t.vectors.at[t.b, t.h, n], t.vectors_s.at[n], t.start.at[side])
        state = None
        if side < self.e // TILE:
            state = self.device.zeros(self.d, TILE)
            if t.pairs is not None:
                state = self.device.load(t.pairs.at[t.b, t.h, :, mine], LAYOUT, optimized=False)
        plgpu.barrier_wait(t.start.at[side])
        step = lambda i, carry: _Chunk(self, t, side, i, *carry).run()
        carry = state, t.rivals[t.b, t.h], jnp.int32(-1)
        state, _, _ = lax.fori_loop(0, self.chunks, step, carry)
        for n in own:
            plgpu.copy_smem_to_gmem(t.vectors_s.at[n], t.vectors_end.at[t.b, t.h, n])
        if side == 1 and self.rule.competition:
            plgpu.copy_smem_to_gmem(t.own_s.at[side], t.rivals_end.at[t.b, t.h])
        if state is not None:
            zero = t.zero[0]  # or the addresses of the state before are kept till here
            t.pairs_end.at[t.b + zero, t.h + zero, :, mine][...] = state
        plgpu.wait_smem_to_gmem(0)


class _Chunk:
    """A chunk in a warpgroup: x are the features whose flows it makes, y those that they meet."""

    def __init__(self, launch: _Forward, t: Any, side: int, i: jax.Array, state: Any, rivals: Any, before: Any):
        self.launch, self.device, self.rule, self.t, self.side = launch, launch.device, launch.rule, t, side
        self.i, self.at, self.state, self.rivals, self.before = i, t.slot(i), state, rivals, before
        self.zero = lax.min(i, t.zero[0])
        self.x_s, self.y_s = (t.q_s.at[self.at], t.k_s.at[self.at])[:: 1 - 2 * side]
        self.tiles = [pl.ds(n * TILE, TILE) for n in range(launch.d // TILE)]
        self.first = side == 0 or self.rule.allocation  # whether the first flow is asked for, and the second
        self.second = (self.rule.allocation, self.rule.competition)[side]

    def run(self) -> tuple[Any, jax.Array, jax.Array]:
        """The pairs' state, the competition's sum and the documents' limit behind the chunk."""
        t, device, met = self.t, self.device, self.t.met.at[0]
        plgpu.barrier_wait(t.here.at[self.at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before: its memory is written again
        if t.chunk_vectors is not None:
            own = pl.ds(2 * self.side, 2)
            plgpu.copy_smem_to_gmem(t.vectors_s.at[own], t.chunk_vectors.at[t.b, t.h, self.i, own])
        self.counts = device.load(t.counts_s.at[self.at], ROWS)
        self.follows = self.written = self.carry = None
        self.last = self.before
        if t.limits is not None:
            limits, self.last = device.load(t.limits_s.at[self.at], ROWS), t.limits_s[self.at, CHUNK - 1]
            self.follows, self.written = limits == self.before, limits == self.last
            self.carry = jnp.where(self.last == self.before, 1.0, 0.0)
        if self.first or self.second:
            self.first_flow()
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        self.second_flow()
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        self.output()
        return self.state, self.rivals, self.last

    def seen(self) -> jax.Array:
        """The pairs of a position with itself and those before it in its document."""
        device, shape = self.device, (CHUNK, CHUNK)
        row, column = device.iota(shape, 0), device.iota(shape, 1)
        seen = row >= column
        if self.t.limits is not None:
            limits = device.load(self.t.limits_s.at[self.at], ROWS) - self.i * CHUNK
            seen &= column >= by_row(limits, shape)
        return seen

    def following(self, x: jax.Array) -> jax.Array:
        """Rows, 0 where they do not follow what came before the chunk."""
        return x if self.follows is None else jnp.where(self.follows, x, 0.0)

    def sums(self, ref: Any, n: int | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Of features their sums and, of before the chunk, `(x + epsilon) . vector n`; one tile is in registers."""
        own = met = None
        for tile in self.tiles:
            plgpu.commit_smem()  # no tile is loaded before it
            x = self.device.load(ref.at[:, tile], LAYOUT).astype(jnp.float32)
            part = x.sum(axis=1)
            own = part if own is None else own + part
            if n is not None:
                vector = self.device.load(self.t.vectors_s.at[n + self.zero, tile], COLUMNS)
                part = ((x + self.rule.epsilon) * by_column(vector, x.shape)).sum(axis=1)
                met = part if met is None else met + part
        return own, None if met is None else self.following(met)

    def add(self, weights: Any | None) -> None:
        """Adds the chunk's y to the first vector, and weighted to the second: a product for both, of a matrix that has
        the weights as two bfloat16 parts in rows of its own."""
        t, device, launch = self.t, self.device, self.launch
        row = device.iota((CHUNK, CHUNK), 0)
        across = lambda x: by_column(x, row.shape)
        found = jnp.where(row == 0, 1.0, 0.0)
        if weights is not None:
            weights = device.load(weights, COLUMNS)
            high = weights.astype(launch.dtype).astype(jnp.float32)
            found = jnp.where(row == 1, across(high), jnp.where(row == 2, across(weights - high), found))
        if t.limits is not None:
            limits = device.load(t.limits_s.at[self.at], COLUMNS)
            found = jnp.where(across(limits) == self.last, found, 0.0)
        rows_s = t.rows_s.at[self.side + self.zero]
        rows_s[...] = found.astype(launch.dtype)
        plgpu.commit_smem()  # and all threads have read the vectors

        def product(sums: Any) -> jax.Array:
            device.wgmma(sums, self.y_s.T, rows_s.at[pl.ds(0, _PARTS)].T)
            return device.read(sums)

        sums = device.scoped(product, (launch.d, _PARTS))
        column = device.iota(sums.shape, 1)
        for n, own in enumerate([column == 0] if weights is None else [column == 0, (column == 1) | (column == 2)]):
            ref = t.vectors_s.at[2 * self.side + n + self.zero]
            before = device.load(ref, ROWS)
            before = before if self.carry is None else before * self.carry
            ref[...] = before + jnp.where(own, sums, 0.0).sum(axis=1)

    def first_flow(self) -> None:
        """I or O, and what each position weighs in the other side's second flow."""
        t, device, shape, epsilon = self.t, self.device, (CHUNK, CHUNK), self.rule.epsilon
        own = t.own_s.at[self.side + self.zero]
        own[...], _ = self.sums(self.y_s)
        # Before the pairs, which would stay in registers beside it: what is stored cannot be put off.
        sums, far = self.sums(self.x_s, 2 * self.side if self.first else None)
        kept = [x.at[self.side + self.zero] for x in (t.kept_s, t.weights_s)]
        kept[0][...] = epsilon * (sums + epsilon * self.launch.width)  # what epsilon beside the sums gives
        if far is not None:
            kept[1][...] = far
        plgpu.commit_smem()

        def product(pairs: Any) -> jax.Array:
            device.wgmma(pairs, self.x_s, self.y_s.T)
            return device.read(pairs)

        seen = self.seen()
        pairs = device.scoped(product, shape)
        if self.side == 0:
            t.pairs_s.at[self.at][...] = jnp.where(seen, pairs, 0.0).astype(self.launch.dtype)
        others = by_column(device.load(own, COLUMNS), shape)
        self.pairs = jnp.where(seen, pairs + epsilon * others, 0.0)
        self.more = device.load(kept[0], ROWS)
        if far is None:
            return
        self.flow = self.pairs.sum(axis=1) + device.load(kept[1], ROWS) + self.more
        t.weights_s.at[self.side + self.zero][...] = jnp.where(self.counts > 0, self.counts / self.flow, 0.0)

    def second_flow(self) -> None:
        """I^ and by it the scale of outputs, or O^ and by it the share of values."""
        t, device, n = self.t, self.device, 2 * self.side + 1
        flow = weights = None
        if self.second:
            weights = t.weights_s.at[1 - self.side + self.zero]
            others = by_column(device.load(weights, COLUMNS), self.pairs.shape)
            kept = t.kept_s.at[self.side + self.zero]
            kept[...] = (self.pairs * others).sum(axis=1) + self.more
            _, far = self.sums(self.x_s, n)
            flow = (device.load(kept, ROWS) + far) / jnp.maximum(self.counts, 1.0)
        if self.first or self.second:
            if t.chunk_vectors is not None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.add(weights)
        if self.side == 0:
            scale = 1.0 / self.flow
            t.numbers_s.at[self.zero][...] = scale if flow is None else scale / (1.0 + jnp.exp(-flow))
        elif flow is not None:
            self.compete(flow)

    def compete(self, outgoing: jax.Array) -> None:
        t, device, shape, own = self.t, self.device, (CHUNK, CHUNK), self.t.own_s.at[self.side + self.zero]
        clip = self.rule.clip
        rival = jnp.exp(jnp.minimum(jnp.maximum(outgoing, -clip), clip))
        rival = jnp.where(self.counts > 0, rival, 0.0)
        own[...] = rival
        plgpu.commit_smem()
        before = jnp.where(self.seen(), by_column(device.load(own, COLUMNS), shape), 0.0).sum(axis=1)
        total = before + self.following(self.counts * 0.0 + self.rivals)
        t.numbers_s.at[1 + self.zero][...] = jnp.where(self.counts > 0, self.counts * rival / total, 0.0)
        t.numbers_s.at[2 + self.zero][...] = outgoing
        plgpu.commit_smem()
        own[...] = total
        plgpu.commit_smem()
        self.rivals = t.own_s[self.side, CHUNK - 1]

    def output(self) -> None:
        """The warpgroup's columns of o, and of the state behind the chunk."""
        t, side, rows = self.t, self.side, pl.ds(self.i * CHUNK, CHUNK)
        if self.state is not None:
            o = self.columns(pl.ds(side * TILE, TILE))
            t.o_s.at[side + self.zero][...] = o.astype(self.launch.dtype)
        plgpu.commit_smem()  # also puts plain reads of the ring before the copies that overwrite it
        plgpu.barrier_arrive(t.free.at[self.at])
        if self.state is not None:
            plgpu.copy_smem_to_gmem(t.o_s.at[side], t.o.at[t.b, rows, t.h, pl.ds(side * TILE, TILE)])
        for n in (0,) if side == 0 else (1, 2) if self.second else ():
            plgpu.copy_smem_to_gmem(t.numbers_s.at[n], t.numbers.at[t.b, t.h, n, rows])
        if t.weights is not None and self.first:
            plgpu.copy_smem_to_gmem(t.weights_s.at[side + self.zero], t.weights.at[t.b, t.h, side, rows])

    def columns(self, mine: Any) -> jax.Array:
        t, device, side, shape, dtype = self.t, self.device, self.side, (CHUNK, TILE), self.launch.dtype
        u = device.load(t.v_s.at[self.at, :, mine], LAYOUT)
        if self.rule.competition:
            u = (u.astype(jnp.float32) * by_row(device.load(t.numbers_s.at[1 + self.zero], ROWS), shape)).astype(dtype)
        u_s, state_s = t.u_s.at[side + self.zero], t.state_s.at[side + self.zero]
        u_s[...], state_s[...] = u, self.state.astype(dtype)
        written_s = u_s
        if self.written is not None:
            written_s = t.written_s.at[side + self.zero]
            kept = by_row(jnp.where(self.written, 1.0, 0.0), shape)
            written_s[...] = (u.astype(jnp.float32) * kept).astype(dtype)
        plgpu.commit_smem()
        q, k = t.q_s.at[self.at], t.k_s.at[self.at]

        def from_state(far: Any) -> jax.Array:
            device.wgmma(far, q, state_s)
            return device.read(far)

        o = device.scoped(from_state, shape)
        if self.follows is not None:
            o = o * by_row(jnp.where(self.follows, 1.0, 0.0), shape)
        o = device.state(lambda o: device.wgmma(o, t.pairs_s.at[self.at], u_s))(device.start(o))
        state = self.state if self.carry is None else self.state * self.carry
        self.state = device.state(lambda s: device.wgmma(s, k.T, written_s))(device.start(state))
        return o * by_row(device.load(t.numbers_s.at[self.zero], ROWS), shape)
