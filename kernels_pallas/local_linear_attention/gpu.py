"""Local linear attention on Hopper: arrays as the kernels want them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import hopper
from kernels_pallas.flash_attention.call import LOG2E, NOTHING, Call
from kernels_pallas.flash_attention.gpu import padded, padded_bounds
from kernels_pallas.local_linear_attention import gpu_adjoint, gpu_backward, gpu_backward_rows, gpu_forward
from kernels_pallas.local_linear_attention import plan as plan_lib
from kernels_pallas.local_linear_attention.gpu_rows import ROWS
from kernels_pallas.local_linear_attention.plan import Gradients, Output, Solver

WIDEST = 128  # keys and values: sums and scores of a tile stand in registers
_KEYS = gpu_backward.KEYS


def unsupported(dtype: str, width: int) -> str | None:
    """Why the kernels cannot serve inputs of this type and heads so wide, keys or values, or None."""
    if dtype != "bfloat16":
        return f"on GPUs it computes bfloat16, not {dtype}"
    return f"on GPUs head widths are at most {WIDEST}, not {width}" if width > WIDEST else None


def kernel_widths(iterations: int, width: int, value_width: int) -> dict[str, int]:
    """As `plan.widths`, of Hopper's kernels: weights are made in every pass."""
    d, e = width, value_width
    return {
        plan_lib.FORWARD: (4 + 3 * iterations) * d + e,
        gpu_adjoint.NAME: (4 + 3 * iterations) * d + 2 * e,
        gpu_backward_rows.NAME: 4 * d + e,
        gpu_backward.NAME: 6 * d + 2 * e,
    }


def forward(call: Call, solver: Solver, q, ridge_BHT, k, v, bounds) -> Output:
    """See `gradient`; x is [B, H, T, width of the kernels]."""
    T, e = q.shape[1], v.shape[3]
    device, width, bounds = prepared("local_linear_attention", call, q, k, v, bounds)
    q, k, v, ridge = padded(q, ROWS, width), padded(k, _KEYS, width), padded(v, _KEYS, width), behind(ridge_BHT, 1)
    found = gpu_forward.forward(device, solver, q, k, v, ridge, bounds, scale=call.scale)
    numbers = (found[name][..., :T] for name in ("lse2", "residual", "iterations", "turns"))
    return Output(found["o"][:, :T, :, :e], found["x"][:, :, :T], *numbers)


def backward(call: Call, solver: Solver, q, ridge_BHT, k, v, bounds, do, x, lse2_BHT) -> Gradients:
    """See `gradient`."""
    (T, d), (S, e) = q.shape[1::2], v.shape[1::2]
    device, width, bounds = prepared("local_linear_attention", call, q, k, v, bounds)
    q, do, k, v = (padded(y, n, width) for y, n in ((q, ROWS), (do, ROWS), (k, _KEYS), (v, _KEYS)))
    ridge, lse2 = behind(ridge_BHT, 1), behind(lse2_BHT, NOTHING)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -T % ROWS), (0, 0)])
    options = {"scale": call.scale}
    found = gpu_adjoint.adjoint(device, solver, q, k, v, ridge, do, x, lse2, bounds, **options)
    factors = [do, *_pieces(x.swapaxes(1, 2)), *_pieces(-found["u"].swapaxes(1, 2))]
    start = lse2 * (-1 / (call.scale * LOG2E))
    stats = jnp.stack([start, found["slope"], found["tilt"], found["centre"]], 2)
    dq = gpu_backward_rows.backward_rows(device, q, k, v, factors, found["u"], stats, bounds, **options)
    x, u = factors[1:3], factors[3:]
    dk, dv = gpu_backward.backward(device, gpu_backward.NAME, q, k, v, do, x, u, stats, bounds, **options)
    return Gradients(dq[:, :T, :, :d], dk[:, :S, :, :d], dv[:, :S, :, :e], -found["along"][..., :T])


def prepared(op: str, call: Call, q, k, v, bounds) -> tuple[hopper.Device, int, Any]:
    """The primitives, the width of the kernels, and intervals of whole tiles; ValueError for what they cannot do."""
    widest = max(q.shape[3], v.shape[3])
    if reason := unsupported(str(q.dtype), widest):
        raise ValueError(f"{op} on cuda: {reason}")
    if not call.scale > 0:
        raise ValueError(f"{op} on cuda: scale={call.scale}; allowed: a number > 0")
    if call.blocks is not None:
        raise ValueError(f"{op} on cuda: blocks={call.blocks}; allowed: None")
    device = hopper.device_of(call.interpret)
    bounds = padded_bounds(bounds, q.shape[1], k.shape[1], ROWS, _KEYS)
    return device, 64 if widest <= 64 else 128, bounds


def behind(x_BHT: jax.Array, value: float) -> jax.Array:
    """Up to whole tiles of rows."""
    return jnp.pad(x_BHT, [(0, 0), (0, 0), (0, -x_BHT.shape[2] % ROWS)], constant_values=value)


def _pieces(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers in bfloat16 that add up to x, to twice its digits; XLA would take a cast and back for nothing."""
    first = lax.reduce_precision(x, 8, 7)
    return first.astype(jnp.bfloat16), (x - first).astype(jnp.bfloat16)
