"""What flows add to the gradients of queries and keys on Hopper: one sweep against the positions.

Queries and keys are the same here with the two exchanged. With P the pairs x . y of the one that a warpgroup has and
the other, rho what its positions weigh in the other's second flow, alpha the gradient of its own second flow over its
count, and f that of its first:

    drho_x = sum_y alpha_y (P + epsilon sum x),   f_x = -(delta_x + rho_x drho_x) rho_x / count_x
    dx = sum_y (alpha_x rho_y + f_x) y   over y up to x   +   sum_y (rho_x alpha_y + f_y) (y + epsilon)   from x on

So a warpgroup has queries, another keys; they meet twice a chunk, to exchange alpha of keys, which the competition's
gradient is a part of, and f. What crosses a chunk's edge are the four vectors of sums and their gradients.

Shapes: as in `gpu_forward`.
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
from kernels_pallas.flow_attention.gpu_forward import CHUNK, TILE, VECTORS
from kernels_pallas.flow_attention.plan import Rule
from kernels_pallas.hopper import COLUMNS, LAYOUT, ROWS, added, by_column, by_row, product

NAME = "flow_backward"
_STAGES = 2  # chunks in flight
_PARTS = 16  # columns of the product that makes sums of features: of 8 or more, four are used
_PAIRS = (CHUNK, CHUNK)
# Numbers of positions: of queries alpha, and delta, the gradient of their outputs' scale times it; rho of either; what
# alpha of keys is made from, with what later positions spent for their shares; counts.
ROWS_OF = ALPHA, DELTA, TAKE, EMIT, BASE, RIVAL, SPENT, COUNT = range(8)


def backward(
    device: hopper.Device,
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    dq: jax.Array,
    dk: jax.Array,
    numbers: jax.Array,
    limits: jax.Array | None,
    vectors: jax.Array,
    dvectors: jax.Array,
    drivals: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """dq and dk with what flows add to those given, and the gradients of vectors and rivals before the first position.

    Args:
      dq, dk: as q and k.
      numbers: [B, H, 8, T] float32, those that `ROWS_OF` names.
      limits: as of `gpu_forward.forward`.
      vectors: [B, H, N, 4, d], before each chunk.
      dvectors, drivals: [B, H, 4, d] and [B, H], gradients of vectors and rivals after the last position; float32.
    """
    B, T, H, d = q.shape
    launch = _Backward(device, rule, d, T // CHUNK, q.dtype)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    run = device.kernel(
        NAME,
        launch.body,
        by_lanes=True,
        out_type=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)), of(*dvectors.shape), of(B, H, CHUNK)],
        scratch_types=launch.scratch(limits is not None),
        grid=(H, B),
        grid_names=("h", "b"),
        num_threads=3,
        thread_name="wg",
    )
    *found, rivals = run(q, k, dq, dk, numbers, limits, vectors, dvectors, drivals, hopper.hidden_zero())
    return *found, rivals[..., 0]


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What a launch's code is made from."""

    device: hopper.Device
    rule: Rule
    d: int
    chunks: int
    dtype: Any

    def scratch(self, packed: bool) -> dict[str, Any]:
        tiles = lambda *shape: hopper.tiles(shape, self.dtype)
        wide = lambda *shape: plgpu.SMEM(shape, jnp.float32)
        return {
            "q_s": tiles(_STAGES, CHUNK, self.d),
            "k_s": tiles(_STAGES, CHUNK, self.d),
            "dq_s": tiles(_STAGES, CHUNK, self.d),
            "dk_s": tiles(_STAGES, CHUNK, self.d),
            "numbers_s": wide(_STAGES, len(ROWS_OF), CHUNK),
            "vectors_s": wide(_STAGES, len(VECTORS), self.d),
            "limits_s": plgpu.SMEM((_STAGES, CHUNK), jnp.int32) if packed else None,
            "dvectors_s": wide(2, len(VECTORS), self.d),  # behind a chunk and before it, in turns
            "alpha_s": wide(2, CHUNK),  # of keys: queries may be at the chunk before
            "flows_s": wide(2, CHUNK),  # f
            "kept_s": wide(2, CHUNK),  # what a warpgroup needs later
            "later_s": wide(1, CHUNK),
            "rows_s": tiles(2, CHUNK, CHUNK),
            "here": hopper.barriers(_STAGES, 6 + packed),
            "free": hopper.barriers(_STAGES, 2),
            "met": hopper.barriers(1, 2),
            "start": hopper.barriers(1),
        }

    def body(
        self, q, k, dq, dk, numbers, limits, vectors, dvectors, drivals, zero, dq_out, dk_out, dvectors_start,
        drivals_start, **scratch: Any,
    ) -> None:  # fmt: skip
        h, b, wg = (lax.axis_index(name) for name in ("h", "b", "wg"))
        t = types.SimpleNamespace(
            q=q, k=k, dq=dq, dk=dk, numbers=numbers, limits=limits, vectors=vectors, dvectors=dvectors,
            drivals=drivals, zero=zero, out=(dq_out, dk_out), dvectors_start=dvectors_start,
            drivals_start=drivals_start, h=h, b=b, **scratch,
        )  # fmt: skip
        t.slot = lambda i: lax.rem(i, _STAGES)
        for side in (0, 1):
            pl.when(wg == side)(lambda side=side: self.compute(t, side))
        pl.when(wg == 2)(lambda: self.copy(t))

    def copy(self, t: Any) -> None:
        """The third warpgroup: fills the ring of chunks."""
        self.device.set_registers(hopper.REGISTERS[1], action="decrease")
        plgpu.copy_gmem_to_smem(t.dvectors.at[t.b, t.h], t.dvectors_s.at[0], t.start.at[0])

        def chunk(i: jax.Array) -> None:
            at, n = t.slot(i), self.chunks - 1 - i
            rows = pl.ds(n * CHUNK, CHUNK)
            fetch = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
            for source, target in ((t.q, t.q_s), (t.k, t.k_s), (t.dq, t.dq_s), (t.dk, t.dk_s)):
                fetch(source.at[t.b, rows, t.h], target)
            fetch(t.numbers.at[t.b, t.h, :, rows], t.numbers_s)
            fetch(t.vectors.at[t.b, t.h, n], t.vectors_s)
            if t.limits is not None:
                fetch(t.limits.at[t.b, rows], t.limits_s)

        hopper.fill_ring(_STAGES, self.chunks, t.free, chunk)

    def compute(self, t: Any, side: int) -> None:
        """A warpgroup: of queries (0) or of keys (1)."""
        self.device.set_registers(hopper.REGISTERS[0], action="increase")
        plgpu.barrier_wait(t.start.at[0])
        lax.fori_loop(0, self.chunks, lambda i, rivals: _Chunk(self, t, side, i).run(rivals), t.drivals[t.b, t.h])
        last = t.dvectors_s.at[self.chunks & 1]
        for n in (2 * side, 2 * side + 1):
            plgpu.copy_smem_to_gmem(last.at[n], t.dvectors_start.at[t.b, t.h, n])
        if side == 1:
            plgpu.copy_smem_to_gmem(t.later_s.at[0], t.drivals_start.at[t.b, t.h])
        plgpu.wait_smem_to_gmem(0)


class _Chunk:
    """A chunk in a warpgroup: x are the features whose gradients it makes, y those that they meet."""

    def __init__(self, launch: _Backward, t: Any, side: int, i: jax.Array):
        self.launch, self.device, self.rule, self.t, self.side = launch, launch.device, launch.rule, t, side
        self.at, self.n = t.slot(i), launch.chunks - 1 - i
        self.first = self.n * CHUNK
        self.zero = lax.min(i, t.zero[0])
        self.x_s, self.y_s = (t.q_s.at[self.at], t.k_s.at[self.at])[:: 1 - 2 * side]
        self.dx_s = (t.dq_s, t.dk_s)[side].at[self.at]
        self.numbers, self.vectors = t.numbers_s.at[self.at], t.vectors_s.at[self.at]
        self.behind, self.before = (t.dvectors_s.at[(i + n) & 1] for n in (0, 1))
        self.alpha_of_keys = t.alpha_s.at[i & 1]
        alphas = self.numbers.at[ALPHA], self.alpha_of_keys
        self.alpha, self.alpha_y = alphas[:: 1 - 2 * side]
        self.rho, self.rho_y = (self.numbers.at[n] for n in (TAKE, EMIT)[:: 1 - 2 * side])
        self.flow, self.flow_y = (t.flows_s.at[n + self.zero] for n in (side, 1 - side))
        self.tiles = [pl.ds(n * TILE, TILE) for n in range(launch.d // TILE)]

    def run(self, rivals: jax.Array) -> jax.Array:
        """The gradient of the competition's sum before the chunk, from that behind it."""
        t = self.t
        plgpu.barrier_wait(t.here.at[self.at])
        if self.side == 1:
            rivals = self.compete(rivals)
        self.meet()
        self.first_flow()
        self.meet()
        self.gradient()
        self.add()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()  # puts plain reads and writes before the copies that overwrite the chunk
        plgpu.barrier_arrive(t.free.at[self.at])
        return rivals

    def meet(self) -> None:
        """Both warpgroups see what the other wrote."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.t.met.at[0])
        plgpu.barrier_wait(self.t.met.at[0])

    def row(self, ref: Any) -> jax.Array:
        return self.device.load(ref, ROWS)

    def column(self, ref: Any) -> jax.Array:
        return by_column(self.device.load(ref, COLUMNS), _PAIRS)

    def limit(self, layout: Any) -> jax.Array:
        """First positions of documents, from the chunk's first."""
        return self.device.load(self.t.limits_s.at[self.at], layout) - self.first

    def last(self) -> jax.Array:
        """The limit of the document that goes on behind the chunk."""
        return self.t.limits_s[self.at, CHUNK - 1] - self.first

    def pairs(self, *, later: bool) -> jax.Array:
        """Whether y (columns) is of the document of x and x itself or before it, or, `later`, behind it."""
        row, column = (self.device.iota(_PAIRS, axis) for axis in (0, 1))
        seen = row <= column if later else row >= column
        if self.t.limits is not None and later:
            seen &= row >= by_column(self.limit(COLUMNS), _PAIRS)
        elif self.t.limits is not None:
            seen &= column >= by_row(self.limit(ROWS), _PAIRS)
        return seen

    def follows(self, x: jax.Array) -> jax.Array:
        """Rows, 0 where they do not follow what came before the chunk."""
        return x if self.t.limits is None else jnp.where(self.limit(ROWS) < 0, x, 0.0)

    def stays(self, x: jax.Array) -> jax.Array:
        """Rows, 0 where they are not of the document that goes on behind the chunk."""
        if self.t.limits is None:
            return x
        return jnp.where(self.limit(ROWS) == self.last(), x, 0.0)

    def compete(self, rivals: jax.Array) -> jax.Array:
        """alpha of keys, through the competition's sums."""
        t, number = self.t, lambda n: self.row(self.numbers.at[n])
        count = number(COUNT)
        spent = jnp.where(self.pairs(later=True), self.column(self.numbers.at[SPENT]), 0.0).sum(axis=1)
        later = spent + self.stays(count * 0.0 + rivals)
        alpha = (number(BASE) + number(RIVAL) * later) / jnp.maximum(count, 1.0)
        self.alpha_of_keys[...] = jnp.where(count > 0, alpha, 0.0)
        t.later_s.at[self.zero][...] = self.follows(later)
        plgpu.commit_smem()
        return t.later_s[0, 0]

    def sums(self, vector: Any) -> tuple[jax.Array, jax.Array]:
        """Of x over features, and `x . vector`; one tile is in registers."""
        own = met = None
        for tile in self.tiles:
            plgpu.commit_smem()  # no tile is loaded before it
            x = self.device.load(self.x_s.at[:, tile], LAYOUT).astype(jnp.float32)
            part = x.sum(axis=1)
            own = part if own is None else own + part
            part = (x * by_column(self.device.load(vector.at[tile], COLUMNS), x.shape)).sum(axis=1)
            met = part if met is None else met + part
        return own, met

    def first_flow(self) -> None:
        """f."""
        device, other = self.device, 2 * (1 - self.side)
        own, far = self.sums(self.behind.at[other + 1])
        kept = self.t.kept_s.at[self.side + self.zero]
        kept[...] = self.rule.epsilon * own
        self.flow[...] = self.stays(far)
        plgpu.commit_smem()
        pairs = product(device, self.x_s, self.y_s.T, _PAIRS) + by_row(self.row(kept), _PAIRS)
        near = jnp.where(self.pairs(later=True), pairs * self.column(self.alpha_y), 0.0).sum(axis=1)
        rho = self.row(self.rho)
        found = (near + self.row(self.flow)) * rho
        if self.side == 0:
            found += self.row(self.numbers.at[DELTA])
        self.flow[...] = -found * rho / jnp.maximum(self.row(self.numbers.at[COUNT]), 1.0)

    def gradient(self) -> None:
        """dx."""
        t, device, side, epsilon = self.t, self.device, self.side, self.rule.epsilon
        alpha, flow, rho = (self.row(x) for x in (self.alpha, self.flow, self.rho))
        later = by_row(rho, _PAIRS) * self.column(self.alpha_y) + self.column(self.flow_y)
        later = jnp.where(self.pairs(later=True), later, 0.0)
        t.kept_s.at[side + self.zero][...] = epsilon * (later.sum(axis=1) + alpha + flow)
        earlier = by_row(alpha, _PAIRS) * self.column(self.rho_y) + by_row(flow, _PAIRS)
        weights = (later + jnp.where(self.pairs(later=False), earlier, 0.0)).astype(self.launch.dtype)
        own, other = 2 * side, 2 * (1 - side)
        for tile in self.tiles:
            plgpu.commit_smem()
            dx = device.load(self.dx_s.at[:, tile], LAYOUT).astype(jnp.float32)
            dx += by_row(self.row(t.kept_s.at[side + self.zero]), dx.shape)
            terms = (
                (self.follows(self.row(self.flow)), self.vectors.at[own]),
                (self.follows(self.row(self.alpha)), self.vectors.at[own + 1]),
                (self.stays(self.row(self.flow) * 0.0 + 1.0), self.behind.at[other]),
                (self.stays(self.row(self.rho)), self.behind.at[other + 1]),
            )
            for row, vector in terms:
                dx += by_row(row, dx.shape) * by_column(device.load(vector.at[tile], COLUMNS), dx.shape)
            dx = added(device, dx, (weights, self.y_s.at[:, tile]))
            self.dx_s.at[:, tile][...] = dx.astype(self.launch.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.dx_s, t.out[side].at[t.b, pl.ds(self.first, CHUNK), t.h])

    def add(self) -> None:
        """The gradients of x's vectors before the chunk: a product for both, of a matrix that has f and alpha as two
        bfloat16 parts each in rows of its own."""
        t, device, launch, own = self.t, self.device, self.launch, 2 * self.side
        row, found, totals = device.iota(_PAIRS, 0), 0.0, []
        for n, ref in enumerate((self.flow, self.alpha)):
            weights = self.column(ref)
            if t.limits is not None:
                weights = jnp.where(by_column(self.limit(COLUMNS), _PAIRS) < 0, weights, 0.0)
            high = weights.astype(launch.dtype).astype(jnp.float32)
            part = jnp.where(row == 2 * n, high, jnp.where(row == 2 * n + 1, weights - high, 0.0))
            found = found + part
            t.kept_s.at[self.side + self.zero][...] = weights.sum(axis=1)
            plgpu.commit_smem()
            totals.append(self.rule.epsilon * t.kept_s[self.side, 0])
            plgpu.commit_smem()
        rows_s = t.rows_s.at[self.side + self.zero]
        rows_s[...] = found.astype(launch.dtype)
        plgpu.commit_smem()
        sums = product(device, self.x_s.T, rows_s.at[pl.ds(0, _PARTS)].T, (launch.d, _PARTS))
        column = device.iota(sums.shape, 1)
        carry = 1.0 if t.limits is None else jnp.where(self.last() < 0, 1.0, 0.0)
        for n, total in enumerate(totals):
            mine = (column == 2 * n) | (column == 2 * n + 1)
            new = jnp.where(mine, sums, 0.0).sum(axis=1) + total
            self.before.at[own + n][...] = device.load(self.behind.at[own + n], ROWS) * carry + new
