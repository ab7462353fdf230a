"""The gradient around the kernels, on arrays as they want them: heads side by side, widths padded.

Arrays by name; B sequences, T positions, H heads, d and e padded widths of keys and values:
    q, k [B, T, H d], v [B, T, H e].
    logs [B, H, T], of channels [B, T, H d]: decays in log2 units; beta [B, H, T]; both float32.
    starts [B, T] int32, of documents; missing: all positions continue what came before.
    state [B, H, d, e] float32, before the first position; missing: nothing.
On Hopper (a plan of `gpu`) heads have an axis, q, k [B, T, H, d] and v [B, T, H, e], and no width is padded.

Results: o [B, T, H e], and state_end, the state after the last position.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from kernels_pallas.delta_rule import gpu, tpu_backward, tpu_forward
from kernels_pallas.linear_recurrence.plan import Plan

Arrays = dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rule(plan: Plan | gpu.Plan, arrays: Arrays) -> Arrays:
    """See the module."""
    return _run(plan)(plan, arrays, save=False)


def _run(plan: Plan | gpu.Plan):
    return gpu.forward if isinstance(plan, gpu.Plan) else tpu_forward.run


def _forward(plan: Plan | gpu.Plan, primals):
    arrays = {name: x.value for name, x in primals.items()}
    out = _run(plan)(plan, arrays, save=True)
    end = out.pop("state_end")
    # Named as attention's, for remat policies that do not repeat attention.
    saved = {name: checkpoint_name(x, "attention_o") for name, x in out.items()}
    o = saved.pop("o")
    plan = dataclasses.replace(plan, wants_decay=primals["logs"].perturbed)
    return {"o": o, "state_end": end}, (plan, arrays, saved)


def _backward(plan: Plan | gpu.Plan, residuals, cotangents):
    plan, arrays, saved = residuals
    known = lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
    run = gpu.backward if isinstance(plan, gpu.Plan) else tpu_backward.run
    found = run(plan, arrays, saved, {name: known(x) for name, x in cotangents.items()})
    gradients = {name: found.get(f"d{name}") for name in ("q", "k", "v", "beta", "starts")}
    gradients["state"] = found.get("dstate_start")
    gradients["logs"] = found["dlogs"] * math.log(2) if plan.wants_decay else None  # for units of log2
    return ({name: gradients[name] for name in arrays},)


rule.defvjp(_forward, _backward, symbolic_zeros=True)
