"""The neural memory on NVIDIA's Hopper: what its kernels are given, and the gradient around them.

The memory is a matrix (of two layers: `gpu_deep`). The forward (`gpu_forward`) saves W and S about every 512 positions.
The backward makes the states before all groups again from these, segments side by side; takes the gradient of W and S
through the groups in reverse (`gpu_backward`); and makes all other gradients of all groups at once
(`gpu_backward_groups`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.neural_memory import gpu_backward, gpu_backward_groups, gpu_forward, gpu_numbers
from kernels_pallas.neural_memory.call import LOG2E, segment_of
from kernels_pallas.neural_memory.gpu_group import E, Shape

WIDTHS = 64, 128  # of heads
CHUNKS = 16, 32, 64


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static; see `neural_memory`. epsilon: None without a norm. packed: rows may be more than one document
    from their beginning."""

    chunk: int
    rate: float
    epsilon: float | None
    read_after_write: bool
    decayed: bool
    interpret: Any
    packed: bool = True

    @property
    def rules(self) -> gpu_numbers.Rules:
        return gpu_numbers.Rules(self.chunk < gpu_numbers.ROWS, self.read_after_write, self.decayed)

    def shape(self, q: jax.Array) -> Shape:
        device = hopper.device_of(self.interpret)
        return Shape(device, q.shape[3], self.chunk, self.rate, self.read_after_write, self.epsilon, q.dtype)


def unsupported(widths: tuple[int, ...], chunk: int, dtype: str, residual_norm: bool) -> str | None:
    """Why the kernels cannot serve, or None."""
    reasons = (
        (dtype != "bfloat16", f"on GPUs it computes bfloat16, not {dtype}"),
        (len(widths) > 3, f"on GPUs the memory has one layer or two, not {len(widths) - 1}"),
        (len(widths) == 3 and widths[0] != E, f"on GPUs heads of two layers are {E} wide, not {widths[0]}"),
        (len(widths) == 3 and widths[1] != E, _too_wide(widths)),
        (residual_norm and widths[0] != E, f"on GPUs heads with a norm are {E} wide, not {widths[0]}"),
        (widths[0] not in WIDTHS, f"on GPUs heads are {' or '.join(map(str, WIDTHS))} wide, not {widths[0]}"),
        (chunk not in CHUNKS, f"on GPUs chunk is {', '.join(map(str, CHUNKS))}, not {chunk}"),
    )
    return next((reason for fails, reason in reasons if fails), None)


def _too_wide(widths: tuple[int, ...]) -> str:
    """Why a block of threads cannot have two such layers."""
    kib = 4 * 2 * 2 * widths[0] * widths[1] // 1024
    layers = "x".join(map(str, widths))
    room = f"beside what is computed with them in {hopper.SMEM_BYTES // 1024} KiB of shared memory"
    return f"on GPUs two layers have {E} hidden units: W and S of layers {layers} take {kib} KiB in float32, {room}"


def kernel_widths(d: int, chunk: int, normed: bool) -> dict[str, int]:
    """Multiplications of each kernel's products for a position of a head, by the kernel's name; tiles are whole."""
    rows, tiles = gpu_numbers.ROWS, d // E
    several = chunk < rows
    pairs, again = (1 + several) * rows * (rows + d), several * rows * (rows + d)
    near = (rows // chunk - 1) * rows * d
    states = 4 * d * d
    forward = tiles * pairs + near + rows * d + states + (1 + several) * d * d
    return {
        gpu_forward.NAME: forward,
        gpu_forward.AGAIN: forward if normed else tiles * again + near + 2 * d * d + (1 + several) * d * d,
        gpu_backward.NAME: tiles * pairs + near + rows * d + 2 * d * d + states,
        gpu_backward_groups.NAME: (1 + several) * (3 * rows * rows + 4 * rows * d) + (10 + 2 * several) * d * d,
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def memory(call: Call, q, k, v, gates, initial, carried, position_BT, first_B):
    """y [B, T, H, d], W and S after the last position [B, H, 2, d, d], and W before the last group [B, H, d, d].

    Args:
      gates: log keep, log eta, theta [B, T, H], float32.
      initial, carried: W and S [1 or B, H, 2, d, d], [B, H, 2, d, d] or None.
      position_BT, first_B: as in `plan.groups`.
    """
    return run(gpu_forward.forward, call, q, k, v, gates, initial, carried, position_BT, first_B, save=False)[0]


def run(forward, call, q, k, v, gates, initial, carried, position_BT, first_B, *, save):
    """What `memory` gives by a kernel `forward`, and the states that it saved, None without `save`."""
    T, at = q.shape[1], layout_of(call, position_BT, first_B)
    places = numbers_of(call, at, gates), at.table, at.bounds
    found = forward(call.shape(q), *map(filled, (q, k, v)), *places, initial, carried, save=save)
    return (found["y"][:, :T], found["end"], found["before"]), found.get("saved")


def _memory_forward(call: Call, q, k, v, gates, initial, carried, position_BT, first_B):
    out, saved = run(gpu_forward.forward, call, q, k, v, gates, initial, carried, position_BT, first_B, save=True)
    return out, (q, k, v, gates, initial, carried is not None, position_BT, first_B, saved)


def _memory_backward(call: Call, residuals, cotangents):
    q, k, v, gates, initial, is_carried, position_BT, first_B, saved = residuals
    dy, d_end, d_before = cotangents
    T, shape, at = q.shape[1], call.shape(q), layout_of(call, position_BT, first_B)
    numbers, pull = jax.vjp(functools.partial(numbers_of, call, at), gates)
    q_, k_, v_, dy_ = map(filled, (q, k, v, dy))
    places = numbers, at.table, at.bounds
    found = gpu_forward.again(shape, q_, k_, v_, *places, initial, saved)
    of_norm = {name: found[name] for name in gpu_backward.NORMED} if shape.normed else {}
    found |= gpu_backward.backward(shape, q_, k_, dy_, *places, d_end, d_before, of_norm)
    left = [found.get(name) for name in ("errors", "states", "dsteps", "dstates", "dsaid")]
    dq, dk, of_groups = gpu_backward_groups.backward_groups(
        shape, q_, k_, found["dread"] if shape.normed else dy_, *places, *left
    )
    (d_gates,) = pull(of_numbers(at, numbers, of_groups))
    here = (at.group >= 0)[..., None, None]
    rows = lambda x: jnp.where(here, x[:, :T], 0).astype(q.dtype)
    dv = rows(-gates[2][..., None] * found["dsteps"][:, :T])
    if shape.normed:  # what the memory says is q or k, and what the matrix does, normalised
        dmisses, wide = found["dmisses"], lambda *x: sum(y.astype(jnp.float32) for y in x)
        dq, dk, dv = wide(dq, dy_), wide(dk, dmisses), rows(-dmisses)
    d_initial = found["dinitial"]
    d_initial = d_initial.sum(0, keepdims=True) if initial.shape[0] == 1 else d_initial
    d_carried = found["dcarried"] if is_carried else None
    return rows(dq), rows(dk), dv, d_gates, d_initial, d_carried, None, None


memory.defvjp(_memory_forward, _memory_backward)


def of_numbers(at: gpu_numbers.Layout, numbers: jax.Array, of_groups: jax.Array) -> jax.Array:
    """Gradients of `numbers`, of what `gpu_backward_groups` found."""
    names, log2 = gpu_backward_groups, math.log(2)
    count = names.BETA
    sums = of_groups[:, :, :, count:].sum(-1, keepdims=True)
    found = jnp.concatenate(
        [of_groups[:, :, :, :count], jnp.broadcast_to(sums, (*sums.shape[:-1], gpu_numbers.ROWS))], 3
    )
    found = gpu_numbers.of_positions(at, found)
    of = lambda name: found[:, :, name]
    T = found.shape[3]
    last = (jnp.arange(T) + 1 == at.end)[:, None]
    at_last = lambda name: jnp.where(last, of(name), 0)
    own = lambda which: jnp.exp2(numbers[:, :, which, :T])
    gradients = {
        gpu_numbers.KEPT: log2 * (of(names.KEPT) + own(gpu_numbers.KEPT) * at_last(names.BETA)),
        gpu_numbers.MOVED: log2
        * (of(names.MOVED) + of(names.MOVED_AS_OLDER) + own(gpu_numbers.MOVED) * at_last(names.H)),
        gpu_numbers.READ: log2 * of(names.READ),
        gpu_numbers.EARLY: log2 * of(names.EARLY),
        gpu_numbers.THETA: of(names.THETA),
        gpu_numbers.RHO: at_last(names.RHO),
        gpu_numbers.RHO_READ: of(names.RHO_READ),
        gpu_numbers.RHO_EARLY: of(names.RHO_EARLY),
        gpu_numbers.LAST_KAPPA: of(names.KAPPA),
        gpu_numbers.LAST_MOVED: of(names.LEFT),
    }
    none = jnp.zeros_like(found[:, :, 0])
    x = jnp.stack([gradients.get(which, none) for which in range(gpu_numbers.NUMBERS)], axis=2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, numbers.shape[3] - T)))


def layout_of(call: Call, position_BT: jax.Array, first_B: jax.Array) -> gpu_numbers.Layout:
    segment = segment_of(position_BT.shape[1], gpu_numbers.ROWS)
    return gpu_numbers.layout(position_BT, first_B, call.chunk, segment, packed=call.packed)


def numbers_of(call: Call, at: gpu_numbers.Layout, gates: tuple[jax.Array, ...]) -> jax.Array:
    log_keep, log_eta, theta = gates
    return gpu_numbers.numbers(call.rules, at, log_keep * LOG2E, log_eta * LOG2E, theta)


def filled(x: jax.Array) -> jax.Array:
    """At least a tile of positions."""
    return jnp.pad(x, ((0, 0), (0, max(gpu_numbers.ROWS - x.shape[1], 0)), (0, 0), (0, 0)))
