"""The neural memory on NVIDIA's Hopper: what its kernels are given, and the gradient around them.

The memory is a matrix. The forward (`gpu_forward`) saves W and S about every 512 positions; the backward makes the states before
all groups again from these, segments side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.neural_memory import gpu_forward, gpu_numbers
from kernels_pallas.neural_memory.call import LOG2E, segment_of
from kernels_pallas.neural_memory.gpu_group import Shape

WIDTHS = 64, 128  # of heads
CHUNKS = 16, 32, 64


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static; see `neural_memory`."""

    chunk: int
    rate: float
    read_after_write: bool
    decayed: bool
    interpret: Any

    @property
    def rules(self) -> gpu_numbers.Rules:
        return gpu_numbers.Rules(self.chunk < gpu_numbers.ROWS, self.read_after_write, self.decayed)

    def shape(self, q: jax.Array) -> Shape:
        races = bool(getattr(self.interpret, "detect_races", False))
        device = hopper.DEVICE if self.interpret is False else hopper.interpreted(races=races)
        return Shape(device, q.shape[3], self.chunk, self.rate, self.read_after_write, q.dtype)


def unsupported(widths: tuple[int, ...], chunk: int, dtype: str, residual_norm: bool) -> str | None:
    """Why the kernels cannot serve, or None."""
    reasons = (
        (dtype != "bfloat16", f"on GPUs it computes bfloat16, not {dtype}"),
        (len(widths) > 2, f"on GPUs the memory is a matrix, depth 1, not layers {'x'.join(map(str, widths))}"),
        (residual_norm, "on GPUs the memory has no norm: residual_norm=True; allowed: False"),
        (widths[0] not in WIDTHS, f"on GPUs heads are {' or '.join(map(str, WIDTHS))} wide, not {widths[0]}"),
        (chunk not in CHUNKS, f"on GPUs chunk is {', '.join(map(str, CHUNKS))}, not {chunk}"),
    )
    return next((reason for fails, reason in reasons if fails), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def memory(call: Call, q, k, v, gates, initial, carried, position_BT, first_B):
    """y [B, T, H, d], W and S after the last position [B, H, 2, d, d], and W before the last group [B, H, d, d].

    Args:
      gates: log keep, log eta, theta [B, T, H], float32.
      initial, carried: W and S [1 or B, H, 2, d, d], [B, H, 2, d, d] or None.
      position_BT, first_B: as in `plan.groups`.
    """
    return _run(call, q, k, v, gates, initial, carried, position_BT, first_B, save=False)[0]


def _run(call, q, k, v, gates, initial, carried, position_BT, first_B, *, save):
    T = q.shape[1]
    at = _layout(call, position_BT, first_B)
    numbers = _numbers(call, at, gates)
    found = gpu_forward.forward(
        call.shape(q), *map(filled, (q, k, v)), numbers, at.table, at.bounds, initial, carried, save=save
    )
    return (found["y"][:, :T], found["end"], found["before"]), found.get("saved")


def _layout(call: Call, position_BT: jax.Array, first_B: jax.Array) -> gpu_numbers.Layout:
    return gpu_numbers.layout(position_BT, first_B, call.chunk, segment_of(position_BT.shape[1], gpu_numbers.ROWS))


def _numbers(call: Call, at: gpu_numbers.Layout, gates: tuple[jax.Array, ...]) -> jax.Array:
    log_keep, log_eta, theta = gates
    return gpu_numbers.numbers(call.rules, at, log_keep * LOG2E, log_eta * LOG2E, theta)


def filled(x: jax.Array) -> jax.Array:
    """At least a tile of positions."""
    return jnp.pad(x, ((0, 0), (0, max(gpu_numbers.ROWS - x.shape[1], 0)), (0, 0), (0, 0)))
