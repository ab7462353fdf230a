"""Cross-entropy on TPU: the forward sums the hidden states' gradient, the backward the embedding's.

The gradient of a row is `scale sum_v p_v w_v + slope w_target`. Its factors are not known in the forward, so it sums
`others = sum_{v != target} p_v w_v` with the log-partition; the gradient is
`scale others + (scale p_target + slope) w_target`. The target stands apart because for likely ones the number before it
is a small difference, which must not be of rounded terms.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cross_entropy import tpu_backward, tpu_forward
from kernels_pallas.cross_entropy.plan import Plan

forward = tpu_forward.run


def backward(plan: Plan, hidden, kernel, targets, out: dict[str, Any], scale, slope) -> tuple[jax.Array, jax.Array]:
    """As `gradient` asks."""
    of_target = jnp.where(targets >= 0, scale * jnp.exp(out["logit"] - out["lse"]) + slope, 0)
    target = jnp.take(kernel, jnp.maximum(targets, 0), axis=1).T
    dhidden = scale[:, None] * out["others"] + of_target[:, None] * target
    dkernel = tpu_backward.run(plan, hidden, kernel, targets=targets, lse=out["lse"], scale=scale, slope=slope)
    return dhidden, dkernel
