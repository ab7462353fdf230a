"""Agent attention on NVIDIA's Hopper: arrays as the kernel wants them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.agent_attention import gpu_forward
from kernels_pallas.agent_attention.chunk import LOWEST, TINY
from kernels_pallas.agent_attention.gpu_forward import AGENTS, CHUNK, COLUMNS_EACH, Facts

WIDEST = 128
_UNIT = 64  # of widths
_LOG2E = math.log2(math.e)


def unsupported(dtype: Any, d: int, e: int, agents: int) -> str | None:
    """Why the kernel cannot serve heads of these widths with so many agents, or None."""
    reasons = (
        (jnp.dtype(dtype) != jnp.bfloat16, f"on GPUs it computes bfloat16, not {jnp.dtype(dtype)}"),
        (max(d, e) > WIDEST, f"on GPUs widths of keys and values are at most {WIDEST}, not {d} and {e}"),
        (agents > AGENTS, f"on GPUs a head has at most {AGENTS} agents, not {agents}"),
    )
    return next((reason for fails, reason in reasons if fails), None)


def flops(batch: int, length: int, heads: int, d: int, e: int) -> dict[str, float]:
    """Of the products of one run, by the kernel's name: each warpgroup makes all weights."""
    each = -(-e // COLUMNS_EACH)
    width = each * AGENTS * (2 * d + 2 * CHUNK) + e * (2 * AGENTS + CHUNK)
    return {gpu_forward.NAME: 2.0 * batch * length * heads * width}


def forward(q, k, v, agents, starts, state, interpret: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
    """As `gpu_agent_attention`."""
    (T, width), value_width, m = q.shape[1::2], v.shape[3], agents.shape[-2]
    races = bool(getattr(interpret, "detect_races", False))
    device = hopper.DEVICE if interpret is False else hopper.interpreted(races=races)
    facts = Facts(m, width**-0.5 * _LOG2E, T)
    fill = -T % CHUNK
    padded = lambda x: jnp.pad(x, [(0, 0), (0, fill), (0, 0), (0, -x.shape[3] % _UNIT)])
    own = agents[None] if agents.ndim == 3 else agents
    own = jnp.pad(own, [(0, 0), (0, 0), (0, AGENTS - m), (0, -width % _UNIT)])
    limits = None if starts is None else jnp.pad(starts.astype(jnp.int32), [(0, 0), (0, fill)], mode="edge")
    log = values = None
    if state is not None:
        log, values = state
        log = jnp.maximum(log * _LOG2E, LOWEST)
        log = jnp.pad(log, [(0, 0), (0, 0), (0, AGENTS - m)], constant_values=LOWEST)
        values = jnp.pad(values, [(0, 0), (0, 0), (0, AGENTS - m), (0, -value_width % _UNIT)])
    arrays = padded(q), padded(k), padded(v), own, limits, log, values
    o, log, values, least = gpu_forward.forward(device, facts, *arrays)
    log = log[:, :, :m]
    log = jnp.where(log > LOWEST / 2, log / _LOG2E, -jnp.inf)
    state = log, values[:, :, :m, :value_width]
    return o[:, :T, :, :value_width], state, jnp.all(least >= TINY, axis=-1)
