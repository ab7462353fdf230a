"""The gated delta rule in one pass (Yang et al. 2024, arXiv:2412.06464, section 3): the state never leaves the chip.

With a decay for each channel: Kimi Team 2025, arXiv:2510.26692, section 3."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.delta_rule import gpu
from kernels_pallas.delta_rule import plan as plan_lib
from kernels_pallas.delta_rule.gradient import rule
from kernels_pallas.flash_attention.call import platform_of
from kernels_pallas.linear_recurrence.checks import check_arrays, check_shape, check_sizes
from kernels_pallas.linear_recurrence.plan import Plan, Sizes, padded_width, side_by_side

__all__ = ["GPU_WIDEST", "Sizes", "default_sizes", "delta_rule", "gpu_kernel_flops", "gpu_unsupported", "kernel_flops"]

GPU_WIDEST, gpu_unsupported = gpu.WIDEST, gpu.unsupported
_LOG2E = math.log2(math.e)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    *,
    starts: jax.Array | None = None,
    state: jax.Array | None = None,
    platform: str = "tpu",
    interpret: Any = False,
    sizes: Sizes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`S_t = a_t S_{t-1} + k_t u_t^T`, `u_t = beta_t (v_t - a_t S_{t-1}^T k_t)`, `o_t = S_t^T q_t`, on TPU and Hopper.

    Args:
      q, k: queries and keys [B, T, H, d]; v: values [B, T, H, e]; all bfloat16, or all float32. Any T, H, d and e. For
        `0 <= beta <= 2` the rule is stable where keys are of length 1 or less.
      log_decay: [B, T, H], log a, finite, 0 or less. A weight within a chunk is the exponential of a difference of
        float32 sums over it: where these are large, it is less exact. Or [B, T, H, d], of channels, `a` then a diagonal
        matrix at the left of S: weights are exact at any decay, -inf too.
      beta: [B, T, H], strengths of writing.
      starts: int [B, T], the first position of each position's document; -1: that of the document that `state` is of.
        They ascend, and begin with -1 or 0. None: all are of that document.
      state: [B, H, d, e] float32, before the first position; None: nothing.
      platform: whose kernels run, "tpu" or "cuda". Hopper's take bfloat16 alone, and keys up to `GPU_WIDEST`.
      interpret: runs the kernels as plain XLA operations on any platform, or, on a CPU, as its interpreter's parameters
        say (`jax.experimental.pallas.tpu.InterpretParams`). Hopper's run on a CPU, by jax's interpreter of GPU kernels.
      sizes: blocks; by default `default_sizes`. Hopper's chunks are of 64 positions.

    Returns:
      o [B, T, H, e] in the dtype of q, and the state after the last position [B, H, d, e] in float32: of the last
      position's document. Both differentiable (reverse mode) in q, k, v, log_decay, beta and state. States and sums are
      float32; products are of numbers in the dtype of q, those that invert a chunk's triangular system among them.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    _check(q, k, v, log_decay, beta, starts, state)
    if platform_of("delta_rule", platform, interpret, ("tpu", "cuda")) == "cuda":
        return _on_hopper(q, k, v, log_decay, beta, starts, state, interpret, sizes)
    (B, T, H, width), value_width, kind = q.shape, v.shape[3], tuning.kind()
    d, e = padded_width(width), padded_width(value_width)
    channels = log_decay.ndim == 4
    sizes = default_sizes(q, v, kind, channels) if sizes is None else sizes
    if sizes is None:
        raise ValueError(f"delta_rule: widths {width}/{value_width}: a state of so many does not fit on chip")
    check_sizes("delta_rule", sizes, H, d, e, joined=True)
    plan = Plan(
        (B, T, H, d, e), str(q.dtype), False, starts is not None, False, state is not None, sizes, kind, interpret,
        channels=channels,
    )  # fmt: skip
    arrays = {name: side_by_side(x, w) for name, x, w in (("q", q, d), ("k", k, d), ("v", v, e))}
    heads_first = lambda x: jnp.moveaxis(x.astype(jnp.float32), 2, 1)
    logs = log_decay.astype(jnp.float32) * _LOG2E
    arrays |= {"logs": side_by_side(logs, d) if channels else heads_first(logs), "beta": heads_first(beta)}
    if starts is not None:
        arrays["starts"] = starts.astype(jnp.int32)
    if state is not None:
        arrays["state"] = jnp.pad(state, ((0, 0), (0, 0), (0, d - width), (0, e - value_width)))
    out = rule(plan, arrays)
    return out["o"].reshape(B, T, H, e)[..., :value_width], out["state_end"][:, :, :width, :value_width]


def _on_hopper(q, k, v, log_decay, beta, starts, state, interpret, sizes) -> tuple[jax.Array, jax.Array]:
    if reason := gpu.unsupported(str(q.dtype), q.shape[3], channels=log_decay.ndim == 4):
        raise ValueError(f"delta_rule on cuda: {reason}")
    if sizes is not None:
        raise ValueError(f"delta_rule on cuda: sizes={sizes}; allowed: None")
    heads_first = lambda x: jnp.moveaxis(x.astype(jnp.float32), 2, 1)
    arrays = {"q": q, "k": k, "v": v, "logs": heads_first(log_decay) * _LOG2E, "beta": heads_first(beta)}
    arrays |= {} if starts is None else {"starts": starts.astype(jnp.int32)}
    arrays |= {} if state is None else {"state": state}
    out = rule(gpu.Plan(starts is not None, state is not None, interpret), arrays)
    return out["o"], out["state_end"]


def default_sizes(
    q: jax.Array | jax.ShapeDtypeStruct, v: jax.Array | jax.ShapeDtypeStruct, kind: str, channels: bool = False
) -> Sizes | None:
    """Blocks for queries and values of these shapes on devices of a kind, `channels` with decays of their own; None:
    states are too large for the chip."""
    d, e = padded_width(q.shape[3]), padded_width(v.shape[3])
    return plan_lib.sizes(q.shape[1], q.shape[2], d, e, q.dtype.itemsize, kind, channels)


def kernel_flops(
    q: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct, kind: str, channels: bool = False
) -> dict[str, float]:
    """FLOPs of the products of one run of each kernel, by name, without padding; all pairs of a chunk are counted."""
    (B, T, H, d), e, sizes = q.shape, v.shape[3], default_sizes(q, v, kind, channels)
    if sizes is None:
        return {}
    C, again = sizes.chunk, {"forward": 0, "backward": 1 - 1 / sizes.chunks}
    widths = {"forward": plan_lib.forward_widths, "backward": plan_lib.backward_widths}
    found = {}
    for name, of in widths.items():
        pairs, states = of(q.shape[:3] + (d, e), C, channels)
        each = C * pairs + (states + again[name]) * d * e
        found[plan_lib.kernel_name(channels, name)] = 2.0 * B * T * H * each
    return found


def gpu_kernel_flops(q: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct) -> dict[str, float]:
    """As `kernel_flops`, of the kernels for Hopper."""
    (B, T, H, d), e = q.shape, v.shape[3]
    return {name: 2.0 * B * T * H * n for name, n in gpu.kernel_widths(d, e).items()}


def _check(q, k, v, log_decay, beta, starts, state) -> None:
    rows = check_arrays("delta_rule", q, k, v, "v", starts, state)
    check_shape("delta_rule", "log_decay", log_decay, rows, q.shape)
    check_shape("delta_rule", "beta", beta, rows)
