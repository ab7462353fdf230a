"""Local linear attention on TPU: arrays as the kernels want them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.flash_attention import tpu_arrays
from kernels_pallas.flash_attention.call import NOTHING, Call
from kernels_pallas.flash_attention.tpu_plan import Plan
from kernels_pallas.local_linear_attention import plan as plan_lib
from kernels_pallas.local_linear_attention import tpu_backward, tpu_forward
from kernels_pallas.local_linear_attention.plan import Blocks, Gradients, Output, Solver


def forward(call: Call, solver: Solver, q, ridge_BHT, k, v, bounds) -> Output:
    """As `tpu_forward.run`, but o [B, T, H, e]; arrays as the user gives them, q of rows that see nothing 0."""
    T, e = q.shape[1], v.shape[3]
    plan, q, k, v, bounds, behind = _whole(call, q, k, v, bounds)
    ridge = jnp.pad(ridge_BHT, behind, constant_values=1)
    found = tpu_forward.run(plan, solver, q, k, v, ridge, bounds, **_options(call))
    numbers = (x[:, :, :T] for x in found[2:])
    return Output(found.o[:, :, :T, :e].swapaxes(1, 2), found.x[..., :T], *numbers)


def backward(call: Call, solver: Solver, q, ridge_BHT, k, v, bounds, do, x_BHdT, lse2_BHT) -> Gradients:
    """dq [B, T, H, d], dk, dv as k and v are, dridge [B, H, T]; x as `forward` gives it."""
    (T, d), S, e = q.shape[1::2], k.shape[1], v.shape[3]
    plan, q, k, v, bounds, behind = _whole(call, q, k, v, bounds)
    do = tpu_arrays.heads(do, q.shape[2])
    x = jnp.pad(x_BHdT, (*behind[:2], (0, 0), behind[2]))
    ridge = jnp.pad(ridge_BHT, behind, constant_values=1)
    lse2 = jnp.pad(lse2_BHT, behind, constant_values=NOTHING)
    found = tpu_backward.run(plan, solver, q, k, v, ridge, do, x, lse2, bounds, **_options(call))
    back = lambda x, n, width: x[:, :, :n, :width].swapaxes(1, 2)
    return Gradients(back(found.dq, T, d), back(found.dk, S, d), back(found.dv, S, e), found.dridge[:, :, :T])


def _whole(call: Call, q, k, v, bounds):
    """The plan, arrays of whole tiles, and how numbers of rows are padded to them."""
    T, S = q.shape[1], k.shape[1]
    blocks = _blocks(call, q, k, v)
    rows, keys = tpu_arrays.rounded(T, blocks.rows), tpu_arrays.rounded(S, blocks.keys)
    bounds, low, high = tpu_arrays.padded_bounds(call, bounds, T, S, rows, keys)
    q = tpu_arrays.heads(q, rows)
    k, v = (tpu_arrays.heads(x, keys) for x in (k, v))
    plan = Plan.of(call, blocks, low, high, False)
    return plan, q, k, v, bounds, ((0, 0), (0, 0), (0, rows - T))


def _blocks(call: Call, q, k, v) -> Blocks:
    if call.blocks is not None:
        if not isinstance(call.blocks, Blocks):
            raise ValueError(f"blocks={call.blocks!r}; allowed: None or Blocks(...)")
        tuning.check(call.blocks)
        return call.blocks
    sizes = q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype.itemsize
    found = plan_lib.blocks(call.kind, *sizes)
    if found is None:
        most = plan_lib.most_keys(call.kind, 128, *sizes[2:])
        raise ValueError(f"local_linear_attention: {k.shape[1]} keys; allowed: {most}, for which fast memory has room")
    return found


def _options(call: Call) -> dict[str, Any]:
    return {"vmem": tuning.vmem_limit(call.kind), "interpret": call.interpret}
