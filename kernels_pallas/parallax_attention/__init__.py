"""Parallax by tiles: softmax attention tilted along a probe (Zuo et al. 2026, arXiv:2605.29157, algorithm 1).

The TPU's kernels are those of `kernels_pallas.flash_attention`, which take the probe as one more array of rows;
Hopper's are built of those of `kernels_pallas.local_linear_attention`.
"""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import tuning
from kernels_pallas.flash_attention.call import Call, check_arrays, platform_of
from kernels_pallas.parallax_attention import gpu, tpu
from kernels_pallas.parallax_attention.definition import definition
from kernels_pallas.parallax_attention.gradient import attention

__all__ = ["definition", "gpu_kernel_widths", "gpu_unsupported", "parallax_attention", "tpu_kernel_runs"]

gpu_kernel_widths, gpu_unsupported = gpu.kernel_widths, gpu.unsupported


def parallax_attention(
    q: jax.Array,
    probe: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    scale: float | None = None,
    platform: str = "tpu",
    interpret: Any = False,
    blocks: tuning.Blocks | None = None,
    keys_seen: bool = False,
) -> jax.Array:
    """`o[t] = sum_s p[t, s] (1 - (tilt[t, s] - sum_j p[t, j] tilt[t, j])) v[s]` over the keys that row `t` sees.

    `p = softmax_s(scale * q[t] . k[s])` and `tilt[t, s] = probe[t] . k[s]`, which is not scaled.

    Args:
      q, probe: queries and probes [B, T, H, d]; k: keys [B, S, K, d]; v: values [B, S, K, e]; all bfloat16, or all
        float32. `H % K == 0`: query head `h` reads key head `h // (H / K)`.
      starts, ends: int [B, T] or [1, T]. Row `t` sees the keys `starts[t] <= s < ends[t]`; None: from the first key,
        to the last.
      scale: of the logits; `d ** -0.5` by default.
      platform: whose kernels run, "tpu" or "cuda". Hopper's take bfloat16 and heads up to 128 wide.
      interpret: as in `flash_attention`.
      blocks: tile sizes on TPU; by default those of `tuning`. `ones` counts for nothing: the matrix unit sums weights.
      keys_seen: as in `flash_attention`.

    Returns:
      o [B, T, H, e] in the dtype of q. Differentiable (reverse mode) in q, probe, k and v; kept for the backward are o,
      the mean `sum_s p[t, s] v[s]` of the same shape, and two numbers a row and head. A row that sees nothing has
      o = 0 and gradients 0. What no row sees, NaN included, changes nothing.

    Raises:
      ValueError: shapes, dtypes or numbers that do not fit.
    """
    _check(q, probe, k, v, starts, ends)
    platform = platform_of("parallax_attention", platform, interpret, ("tpu", "cuda"))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    given = starts is not None, ends is not None
    call = Call(platform, tuning.kind(), scale, None, interpret, blocks, True, *given, keys_seen)
    return attention(call, q, probe, k, v, starts, ends)


def tpu_kernel_runs(q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct) -> dict[str, int]:
    """How often a forward and a backward run each kernel, by name: more than once for very many keys."""
    return tpu.kernel_runs(Call("tpu", tuning.kind(), 1.0, None, False, None, True, False, False), q, k, v)


def _check(q, probe, k, v, starts, ends) -> None:
    check_arrays("parallax_attention", q, k, v, starts, ends)
    if probe.shape != q.shape or probe.dtype != q.dtype:
        raise ValueError(
            f"parallax_attention: probe {probe.shape} {probe.dtype}; expected those of q, {q.shape} {q.dtype}"
        )
