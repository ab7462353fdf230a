"""The gradient around the kernels, the same for every platform, on arrays as its kernels want them: hidden [N, D],
kernel [D, V] of any dtype, targets [N], -1 where there is none.

A platform is a module with two functions; the kernel is in the dtype of hidden there.

    forward(plan, hidden, kernel, targets, save=) -> {"lse", "logit", ...}
        [N] float32, and with `save` what else the backward wants.
    backward(plan, hidden, kernel, targets, out, scale, slope) -> (dhidden, dkernel)
        `out` is what `forward` gave, `scale` and `slope` [N] are the cotangents of lse and logit: the gradient of a
        row's logits is `scale p`, and the target's `slope` more. dkernel is of the dtype `plan.gradient`.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import jax

from kernels_pallas.cross_entropy import gpu, tpu

KERNELS: dict[str, types.ModuleType] = {"tpu": tpu, "cuda": gpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def statistics(plan: Any, hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-partitions and logits of targets, [N] float32."""
    out = KERNELS[plan.platform].forward(plan, hidden, kernel.astype(hidden.dtype), targets, save=False)
    return out["lse"], out["logit"]


def _forward(plan: Any, hidden, kernel, targets):
    kernel = kernel.astype(hidden.dtype)
    out = KERNELS[plan.platform].forward(plan, hidden, kernel, targets, save=True)
    return (out["lse"], out["logit"]), (hidden, kernel, targets, out)


def _backward(plan: Any, residuals, cotangents):
    hidden, *rest = residuals
    dhidden, dkernel = KERNELS[plan.platform].backward(plan, hidden, *rest, *cotangents)
    return dhidden.astype(hidden.dtype), dkernel, None


statistics.defvjp(_forward, _backward)
