"""The forward on Hopper: statistics and mean keys in one pass, an iteration of conjugate gradients in one each, and the
output in one. For shapes see `gpu_rows`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.flash_attention import gpu_forward
from kernels_pallas.flash_attention.call import LOG2E, NOTHING
from kernels_pallas.hopper import LAYOUT, by_row
from kernels_pallas.local_linear_attention import plan as plan_lib
from kernels_pallas.local_linear_attention.gpu_rows import ROWS, N, R, W, over_columns, pieces
from kernels_pallas.local_linear_attention.gpu_solver import SolvingRows
from kernels_pallas.local_linear_attention.plan import Solver

FACTS = "lse2", "residual", "iterations", "turns"
_LOWEST, _HIDDEN = -1e30, -3e38  # the first maximum of a row, in log2 units, and a hidden score


class _Forward(SolvingRows):
    """What a launch's code is made from."""

    copied = 1

    def body(self, q, k, v, ridge, starts, ends, tiles, o, x, mean, *rest: Any, **scratch: Any) -> None:
        rows, facts = {"starts": starts, "ends": ends, "tiles": tiles}, dict(zip(FACTS, rest, strict=True))
        self.start(q=q, k=k, v=v, ridge=ridge, o=o, x=x, mean=mean, **rows, **facts, **scratch)

    def fetched(self, t: Any) -> list[tuple[Any, Any]]:
        return [(t.q, t.qs)]

    def passes(self, t: Any, n: jax.Array) -> jax.Array:
        return self.fill(t, self.iterations(t, self.fill(t, n, (t.k,))), (t.k, t.v))

    def work(self, t: Any) -> None:
        device = self.device
        state = device.zeros(R, self.d), device.full(R, _LOWEST), device.full(R, 0.0)
        n, (acc, highest, total) = self.sweep(t, jnp.int32(0), 1, lambda *a: self.statistics(t, *a), state)
        mean = acc * by_row(1.0 / (total + 1e-30), acc.shape)  # not 1e-38, which is subnormal: flushed to 0
        t.mean.at[t.b, t.h, t.mine][...] = mean
        lse, offset = highest + jnp.log2(total), device.load(t.qs, LAYOUT).astype(jnp.float32) - mean
        if t.masked:
            some = jnp.where(t.high > t.low, 1.0, 0.0)
            lse, offset = jnp.where(some > 0, lse, NOTHING), offset * by_row(some, offset.shape)
        start = lse * (-1 / (self.scale * LOG2E))
        n, residual, iterations, turns = self.solve(t, n, offset, start)
        self.output(t, n, start)
        self.give(t, [(lse, t.lse2), (residual, t.residual), (iterations, t.iterations), (turns, t.turns)])

    def statistics(self, t: Any, j: jax.Array, slots: list[Any], carry: Any) -> Any:
        """The largest score and the sum of exponentials so far, and keys times these."""
        (keys,), (acc, highest, total) = slots, carry

        def product(s: Any) -> jax.Array:
            self.device.wgmma(s, self.own(t, t.q_s, j), keys.T)
            return self.device.read(s)

        s = self.hide(t, j, self.device.scoped(product, self.shape), _HIDDEN)
        p, highest, total, decay = gpu_forward.softmax_step(
            s, None, highest, total, scale=self.scale, soft_cap=None, keep=None
        )
        return self.add_of_keys(acc * by_row(decay, acc.shape), p, keys), highest, total

    def output(self, t: Any, n: jax.Array, start: jax.Array) -> None:
        """Values by `p (1 + (k - mean) . x)`."""
        device = self.device
        x = self.wide(t, t.x)
        tilt = 1.0 - over_columns(self.wide(t, t.mean) * x)
        plgpu.commit_smem()  # the products of all warps that read the last direction are done
        t.ys[...], t.others[...] = pieces(x, self.dtype)
        plgpu.commit_smem()

        def step(j: jax.Array, slots: list[Any], acc: jax.Array) -> jax.Array:
            keys, values = slots
            p, tilts = self.weights(t, j, keys, start, (tilt, [(t.y_s, keys), (t.other_s, keys)]))
            weights = lax.optimization_barrier((p * tilts).astype(self.dtype))
            return device.state(lambda acc: device.wgmma(acc, weights, values))(device.start(acc))

        _, acc = self.sweep(t, n, 2, step, device.zeros(R, self.d))
        self.put_rows(t, acc, t.qs, t.o)


def forward(
    device: hopper.Device,
    solver: Solver,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ridge: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
) -> dict[str, jax.Array]:
    """o [B, T, H, D]; x [B, H, T, D], the solutions, float32; of each row [B, H, T], float32, what `FACTS`
    names (`plan.Output`). Rows that see nothing have q = 0.

    q, k, v: [B, T, H, D] and [B, S, K, D]; ridge [B, H, T] float32; bounds: starts and ends [B or 1, T].
    """
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    launch = _Forward(device, H // K, S, scale, D, q.dtype, solver)
    of = jax.ShapeDtypeStruct
    wide, number = of((B, H, T, D), jnp.float32), of((B, H, T), jnp.float32)
    run = device.kernel(
        plan_lib.FORWARD,
        launch.body,
        out_type=[of(q.shape, q.dtype), wide, wide, *[number] * 4],
        scratch_types=launch.scratch(),
        grid=(H, T // ROWS, B),
        grid_names=("h", "i", "b"),
        num_threads=W + 1,
        thread_name="wg",
    )
    tiles = None if bounds is None else gpu_forward.ranges(bounds, R, N)
    o, x, _, *numbers = run(q, k, v, ridge, *(bounds or (None, None)), tiles)
    found = {"o": o, "x": x} | dict(zip(FACTS, numbers, strict=True))
    return found | {"residual": jnp.sqrt(found["residual"])}  # a square: the kernels have no root
