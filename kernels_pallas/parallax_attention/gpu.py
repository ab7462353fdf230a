"""Parallax on Hopper: arrays as the kernels want them.

It is local linear attention whose solution is minus the probe, and its gradient that of no system: blocks of rows, the
ring and the gradients of keys and values are `local_linear_attention`'s.
"""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.flash_attention.call import LOG2E, NOTHING, Call
from kernels_pallas.flash_attention.gpu import padded
from kernels_pallas.flash_attention.tpu_forward import Output
from kernels_pallas.local_linear_attention import gpu_backward
from kernels_pallas.local_linear_attention.gpu import behind, prepared, unsupported
from kernels_pallas.local_linear_attention.gpu_backward import KEYS
from kernels_pallas.local_linear_attention.gpu_rows import ROWS
from kernels_pallas.parallax_attention import gpu_backward_rows, gpu_forward

__all__ = ["backward", "forward", "kernel_widths", "unsupported"]

_OP, _BACKWARD = "parallax_attention", "parallax_backward"


def kernel_widths(width: int, value_width: int) -> dict[str, int]:
    """By kernel, the widths of all its products over pairs of a row and a key, added up."""
    d, e = width, value_width
    return {gpu_forward.NAME: 2 * d + 2 * e, gpu_backward_rows.NAME: 4 * d + e, _BACKWARD: 4 * d + 2 * e}


def forward(call: Call, q, probe, k, v, bounds) -> Output:
    """See `gradient`."""
    T, e = q.shape[1], v.shape[3]
    device, width, bounds = prepared(_OP, call, q, k, v, bounds)
    q, probe, k, v = (padded(x, n, width) for x, n in ((q, ROWS), (probe, ROWS), (k, KEYS), (v, KEYS)))
    o, mean, lse2, mean_tilt = gpu_forward.forward(device, q, probe, k, v, bounds, scale=call.scale)
    return Output(o[:, :T, :, :e], lse2[..., :T], mean[:, :T, :, :e], mean_tilt[..., :T])


def backward(call: Call, q, probe, k, v, bounds, do, lse2, delta, mean_slope, keep):
    """See `gradient`."""
    (T, d), (S, e) = q.shape[1::2], v.shape[1::2]
    device, width, bounds = prepared(_OP, call, q, k, v, bounds)
    q, against, do = (padded(x, ROWS, width) for x in (q, -probe, do))
    k, v = (padded(x, KEYS, width) for x in (k, v))
    start = behind(lse2, NOTHING) * (-1 / (call.scale * LOG2E))
    stats = jnp.stack([start, *(behind(x, 0) for x in (-mean_slope, keep, delta))], 2)
    options = {"scale": call.scale}
    dq, dprobe = gpu_backward_rows.backward_rows(device, q, k, v, do, against, stats, bounds, **options)
    dk, dv = gpu_backward.backward(device, _BACKWARD, q, k, v, do, [against], [], stats, bounds, **options)
    return dq[:, :T, :, :d], dprobe[:, :T, :, :d], dk[:, :S, :, :d], dv[:, :S, :, :e]
