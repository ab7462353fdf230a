"""Agent attention on NVIDIA's Hopper: arrays as the kernels want them, and the gradient around them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import hopper
from kernels_pallas.agent_attention import gpu_backward, gpu_forward
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
    """Of the products of one run, by the kernel's name: each warpgroup of the forward makes all weights."""
    each, M = -(-e // COLUMNS_EACH), AGENTS
    widths = {
        gpu_forward.NAME: each * M * (2 * d + 2 * CHUNK) + e * (2 * M + CHUNK),
        gpu_backward.NAME: 6 * M * d + 5 * M * CHUNK + 4 * M * e + 2 * CHUNK * e,
    }
    return {name: 2.0 * batch * length * heads * width for name, width in widths.items()}


def forward(q, k, v, agents, starts, state, interpret: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
    """As `gpu_agent_attention`."""
    (T, width), value_width, m = q.shape[1::2], v.shape[3], agents.shape[-2]
    call = _Call(Facts(m, width**-0.5 * _LOG2E, T), interpret)
    fill = -T % CHUNK
    own = agents[None] if agents.ndim == 3 else agents
    own = jnp.pad(own, [(0, 0), (0, 0), (0, AGENTS - m), (0, -width % _UNIT)])
    limits = None if starts is None else jnp.pad(starts.astype(jnp.int32), [(0, 0), (0, fill)], mode="edge")
    log = values = None
    if state is not None:
        log, values = state
        log = jnp.maximum(log * _LOG2E, LOWEST)
        log = jnp.pad(log, [(0, 0), (0, 0), (0, AGENTS - m)], constant_values=LOWEST)
        values = jnp.pad(values, [(0, 0), (0, 0), (0, AGENTS - m), (0, -value_width % _UNIT)])
    o, log, values, least = _rule(call, _padded(q), _padded(k), _padded(v), own, limits, log, values)
    log = log[:, :, :m]
    log = jnp.where(log > LOWEST / 2, log / _LOG2E, -jnp.inf)
    state = log, values[:, :, :m, :value_width]
    return o[:, :T, :, :value_width], state, jnp.all(least >= TINY, axis=-1)


def _padded(x: jax.Array) -> jax.Array:
    """[B, T, H, w] with zeros up to whole chunks and whole tiles."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK), (0, 0), (0, -x.shape[3] % _UNIT)])


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static."""

    facts: Facts
    interpret: Any

    @property
    def device(self) -> hopper.Device:
        return hopper.device_of(self.interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(call: _Call, *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    """What `gpu_forward.forward` is given and gives, but for what is kept for the backward."""
    return gpu_forward.forward(call.device, call.facts, *arrays, save=False)[:4]


def _rule_forward(call: _Call, *arrays: jax.Array | None) -> tuple[tuple[jax.Array, ...], Any]:
    o, log, values, least, *kept = gpu_forward.forward(call.device, call.facts, *arrays, save=True)
    # Named as attention's, for remat policies that do not repeat attention.
    o, *kept = (checkpoint_name(x, "attention_o") for x in (o, *kept))
    return (o, log, values, least), (arrays, values, kept)


def _rule_backward(call: _Call, residuals: Any, cotangents: tuple[jax.Array, ...]) -> tuple[jax.Array | None, ...]:
    (q, k, v, agents, limits, log, values), end, kept = residuals
    do, dlog, dvalues, _ = cotangents
    over_values = lambda x, y: jnp.sum(x * y, axis=-1)
    # Of the sums themselves, as the kernel has it, of a sum of weights that is 1; a larger logarithm is more of both.
    dtotal = _LOG2E * dlog - over_values(dvalues, end)
    dq, dk, dv, dagents, dtotal, dvalues = gpu_backward.backward(
        call.device, call.facts, q, k, v, agents, limits, *kept, do, dtotal, dvalues
    )
    if agents.shape[0] == 1:
        dagents = dagents.sum(0, keepdims=True)
    given = (None, None) if log is None else ((dtotal + over_values(dvalues, values)) / _LOG2E, dvalues)
    return dq, dk, dv, dagents.astype(agents.dtype), None, *given


_rule.defvjp(_rule_forward, _rule_backward)
