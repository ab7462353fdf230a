"""The gradient around the kernels, on arrays as they want them: heads side by side, widths and agents padded.

Arrays by name; B sequences, T positions, H heads, d and e padded widths of keys and values, rows the padded agents:
    q, k [B, T, H d], v [B, T, H e]; agents [B, H, rows, d], or [1, H, rows, d]; one dtype.
    starts [B, T] int32, of documents; missing: all positions continue what came before.
    log [B, H, 1, rows], values [B, H, rows, e], float32: averages before the first position, and the logarithms of
    their sums of weights in units of logits before they are scaled; missing: of nothing.

Results: o [B, T, H e], and log_end, values_end, as after the last position.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.agent_attention import tpu_backward, tpu_forward
from kernels_pallas.agent_attention.plan import AgentPlan

Arrays = dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rule(plan: AgentPlan, arrays: Arrays) -> Arrays:
    """See the module."""
    return tpu_forward.run(plan, arrays, save=False)


def _forward(plan: AgentPlan, arrays: Arrays):
    out = tpu_forward.run(plan, arrays, save=True)
    # Named as attention's, for remat policies that do not repeat attention.
    saved = {name: checkpoint_name(out.pop(name), "attention_o") for name in ("log_saved", "values_saved")}
    out["o"] = checkpoint_name(out["o"], "attention_o")
    return out, (arrays, saved, out["values_end"])


def _backward(plan: AgentPlan, residuals, cotangents):
    arrays, saved, end = residuals
    over_values = lambda x, y: jnp.sum(x * y, axis=-1)[:, :, None]
    dvalues = cotangents["values_end"]
    # Of the sums themselves, as the kernel has it, of a sum of weights that is 1; a larger logarithm is more of both.
    known = {"o": cotangents["o"], "values": dvalues}
    known["total"] = cotangents["log_end"] / plan.scale - over_values(dvalues, end)
    found = tpu_backward.run(plan, arrays, saved, known)
    gradients = {name: found[f"d{name}"] for name in "qkv"}
    agents = found["dagents"].sum(0, keepdims=True) if plan.shared else found["dagents"]
    gradients["agents"] = agents.astype(arrays["agents"].dtype)
    if plan.given:
        gradients["values"] = found["dvalues_start"]
        more = over_values(found["dvalues_start"], arrays["values"])
        gradients["log"] = plan.scale * (found["dtotal_start"] + more)
    return ({name: gradients.get(name) for name in arrays},)


rule.defvjp(_forward, _backward)
