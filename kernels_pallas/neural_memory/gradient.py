"""The gradient around the kernels: what they take, from what the user gives, and back."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.neural_memory import plan, tpu_backward, tpu_forward, windows
from kernels_pallas.neural_memory.call import LOG2E, Call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def memory(call: Call, q, k, v, gates, initial, carried, position_BT, first_B):
    """y, and per layer [W S] at the end and before the last group.

    Args:
      gates: log keep, log eta, theta [B, T, H], float32.
      initial, carried: [W S] per layer, `Call.shapes`, [1 or B, H, i, o] and [B, H, i, o]; carried: () if none.
      position_BT, first_B: as in `plan.groups`.
    """
    return _run(call, q, k, v, gates, initial, carried, position_BT, first_B, save=False)[:3]


def _run(call, q, k, v, gates, initial, carried, position_BT, first_B, *, save):
    heads, T = call.heads_of_step("forward"), q.shape[1]
    groups, begin = _groups(call, position_BT, first_B, of_ends=False)
    rows = [windows.laid_out(call, x) for x in (q, k, v)]
    columns = _columns(call, gates, begin, heads)
    y, *states = tpu_forward.run(call, *rows, columns, groups, initial, carried, heads=heads, save=save)
    return windows.as_given(call, y, T), *states


def _memory_forward(call: Call, q, k, v, gates, initial, carried, position_BT, first_B):
    *out, saved = _run(call, q, k, v, gates, initial, carried, position_BT, first_B, save=True)
    return tuple(out), (q, k, v, gates, initial, position_BT, first_B, saved)


def _memory_backward(call: Call, residuals, cotangents):
    q, k, v, gates, initial, position_BT, first_B, saved = residuals
    dy, d_end, d_before = cotangents
    heads, T = call.heads_of_step("backward"), q.shape[1]
    groups, begin = _groups(call, position_BT, first_B, of_ends=True)
    rows = [windows.laid_out(call, x) for x in (q, k, v, dy)]
    columns = _columns(call, gates, begin, heads)
    d_rows, d_columns, d_initial, d_carried = tpu_backward.run(
        call, *rows, columns, groups, initial, saved, d_end, d_before, heads=heads
    )
    if initial[0].shape[0] == 1:
        d_initial = [x.sum(0, keepdims=True) for x in d_initial]
    d_gates = _gates(d_columns, heads, T)
    return *(windows.as_given(call, x, T) for x in d_rows), d_gates, tuple(d_initial), tuple(d_carried), None, None


memory.defvjp(_memory_forward, _memory_backward)


def _groups(call: Call, position_BT: jax.Array, first_B: jax.Array, *, of_ends: bool):
    """Of `plan`, each [B, 1, n]; and where documents begin [B, T]."""
    starts, kinds, begin = plan.groups(position_BT, first_B, call.chunk, call.rows)
    firsts = plan.by_segment(starts, call.segment, call.segments, of_ends=of_ends)
    return [x[:, None] for x in (starts, kinds, firsts)], begin


def _columns(call: Call, gates, begin_BT: jax.Array, heads: int) -> jax.Array:
    """[B, H / heads, length, 3 heads + 1]: logarithms to the base 2, theta, and where the document begins."""
    log_keep, log_eta, theta = gates
    B, T, H = theta.shape
    parts = [x.reshape(B, T, H // heads, heads) for x in (log_keep * LOG2E, log_eta * LOG2E, theta)]
    begin = jnp.broadcast_to(begin_BT[..., None, None].astype(jnp.float32), (B, T, H // heads, 1))
    columns = jnp.concatenate([*parts, begin], axis=-1).swapaxes(1, 2)
    return jnp.pad(columns, ((0, 0), (0, 0), (0, call.length - T), (0, 0)))


def _gates(d_columns: jax.Array, heads: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the gates [B, T, H]."""
    parts = jnp.split(d_columns[:, :, :length].swapaxes(1, 2), 3, axis=-1)
    log_keep, log_eta, theta = (x.reshape(*x.shape[:2], -1) for x in parts)
    return log_keep * LOG2E, log_eta * LOG2E, theta
