"""Gradients of keys and values on Hopper: a block owns keys and goes through the rows that see them.

Scores are transposed, [keys, rows], so that weights are operands in registers. Of what `tpu_backward` says, x and u are
what `gpu_adjoint` found, in pieces that add up to them, and a row has as numbers what the accumulators of its scores,
slopes and tilts start at. The minus of u stands for u in all arrays of factors. Of Parallax x is minus the probe, and u
is 0, of no pieces.

Shapes: as in `gpu_rows`; M rows of a tile, 64 keys of a warpgroup, G = H / K.
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
from kernels_pallas.flash_attention import gpu_backward
from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.hopper import COLUMNS, by_column
from kernels_pallas.local_linear_attention.gpu_rows import HIDDEN

NAME = "local_linear_backward"
W, N = 2, 64  # warpgroups, and keys of each
KEYS = W * N
START, SLOPE, TILT, CENTRE = range(4)  # rows of `stats`


def rows_of_tile(width: int) -> int:
    """M, for heads padded to a width: so many that both sums and three scores of each pair fit into registers."""
    return 32 if width > 64 else 64


def backward(
    device: hopper.Device,
    name: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    x: list[jax.Array],
    u: list[jax.Array],
    stats: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """dk and dv, by a kernel of this name. do, and pieces of x and u: as q. stats: [B, H, 4, T] float32."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    launch = _Backward(device, H // K, T, scale, D, q.dtype, len(x), len(u))
    run = device.kernel(
        name,
        launch.body,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        scratch_types=launch.scratch(bounds is not None),
        grid=(S // KEYS, K, B),
        grid_names=("j", "h", "b"),
        num_threads=W,
        thread_name="wg",
    )
    tiles = intervals = None
    if bounds is not None:
        tiles = gpu_backward.row_ranges(bounds, gpu_backward.Blocks(rows_of_tile(D), KEYS), S)
        intervals = jnp.stack(bounds, 1)
    return run(k, v, stats, intervals, tiles, q, do, *x, *u)


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What a launch's code is made from."""

    device: hopper.Device
    group: int
    length: int
    scale: float
    d: int
    dtype: Any
    x_pieces: int
    u_pieces: int

    @property
    def factors(self) -> int:
        """Arrays of rows."""
        return 2 + self.x_pieces + self.u_pieces

    @property
    def rows(self) -> int:
        return rows_of_tile(self.d)

    def scratch(self, masked: bool) -> dict[str, Any]:
        M = self.rows
        tiles = lambda *shape: hopper.tiles(shape, self.dtype, unit=2 * M)
        return {
            "k_s": tiles(KEYS, self.d),
            "v_s": tiles(KEYS, self.d),
            "rows_s": tiles(2, self.factors, M, self.d),
            "stats_s": plgpu.SMEM((2, 4, M), jnp.float32),
            "intervals_s": plgpu.SMEM((2, 2, M), jnp.int32) if masked else None,
            "keys_here": hopper.barriers(W, 2),
            "rows_here": hopper.barriers(2, self.factors + 1 + masked),
            "meeting": hopper.barriers(1, W),
        }

    def body(self, k, v, stats, intervals, tiles, *rest: Any, **scratch: Any) -> None:
        *of_rows, dk, dv = rest
        j, h, b, wg = (lax.axis_index(name) for name in ("j", "h", "b", "wg"))
        shared = lambda x: b if x is None or x.shape[0] > 1 else b & 0
        t = types.SimpleNamespace(
            k=k, v=v, of_rows=of_rows, stats=stats, intervals=intervals, tiles=tiles, dk=dk,
            dv=dv, h=h, b=b, wg=wg, row=shared(intervals), first=0, end=self.length // self.rows,
            mine=pl.ds(j * KEYS + wg * N, N), first_key=j * KEYS + wg * N, **scratch,
        )  # fmt: skip
        if tiles is not None:
            t.first, t.end, t.full, t.full_end = (tiles[shared(tiles), j, n] for n in range(4))
        t.ks, t.vs = (x.at[pl.ds(wg * N, N)] for x in (t.k_s, t.v_s))
        self.compute(t)

    def slot(self, t: Any, g: Any, i: Any) -> jax.Array:
        """Which of two places tile i of the group's g-th head has: that of an even or an odd number of tiles before."""
        return (g * (t.end - t.first) + i - t.first) & 1

    def fetch(self, t: Any, g: Any, i: Any) -> None:
        """Copies tile i of the group's g-th head, with its numbers and intervals."""
        at, head, rows = self.slot(t, g, i), t.h * self.group + g, pl.ds(i * self.rows, self.rows)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, t.rows_here.at[at])
        for n, array in enumerate(t.of_rows):
            copy(array.at[t.b, rows, head], t.rows_s.at[at, n])
        copy(t.stats.at[t.b, head, :, rows], t.stats_s.at[at])
        if t.intervals is not None:
            copy(t.intervals.at[t.row, :, rows], t.intervals_s.at[at])

    def compute(self, t: Any) -> None:
        """A warpgroup."""
        for source, target in ((t.k, t.ks), (t.v, t.vs)):
            plgpu.copy_gmem_to_smem(source.at[t.b, t.mine, t.h], target, t.keys_here.at[t.wg])
        pl.when((t.wg == 0) & (t.end > t.first))(lambda: self.fetch(t, jnp.int32(0), t.first))
        plgpu.barrier_wait(t.keys_here.at[t.wg])
        carry = self.device.zeros(N, self.d), self.device.zeros(N, self.d)
        head = lambda g, carry: lax.fori_loop(t.first, t.end, lambda i, c: self.step(t, g, i, *c), carry)
        grads = lax.fori_loop(0, self.group, head, carry)
        plgpu.commit_smem()  # the products of all warps that read keys and values are done
        for grad, memory, target in zip(grads, (t.ks, t.vs), (t.dk, t.dv), strict=True):
            memory[...] = grad.astype(self.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(memory, target.at[t.b, t.mine, t.h])
        plgpu.wait_smem_to_gmem(0)

    def step(self, t: Any, g: jax.Array, i: jax.Array, dk: jax.Array, dv: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a tile of rows adds."""
        device, at = self.device, self.slot(t, g, i)
        plgpu.barrier_arrive(t.meeting)
        plgpu.barrier_wait(t.meeting)  # both are done with the tile before: the next may take its place
        last = (i + 1 == t.end).astype(jnp.int32)
        following = lambda: self.fetch(t, g + last, i + 1 - last * (t.end - t.first))
        pl.when((t.wg == 0) & (g + last < self.group))(following)
        plgpu.barrier_wait(t.rows_here.at[at])
        q, do, *rest = (t.rows_s.at[at, n] for n in range(self.factors))
        x, u = rest[: self.x_pieces], rest[self.x_pieces :]
        of_logits, of_slopes, of_tilts = self.weights(t, i, at, q, do, x, u)

        def sums(refs: Any) -> None:
            dk, dv = refs
            device.wgmma(dv, of_tilts, do)
            device.wgmma(dk, of_logits, q)
            device.wgmma(dk, of_slopes, x[0])
            if u:
                device.wgmma(dk, of_tilts, u[0])

        found = device.state(sums)((device.start(dk), device.start(dv)))
        plgpu.commit_smem()  # orders the plain reads of numbers and intervals before the next copy over them
        return found

    def weights(self, t: Any, i: Any, at: Any, q: Any, do: Any, x: list[Any], u: list[Any]) -> Any:
        """What the rows' queries, x and -u, and gradients are multiplied with: [keys, rows], rounded."""
        device, shape = self.device, (N, self.rows)
        number = lambda n: by_column(device.load(t.stats_s.at[at, n], COLUMNS), shape)
        start = number(START)
        if t.intervals is not None:

            def hidden() -> jax.Array:
                key = device.iota(shape, 0)
                load = lambda x: device.load(t.intervals_s.at[at, x], COLUMNS)
                low, high = (by_column(load(x) - t.first_key, shape) for x in (0, 1))
                return jnp.where((key >= low) & (key < high), start, HIDDEN)

            start = lax.cond((i < t.full) | (i >= t.full_end), hidden, lambda: start)

        def products(refs: Any) -> None:
            s, slope, tilt, p = refs
            device.wgmma(s, t.ks, q.T)
            device.wgmma(slope, t.vs, do.T)
            for y in u:
                device.wgmma(slope, t.ks, y.T)
            for y in x:
                device.wgmma(tilt, t.ks, y.T)
            p[...] = lax.optimization_barrier(jnp.exp2(device.read(s, self.factors - 1) * (self.scale * LOG2E)))

        states = [device.start(y) for y in (start, number(SLOPE), number(TILT))]
        _, slope, tilt, p = device.state(products)([*states, device.zeros(*shape)])
        dlogits = (p * self.scale) * (slope * tilt - number(CENTRE))
        return lax.optimization_barrier(tuple(y.astype(self.dtype) for y in (dlogits, p * slope, p * tilt)))
