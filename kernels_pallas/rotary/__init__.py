"""RMS-norm of heads and rotary embedding of queries or keys in one pass over them, on TPU.

Sources: Su et al. 2021, RoFormer (arXiv:2104.09864), eq. 15 and 34; Zhang and Sennrich 2019, Root Mean Square Layer
Normalization (arXiv:1910.07467), eq. 4.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.rotary import tpu
from kernels_pallas.rotary.plan import Plan, rows_of

__all__ = ["rotary", "rows_of", "unsupported"]


def rotary(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    scale: jax.Array | None = None,
    epsilon: float = 0.0,
    interpret: Any = False,
) -> jax.Array:
    """`y = x / sqrt(mean(x^2) + epsilon) * scale` of each head, its pairs (i, i + r) turned: (a, b) becomes
    (a cos - b sin, a sin + b cos).

    Args:
      x: queries or keys [B, T, H, d], bfloat16 or float32; d a multiple of 128. Any B, T and H.
      cos, sin: float32 [B, T, r], of the angles of pairs, r at most d / 2; channels from 2 r on are not turned.
      scale: [d]; None: there is no norm.
      epsilon: added to the mean square.
      interpret: runs the kernels as plain XLA operations on any platform, or, on a CPU, as its interpreter's parameters
        say (`jax.experimental.pallas.tpu.InterpretParams`).

    Returns:
      An array like x. Differentiable (reverse mode) in x and scale. All is computed in float32, and rounded once.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    _check(x, cos, sin, scale)
    B, T, H, d = x.shape
    kind = tuning.kind()
    rows = rows_of(T, H, d, x.dtype.itemsize, kind)
    width = 2 * cos.shape[2]
    plan = Plan((B, T, H, d), width, scale is not None, epsilon, rows, kind, interpret)
    table = jnp.pad(jnp.concatenate([cos, sin], axis=-1), ((0, 0), (0, 0), (0, d - width)))
    out = _rotated(plan, x.swapaxes(1, 2), table, None if scale is None else scale.astype(jnp.float32))
    return out.swapaxes(1, 2)


def unsupported(dtype: str, heads: int, width: int, kind: str) -> str | None:
    """Why the kernels cannot serve heads so many and so wide on devices of a kind, or None."""
    if dtype not in ("bfloat16", "float32"):
        return f"it computes bfloat16 and float32, not {dtype}"
    if width % tuning.LANES:
        return f"heads are {width} wide; allowed: a multiple of {tuning.LANES}"
    if rows_of(1, heads, width, jnp.dtype(dtype).itemsize, kind) is None:
        return f"positions of {heads} heads of {width} do not fit into fast memory"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotated(plan: Plan, x: jax.Array, table: jax.Array, scale: jax.Array | None) -> jax.Array:
    """x [B, H, T, d]."""
    return tpu.forward(plan, x, table, scale)


def _forward(plan: Plan, x, table, scale):
    return tpu.forward(plan, x, table, scale), (x if plan.norm else None, table, scale)


def _backward(plan: Plan, saved, g):
    x, table, scale = saved
    if not plan.norm:
        return tpu.forward(plan, g, table, None, back=True), None, None
    dx, dscale = tpu.backward(plan, x, g, table, scale)
    return dx, None, dscale


_rotated.defvjp(_forward, _backward)


def _check(x, cos, sin, scale) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"rotary: {what}")

    need(x.ndim == 4 and math.prod(x.shape) > 0, f"x {x.shape}; expected [B, T, H, d], no size 0")
    B, T, H, d = x.shape
    reason = unsupported(str(x.dtype), H, d, tuning.kind())
    need(reason is None, str(reason))
    for name, y in (("cos", cos), ("sin", sin)):
        fits = y.ndim == 3 and y.shape[:2] == (B, T) and 1 <= y.shape[2] <= d // 2
        need(fits, f"{name} {y.shape}; expected [{B}, {T}, r], r 1 to {d // 2}")
        need(y.dtype == jnp.float32, f"{name} {y.dtype}; expected float32")
    need(cos.shape == sin.shape, f"cos {cos.shape} and sin {sin.shape}; expected one shape")
    need(scale is None or scale.shape == (d,), f"scale {getattr(scale, 'shape', '')}; expected {[d]}")
