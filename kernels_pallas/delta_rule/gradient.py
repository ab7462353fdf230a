"""The gradient around the kernels, on arrays as they want them: heads side by side, widths padded.

Arrays by name; B sequences, T positions, H heads, d and e padded widths of keys and values:
    q, k [B, T, H d], v [B, T, H e].
    logs [B, H, T], of channels [B, T, H d]: decays in log2 units; beta [B, H, T]; both float32.
    starts [B, T] int32, of documents; missing: all positions continue what came before.
    state [B, H, d, e] float32, before the first position; missing: nothing.

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

from kernels_pallas.delta_rule import tpu_backward, tpu_forward
from kernels_pallas.delta_rule.plan import DeltaPlan

Arrays = dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rule(plan: DeltaPlan, arrays: Arrays) -> Arrays:
    """See the module."""
    return tpu_forward.run(plan, arrays, save=False)


def _forward(plan: DeltaPlan, primals):
    arrays = {name: x.value for name, x in primals.items()}
    out = tpu_forward.run(plan, arrays, save=True)
    # Named as attention's, for remat policies that do not repeat attention.
    named = {name: checkpoint_name(out[name], "attention_o") for name in ("o", "state_saved", "inverse_saved")}
    saved = {name: named.pop(name) for name in ("state_saved", "inverse_saved")}
    plan = dataclasses.replace(plan, wants_decay=primals["logs"].perturbed)
    return {"o": named["o"], "state_end": out["state_end"]}, (plan, arrays, saved)


def _backward(plan: DeltaPlan, residuals, cotangents):
    plan, arrays, saved = residuals
    known = lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
    found = tpu_backward.run(plan, arrays, saved, {name: known(x) for name, x in cotangents.items()})
    gradients = {name: found.get(f"d{name}") for name in ("q", "k", "v", "beta", "starts")}
    gradients["state"] = found.get("dstate_start")
    gradients["logs"] = found["dlogs"] * math.log(2) if plan.wants_decay else None  # for units of log2
    return ({name: gradients[name] for name in arrays},)


rule.defvjp(_forward, _backward, symbolic_zeros=True)
