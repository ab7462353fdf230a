"""Causal agent attention in one pass: the agents' averages never leave the chip.

The two softmaxes are those of Han et al. 2023 (Agent Attention, arXiv:2312.08874); that agents average over what came
before each position is not of the paper.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.agent_attention import gpu
from kernels_pallas.agent_attention import plan as plan_lib
from kernels_pallas.agent_attention.chunk import LOWEST
from kernels_pallas.agent_attention.gradient import rule
from kernels_pallas.linear_recurrence.checks import check_arrays, check_shape, check_sizes
from kernels_pallas.linear_recurrence.plan import Sizes, padded_width, side_by_side

__all__ = [
    "Sizes",
    "agent_attention",
    "default_sizes",
    "gpu_agent_attention",
    "gpu_kernel_flops",
    "gpu_unsupported",
    "kernel_flops",
]

gpu_unsupported, gpu_kernel_flops = gpu.unsupported, gpu.flops

State = tuple[jax.Array, jax.Array]


def agent_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    agents: jax.Array,
    *,
    starts: jax.Array | None = None,
    state: State | None = None,
    interpret: Any = False,
    sizes: Sizes | None = None,
) -> tuple[jax.Array, State]:
    """`o_t = sum_a w_ta V_a(t)` per head, on TPU, with `w_t = softmax_a(q_t . A_a / sqrt(d))` and `V_a(t)` the average
    of `v_j` over `j <= t` of t's document by `softmax_j(A_a . k_j / sqrt(d))`.

    Args:
      q, k: queries and keys [B, T, H, d]; v: values [B, T, H, e]; all bfloat16, or all float32. Any T, H, d and e.
      agents: A [H, m, d], or of each sequence [B, H, m, d]; in the same dtype. Any m.
      starts: int [B, T], the first position of each position's document; -1: that of the document that `state` is of.
        They ascend, and begin with -1 or 0. None: all are of that document.
      state: before the first position, in float32: logarithms of the sums of weights `e^(A_a . k_j / sqrt(d))`
        [B, H, m], -inf over no keys, and the averages [B, H, m, e], of those 0. None: over no keys.
      interpret: runs the kernels as plain XLA operations on any platform, or, on a CPU, as its interpreter's parameters
        say (`jax.experimental.pallas.tpu.InterpretParams`).
      sizes: blocks; by default `default_sizes`.

    Returns:
      o [B, T, H, e] in the dtype of q, and the state after the last position, of its document. Both differentiable
      (reverse mode) in q, k, v, agents and state. Logits, sums and states are float32; products are of numbers in the
      dtype of q. No weight that counts is lost, however logits differ.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    _check(q, k, v, agents, starts, state)
    (B, T, H, width), value_width, kind = q.shape, v.shape[3], tuning.kind()
    m, d, e = agents.shape[-2], padded_width(width), padded_width(value_width)
    sizes = default_sizes(q, v, m, kind) if sizes is None else sizes
    if sizes is None:
        raise ValueError(f"agent_attention: {m} agents of widths {width}/{value_width} do not fit on chip")
    check_sizes("agent_attention", sizes, H, d, e)
    if sizes.chunk > 128:
        raise ValueError(f"agent_attention: {sizes} is not allowed; allowed: chunk 128 or less")
    scale = width**-0.5
    plan = plan_lib.AgentPlan(
        (B, T, H, d, e), str(q.dtype), False, starts is not None, False, state is not None, sizes, kind, interpret,
        agents=m, shared=agents.ndim == 3, scale=scale,
    )  # fmt: skip
    more = plan.rows - m
    arrays = {name: side_by_side(x, w) for name, x, w in (("q", q, d), ("k", k, d), ("v", v, e))}
    agents = agents[None] if agents.ndim == 3 else agents
    arrays["agents"] = jnp.pad(agents, ((0, 0), (0, 0), (0, more), (0, d - width)))
    if starts is not None:
        arrays["starts"] = starts.astype(jnp.int32)
    if state is not None:
        log, values = state
        log = jnp.maximum(log / scale, LOWEST)
        arrays["log"] = jnp.pad(log, ((0, 0), (0, 0), (0, more)), constant_values=LOWEST)[:, :, None]
        arrays["values"] = jnp.pad(values, ((0, 0), (0, 0), (0, more), (0, e - value_width)))
    out = rule(plan, arrays)
    log, values = out["log_end"][:, :, 0, :m], out["values_end"][:, :, :m, :value_width]
    log = jnp.where(log > LOWEST / 2, log * scale, -jnp.inf)
    return out["o"].reshape(B, T, H, e)[..., :value_width], (log, values)


def gpu_agent_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    agents: jax.Array,
    *,
    starts: jax.Array | None = None,
    state: State | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, State, jax.Array]:
    """`agent_attention` on NVIDIA's Hopper, in bfloat16.

    Args: as of `agent_attention`, of widths up to 128 and up to 64 agents; `interpret`: by jax's interpreter of GPU
      kernels, on a CPU.

    Returns:
      o, the state after the last position, and whether o and all gradients are exact, [B, H]. Where they are not, in
      some chunk of 64 positions one sees of an agent no logit that comes near the largest up to the chunk's end: all
      weights that it has are less than 2^-80 of that one's. The state is exact in any case.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    _check(q, k, v, agents, starts, state)
    if reason := gpu.unsupported(q.dtype, q.shape[3], v.shape[3], agents.shape[-2]):
        raise ValueError(f"agent_attention: {reason}")
    return gpu.forward(q, k, v, agents, starts, state, interpret)


def default_sizes(
    q: jax.Array | jax.ShapeDtypeStruct, v: jax.Array | jax.ShapeDtypeStruct, agents: int, kind: str
) -> Sizes | None:
    """Blocks for queries and values of these shapes on devices of a kind; None: states are too large for the chip."""
    d, e = padded_width(q.shape[3]), padded_width(v.shape[3])
    return plan_lib.sizes(q.shape[1], q.shape[2], agents, d, e, q.dtype.itemsize, kind)


def kernel_flops(q: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct, agents: int, kind: str) -> dict[str, float]:
    """FLOPs of the products of one run of each kernel, by name, without padding; all pairs of a chunk are counted."""
    (B, T, H, d), e, m, sizes = q.shape, v.shape[3], agents, default_sizes(q, v, agents, kind)
    if sizes is None:
        return {}
    C = sizes.chunk
    each = {"forward": 2 * m * d + 2 * m * C + C * e + 2 * m * e,
            "backward": 6 * m * d + 5 * m * C + 2 * C * e + 5 * m * e}  # fmt: skip
    return {f"agent_attention_{name}": 2.0 * B * T * H * n for name, n in each.items()}


def _check(q, k, v, agents, starts, state) -> None:
    name = "agent_attention"
    B, _, H = check_arrays(name, q, k, v, "v", starts, None)
    d, e = q.shape[3], v.shape[3]
    m = agents.shape[-2] if agents.ndim >= 2 else 0
    check_shape(name, "agents", agents, (H, m, d), (B, H, m, d))
    if m < 1 or agents.dtype != q.dtype:
        raise ValueError(f"{name}: agents {agents.shape} {agents.dtype}; expected one or more, in {q.dtype}")
    if state is None:
        return
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(f"{name}: state is a {type(state).__name__}; expected (logarithms, averages)")
    for part, x, shape in zip(("state[0]", "state[1]"), state, ((B, H, m), (B, H, m, e))):
        check_shape(name, part, x, shape)
        if x.dtype != jnp.float32:
            raise ValueError(f"{name}: {part} {x.dtype}; expected float32")
