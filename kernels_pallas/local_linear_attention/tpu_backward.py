"""The backward on TPU: the weights again, the adjoint system solved with the forward's solver, and one pass for all
gradients.

With p the weights of a row, m their mean key, x the forward's solution, g the gradient of the output, c = g . v less
its mean, u = A^-1 sum p c k, t = (k - m) . x, s = (k - m) . u:

    d logit = p ((c - s)(1 + t) - mean)        d v = p (1 + t) g        d ridge = -u . x
    d q = scale sum (d logit) k + u            d k = scale (d logit) q + p (c - s) x - p (1 + t) u

The mean is `ridge u . x + x . r`, r what is left of the adjoint system.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.tpu_plan import Plan, Tiles
from kernels_pallas.local_linear_attention import plan as plan_lib
from kernels_pallas.local_linear_attention.plan import Gradients, Solver
from kernels_pallas.local_linear_attention.solver import (
    CENTRE,
    MEAN,
    SECOND_CENTRE,
    RowTile,
    over_rows,
    pieces,
    turn_keys,
)
from kernels_pallas.local_linear_attention.tpu_launch import Launch
from kernels_pallas.mosaic import product

SUMS = "dk_sum", "dv_sum"


class Backward(RowTile):
    """One tile of rows."""

    def run(self) -> None:
        r = self.refs
        self.begin()
        r["q_t"][...], r["do_t"][...] = r["q"][...].T, r["do"][...].T
        self.keep(MEAN, jnp.zeros((1, self.plan.blocks.rows), jnp.float32))
        self.each(self.weigh)
        r["residual"][...] = jnp.zeros_like(r["residual"])
        self.each(self.right_side)
        self.solve()
        x, u = r["x"][...], r["solution"][...]
        along = over_rows(u * x)
        r["dridge"][...] = -along
        mean = r["ridge"][...] * along + over_rows(x * r["residual"][...])
        self.gradients(x, u, mean)
        r["dq"][...] = (r["image"][...] + u).astype(r["dq"].dtype).T

    def weigh(self, tile, rows: slice) -> None:
        """Weights of a tile and their mean key, slopes and their mean."""
        r = self.refs
        mean, lse = self.number(MEAN, rows), r["lse"][:, rows]
        mean_key = r["mean"][:, rows]
        for keys in self.key_parts:
            p = jnp.exp2(self.logits(tile, keys, rows) - lse)
            slopes = product(r["v"][self.at(tile, keys), :], r["do_t"][:, rows], 1, 0)
            r["weights"][tile, keys, rows], r["slopes"][tile, keys, rows] = p, slopes
            mean += over_rows(p * slopes)
            mean_key += self.of_keys(tile, keys, p)
        self.keep(MEAN, mean, rows)
        r["mean"][:, rows] = mean_key

    def right_side(self, tile, rows: slice) -> None:
        """Slopes less their mean, and what they give of the adjoint system's right side."""
        r, mean = self.refs, self.number(MEAN, rows)

        def weights(keys: slice):
            slopes = r["slopes"][tile, keys, rows] - mean
            r["slopes"][tile, keys, rows] = slopes
            return r["weights"][tile, keys, rows] * slopes

        self.add_of_keys("residual", tile, rows, weights)

    def gradients(self, x, u, mean) -> None:
        """Of keys and values, added to their sums; `image` becomes that of q by way of logits."""
        r, dtype, scale = self.refs, self.refs["k"].dtype, self.plan.scale
        self.keep(CENTRE, over_rows(r["mean"][...] * x) - 1.0)
        self.keep(SECOND_CENTRE, over_rows(r["mean"][...] * u))
        vectors = {"fits": pieces(x, dtype), "second_fits": pieces(u, dtype)}
        x_low, u_low = x.astype(dtype), (-u).astype(dtype)

        def ask(tile, slot: int, keys: slice, rows: slice) -> None:
            for name, of in vectors.items():
                r[name][slot, keys, rows] = self.along(tile, keys, [y[:, rows] for y in of])

        def finish(tile, slot: int, keys: slice, rows: slice):
            p = r["weights"][tile, keys, rows]
            tilt = r["fits"][slot, keys, rows] - self.number(CENTRE, rows)
            against = r["second_fits"][slot, keys, rows] - self.number(SECOND_CENTRE, rows)
            slope = r["slopes"][tile, keys, rows] - against
            dlogits = ((p * scale) * (slope * tilt - mean[:, rows])).astype(dtype)
            slope, tilt = (p * slope).astype(dtype), (p * tilt).astype(dtype)
            dk = product(r["q_t"][:, rows], dlogits, 1, 1)
            dk += product(x_low[:, rows], slope, 1, 1) + product(u_low[:, rows], tilt, 1, 1)
            r["dk_sum"][tile, :, keys] += dk
            r["dv_sum"][tile, :, keys] += product(r["do_t"][:, rows], tilt, 1, 1)
            return product(r["k_t"][tile, :, keys], dlogits, 1, 0)

        self.sweep("image", ask, finish)


def _turned(plan: Plan, refs: dict[str, Any]) -> None:
    """What has been summed of keys and values, in their own order and dtype."""

    def turn(tile, carry):
        at = pl.ds(pl.multiple_of(tile * plan.blocks.keys, plan.blocks.keys), plan.blocks.keys)
        refs["dk"][at, :] = refs["dk_sum"][tile].T.astype(refs["dk"].dtype)
        refs["dv"][at, :] = refs["dv_sum"][tile].T.astype(refs["dv"].dtype)
        return carry

    lax.fori_loop(0, refs["dk_sum"].shape[0], turn, 0)


def _kernel(plan: Plan, solver: Solver, names: tuple[str, ...], tiles: Tiles, table, *refs) -> None:
    b, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    refs = dict(zip(names, refs, strict=True))

    @pl.when((g == 0) & (i == 0))
    def _():
        turn_keys(refs, {"k": "k_t"})
        for name in SUMS:
            refs[name][...] = jnp.zeros_like(refs[name])

    at = tiles.at(b, i)
    Backward(plan, solver, refs, tuple(table[at + n] for n in range(tiles.numbers))).run()
    pl.when((g == tiles.group - 1) & (i == tiles.count - 1))(lambda: _turned(plan, refs))


def run(
    plan: Plan,
    solver: Solver,
    q_BHTd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSe: jax.Array,
    ridge_BHT: jax.Array,
    do_BHTe: jax.Array,
    x_BHdT: jax.Array,
    lse2_BHT: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    vmem: int,
    interpret: Any,
) -> Gradients:
    """Of whole tiles; x and lse2 as the forward gives them. Rows that see nothing have q = do = x = 0."""
    launch = Launch(plan, solver, q_BHTd, k_BKSd, v_BKSe, ridge_BHT, bounds)
    slots, blocks, (B, H, T, d), (K, S, e) = launch.slots, plan.blocks, q_BHTd.shape, v_BKSe.shape[1:]
    dtype = q_BHTd.dtype
    slots.input("do", do_BHTe, launch.row(e))
    slots.input("x", x_BHdT, launch.column(d))
    slots.input("lse", lse2_BHT[:, :, None], launch.column(1))
    slots.output("dq", (B, H, T, d), dtype, launch.row(d))
    slots.output("dridge", (B, H, 1, T), jnp.float32, launch.column(1))
    for name, width in (("dk", d), ("dv", e)):
        slots.output(name, (B, K, S, width), dtype, launch.keys(S, width))
        slots.scratch(f"{name}_sum", (launch.key_tiles, width, blocks.keys), jnp.float32)
    slots.scratch("slopes", (launch.key_tiles, blocks.keys, blocks.rows), jnp.float32)
    slots.scratch("second_fits", (2, blocks.keys, blocks.rows), jnp.float32)
    slots.scratch("q_t", (d, blocks.rows), dtype)
    slots.scratch("do_t", (e, blocks.rows), dtype)
    wide = (2 * d + e) * dtype.itemsize + 4 * d
    found = launch.call(_kernel, plan_lib.BACKWARD, 3, wide, vmem=vmem, interpret=interpret)
    return Gradients(found["dq"], found["dk"], found["dv"], found["dridge"][:, :, 0])
