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
    positions: jax.Array,
    *,
    base: float,
    width: int,
    scale: jax.Array | None = None,
    epsilon: float = 0.0,
    interpret: Any = False,
) -> jax.Array:
    """`y = x / sqrt(mean(x^2) + epsilon) * scale` of each head, its pairs (i, i + width / 2) turned by their angles.

    Args:
      x: queries or keys [B, T, H, d], bfloat16 or float32; d a multiple of 128. Any B, T and H.
      positions: int [B, T]; the angle of pair i is position * base^(-2 i / width).
      width: even, d at most; channels behind are not turned.
      scale: [d]; None: there is no norm.
      epsilon: added to the mean square.
      interpret: runs the kernels as plain XLA operations on any platform, or, on a CPU, as its interpreter's parameters
        say (`jax.experimental.pallas.tpu.InterpretParams`).

    Returns:
      An array like x. Differentiable (reverse mode) in x and scale. All is computed in float32, and rounded once.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    _check(x, positions, width, scale)
    B, T, H, d = x.shape
    kind = tuning.kind()
    rows = rows_of(T, H, d, x.dtype.itemsize, kind)
    plan = Plan((B, T, H, d), width, scale is not None, epsilon, rows, kind, interpret)
    table = _table(positions, base, width, d)
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


def _table(positions: jax.Array, base: float, width: int, d: int) -> jax.Array:
    """[B, T, d] float32: cosines of the angles of all pairs, then their sines, then zeros."""
    angle = positions[..., None].astype(jnp.float32) * base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    table = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, d - width)))


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


def _check(x, positions, width: int, scale) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"rotary: {what}")

    need(x.ndim == 4 and math.prod(x.shape) > 0, f"x {x.shape}; expected [B, T, H, d], no size 0")
    reason = unsupported(str(x.dtype), *x.shape[2:], tuning.kind())
    need(reason is None, str(reason))
    need(positions.shape == x.shape[:2], f"positions {positions.shape}; expected {list(x.shape[:2])}")
    need(positions.dtype.kind == "i", f"positions {positions.dtype}; expected integers")
    need(width % 2 == 0 and 2 <= width <= x.shape[3], f"width = {width}; allowed: even, 2 to {x.shape[3]}")
    need(scale is None or scale.shape == x.shape[3:], f"scale {getattr(scale, 'shape', '')}; expected {[x.shape[3]]}")
