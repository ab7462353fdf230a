"""The adjoint systems on Hopper: `(sum p (k - mean)(k - mean)^T + ridge) u = sum p c k`, c the slopes of weights,
`do . v` less their mean. For shapes see `gpu_rows`, for what the gradients make of u `gpu_backward`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.flash_attention import gpu_forward
from kernels_pallas.flash_attention.call import LOG2E
from kernels_pallas.hopper import LAYOUT
from kernels_pallas.local_linear_attention.gpu_rows import ROWS, N, R, W, over_columns
from kernels_pallas.local_linear_attention.gpu_solver import SolvingRows
from kernels_pallas.local_linear_attention.plan import Solver

NAME = "local_linear_adjoint"


class _Adjoint(SolvingRows):
    """What a launch's code is made from. The solver's x is u here."""

    copied = 2

    def body(self, q, k, v, ridge, do, solution, lse, starts, ends, tiles, u, mean, tilt, slope, centre, along, **rest):
        self.start(
            q=q, k=k, v=v, ridge=ridge, do=do, solution=solution, lse=lse, starts=starts, ends=ends, tiles=tiles,
            x=u, mean=mean, tilt=tilt, slope=slope, centre=centre, along=along, **rest,
        )  # fmt: skip

    def fetched(self, t: Any) -> list[tuple[Any, Any]]:
        return [(t.q, t.qs), (t.do, t.others)]

    def passes(self, t: Any, n: jax.Array) -> jax.Array:
        for _ in range(2):
            n = self.fill(t, n, (t.k, t.v))
        return self.iterations(t, n)

    def work(self, t: Any) -> None:
        zeros, none = self.device.zeros(R, self.d), self.device.full(R, 0.0)
        start = t.vector(t.lse) * (-1 / (self.scale * LOG2E))

        def means(j: jax.Array, slots: list[Any], carry: Any) -> Any:
            (keys, values), (mean, mean_slope) = slots, carry
            p, slopes = self.weights(t, j, keys, start, (none, [(t.other_s, values)]))
            return self.add_of_keys(mean, p, keys), mean_slope + over_columns(p * slopes)

        n, (mean, mean_slope) = self.sweep(t, jnp.int32(0), 2, means, (zeros, none))
        t.mean.at[t.b, t.h, t.mine][...] = mean

        def right_side(j: jax.Array, slots: list[Any], acc: jax.Array) -> jax.Array:
            keys, values = slots
            p, slopes = self.weights(t, j, keys, start, (-mean_slope, [(t.other_s, values)]))
            return self.add_of_keys(acc, p * slopes, keys)

        n, b = self.sweep(t, n, 2, right_side, zeros)
        self.solve(t, n, b, start)
        u, x, mean = (self.wide(t, array) for array in (t.x, t.solution, t.mean))
        along = over_columns(u * x)
        # Of the logits' gradients, which are to add up to 0; the residual is what the solver has left.
        centre = t.ridge_row * along + over_columns(x * self.device.load(t.rs, LAYOUT))
        tilt, slope = 1.0 - over_columns(mean * x), over_columns(mean * u) - mean_slope
        self.give(t, [(tilt, t.tilt), (slope, t.slope), (centre, t.centre), (along, t.along)])


def adjoint(
    device: hopper.Device,
    solver: Solver,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ridge: jax.Array,
    do: jax.Array,
    x: jax.Array,
    lse2: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
) -> dict[str, jax.Array]:
    """u [B, H, T, D], float32, and of each row [B, H, T]: `tilt` and `slope`, what the products `x . k` and
    `do . v - u . k` start at to be weights' factors and slopes, `centre`, which logits' gradients lose, and `along`,
    u . x. The arguments are as in `gpu_forward`; rows that see nothing have q = do = x = 0."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    launch = _Adjoint(device, H // K, S, scale, D, q.dtype, solver)
    of = jax.ShapeDtypeStruct
    wide, number = of((B, H, T, D), jnp.float32), of((B, H, T), jnp.float32)
    run = device.kernel(
        NAME,
        launch.body,
        out_type=[wide, wide, *[number] * 4],
        scratch_types=launch.scratch(),
        grid=(H, T // ROWS, B),
        grid_names=("h", "i", "b"),
        num_threads=W + 1,
        thread_name="wg",
    )
    tiles = None if bounds is None else gpu_forward.ranges(bounds, R, N)
    u, _, *numbers = run(q, k, v, ridge, do, x, lse2, *(bounds or (None, None)), tiles)
    return {"u": u} | dict(zip(("tilt", "slope", "centre", "along"), numbers, strict=True))
