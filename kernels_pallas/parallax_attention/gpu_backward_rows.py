"""Gradients of queries and probes on Hopper, by blocks of rows. For shapes see `local_linear_attention.gpu_rows`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import hopper
from kernels_pallas.flash_attention import gpu_forward
from kernels_pallas.hopper import by_row
from kernels_pallas.local_linear_attention.gpu_rows import ROWS, R, Rows, W

NAME = "parallax_backward_rows"
_STAGES = 6  # tiles of keys and of values in flight


def _keys_of_tile(width: int) -> int:
    """So many that both sums and three scores of each pair fit into registers."""
    return 32 if width > 64 else 64


class _BackwardRows(Rows):
    """What a launch's code is made from."""

    @property
    def shape(self) -> tuple[int, int]:
        return R, _keys_of_tile(self.d)

    def scratch(self) -> dict[str, Any]:
        return self.memory(_STAGES, 3) | {name: self.of_rows(self.dtype) for name in ("do_s", "against_s")}

    def body(self, q, k, v, do, against, stats, starts, ends, tiles, dq, dprobe, **scratch: Any) -> None:
        rows = {"do": do, "against": against, "stats": stats}
        bounds = {"starts": starts, "ends": ends, "tiles": tiles}
        self.start(q=q, k=k, v=v, dq=dq, dprobe=dprobe, **rows, **bounds, **scratch)

    def fetched(self, t: Any) -> list[tuple[Any, Any]]:
        return [(t.q, t.qs), (t.do, t.do_s.at[t.wg]), (t.against, t.against_s.at[t.wg])]

    def passes(self, t: Any, n: jax.Array) -> jax.Array:
        return self.fill(t, n, (t.k, t.v))

    def work(self, t: Any) -> None:
        device = self.device
        start, slope, keep, delta = (
            device.load(t.stats.at[t.b, t.h, n, t.mine], hopper.ROWS, optimized=False) for n in range(4)
        )

        def step(j: jax.Array, slots: list[Any], sums: Any) -> Any:
            keys, values = slots
            factors = (slope, [(t.do_s, values)]), (keep, [(t.against_s, keys)])
            p, slopes, tilts = self.weights(t, j, keys, start, *factors)
            gradients = p * (slopes * tilts - by_row(delta, p.shape)), p * slopes
            of_logits, of_tilts = lax.optimization_barrier(tuple(x.astype(self.dtype) for x in gradients))

            def add(refs: Any) -> None:
                device.wgmma(refs[0], of_logits, keys)
                device.wgmma(refs[1], of_tilts, keys)

            return device.state(add)(tuple(device.start(x) for x in sums))

        zeros = device.zeros(R, self.d)
        _, (dq, dprobe) = self.sweep(t, jnp.int32(0), 2, step, (zeros, zeros))
        self.put_rows(t, dq * self.scale, t.qs, t.dq)
        self.put_rows(t, -dprobe, t.against_s.at[t.wg], t.dprobe)


def backward_rows(
    device: hopper.Device,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    against: jax.Array,
    stats: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """dq and dprobe. against: minus the probe; stats as in `local_linear_attention.gpu_backward`."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    launch = _BackwardRows(device, H // K, S, scale, D, q.dtype)
    run = device.kernel(
        NAME,
        launch.body,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 2,
        scratch_types=launch.scratch(),
        grid=(H, T // ROWS, B),
        grid_names=("h", "i", "b"),
        num_threads=W + 1,
        thread_name="wg",
    )
    tiles = None if bounds is None else gpu_forward.ranges(bounds, R, _keys_of_tile(D))
    return tuple(run(q, k, v, do, against, stats, *(bounds or (None, None)), tiles))
