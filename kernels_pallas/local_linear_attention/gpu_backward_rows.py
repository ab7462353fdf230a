"""The queries' gradient on Hopper, by blocks of rows. For shapes see `gpu_rows`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import hopper
from kernels_pallas.flash_attention import gpu_forward
from kernels_pallas.hopper import by_row
from kernels_pallas.local_linear_attention.gpu_rows import ROWS, N, R, Rows, W

NAME = "local_linear_backward_rows"
FACTORS = "do", "x", "x_rest", "u", "u_rest"  # of products with keys and values, beside q


class _BackwardRows(Rows):
    """What a launch's code is made from."""

    def scratch(self) -> dict[str, Any]:
        memory = {f"{name}_s": self.of_rows(self.dtype) for name in FACTORS}
        return self.memory(2, 1 + len(FACTORS)) | memory

    def body(self, q, k, v, do, x, x_rest, u, u_rest, wide_u, stats, starts, ends, tiles, dq, **scratch: Any) -> None:
        rows = {"do": do, "x": x, "x_rest": x_rest, "u": u, "u_rest": u_rest}
        bounds = {"starts": starts, "ends": ends, "tiles": tiles}
        self.start(q=q, k=k, v=v, wide_u=wide_u, stats=stats, dq=dq, **rows, **bounds, **scratch)

    def fetched(self, t: Any) -> list[tuple[Any, Any]]:
        return [(t.q, t.qs), *((getattr(t, name), getattr(t, f"{name}_s").at[t.wg]) for name in FACTORS)]

    def passes(self, t: Any, n: jax.Array) -> jax.Array:
        return self.fill(t, n, (t.k, t.v))

    def work(self, t: Any) -> None:
        device = self.device
        start, slope, tilt, centre = (
            device.load(t.stats.at[t.b, t.h, n, t.mine], hopper.ROWS, optimized=False) for n in range(4)
        )

        def step(j: jax.Array, slots: list[Any], acc: jax.Array) -> jax.Array:
            keys, values = slots
            of_slope = [(t.do_s, values), (t.u_s, keys), (t.u_rest_s, keys)]
            of_tilt = [(t.x_s, keys), (t.x_rest_s, keys)]
            p, slopes, tilts = self.weights(t, j, keys, start, (slope, of_slope), (tilt, of_tilt))
            dlogits = lax.optimization_barrier((p * (slopes * tilts - by_row(centre, p.shape))).astype(self.dtype))
            return device.state(lambda acc: device.wgmma(acc, dlogits, keys))(device.start(acc))

        _, acc = self.sweep(t, jnp.int32(0), 2, step, device.zeros(R, self.d))
        self.put_rows(t, acc * self.scale + self.wide(t, t.wide_u), t.qs, t.dq)


def backward_rows(
    device: hopper.Device,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    factors: list[jax.Array],
    u: jax.Array,
    stats: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
) -> jax.Array:
    """dq. factors: those that `FACTORS` names, as q. u [B, H, T, D], float32; stats as in `gpu_backward`."""
    (_, T, H, D), (S, K) = q.shape, k.shape[1:3]
    launch = _BackwardRows(device, H // K, S, scale, D, q.dtype)
    run = device.kernel(
        NAME,
        launch.body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=launch.scratch(),
        grid=(H, T // ROWS, q.shape[0]),
        grid_names=("h", "i", "b"),
        num_threads=W + 1,
        thread_name="wg",
    )
    tiles = None if bounds is None else gpu_forward.ranges(bounds, R, N)
    return run(q, k, v, *factors, u, stats, *(bounds or (None, None)), tiles)
