"""Tiles of logits for Hopper: two warpgroups compute 64 rows each, a third copies to them; what a tile says is all that
leaves the chip.

`value`: of each row the log-partition and the target's logit. `slopes`: the gradient of the logits of a chunk of
columns, rounded, which XLA multiplies with rows and columns. On TPU a tile's is multiplied on chip; here the sums, rows
by width, do not fit into registers.

Shapes: N rows, a multiple of `ROWS`; D width, a multiple of `DEPTH`; V columns, a multiple of `COLUMNS`.
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
from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.hopper import by_row

VALUE, SLOPES = "cross_entropy_value", "cross_entropy_slopes"
W, R = 2, 64  # warpgroups that compute, and the rows of each
ROWS, COLUMNS, DEPTH = W * R, 256, 64  # of a tile of logits; of the width, what is in one slot of the ring
_HIDDEN = -1e30  # what the logit of a column that there is not starts at
_BLOCKS = 4 * 132  # blocks of threads that a launch should have: some for each of a GPU's processors
_PART = 64  # columns whose slopes are made at once
_MOST = 8  # tiles of columns of a block, at most


def value(
    device: hopper.Device, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, columns: int
) -> tuple[jax.Array, jax.Array]:
    """lse and logit [N]; `columns` of the kernel are columns of the vocabulary, the others padding."""
    launch = _Tiles.of(device, hidden, kernel, kernel.shape[1], columns, slopes=False)
    out = [jax.ShapeDtypeStruct((launch.spans, hidden.shape[0]), jnp.float32)] * 3
    peak, total, logit = launch.run(VALUE, out, hidden, kernel, jnp.zeros((1,), jnp.int32), targets)
    top = peak.max(0)
    total = (total * jnp.exp2(peak - top)).sum(0)
    return (top + jnp.log2(total)) / LOG2E, logit.sum(0)


def slopes(
    device: hopper.Device,
    hidden: jax.Array,
    kernel: jax.Array,
    first: jax.Array,
    chunk: int,
    columns: int,
    *,
    targets: jax.Array,
    lse: jax.Array,
    scale: jax.Array,
    slope: jax.Array,
) -> jax.Array:
    """`scale_n p_n`, the target's column `slope_n` more, [N, chunk] in the dtype of hidden, from column `first` on.

    chunk: a multiple of `COLUMNS`. first: int32, a multiple of `COLUMNS`. targets, lse, scale, slope: [N].
    """
    launch = _Tiles.of(device, hidden, kernel, chunk, columns, slopes=True)
    out = [jax.ShapeDtypeStruct((hidden.shape[0], chunk), hidden.dtype)]
    rows = targets, lse * LOG2E, scale, slope
    return launch.run(SLOPES, out, hidden, kernel, first.reshape(1), *rows)[0]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What a launch's code is made from.

    Attributes:
      tiles: of columns, and how many of them a block of threads goes through.
      columns: of the vocabulary; `padded`: whether the kernel has more.
      depth: slots' worth of the width.
    """

    device: hopper.Device
    tiles: int
    each: int
    columns: int
    padded: bool
    depth: int
    dtype: Any
    stages: int
    slopes: bool

    @classmethod
    def of(
        cls, device: hopper.Device, hidden: jax.Array, kernel: jax.Array, chunk: int, columns: int, *, slopes: bool
    ) -> _Tiles:
        """For `chunk` columns of the kernel."""
        (N, D), tiles = hidden.shape, chunk // COLUMNS
        each = max(1, min(_MOST, N // ROWS * tiles // _BLOCKS))
        padded = kernel.shape[1] > columns
        return cls(device, tiles, each, columns, padded, D // DEPTH, hidden.dtype, 3 if slopes else 4, slopes)

    @property
    def spans(self) -> int:
        """Blocks of threads beside each other."""
        return -(-self.tiles // self.each)

    def run(self, name: str, out: list[Any], hidden: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        return self.device.kernel(
            name,
            self.body,
            out_type=out,
            scratch_types=self.scratch(),
            grid=(self.spans, hidden.shape[0] // ROWS),  # neighbours share rows, and rows' neighbours columns
            grid_names=("j", "i"),
            num_threads=W + 1,
            thread_name="wg",
        )(hidden, *arrays)

    def scratch(self) -> dict[str, Any]:
        return {
            "h_s": hopper.tiles((self.stages, W, R, DEPTH), self.dtype),
            "k_s": hopper.tiles((self.stages, DEPTH, COLUMNS), self.dtype),
            "out_s": hopper.tiles((W, R, COLUMNS), self.dtype) if self.slopes else plgpu.SMEM((W, 3, R), jnp.float32),
            "here": hopper.barriers(self.stages, W + 1),
            "free": hopper.barriers(self.stages, W),
        }

    def body(self, hidden, kernel, first, targets, *rest: Any, **scratch: Any) -> None:
        rows, out = (rest[:3], rest[3:]) if self.slopes else ((), rest)
        i, j, wg = (lax.axis_index(name) for name in ("i", "j", "wg"))
        t = types.SimpleNamespace(
            hidden=hidden, kernel=kernel, targets=targets, rows=rows, out=out, i=i, j=j, wg=wg,
            count=lax.min(jnp.int32(self.each), self.tiles - j * self.each), tile=j * self.each,
            column=first[0] + j * (self.each * COLUMNS), **scratch,
        )  # fmt: skip
        pl.when(wg < W)(lambda: self.compute(t))
        pl.when(wg == W)(lambda: self.copy(t))

    def copy(self, t: Any) -> None:
        """The third warpgroup: fills the ring."""
        self.device.set_registers(hopper.REGISTERS[1], action="decrease")
        count = t.count * self.depth

        @pl.loop(0, count)
        def _(n: jax.Array) -> None:
            at, depth = lax.rem(n, self.stages), pl.ds(lax.rem(n, self.depth) * DEPTH, DEPTH)
            pl.when(n >= self.stages)(lambda: plgpu.barrier_wait(t.free.at[at]))
            for w in range(W):
                rows = pl.ds((t.i * W + w) * R, R)
                plgpu.copy_gmem_to_smem(t.hidden.at[rows, depth], t.h_s.at[at, w], t.here.at[at])
            columns = pl.ds(t.column + lax.div(n, self.depth) * COLUMNS, COLUMNS)
            plgpu.copy_gmem_to_smem(t.kernel.at[depth, columns], t.k_s.at[at], t.here.at[at])

        @pl.loop(lax.max(count - self.stages, 0), count)  # costs nothing; the interpreter wants every arrival seen
        def _(n: jax.Array) -> None:
            plgpu.barrier_wait(t.free.at[lax.rem(n, self.stages)])

    def compute(self, t: Any) -> None:
        """A computing warpgroup."""
        device = self.device
        device.set_registers(hopper.REGISTERS[0], action="increase")
        t.mine = pl.ds((t.i * W + t.wg) * R, R)
        vector = lambda ref: device.load(ref.at[t.mine], hopper.ROWS, optimized=False)
        t.target, t.numbers = vector(t.targets), [vector(ref) for ref in t.rows]
        if self.slopes:
            pl.loop(0, t.count)(lambda c: self.store_slopes(t, c, self.logits(t, c)))
        else:
            start = device.full(R, _HIDDEN), device.full(R, 0.0), device.full(R, 0.0)
            found = lax.fori_loop(0, t.count, lambda c, sums: self.summed(t, c, self.logits(t, c), *sums), start)
            for n, x in enumerate(found):
                t.out_s.at[t.wg, n][...] = x
            plgpu.commit_smem()
            for n, out in enumerate(t.out):
                plgpu.copy_smem_to_gmem(t.out_s.at[t.wg, n], out.at[t.j, t.mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def column(self, t: Any, c: jax.Array) -> jax.Array:
        """The first of the vocabulary of a tile."""
        return t.column + c * COLUMNS

    def logits(self, t: Any, c: jax.Array) -> jax.Array:
        """Of the block's c-th tile of columns."""
        device, shape = self.device, (R, COLUMNS)

        def hidden() -> jax.Array:
            return jnp.where(device.iota(shape, 1) < self.columns - self.column(t, c), 0.0, _HIDDEN)

        def step(k: jax.Array, acc: jax.Array) -> jax.Array:
            at = lax.rem(c * self.depth + k, self.stages)
            plgpu.barrier_wait(t.here.at[at])
            product = lambda acc: device.wgmma(acc, t.h_s.at[at, t.wg], t.k_s.at[at])
            acc = device.state(product)(device.start(acc))
            plgpu.barrier_arrive(t.free.at[at])
            return acc

        none = device.zeros(*shape)
        if self.padded and not self.slopes:
            none = lax.cond(self.column(t, c) + COLUMNS > self.columns, hidden, lambda: none)
        return lax.fori_loop(0, self.depth, step, none)

    def of_target(self, t: Any, c: jax.Array, part: int, width: int) -> jax.Array:
        """Which logits of a part of the columns are the rows' targets'."""
        shape = R, width
        return self.device.iota(shape, 1) == by_row(t.target - (self.column(t, c) + part), shape)

    def summed(self, t: Any, c: jax.Array, s: jax.Array, peak: Any, total: Any, logit: Any) -> Any:
        """Sums over columns, a tile more."""
        new = jnp.maximum(peak, s.max(axis=1) * LOG2E)
        p = jnp.exp2(s * LOG2E - by_row(new, s.shape))
        total = total * jnp.exp2(peak - new) + p.sum(axis=1)
        return new, total, logit + jnp.where(self.of_target(t, c, 0, COLUMNS), s, 0.0).sum(axis=1)

    def store_slopes(self, t: Any, c: jax.Array, s: jax.Array) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out = t.out_s.at[t.wg]
        for part in range(0, COLUMNS, _PART):  # all at once do not fit into registers beside the logits
            own = s[:, part : part + _PART]
            lse, scale, slope = (by_row(x, own.shape) for x in t.numbers)
            logs = own * LOG2E - lse
            if self.padded:  # what is there is multiplied with zeros, or left out; it must be finite
                logs = jnp.minimum(logs, 0.0)
            found = jnp.exp2(logs) * scale
            found += jnp.where(self.of_target(t, c, part, _PART), slope, 0.0)
            out.at[:, pl.ds(part, _PART)][...] = found.astype(self.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, t.out[0].at[t.mine, pl.ds((t.tile + c) * COLUMNS, COLUMNS)])
