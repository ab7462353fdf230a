"""Parallax by our kernels (`kernels_pallas.parallax_attention`), for TPU and Hopper: any mask of intervals, any
length."""

from __future__ import annotations

from typing import Any

import jax

from attnlab.ops import attention_flash
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.masks import Mask
from attnlab.parallel import partition
from kernels_pallas import tuning


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import parallax_attention

    return parallax_attention


def unsupported(spec: AttentionSpec) -> str | None:
    """Why the kernels cannot serve, or None."""
    if partition.platform() == "gpu":
        widest = max(spec.width, spec.value_width)
        return _kernels().gpu_unsupported(spec.dtype, widest) or attention_flash.not_hopper()
    known = spec.dtype in ("bfloat16", "float32")
    return None if known else f"it computes bfloat16 and float32, not {spec.dtype}"


def worth(spec: AttentionSpec) -> bool:
    """Whether "auto" takes it: not for less than a tile."""
    return min(spec.queries, spec.keys) >= tuning.LANES


def kernel_flops(spec: AttentionSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel; pairs as for attention.

    The forward has four products a tile, two of them over the width of keys; the backward on TPU eight, six of them.
    """
    pairs = attention_flash.pair_flops(spec)
    if partition.platform() == "gpu":
        widths = _kernels().gpu_kernel_widths(spec.width, spec.value_width)
        return {name: pairs * width for name, width in widths.items()}
    with tuning.device_kind(partition.device_kind()):
        runs = _kernels().tpu_kernel_runs(*attention_flash.arrays(spec))
    widths = {
        "parallax_forward": 2 * spec.width + 2 * spec.value_width,
        "parallax_backward": 6 * spec.width + 2 * spec.value_width,
    }
    return {name: pairs * width / runs[name] for name, width in widths.items()}


def attention(
    q_BTHd: jax.Array,
    r_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """See `attnlab.ops.parallax.parallax`; `interpret` runs the TPU's as plain XLA, on any platform.

    Scores and statistics are float32, products bfloat16 for bfloat16 inputs, for which the TPU's round the scaled
    queries once more. Backward recomputes the scores from the output, softmax attention's output and two numbers a row,
    which carry the checkpoint names "attention_o" and "attention_lse".
    """
    T, S = q_BTHd.shape[1], k_BSKd.shape[1]
    starts, ends = mask.bounds(T, S)
    with tuning.device_kind(partition.device_kind()):
        return _kernels().parallax_attention(
            q_BTHd, r_BTHd, k_BSKd, v_BSKe,
            starts=starts, ends=ends, scale=scale,
            platform=attention_flash.kernel_platform(), interpret=interpret,
            keys_seen=attention_flash.own_keys_seen(mask, T, S),
        )  # fmt: skip
