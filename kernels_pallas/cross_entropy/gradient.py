"""The gradient around the kernels, on arrays as they want them: hidden [N, D], kernel [D, V] of any dtype, targets [N],
-1 where there is none.

The gradient of a row is `scale sum_v p_v w_v + slope w_target`, of cotangents `scale` of its log-partition and `slope`
of its target's logit. They alone are not known in the forward, so it sums `others = sum_{v != target} p_v w_v` with the
log-partition; the gradient is `scale others + (scale p_target + slope) w_target`. The target stands apart because for
likely ones the number before it is a small difference, which must not be of rounded terms.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.cross_entropy import tpu_backward, tpu_forward
from kernels_pallas.cross_entropy.plan import Plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def statistics(plan: Plan, hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-partitions and logits of targets, [N] float32."""
    out = tpu_forward.run(plan, hidden, kernel.astype(hidden.dtype), targets, save=False)
    return out["lse"], out["logit"]


def _forward(plan: Plan, hidden, kernel, targets):
    kernel = kernel.astype(hidden.dtype)
    out = tpu_forward.run(plan, hidden, kernel, targets, save=True)
    return (out["lse"], out["logit"]), (hidden, kernel, targets, out)


def _backward(plan: Plan, residuals, cotangents):
    hidden, kernel, targets, out = residuals
    scale, slope = cotangents
    of_target = jnp.where(targets >= 0, scale * jnp.exp(out["logit"] - out["lse"]) + slope, 0)
    target = jnp.take(kernel, jnp.maximum(targets, 0), axis=1).T
    dhidden = scale[:, None] * out["others"] + of_target[:, None] * target
    dkernel = tpu_backward.run(plan, hidden, kernel, targets=targets, lse=out["lse"], scale=scale, slope=slope)
    return dhidden.astype(hidden.dtype), dkernel, None


statistics.defvjp(_forward, _backward)
