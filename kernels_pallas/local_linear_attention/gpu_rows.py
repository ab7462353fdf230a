"""What Hopper's kernels of local linear attention and Parallax that own rows share: a ring of keys and values, weights.

Two warpgroups have 64 rows each, a third copies keys to them, again for every pass: weights of a tile against all keys
do not fit on chip, so that each pass makes them again, `exp2(q . k - lse)`.

Shapes: B sequences, T rows, H query heads, S keys, K key heads, D width of keys and values; R = 64 rows of a warpgroup,
N keys of a tile. T is a multiple of `ROWS`, S of N, D is 64 or 128.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.flash_attention import gpu_forward
from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.hopper import LAYOUT, by_row

W, R = gpu_forward.WARPGROUPS, 64
ROWS = W * R  # of a block of threads
N = 64  # keys of a tile: with twice as many, products of heads of 64 are serialized
HIDDEN = -1e30  # what the accumulator of a hidden score starts at: exp2 of it is 0, whatever the product adds


def over_columns(x: jax.Array) -> jax.Array:
    """Sum of each row."""
    return x.sum(axis=1)


def pieces(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Two numbers of a dtype that add up to x, to twice its digits."""
    first = x.astype(dtype)
    return first, (x - first.astype(jnp.float32)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a launch's code is made from; a kernel says `passes`, `fetched` and `work`."""

    device: hopper.Device
    group: int
    keys: int
    scale: float
    d: int
    dtype: Any

    @property
    def shape(self) -> tuple[int, int]:
        return R, N

    def memory(self, stages: int, copied: int, given: int = 0) -> dict[str, Any]:
        """Of the ring, where `copied` arrays of rows, `fetched`, have come, and for as many numbers a row to `give`."""
        return {
            "q_s": self.of_rows(self.dtype),
            "ring_s": self.tiles((stages, self.shape[1], self.d), self.dtype),
            "here": hopper.barriers(stages),
            "free": hopper.barriers(stages, W),
            "rows_here": hopper.barriers(W, copied),
        } | ({"numbers_s": plgpu.SMEM((W, given, R), jnp.float32)} if given else {})

    def of_rows(self, dtype: Any) -> Any:
        """Memory for vectors of a block's rows."""
        return self.tiles((W, R, self.d), dtype)

    def tiles(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Memory for operands of products, whose units are not wider than a tile has keys."""
        return hopper.tiles(shape, dtype, unit=2 * min(64, self.shape[1]))

    def start(self, **refs: Any) -> None:
        """Everything: `refs` are a kernel's operands and its shared memory."""
        h, i, b, wg = (lax.axis_index(name) for name in ("h", "i", "b", "wg"))
        t = types.SimpleNamespace(h=h, i=i, b=b, wg=wg, **refs)
        shared = lambda x: b if x is None or x.shape[0] > 1 else b & 0
        t.first, t.end, t.row, t.masked = 0, self.keys // self.shape[1], shared(t.starts), t.starts is not None
        if t.masked:
            t.i = i = t.tiles.shape[1] - 1 - i  # of a causal mask the longest first
            t.table = t.tiles.at[shared(t.tiles), i]
            t.first, t.end = t.table[0], t.table[1]
        t.count, t.stages = t.end - t.first, t.ring_s.shape[0]
        t.kh = lax.div(h, jnp.int32(self.group))
        pl.when(wg < W)(lambda: self.compute(t))
        pl.when(wg == W)(lambda: self.copy(t))

    # The third warpgroup.

    def copy(self, t: Any) -> None:
        """Fills the ring."""
        self.device.set_registers(hopper.REGISTERS[1], action="decrease")
        n = self.passes(t, jnp.int32(0))

        @pl.loop(lax.max(n - t.stages, 0), n)  # costs nothing; the interpreter wants every arrival seen
        def _(n: jax.Array) -> None:
            plgpu.barrier_wait(t.free.at[lax.rem(n, t.stages)])

    def fill(self, t: Any, n: jax.Array, arrays: tuple[Any, ...]) -> jax.Array:
        """Tiles of arrays in turn, the first of them the n-th of all; how many there have been behind them."""
        N = self.shape[1]

        @pl.loop(t.first, t.end)
        def _(j: jax.Array) -> None:
            for which, array in enumerate(arrays):
                own = n + (j - t.first) * len(arrays) + which
                at = lax.rem(own, t.stages)
                pl.when(own >= t.stages)(lambda at=at: plgpu.barrier_wait(t.free.at[at]))
                source = array.at[t.b, pl.ds(j * N, N), t.kh]
                plgpu.copy_gmem_to_smem(source, t.ring_s.at[at], t.here.at[at])

        return n + t.count * len(arrays)

    # A computing warpgroup.

    def compute(self, t: Any) -> None:
        device = self.device
        device.set_registers(hopper.REGISTERS[0], action="increase")
        t.mine = pl.ds((W * t.i + t.wg) * R, R)
        t.qs = t.q_s.at[t.wg]
        vector = lambda ref: device.load(ref, hopper.ROWS, optimized=False)
        t.vector = lambda array: vector(array.at[t.b, t.h, t.mine])
        if t.masked:
            t.low, t.high = vector(t.starts.at[t.row, t.mine]), vector(t.ends.at[t.row, t.mine])
            t.full, t.full_end = t.table[2 + 2 * t.wg], t.table[3 + 2 * t.wg]
        for source, target in self.fetched(t):
            plgpu.copy_gmem_to_smem(source.at[t.b, t.mine, t.h], target, t.rows_here.at[t.wg])
        plgpu.barrier_wait(t.rows_here.at[t.wg])
        self.work(t)

    def wide(self, t: Any, array: Any) -> jax.Array:
        """Vectors of the rows in global memory, [R, d]."""
        return self.device.load(array.at[t.b, t.h, t.mine], LAYOUT, optimized=False)

    def hide(self, t: Any, j: jax.Array, x: jax.Array, value: float) -> jax.Array:
        """x, [R, N], with a value where the row does not see the key."""
        if not t.masked:
            return x

        def hidden() -> jax.Array:
            column = self.device.iota(x.shape, 1)
            low, high = (by_row(bound - j * x.shape[1], x.shape) for bound in (t.low, t.high))
            return jnp.where((column >= low) & (column < high), x, value)

        return lax.cond((j < t.full) | (j >= t.full_end), hidden, lambda: x)

    def sweep(self, t: Any, n: jax.Array, each: int, step: Callable[..., Any], carry: Any) -> tuple[jax.Array, Any]:
        """`step(j, slots, carry)` for all tiles of keys, `each` arrays in the slots of the ring; and the next n."""

        def turn(j: jax.Array, carry: Any) -> Any:
            at = [lax.rem(n + (j - t.first) * each + which, t.stages) for which in range(each)]
            for slot in at:
                plgpu.barrier_wait(t.here.at[slot])
            carry = step(j, [t.ring_s.at[slot] for slot in at], carry)
            for slot in at:
                plgpu.barrier_arrive(t.free.at[slot])
            return carry

        return n + t.count * each, lax.fori_loop(t.first, t.end, turn, carry)

    def own(self, t: Any, memory: Any, j: jax.Array) -> Any:
        """The warpgroup's rows, for products of a loop's step j."""
        # The minimum is 0, which no compiler knows: it would keep every operand's address in registers otherwise.
        return memory.at[t.wg + lax.min(j, 0)]

    def weights(self, t: Any, j: jax.Array, keys: Any, start: jax.Array, *others: tuple[jax.Array, list[Any]]) -> Any:
        """Softmax weights of a tile, and other products with it.

        start: what their exponents start at, per row. others: for each what it starts at, per row, and its factors,
        memory of rows and a tile of keys or values.
        """
        device, c = self.device, self.scale * LOG2E

        def run(refs: Any) -> None:
            s, p, *accumulators = refs
            device.wgmma(s, self.own(t, t.q_s, j), keys.T)
            for accumulator, (_, factors) in zip(accumulators, others, strict=True):
                for a, b in factors:
                    device.wgmma(accumulator, self.own(t, a, j), b.T)
            count = sum(len(factors) for _, factors in others)
            p[...] = lax.optimization_barrier(jnp.exp2(device.read(s, count) * c))

        begin = self.hide(t, j, by_row(start, self.shape), HIDDEN)
        states = [device.start(by_row(x, self.shape)) for x, _ in others]
        _, p, *found = device.state(run)([device.start(begin), device.zeros(*self.shape), *states])
        return p, *found

    def add_of_keys(self, acc: jax.Array, weights: jax.Array, keys: Any) -> jax.Array:
        """`acc + weights keys`."""
        first, second = lax.optimization_barrier(pieces(weights, self.dtype))

        def run(acc: Any) -> None:
            self.device.wgmma(acc, first, keys)
            self.device.wgmma(acc, second, keys)

        return self.device.state(run)(self.device.start(acc))

    def put_rows(self, t: Any, x: jax.Array, memory: Any, array: Any) -> None:
        """Vectors of the rows to an array, by way of a warpgroup's memory of some, which no product reads any more."""
        plgpu.commit_smem()  # those of all warps are done
        memory[...] = x.astype(self.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, array.at[t.b, t.mine, t.h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def give(self, t: Any, found: list[tuple[jax.Array, Any]]) -> None:
        """Numbers of rows to arrays [B, H, T]."""
        for n, (x, _) in enumerate(found):
            t.numbers_s.at[t.wg, n][...] = x
        plgpu.commit_smem()
        for n, (_, array) in enumerate(found):
            plgpu.copy_smem_to_gmem(t.numbers_s.at[t.wg, n], array.at[t.b, t.h, t.mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
