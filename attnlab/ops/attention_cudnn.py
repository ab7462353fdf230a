"""Softmax attention on NVIDIA GPUs by cuDNN's fused kernels, which jax calls in `jax.nn.dot_product_attention`.

Only what cuDNN does without an array of T x S is asked for: none of its biases and dense masks.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.masks import Mask, mean_visible_keys

_CALL = "__cudnn$fmhaSoftmax"
# Matrix products of each kernel, against the two of a forward pass: the backward repeats the scores.
_KERNEL_WORK = {_CALL: 1.0, f"{_CALL}Backward": 2.5}


def unsupported(spec: AttentionSpec) -> str | None:
    """Why cuDNN cannot serve, or None."""
    moved = spec.devices > 1 and (spec.causal or spec.window is not None)
    reasons = (
        (spec.dtype not in ("bfloat16", "float16"), f"it computes bfloat16 and float16, not {spec.dtype}"),
        (spec.sinks, "it has no sinks"),
        (spec.soft_cap, "it has no soft-cap"),
        (spec.documents, "packed documents would need their number while tracing"),
        (spec.intervals and not spec.documents, "it has no intervals of keys"),
        (spec.window is not None and not spec.causal, "its windows are causal"),
        (moved, "its masks cannot be split over devices"),
        (spec.causal and spec.queries != spec.keys, "causal queries and keys must be the same positions"),
        (spec.width != spec.value_width, f"values must be as wide as keys, not {spec.width}/{spec.value_width}"),
        (spec.width % 8 != 0, f"the head width {spec.width} is not a multiple of 8"),
    )
    reason = next((reason for fails, reason in reasons if fails), None)
    return reason or _unsupported_here(spec.width)


def _unsupported_here(width: int) -> str | None:
    """Why the GPU of this process cannot, or None."""
    found = capability()
    if found is None:
        return "cuDNN makes its plans on the GPU that it runs on, and this process has no NVIDIA GPU"
    if found < (8, 0):
        return f"it needs compute capability 8.0, and this GPU has {found[0]}.{found[1]}"
    widest = 256 if found >= (9, 0) else 128
    return f"head widths are at most {widest} on this GPU, not {width}" if width > widest else None


def capability() -> tuple[int, int] | None:
    """The compute capability of this process's NVIDIA GPU, None without one."""
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def kernel_flops(spec: AttentionSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel; pairs that the mask hides are not counted."""
    seen = mean_visible_keys(spec.keys, spec.causal, spec.window)
    forward = 2.0 * spec.batch * spec.heads * spec.queries * seen * (spec.width + spec.value_width)
    return {name: work * forward for name, work in _KERNEL_WORK.items()}


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """See `attnlab.ops.attention.attention`; what `unsupported` refuses must not be asked for.

    Statistics are float32, products those of the dtype given. Backward recomputes the scores from the output and the
    log-sum-exp, of which only the output has the checkpoint name "attention_o": jax keeps the other to itself.
    """
    del sinks_H, soft_cap
    window = None if mask.window is None else (mask.window - 1, 0)  # jax counts the keys beside a query's own
    o = jax.nn.dot_product_attention(
        q_BTHd, k_BSKd, v_BSKe,
        scale=scale, is_causal=mask.causal, local_window_size=window, implementation="cudnn",
    )  # fmt: skip
    return checkpoint_name(o, "attention_o")
