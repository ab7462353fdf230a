"""The gradient around the kernels, on arrays as they want them: heads side by side, widths padded.

Arrays by name; B sequences, T positions, H heads, d and e padded widths of keys and values:
    q, k [B, T, H d], or [B, T, d] of all heads, u [B, T, H e].
    z [B, H, T] float32: a last column of the values, if there is one.
    logs [H], or [B, H, T], or of channels [B, T, H d]: decays in log2 units, float32.
    starts [B, T] int32, of documents; missing: all positions continue what came before.
    state [B, H, d, e], and of the last column sums [B, H, 1, d], float32: before the first position; missing: nothing.

Results: o [B, T, H e] and oz [B, H, T], and the states after the last position, state_end and sums_end.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from kernels_pallas.linear_recurrence import tpu_backward, tpu_forward
from kernels_pallas.linear_recurrence.plan import Plan

Arrays = dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(plan: Plan, arrays: Arrays) -> Arrays:
    """See the module."""
    return tpu_forward.run(plan, arrays, save=False)


def _recurrence_forward(plan: Plan, primals):
    arrays = {name: x.value for name, x in primals.items()}
    out = tpu_forward.run(plan, arrays, save=True)
    # Named as attention's, for remat policies that do not repeat attention.
    out = {name: x if name.endswith("_end") else checkpoint_name(x, "attention_o") for name, x in out.items()}
    saved = {name: out.pop(name) for name in list(out) if name.endswith("_saved")}
    wants_decay = primals["logs"].perturbed  # a constant's gradient would be thrown away, and the kernel cannot know
    return out, (dataclasses.replace(plan, wants_decay=wants_decay), arrays, saved)


def _recurrence_backward(plan: Plan, residuals, cotangents):
    plan, arrays, saved = residuals
    known = lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
    found = tpu_backward.run(plan, arrays, saved, {name: known(x) for name, x in cotangents.items()})
    gradients = {name: found[f"d{name}"] for name in ("q", "k", "u", "z") if name in arrays}
    gradients |= {name: found[f"d{name}_start"] for name in ("state", "sums") if name in arrays}
    gradients |= {"starts": None, "logs": None}
    if plan.wants_decay:
        dlogs = found["dlogs"] * math.log(2)  # for units of log2
        gradients["logs"] = dlogs.sum((0, 2)) if plan.constant else dlogs
    return ({name: gradients[name] for name in arrays},)


recurrence.defvjp(_recurrence_forward, _recurrence_backward, symbolic_zeros=True)
