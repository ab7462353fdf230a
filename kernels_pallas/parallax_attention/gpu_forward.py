"""The forward on Hopper, one pass: online softmax, with values summed twice, by weights and by tilted weights.

Tilts are taken from their mean over what a row has seen so far, which the accumulator of their product starts at, so
that bfloat16 does not lose what keys have in common. As that mean moves, the tilted sum moves along: it is
`sum p (tilt - mean) v` throughout. For shapes see `local_linear_attention.gpu_rows`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import hopper
from kernels_pallas.flash_attention import gpu_forward
from kernels_pallas.hopper import by_row
from kernels_pallas.local_linear_attention.gpu_rows import ROWS, N, R, Rows, W, over_columns

NAME = "parallax_forward"
_STAGES = 6  # tiles of keys and of values in flight
_LOWEST, _HIDDEN = -1e30, -3e38  # the first maximum of a row, in log2 units, and what a hidden score starts at


class _Forward(Rows):
    """What a launch's code is made from."""

    def scratch(self) -> dict[str, Any]:
        return self.memory(_STAGES, 2, 2) | {"probe_s": self.of_rows(self.dtype)}

    def body(self, q, probe, k, v, starts, ends, tiles, o, mean, lse, mean_tilt, **scratch: Any) -> None:
        bounds, out = {"starts": starts, "ends": ends, "tiles": tiles}, {"o": o, "mean": mean}
        self.start(q=q, probe=probe, k=k, v=v, lse=lse, mean_tilt=mean_tilt, **bounds, **out, **scratch)

    def fetched(self, t: Any) -> list[tuple[Any, Any]]:
        return [(t.q, t.qs), (t.probe, t.probe_s.at[t.wg])]

    def passes(self, t: Any, n: jax.Array) -> jax.Array:
        return self.fill(t, n, (t.k, t.v))

    def work(self, t: Any) -> None:
        device = self.device
        zeros, none = device.zeros(R, self.d), device.full(R, 0.0)
        state = zeros, zeros, device.full(R, _LOWEST), none, none
        step = lambda j, slots, carry: self.step(t, j, *slots, *carry)
        _, (acc, tilted, highest, total, tilt) = self.sweep(t, jnp.int32(0), 2, step, state)
        share = by_row(1.0 / (total + 1e-30), acc.shape)  # not 1e-38, which is subnormal: flushed to 0
        mean = acc * share
        self.put_rows(t, mean - tilted * share, t.qs, t.o)
        self.put_rows(t, mean, t.probe_s.at[t.wg], t.mean)
        self.give(t, [(highest + jnp.log2(total), t.lse), (tilt, t.mean_tilt)])

    def step(self, t: Any, j: jax.Array, keys: Any, values: Any, acc, tilted, highest, total, tilt) -> Any:
        """A tile: values by weights and by tilted weights, the largest logit, the sum of weights and the mean tilt."""
        device, shape = self.device, self.shape

        def products(refs: Any) -> None:
            s, tilts, *found = refs
            device.wgmma(s, self.own(t, t.q_s, j), keys.T)
            device.wgmma(tilts, self.own(t, t.probe_s, j), keys.T)
            step = gpu_forward.softmax_step(device.read(s, 1), None, highest, total, scale=self.scale, soft_cap=None)
            for ref, x in zip(found, lax.optimization_barrier(step), strict=True):
                ref[...] = x

        begin = self.hide(t, j, device.zeros(*shape), _HIDDEN)
        states = [device.start(x) for x in (begin, by_row(-tilt, shape))]
        states += [device.zeros(*shape), highest, total, highest]
        _, tilts, p, highest, total, decay = device.state(products)(states)
        change = over_columns(p * tilts) / (total + 1e-30)
        tilted = (tilted - acc * by_row(change, acc.shape)) * by_row(decay, acc.shape)
        acc = acc * by_row(decay, acc.shape)
        weights = (p, p * (tilts - by_row(change, shape)))
        plain, by_tilt = lax.optimization_barrier(tuple(x.astype(self.dtype) for x in weights))

        def sums(refs: Any) -> None:
            device.wgmma(refs[0], plain, values)
            device.wgmma(refs[1], by_tilt, values)

        acc, tilted = device.state(sums)((device.start(acc), device.start(tilted)))
        return acc, tilted, highest, total, tilt + change


def forward(
    device: hopper.Device,
    q: jax.Array,
    probe: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """o and the means of values [B, T, H, D]; log-sum-exps in log2 units and mean tilts [B, H, T], float32.

    q, probe, k, v: [B, T, H, D] and [B, S, K, D]; bounds: starts and ends [B or 1, T].
    """
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    launch = _Forward(device, H // K, S, scale, D, q.dtype)
    wide, number = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    run = device.kernel(
        NAME,
        launch.body,
        out_type=[wide, wide, number, number],
        scratch_types=launch.scratch(),
        grid=(H, T // ROWS, B),
        grid_names=("h", "i", "b"),
        num_threads=W + 1,
        thread_name="wg",
    )
    tiles = None if bounds is None else gpu_forward.ranges(bounds, R, N)
    return tuple(run(q, probe, k, v, *(bounds or (None, None)), tiles))
