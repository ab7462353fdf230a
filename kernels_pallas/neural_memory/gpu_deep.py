"""The gradient around the Hopper kernels of a memory of two layers: `gpu`, with one kernel for what is in reverse."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.neural_memory import gpu, gpu_deep_backward, gpu_deep_forward, gpu_numbers
from kernels_pallas.neural_memory.gpu_deep_group import DeepShape


@dataclasses.dataclass(frozen=True)
class Call(gpu.Call):
    """As `gpu.Call`, whose `rate` is 1. rates: of both layers."""

    rates: tuple[float, float] = (1.0, 1.0)

    def shape(self, q: jax.Array) -> DeepShape:
        device = hopper.device_of(self.interpret)
        return DeepShape(
            device, q.shape[3], self.chunk, 1.0, self.read_after_write, self.epsilon, q.dtype, self.rates
        )  # fmt: skip


def kernel_widths(chunk: int, normed: bool) -> dict[str, int]:
    """As `gpu.kernel_widths`: how many products of squares a group takes, times what each is of a position."""
    rows = gpu_numbers.ROWS
    chunks, several = rows // chunk, int(chunk < rows)
    learn, update = 2 * several + chunks * (3 + 10 * several), 4
    queries, keys = 40, 9 + 33 * several + 31 * (chunks - 1)
    found = {
        gpu_deep_forward.NAME: learn + 10 + update,
        gpu_deep_forward.AGAIN: learn + (10 if normed else 5) + update,
        gpu_deep_backward.NAME: queries + keys,
    }
    return {name: n * rows * rows for name, n in found.items()}


def joined(weights: tuple[jax.Array, ...], momentum: tuple[jax.Array, ...]) -> jax.Array:
    """W and S of both layers [n, H, 4, d, d], as `gpu_deep_group.SQUARES` says."""
    return jnp.stack([x for pair in zip(weights, momentum) for x in pair], axis=2)


def parted(states: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The opposite."""
    return tuple(states[:, :, i] for i in (0, 2)), tuple(states[:, :, i] for i in (1, 3))


_run = functools.partial(gpu.run, gpu_deep_forward.forward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def memory(call: Call, q, k, v, gates, initial, carried, position_BT, first_B):
    """y [B, T, H, d], and W and S of both layers after the last position and before the last group [B, H, 4, d, d].

    Args: as of `gpu.memory`; states [..., 4, d, d] (`joined`).
    """
    return _run(call, q, k, v, gates, initial, carried, position_BT, first_B, save=False)[0]


def _memory_forward(call: Call, q, k, v, gates, initial, carried, position_BT, first_B):
    out, saved = _run(call, q, k, v, gates, initial, carried, position_BT, first_B, save=True)
    return out, (q, k, v, gates, initial, carried is not None, position_BT, first_B, saved)


def _memory_backward(call: Call, residuals, cotangents):
    q, k, v, gates, initial, is_carried, position_BT, first_B, saved = residuals
    dy, *d_states = cotangents
    T, shape, at = q.shape[1], call.shape(q), gpu.layout_of(call, position_BT, first_B)
    numbers, pull = jax.vjp(functools.partial(gpu.numbers_of, call, at), gates)
    q_, k_, v_, dy_ = map(gpu.filled, (q, k, v, dy))
    places = numbers, at.table, at.bounds
    left = gpu_deep_forward.again(shape, q_, k_, v_, *places, initial, saved)
    found = gpu_deep_backward.backward(shape, q_, k_, dy_, *places, *d_states, left)
    (d_gates,) = pull(gpu.of_numbers(at, numbers, found["found"]))
    here = (at.group >= 0)[..., None, None]
    rows = lambda *x: jnp.where(here, sum(y[:, :T].astype(jnp.float32) for y in x), 0).astype(q.dtype)
    residual = shape.normed  # of the memory around its layers, which add what comes in
    dq = rows(found["dq"], dy_) if residual else rows(found["dq"])
    of_keys = [found[name] for name in ("dk_after", "dk_read", "dk")]
    dk = rows(*of_keys, found["dmisses"]) if residual else rows(*of_keys)
    d_initial = found["dinitial"]
    d_initial = d_initial.sum(0, keepdims=True) if initial.shape[0] == 1 else d_initial
    return dq, dk, rows(-found["dmisses"]), d_gates, d_initial, found["dcarried"] if is_carried else None, None, None


memory.defvjp(_memory_forward, _memory_backward)
