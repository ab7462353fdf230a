"""Local linear attention by tiles: the d x d systems of a tile of rows are solved on chip, and none is formed.

Zuo et al. 2025, Local Linear Attention, arXiv:2510.01450, with sums centred at the mean key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.flash_attention.call import Call, check_arrays, platform_of
from kernels_pallas.local_linear_attention import gpu, plan
from kernels_pallas.local_linear_attention.gradient import attention
from kernels_pallas.local_linear_attention.plan import Blocks, Solver

__all__ = [
    "Blocks",
    "Solved",
    "default_blocks",
    "gpu_kernel_widths",
    "gpu_unsupported",
    "kernel_widths",
    "local_linear_attention",
    "most_keys",
]

gpu_kernel_widths, gpu_unsupported = gpu.kernel_widths, gpu.unsupported


class Solved(NamedTuple):
    """The output, and how rows' systems were solved.

    Attributes:
      o: [B, T, H, e] in the dtype of q.
      residual: [B, T, H], float32: `|A x - (q - m)| / |q - m|` as the solver has it; 0 for a row that sees nothing.
      iterations: [B, T, H], float32: those that changed the row's solution.
      turns: [B, T, H], float32: those that the row's tile ran.
    """

    o: jax.Array
    residual: jax.Array
    iterations: jax.Array
    turns: jax.Array


def local_linear_attention(
    q: jax.Array,
    ridge: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    scale: float | None = None,
    iterations: int = 16,
    tolerance: float = 1e-5,
    platform: str = "tpu",
    interpret: Any = False,
    blocks: Blocks | None = None,
    keys_seen: bool = False,
) -> Solved:
    """`o[t] = sum_s p[t, s] (1 + (k[s] - m[t]) . x[t]) v[s]` over the keys that row `t` sees.

    `p = softmax_s(scale * q[t] . k[s])`, `m = sum_s p k[s]`, and x solves
    `(sum_s p (k[s] - m)(k[s] - m)^T + ridge[t]) x = q[t] - m` by conjugate gradients.

    Args:
      q: queries [B, T, H, d]; k: keys [B, S, K, d]; v: values [B, S, K, e]; all bfloat16, or all float32. `H % K == 0`:
        query head `h` reads key head `h // (H / K)`.
      ridge: [B, T, H] float32, above 0.
      starts, ends: int [B, T] or [1, T]. Row `t` sees the keys `starts[t] <= s < ends[t]`; None: from the first key,
        to the last.
      scale: of the logits; `d ** -0.5` by default.
      iterations: of the solver at most; those of a tile of rows end when all of them have a residual of `tolerance`
        times their right side. A row keeps its solution from then on.
      tolerance: above 0.
      platform: whose kernels run, "tpu" or "cuda". Hopper's take bfloat16 and heads up to 128 wide.
      interpret: as in `flash_attention`.
      blocks: tile sizes on TPU; by default by what fast memory holds.
      keys_seen: as in `flash_attention`.

    Returns:
      See `Solved`. o is differentiable (reverse mode) in q, ridge, k and v: the gradient of the exact solution, by a
      second solve of the same system. Kept for the backward are x, float32 of the size of q, and a number a row and
      head. A row that sees nothing has o = 0 and gradients 0. What no row sees, NaN included, changes nothing.

    Raises:
      ValueError: shapes, dtypes or numbers that do not fit, or, on TPU, more keys than fast memory has room for
        (`most_keys`).
    """
    _check(q, ridge, k, v, starts, ends, iterations, tolerance)
    platform = platform_of("local_linear_attention", platform, interpret, ("tpu", "cuda"))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    given = starts is not None, ends is not None
    call = Call(platform, tuning.kind(), scale, None, interpret, blocks, True, *given, keys_seen)
    return Solved(*attention(call, Solver(iterations, float(tolerance)), q, ridge, k, v, starts, ends))


def kernel_widths(iterations: int, width: int, value_width: int) -> dict[str, int]:
    """By kernel, the widths of all its products over pairs of a row and a key, added up."""
    return plan.widths(iterations, width, value_width)


def default_blocks(q: Any, k: Any, v: Any, kind: str) -> Blocks | None:
    """Tiles for such arrays on devices of a kind; None where a head's keys do not fit into fast memory."""
    return plan.blocks(kind, q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype.itemsize)


def most_keys(kind: str, width: int, value_width: int, itemsize: int) -> int:
    """How many keys of a head there is room for on devices of a kind (`tuning.kind`)."""
    return plan.most_keys(kind, 128, width, value_width, itemsize)


def _check(q, ridge, k, v, starts, ends, iterations, tolerance) -> None:
    check_arrays("local_linear_attention", q, k, v, starts, ends)
    if ridge.shape != q.shape[:3] or ridge.dtype != jnp.float32:
        raise ValueError(f"local_linear_attention: ridge {ridge.shape} {ridge.dtype}; expected {q.shape[:3]} float32")
    if iterations < 1:
        raise ValueError(f"local_linear_attention: iterations={iterations}; allowed: 1 or more")
    if not tolerance > 0:
        raise ValueError(f"local_linear_attention: tolerance={tolerance}; allowed: above 0")
