"""Conjugate gradients on Hopper, for a block's rows together.

An iteration is three products of a row with a key: the weight's, `t = k . y - mean . y`, and `sum p t k`. Residuals,
directions and queries stand in shared memory, solutions and mean keys, which a pass reads once, in global memory.

The tensor cores multiply bfloat16. Directions are rounded to it before anything is made of them, so that products with
them are exact and steps, residuals and solutions agree; weights times `t` go as two numbers, the second what the first
leaves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.hopper import LAYOUT, by_row
from kernels_pallas.local_linear_attention.gpu_rows import R, Rows, W, over_columns
from kernels_pallas.local_linear_attention.plan import Solver

_STAGES = 3


@dataclasses.dataclass(frozen=True)
class SolvingRows(Rows):
    """Rows whose systems are solved."""

    solver: Solver

    def scratch(self) -> dict[str, Any]:
        return self.memory(_STAGES, self.copied, 4) | {
            "y_s": self.of_rows(self.dtype),
            "other_s": self.of_rows(self.dtype),
            "r_s": self.of_rows(jnp.float32),
            "live_s": plgpu.SMEM((2, W, R), jnp.float32),
            "decided": hopper.barriers(1, W),
        }

    def compute(self, t: Any) -> None:
        t.ys, t.others, t.rs = (x.at[t.wg] for x in (t.y_s, t.other_s, t.r_s))
        super().compute(t)

    def iterations(self, t: Any, n: jax.Array) -> jax.Array:
        """Keys for each, of the warpgroup that copies; the next n."""

        def iterate(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            i, n, _ = carry
            n = self.fill(t, n, (t.k,))
            return i + 1, n, self.unfinished(t, i + 1)

        start = jnp.int32(0), n, self.unfinished(t, jnp.int32(0))
        return lax.while_loop(self.go, iterate, start)[1]

    def go(self, carry: tuple[jax.Array, ...]) -> jax.Array:
        """Whether there is another: the carry begins with how many there were, n, and whether any row is not done."""
        return (carry[0] < self.solver.iterations) & (carry[2] > 0)

    def solve(self, t: Any, n: jax.Array, b: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
        """Solves `(sum p (k - mean)(k - mean)^T + ridge) x = b`, x to `t.x`, the residual to `t.rs`.

        b [R, d]; the mean keys are in `t.mean`; `start` is what weights' exponents start at. A row is left as it is
        from the iteration on at which it is done; the loop is left when all rows of the block are.

        Returns n; of each row the square of the relative residual and the iterations that changed its solution; and
        those that ran.
        """
        device = self.device
        t.ridge_row = t.vector(t.ridge)
        first_square = over_columns(b * b)
        enough = first_square * self.solver.tolerance**2
        t.rs[...] = b
        t.x.at[t.b, t.h, t.mine][...] = device.zeros(R, self.d)
        centre = self.turn_to(t, b)
        busy = self.say(t, jnp.int32(0), first_square, enough)

        def iterate(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            i, n, _, square, count, centre = carry
            n, image = self.covariance(t, n, start, centre)
            square, count, centre = self.step(t, image, square, enough, count, centre)
            return i + 1, n, self.say(t, i + 1, square, enough), square, count, centre

        state = jnp.int32(0), n, busy, first_square, device.full(R, 0.0), centre
        i, n, _, square, count, _ = lax.while_loop(self.go, iterate, state)
        residual = square / jnp.where(first_square > 0, first_square, 1.0)
        return n, residual, count, device.full(R, 0.0) + i.astype(jnp.float32)

    def turn_to(self, t: Any, direction: jax.Array) -> jax.Array:
        """Makes it the direction, rounded; and `mean . y`."""
        y = direction.astype(self.dtype)
        t.ys[...] = y
        plgpu.commit_smem()
        return over_columns(self.wide(t, t.mean) * y.astype(jnp.float32))

    def covariance(self, t: Any, n: jax.Array, start: jax.Array, centre: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`sum p (k - mean)(k - mean)^T y` of the direction y, `centre = mean . y`."""

        def step(j: jax.Array, slots: list[Any], acc: jax.Array) -> jax.Array:
            (keys,) = slots
            p, around = self.weights(t, j, keys, start, (-centre, [(t.y_s, keys)]))
            return self.add_of_keys(acc, p * around, keys)

        return self.sweep(t, n, 1, step, self.device.zeros(R, self.d))

    def step(self, t: Any, image: jax.Array, square: Any, enough: Any, count: Any, centre: Any) -> tuple[Any, ...]:
        """One step along the direction, and the next direction."""
        load = lambda ref: self.device.load(ref, LAYOUT).astype(jnp.float32)
        over = lambda x: by_row(x, image.shape)
        y, residual = load(t.ys), load(t.rs)
        image = image + over(t.ridge_row) * y
        curvature = over_columns(y * image)
        # Rounding can make the curvature of a direction of almost no length zero or negative.
        live = (square > enough) & (curvature > 0)
        step = jnp.where(live, over_columns(residual * y) / jnp.where(live, curvature, 1.0), 0.0)
        x = t.x.at[t.b, t.h, t.mine]
        x[...] = self.wide(t, t.x) + over(step) * y
        residual = residual - over(step) * image
        t.rs[...] = residual
        new = over_columns(residual * residual)
        ratio = jnp.where(live, new / jnp.where(live, square, 1.0), 0.0)
        kept = jnp.where(live, 1.0, 0.0)
        # Of a row that is done the direction no longer matters: its step is 0.
        plgpu.commit_smem()  # the products of all warps that read the old direction are done
        centre = self.turn_to(t, over(kept) * residual + over(ratio) * y)
        return jnp.where(live, new, square), count + kept, centre

    def say(self, t: Any, i: jax.Array, square: jax.Array, enough: jax.Array) -> jax.Array:
        """Tells the block which rows are not done after i iterations; above 0 where any of the block's is not."""
        t.live_s.at[i & 1, t.wg][...] = jnp.where(square > enough, 1.0, 0.0)
        plgpu.barrier_arrive(t.decided)
        return self.unfinished(t, i)

    def unfinished(self, t: Any, i: jax.Array) -> jax.Array:
        """What all have said. There are two places, as a warpgroup may still read what was said before."""
        plgpu.barrier_wait(t.decided)
        return self.device.total([t.live_s.at[i & 1, w] for w in range(W)], R)
