"""Softmax attention by tiles: scores never leave the chip (Dao et al. 2022, arXiv:2205.14135)."""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import tuning
from kernels_pallas.flash_attention import gpu, gpu_pattern, tpu
from kernels_pallas.flash_attention.call import Call, check_arrays, platform_of
from kernels_pallas.flash_attention.definition import definition
from kernels_pallas.flash_attention.gradient import KERNELS, attention
from kernels_pallas.flash_attention.pattern import Pattern, Term

__all__ = ["Pattern", "Term", "definition", "flash_attention", "gpu_kernel_widths", "tpu_kernel_runs"]

PLATFORMS = tuple(KERNELS)
GPU_WIDEST = gpu.WIDEST  # head width, of keys or values
GPU_TILE = gpu_pattern.TILE  # rows and keys of a tile of a pattern for "cuda"
GPU_MOST_AXES = gpu_pattern.MOST_AXES  # coordinates of keys that all its terms may have
gpu_kernel_widths = gpu.kernel_widths


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    sinks: jax.Array | None = None,
    gate: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    pattern: Pattern | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    platform: str | None = None,
    interpret: bool = False,
    blocks: Any = None,
    deterministic: bool = False,
    keys_seen: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`o[t] = sum_s p[t, s] v[s]`, `p = softmax_s(scale * q[t] . k[s])` over the keys that row `t` sees.

    Args:
      q: queries [B, T, H, d]; k: keys [B, S, K, d]; v: values [B, S, K, e]; all bfloat16, or all float32. `H % K == 0`:
        query head `h` reads key head `h // (H / K)`.
      starts, ends: int [B, T] or [1, T]. Row `t` sees the keys `starts[t] <= s < ends[t]`; None: from the first key,
        to the last.
      sinks: [H], a logit per head that adds to the softmax's denominator alone.
      gate: [B, T, H, e], logits: `o` becomes `o * sigmoid(gate)`.
      key_bias: [B, S], or [B, K, S] for each key head, added to the logits (after the cap).
      pattern: a mask that is more than an interval, which then says all of it: `starts` and `ends` are None.
        For "cuda" in tiles of `GPU_TILE`, with up to `GPU_MOST_AXES` coordinates of keys.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.
      scale: of the logits; `d ** -0.5` by default.
      platform: whose kernel runs, of `PLATFORMS`; by default that of jax's default device, or "tpu" if interpreted.
        That of "cuda" is for Hopper: bfloat16, widths up to 256.
      interpret: runs the kernel as plain XLA operations on any platform, or, on a CPU, as its interpreter's parameters
        say (`jax.experimental.pallas.tpu.InterpretParams`). For "cuda" always by the interpreter, from jax 0.11 on.
      blocks: tile sizes (`kernels_pallas.tuning.Blocks`, for "cuda" `kernels_pallas.flash_attention.gpu.Blocks`); by
        default those that `tuning`, or `gpu`, gives.
      deterministic: whether gradients must be the same bits in every run. Kernels for TPU always are.
      keys_seen: whether the caller knows that some row sees every key; else keys and values that none sees are found
        and replaced before the kernel, which reads and writes both once more.

    Returns:
      o [B, T, H, e] in the dtype of q, and lse [B, T, H] in float32, the natural logarithm of the softmax's
      denominator, sinks included. Both differentiable (reverse mode) in q, k, v, sinks, gate and key_bias. A row that
      sees nothing has o = 0, gradients 0 and an lse of -inf (with sinks: of its sink). What no row sees, NaN included,
      changes nothing; with a pattern it must be finite.

    Raises:
      ValueError: shapes, dtypes or options that do not fit, or no kernel for the platform.
    """
    _check(q, k, v, starts, ends, sinks, gate, key_bias, soft_cap)
    platform = platform_of("flash_attention", platform, interpret, PLATFORMS)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    soft_cap = None if soft_cap is None else float(soft_cap)
    call = Call(
        platform, tuning.kind(), scale, soft_cap, interpret, blocks, deterministic,
        starts is not None, ends is not None, keys_seen,
    )  # fmt: skip
    if pattern is not None and (starts is not None or ends is not None):
        raise ValueError("flash_attention: a pattern beside starts or ends; allowed: one of them")
    return attention(call, q, k, v, starts, ends, sinks, gate, key_bias, None, pattern)


def tpu_kernel_runs(
    q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct, blocks: tuning.Blocks | None = None
) -> dict[str, int]:
    """How often a forward and a backward run each kernel on TPU, by name: more than once for very many keys."""
    return tpu.kernel_runs(Call("tpu", tuning.kind(), 1.0, None, False, blocks, True, False, False), q, k, v, False)


def _check(q, k, v, starts, ends, sinks, gate, key_bias, soft_cap) -> None:
    check_arrays("flash_attention", q, k, v, starts, ends)

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"flash_attention: {what}")

    (B, T, H, _), (S, K), e = q.shape, k.shape[1:3], v.shape[3]
    need(sinks is None or sinks.shape == (H,), f"sinks {getattr(sinks, 'shape', ())}; expected [{H}], one per head")
    need(gate is None or gate.shape == (B, T, H, e), f"gate {getattr(gate, 'shape', ())}; expected {[B, T, H, e]}")
    need(
        key_bias is None or key_bias.shape in ((B, S), (B, K, S)),
        f"key_bias {getattr(key_bias, 'shape', ())}; expected {[B, S]} or {[B, K, S]}",
    )
    need(soft_cap is None or soft_cap > 0, f"soft_cap={soft_cap}; allowed: None or a number > 0")
