"""Linear recurrences in one pass: the state never leaves the chip (Qin et al. 2024, arXiv:2401.04658, section 3)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.linear_recurrence import checks, gpu
from kernels_pallas.linear_recurrence import plan as plan_lib
from kernels_pallas.linear_recurrence.gradient import recurrence
from kernels_pallas.linear_recurrence.plan import Features, Sizes

__all__ = ["Features", "Sizes", "default_sizes", "gpu_kernel_flops", "kernel_flops", "linear_recurrence"]

_LOG2E = math.log2(math.e)


def linear_recurrence(
    q: jax.Array,
    k: jax.Array,
    u: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    starts: jax.Array | None = None,
    state: jax.Array | None = None,
    features: Features | None = None,
    platform: str = "tpu",
    interpret: Any = False,
    sizes: Sizes | gpu.Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`S_t = exp(log_decay_t) S_{t-1} + k_t u_t^T`, `o_t = q_t S_t` per head, on TPU or NVIDIA's Hopper.

    Args:
      q, k: queries and keys [B, T, H, d], or [B, T, 1, d] of all heads, on TPU, without features and decays of
        channels; u: values [B, T, H, e]; all bfloat16, or all float32. Any T, H, d and e. A
        column of ones behind values costs little where the others are a power of two from 16 or a multiple of 128.
      log_decay: finite; None: nothing decays; [H]: the same at all positions; [B, T, H]. A weight within 128 positions
        is the exponential of a difference of float32 sums over them: where these are large, it is less exact. Or
        [B, T, H, d], 0 or less: of channels of the keys, not of features; weights are exact at any decay, -inf too.
      starts: int [B, T], the first position of each position's document; -1: that of the document that `state` is of.
        They ascend, and begin with -1 or 0. None: all are of that document.
      state: [B, H, d, e] float32, before the first position; None: nothing.
      features: what stands for queries and keys, made on chip from those of its width; None: themselves. d of the state
        is then their number.
      platform: whose kernels: "tpu", or "cuda", which take bfloat16, widths up to 256, and no features.
      interpret: runs the kernels as plain XLA operations on any platform, or, on a CPU, as its interpreter's parameters
        say (`jax.experimental.pallas.tpu.InterpretParams`). On cuda: by jax's interpreter of GPU kernels, on a CPU.
      sizes: blocks; by default `default_sizes`, on cuda `gpu_sweep.default_blocks`.

    Returns:
      o [B, T, H, e] in the dtype of q, and the state after the last position [B, H, d, e] in float32: of the last
      position's document. Both differentiable (reverse mode) in q, k, u, log_decay and state. States and sums are
      float32; products are of numbers in the dtype of q.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    _check(q, k, u, log_decay, starts, state, features)
    if platform not in ("tpu", "cuda"):
        raise ValueError(f"linear_recurrence: no kernel for platform {platform!r}; allowed: tpu, cuda")
    if platform == "cuda":
        if features is not None:
            raise ValueError("linear_recurrence: on GPUs features are made before; allowed: features=None")
        if q.shape[2] != u.shape[2]:
            raise ValueError(f"linear_recurrence: q {q.shape}; on GPUs expected those of all {u.shape[2]} heads")
        if log_decay is not None and log_decay.ndim == 4:
            raise ValueError(f"linear_recurrence: log_decay {log_decay.shape}; on GPUs expected [H] or [B, T, H]")
        return _on_hopper(q, k, u, log_decay, starts, state, interpret, sizes)
    return _on_tpu(q, k, u, log_decay, starts, state, features, interpret, sizes)


def _on_tpu(q, k, u, log_decay, starts, state, features, interpret, sizes) -> tuple[jax.Array, jax.Array]:
    (B, T, H, value_width), key_width, kind = u.shape, q.shape[3], tuning.kind()
    width = key_width if features is None else len(features.scale)
    channels = log_decay is not None and log_decay.ndim == 4
    column = not channels and plan_lib.has_column(value_width)
    d, e = plan_lib.padded_width(width), plan_lib.padded_width(value_width - column)
    sizes = default_sizes(q, u, kind, features, channels) if sizes is None else sizes
    if sizes is None:
        raise ValueError(f"linear_recurrence: widths {width}/{value_width}: a state of so many does not fit on chip")
    constant = log_decay is None or log_decay.ndim == 1
    plan = plan_lib.Plan(
        (B, T, H, d, e), str(q.dtype), constant, starts is not None, column, state is not None, sizes, kind, interpret,
        features=features, channels=channels, shared=q.shape[2] < H,
    )  # fmt: skip
    checks.check_sizes("linear_recurrence", sizes, H, plan.key_width, e, joined=channels)
    arrays = {name: plan_lib.side_by_side(x, plan.key_width) for name, x in (("q", q), ("k", k))}
    arrays["u"] = plan_lib.side_by_side(u[..., : value_width - column], e)
    logs = jnp.zeros((H,)) if log_decay is None else log_decay
    logs = logs.astype(jnp.float32) * _LOG2E
    arrays["logs"] = plan_lib.side_by_side(logs, d) if channels else _heads_first(logs)
    if starts is not None:
        arrays["starts"] = starts.astype(jnp.int32)
    if column:
        arrays["z"] = _heads_first(u[..., -1].astype(jnp.float32))
    if state is not None:
        behind = lambda x, *widths: jnp.pad(x, ((0, 0), (0, 0), *((0, w) for w in widths)))
        arrays["state"] = behind(state[..., : value_width - column], d - width, e + column - value_width)
        if column:
            arrays["sums"] = behind(state[..., -1:].swapaxes(2, 3), 0, d - width)
    out = recurrence(plan, arrays)
    o = out["o"].reshape(B, T, H, e)[..., :value_width]
    end = out["state_end"][:, :, :width, :value_width]
    if column:
        o = jnp.concatenate([o, jnp.moveaxis(out["oz"], 1, 2)[..., None].astype(o.dtype)], -1)
        end = jnp.concatenate([end, out["sums_end"][..., :width].swapaxes(2, 3)], -1)
    return o, end


def _on_hopper(q, k, u, log_decay, starts, state, interpret, blocks) -> tuple[jax.Array, jax.Array]:
    if reason := gpu.unsupported(q.dtype, q.shape[3], u.shape[3]):
        raise ValueError(f"linear_recurrence: {reason}")
    if blocks is not None and not isinstance(blocks, gpu.Blocks):
        raise ValueError(f"linear_recurrence on cuda: sizes={blocks}; allowed: None or {gpu.Blocks.__module__}.Blocks")
    arrays = {"q": q, "k": k, "u": u}
    if log_decay is not None:
        arrays["log_decay"] = log_decay.astype(jnp.float32)
    if starts is not None:
        arrays["starts"] = starts.astype(jnp.int32)
    if state is not None:
        arrays["state"] = state
    return gpu.recurrence(gpu.Call(interpret, blocks), arrays)


def default_sizes(
    q: jax.Array | jax.ShapeDtypeStruct,
    u: jax.Array | jax.ShapeDtypeStruct,
    kind: str,
    features: Features | None = None,
    channels: bool = False,
) -> Sizes | None:
    """Blocks for queries and values of these shapes on devices of a kind, `channels` with decays of their own; None:
    states are too large for the chip."""
    lies = plan_lib.padded_width(q.shape[3])
    width = lies if features is None else plan_lib.padded_width(len(features.scale))
    values = plan_lib.padded_width(u.shape[3] - (not channels and plan_lib.has_column(u.shape[3])))
    (_, T, H, _), shared = u.shape, q.shape[2] < u.shape[2]
    return plan_lib.sizes(T, H, width, values, q.dtype.itemsize, kind, lies, channels, shared)


def kernel_flops(
    q: jax.ShapeDtypeStruct,
    u: jax.ShapeDtypeStruct,
    kind: str,
    features: Features | None = None,
    channels: bool = False,
) -> dict[str, float]:
    """FLOPs of the products of one run of each kernel, by name, without padding; all pairs of a chunk are counted.

    Features are no products: what is only picked out is not counted.
    """
    (B, T, H, e), d, sizes = u.shape, q.shape[3], default_sizes(q, u, kind, features, channels)
    if sizes is None:
        return {}
    d = d if features is None else len(features.scale)
    C, again = sizes.chunk, 1 - 1 / sizes.chunks
    met = plan_lib.pair_products(C, channels) * d
    scores = lambda heads: met * -(-H // heads) / H if q.shape[2] < H else met
    each = {
        "forward": C * (scores(sizes.forward_heads) + e) + 2 * d * e,
        "backward": C * (scores(sizes.backward_heads) + 2 * met + 2 * e) + (4 + again) * d * e,
    }
    return {plan_lib.kernel_name(channels, name): 2.0 * B * T * H * n for name, n in each.items()}


def gpu_kernel_flops(batch: int, length: int, heads: int, width: int, value_width: int) -> dict[str, float]:
    """As `kernel_flops`, of the kernels for Hopper."""
    return {name: 2.0 * batch * length * heads * n for name, n in gpu.kernel_widths(width, value_width).items()}


def _heads_first(x: jax.Array) -> jax.Array:
    """[B, H, T] from [B, T, H]; [H] as it is."""
    return x if x.ndim == 1 else jnp.moveaxis(x, 2, 1)


def _check(q, k, u, log_decay, starts, state, features) -> None:
    width = None if features is None else len(features.scale)
    shared = features is None and (log_decay is None or log_decay.ndim != 4)
    B, T, H = checks.check_arrays("linear_recurrence", q, k, u, "u", starts, state, width, shared)
    if features is not None and features.width != q.shape[3]:
        raise ValueError(f"linear_recurrence: q {q.shape}; expected width {features.width}, that of features")
    of_channels = [(B, T, H, q.shape[3])] if features is None and q.shape[2] == H else []
    checks.check_shape("linear_recurrence", "log_decay", log_decay, (H,), (B, T, H), *of_channels)
