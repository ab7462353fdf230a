"""The linear recurrence on NVIDIA's Hopper: arrays as the kernel wants them, and the gradient, which is three sweeps.

With `w` the weight that is left of a pair, `dq_t = sum_{s <= t} w (do_t . u_s) k_s` is the recurrence of other arrays;
`dk` and `du` are ones against the positions. None needs a state that the forward would have to save.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from kernels_pallas import hopper
from kernels_pallas.linear_recurrence import gpu_sweep
from kernels_pallas.linear_recurrence.gpu_sweep import CHUNK, UNIT, Blocks, Numbers

__all__ = ["WIDEST", "Blocks", "Call", "gradients", "kernel_widths", "recurrence", "unsupported"]

WIDEST = 256
_LOG2E = math.log2(math.e)
Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static. blocks: of all sweeps; None: `gpu_sweep.default_blocks`."""

    interpret: Any
    blocks: Blocks | None = None


def unsupported(dtype: Any, d: int, e: int) -> str | None:
    """Why the kernel cannot serve heads of these widths, or None."""
    if dtype != jnp.bfloat16:
        return f"on GPUs it computes bfloat16, not {jnp.dtype(dtype)}"
    if max(d, e) > WIDEST:
        return f"on GPUs widths of keys and values are at most {WIDEST}, not {d} and {e}"
    return None


def kernel_widths(d: int, e: int) -> dict[str, int]:
    """Products of a position that each kernel makes, added up, by the kernel's name."""
    states = 2 * d * e
    pairs = CHUNK * (d + e)
    return {
        f"linear_recurrence_{name}": pairs + states
        for name in ("forward", "backward_queries", "backward_keys", "backward_values")
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, e] and the state after the last position [B, H, d, e].

    arrays: q, k [B, T, H, d], u [B, T, H, e]; where there are such, log_decay [H] or [B, T, H] in float32, starts
    [B, T] int32 and state [B, H, d, e], as in `linear_recurrence`.
    """
    sweeps = _Sweeps(call, arrays)
    o, end, _ = sweeps.run("forward", "q", "k", "u", arrays.get("state"))
    return o, end


def gradients(call: Call, arrays: Arrays, do: jax.Array, dend: jax.Array) -> Arrays:
    """Those of `recurrence` without decays, by the names of the arrays, for gradients of o and of the state after."""
    return _backward(call, (False, arrays, None), (do, dend))[0]


def _forward(call: Call, primals: Any):
    arrays = {name: x.value for name, x in primals.items()}
    wants_decay = "log_decay" in primals and primals["log_decay"].perturbed
    o, end = recurrence(call, arrays)
    # Named as attention's, for remat policies that do not repeat attention.
    return (checkpoint_name(o, "attention_o"), end), (wants_decay, arrays, end if wants_decay else None)


def _backward(call: Call, residuals: Any, cotangents: Any):
    (wants_decay, arrays, end), (do, dend) = residuals, cotangents
    if isinstance(do, SymbolicZero):
        do = jnp.zeros(do.shape, do.dtype)
    dend = None if isinstance(dend, SymbolicZero) else dend
    turned = lambda x: None if x is None else x.swapaxes(2, 3)
    sweeps = _Sweeps(call, arrays | {"do": do})
    back = _Sweeps(call, arrays | {"do": do}, reverse=True)
    by = lambda name: name if wants_decay else None
    dq, _, asked = sweeps.run("backward_queries", "do", "u", "k", turned(arrays.get("state")), by("q"), wants_end=False)
    dk, _, given = back.run("backward_keys", "u", "do", "q", turned(dend), by("k"), wants_end=False)
    du, dstate, _ = back.run("backward_values", "k", "q", "do", dend, wants_end="state" in arrays)
    found = {"q": dq, "k": dk, "u": du, "starts": None}
    if "state" in arrays:
        found["state"] = dstate * _kept_first(arrays)
    if "log_decay" in arrays:
        found["log_decay"] = None
        if wants_decay:
            behind = jnp.zeros(end.shape[:2]) if dend is None else jnp.sum(end * dend, (2, 3))
            found["log_decay"] = _decay_gradient(arrays, asked - given, behind)
    return ({name: found[name] for name in arrays},)


recurrence.defvjp(_forward, _backward, symbolic_zeros=True)


class _Sweeps:
    """Arrays filled up to whole tiles, and the numbers of positions for one direction."""

    def __init__(self, call: Call, arrays: Arrays, *, reverse: bool = False):
        self.call, self.reverse, self.arrays = call, reverse, arrays
        self.length = arrays["q"].shape[1]
        self.fill = -self.length % CHUNK
        self.numbers = Numbers(self._logs(), *self._limits())
        self.device = hopper.device_of(call.interpret)

    def run(
        self, name: str, q: str, k: str, u: str, state: jax.Array | None, against: str | None = None, *,
        wants_end: bool = True,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:  # fmt: skip
        """A sweep over arrays of these names: see `gpu_sweep.sweep`; `o . against` is [B, T, H]."""
        d, e = self.arrays[q].shape[3], self.arrays[u].shape[3]
        more = -d % UNIT, -e % UNIT
        blocks = self.call.blocks or gpu_sweep.default_blocks(d + more[0], e + more[1])
        if (e + more[1]) % (blocks.warpgroups * blocks.columns):
            raise ValueError(
                f"linear_recurrence on cuda: {blocks} for {e} columns, filled up to {e + more[1]}; "
                "allowed: those whose warpgroups times columns divide them"
            )
        state = None if state is None else jnp.pad(state, [(0, 0), (0, 0), (0, more[0]), (0, more[1])])
        padded = lambda name: None if name is None else self._padded(self.arrays[name])
        o, end, dots = gpu_sweep.sweep(
            self.device, f"linear_recurrence_{name}", padded(q), padded(k), padded(u), self.numbers, state,
            padded(against), reverse=self.reverse, wants_end=wants_end,
            blocks=blocks,
        )  # fmt: skip
        o, end = o[:, : self.length, :, :e], None if end is None else end[:, :, :d, :e]
        return o, end, None if dots is None else jnp.moveaxis(dots.sum(2)[..., : self.length], 1, 2)

    def _padded(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, self.fill), (0, 0), (0, -x.shape[3] % UNIT)])

    def _logs(self) -> jax.Array | None:
        """Against the positions, what leads from one to the one before is the decay of the later."""
        if "log_decay" not in self.arrays:
            return None
        logs = self.arrays["log_decay"] * _LOG2E
        if logs.ndim == 1:
            logs = jnp.broadcast_to(logs, (1, self.length, logs.shape[0]))
        if self.reverse:
            logs = jnp.pad(logs[:, 1:], [(0, 0), (0, 1), (0, 0)])
        logs = jnp.pad(jnp.moveaxis(logs, 2, 1), [(0, 0), (0, 0), (0, self.fill)])
        chunks = logs.reshape(*logs.shape[:2], -1, CHUNK)
        return jnp.flip(jnp.cumsum(jnp.flip(chunks, -1), -1), -1) if self.reverse else jnp.cumsum(chunks, -1)

    def _limits(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Of the state before the first position it is -1."""
        if "starts" not in self.arrays:
            return None, None
        limits = self.arrays["starts"]
        before = jnp.full(limits.shape[:1], -1, jnp.int32)
        if self.reverse:
            t = jnp.arange(self.length, dtype=jnp.int32)
            ends = jnp.pad(limits[:, 1:] != limits[:, :-1], [(0, 0), (0, 1)], constant_values=True)
            limits = jax.lax.cummin(jnp.where(ends, t, self.length), axis=1, reverse=True)
            before = limits[:, -1]
        return jnp.pad(limits, [(0, 0), (0, self.fill)], mode="edge"), before


def _kept_first(arrays: Arrays) -> jax.Array:
    """How much of the state before the first position is in the one after it, [B or 1, H or 1, 1, 1]."""
    kept = jnp.ones((1, 1), jnp.float32)
    if "log_decay" in arrays:
        logs = arrays["log_decay"]
        kept = jnp.exp(logs[None] if logs.ndim == 1 else logs[:, 0])
    if "starts" in arrays:
        kept = jnp.where(arrays["starts"][:, :1] < 0, kept, 0.0)
    return kept[..., None, None]


def _decay_gradient(arrays: Arrays, x_BTH: jax.Array, behind_BH: jax.Array) -> jax.Array:
    """From `q . dq - k . dk` of positions and the state after the last times its gradient: a decay weighs what later
    positions of its document read, but for what they wrote themselves."""
    x_BTH = x_BTH.at[:, -1].add(behind_BH)
    if "starts" not in arrays:
        found = jax.lax.cumsum(x_BTH, axis=1, reverse=True)
    else:
        starts = arrays["starts"]
        goes_on = jnp.pad(starts[:, 1:] == starts[:, :-1], [(0, 0), (0, 1)])[..., None]
        # A sum for each document: a difference of long sums would lose the digits of short documents.
        join = lambda later, here: (later[0] & here[0], here[1] + jnp.where(here[0], later[1], 0.0))
        _, found = jax.lax.associative_scan(join, (goes_on, x_BTH), axis=1, reverse=True)
        found = jnp.where((starts == jnp.arange(starts.shape[1]))[..., None], 0.0, found)
    return found.sum((0, 1)) if arrays["log_decay"].ndim == 1 else found
