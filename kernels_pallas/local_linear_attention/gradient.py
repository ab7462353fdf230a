"""The gradient around the kernels, the same for every platform: of the exact solution, wrong by about the residuals.

A platform is a module with two functions, on arrays as the user gives them, q and do of rows that see nothing 0.

    forward(call, solver, q, ridge_BHT, k, v, bounds) -> Output
        x may lie as the backward wants it.
    backward(call, solver, q, ridge_BHT, k, v, bounds, do, x, lse2_BHT) -> Gradients
        dq [B, T, H, d], dk, dv as k and v are, dridge [B, H, T]. lse2 is `NOTHING` where a row sees nothing.
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.flash_attention.call import NOTHING, Call
from kernels_pallas.flash_attention.gradient import row_bounds, seen_by_any
from kernels_pallas.local_linear_attention import gpu, tpu
from kernels_pallas.local_linear_attention.plan import Solver

KERNELS: dict[str, types.ModuleType] = {"tpu": tpu, "cuda": gpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(call: Call, solver: Solver, q, ridge, k, v, starts, ends):
    """o, and of each row and head [B, T, H] the residual, its iterations and those of its tile."""
    return _attention_forward(call, solver, q, ridge, k, v, starts, ends)[0]


def _attention_forward(call: Call, solver: Solver, q, ridge, k, v, starts, ends):
    bounds, some = row_bounds(q, k, starts, ends)
    k, v = seen_by_any(call, bounds, k, v)
    if some is not None:  # rows that see nothing may hold anything
        q, ridge = jnp.where(some[..., None, None], q, 0), jnp.where(some[..., None], ridge, 1)
    ridge = ridge.swapaxes(1, 2)
    found = KERNELS[call.platform].forward(call, solver, q, ridge, k, v, bounds)
    lse2 = found.lse2 if some is None else jnp.where(some[:, None], found.lse2, NOTHING)
    o, x = (checkpoint_name(y, "attention_o") for y in (found.o, found.x))
    lse2 = checkpoint_name(lse2, "attention_lse")
    facts = (y.swapaxes(1, 2) for y in (found.residual, found.iterations, found.turns))
    return (o, *facts), (q, ridge, k, v, starts, ends, x, lse2)


def _attention_backward(call: Call, solver: Solver, residuals, cotangents):
    q, ridge, k, v, starts, ends, x, lse2 = residuals
    bounds, some = row_bounds(q, k, starts, ends)
    do = cotangents[0].astype(q.dtype)
    if some is not None:
        do = jnp.where(some[..., None, None], do, 0)
    found = KERNELS[call.platform].backward(call, solver, q, ridge, k, v, bounds, do, x, lse2)
    return found.dq, found.dridge.swapaxes(1, 2), found.dk, found.dv, None, None


attention.defvjp(_attention_forward, _attention_backward)
