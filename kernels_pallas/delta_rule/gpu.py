"""The gated delta rule on NVIDIA's Hopper: what its kernels are given, and what is left of the gradient for XLA.

Two kernels forward: what does not depend on the state, for all chunks at once (`gpu_pairs`), then the states in order
(`gpu_forward`). Two backward: the states' gradient in reverse (`gpu_backward`), then the rest, for all chunks at once
(`gpu_backward_chunks`). Chunks are of 64 positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.delta_rule import gpu_backward, gpu_backward_chunks, gpu_forward, gpu_pairs
from kernels_pallas.delta_rule.gpu_chunk import READ, C, E

WIDEST = 128  # keys: their state is an accumulator


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call.

    Attributes:
      documents: whether positions have documents.
      given: whether there is a state before the first position.
      wants_decay: whether the backward gives the gradient of the decay.
    """

    documents: bool
    given: bool
    interpret: Any
    wants_decay: bool = False

    @property
    def device(self) -> hopper.Device:
        return hopper.device_of(self.interpret)


def unsupported(dtype: str, width: int, *, channels: bool = False) -> str | None:
    """Why the kernels cannot serve inputs of this type and keys so wide, or None. `channels`: each has its decay."""
    reasons = (
        (dtype != "bfloat16", f"on GPUs it computes bfloat16, not {dtype}"),
        (width > WIDEST, f"on GPUs keys are at most {WIDEST} wide, not {width}"),
        (channels, "on GPUs a position has one decay, not one for each channel"),
    )
    return next((reason for fails, reason in reasons if fails), None)


def kernel_widths(d: int, e: int) -> dict[str, int]:
    """Multiplications of each kernel's products for a position of a head, by the kernel's name."""
    inverse = C * (4 + 2 * 3)
    return {
        gpu_pairs.NAME: C * (2 * d + inverse),
        gpu_forward.NAME: 2 * C * e + 3 * d * e,
        gpu_backward.NAME: 2 * C * e + 3 * d * e,
        gpu_backward_chunks.NAME: C * (2 * e + 4 * d) + 3 * d * e,
    }


def forward(plan: Plan, arrays: Mapping[str, jax.Array], *, save: bool) -> dict[str, jax.Array]:
    """As `gradient` asks; its q, k and v are [B, T, H, w] here."""
    T, e = arrays["v"].shape[1::2]
    q, k, v = (_padded(arrays[name]) for name in "qkv")
    numbers, _ = _numbers(plan, arrays)
    inverses, scores = gpu_pairs.pairs(plan.device, q, k, numbers, documents=plan.documents)
    state = _padded_state(arrays["state"]) if plan.given else None
    out = gpu_forward.forward(plan.device, q, k, v, inverses, scores, numbers, state, save=save)
    found = {"o": out["o"][:, :T, :, :e], "state_end": out["state_end"][:, :, : arrays["q"].shape[3], :e]}
    if save:
        found |= {"inverses": inverses, "scores": scores, "states": out["states"], "errors": out["errors"]}
    return found


def backward(
    plan: Plan, arrays: Mapping[str, jax.Array], saved: Mapping[str, jax.Array], cotangents: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """As `gradient` asks: gradients by the names of the arrays that they are of."""
    (T, d), e = arrays["q"].shape[1::2], arrays["v"].shape[3]
    q, k, do = (_padded(x) for x in (arrays["q"], arrays["k"], cotangents["o"]))
    numbers, seen = _numbers(plan, arrays)
    dstate_end = _padded_state(cotangents["state_end"])
    dv, dstates, dstate_start = gpu_backward.backward(
        plan.device, q, k, saved["inverses"], saved["scores"], numbers, do, dstate_end
    )
    dq, dk, found = gpu_backward_chunks.backward_chunks(
        plan.device, q, k, numbers, saved["states"], saved["errors"], do, dv, dstates, documents=plan.documents
    )
    flat = lambda x: x.reshape(*x.shape[:2], -1)[:, :, :T]
    out = {"dq": dq[:, :T, :, :d], "dk": dk[:, :T, :, :d], "dv": dv[:, :T, :, :e]}
    out["dbeta"] = flat(found[:, :, :, gpu_backward_chunks.DBETA])
    if plan.given:
        out["dstate_start"] = dstate_start[:, :, :d, :e]
    if plan.wants_decay:
        out["dlogs"] = flat(_decay_gradient(plan, arrays, found, numbers, seen))
    return out


def _padded(x: jax.Array) -> jax.Array:
    """[B, T, H, w] with zeros up to whole chunks and whole tiles."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % C), (0, 0), (0, -x.shape[3] % E)))


def _padded_state(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % E), (0, -x.shape[3] % E)))


def _begins(plan: Plan, arrays: Mapping[str, jax.Array]) -> jax.Array | None:
    """First positions of documents, counted from each position's chunk, [B, 1, N, C]."""
    if not plan.documents:
        return None
    starts = arrays["starts"]
    starts = jnp.pad(starts, ((0, 0), (0, -starts.shape[1] % C)), mode="edge")
    starts = starts.reshape(starts.shape[0], 1, -1, C)
    return starts - C * jnp.arange(starts.shape[2], dtype=starts.dtype)[:, None]


def _numbers(plan: Plan, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Numbers per position (see `gpu_chunk`), and what positions (rows) of a chunk see of its others [B or 1, 1, N or
    1, C, C]."""
    t, begins = jnp.arange(C), _begins(plan, arrays)
    seen = (t[:, None] >= t)[None, None, None]
    follows = writes = True
    if begins is not None:
        seen = seen & (t >= begins[..., None])
        follows, writes = begins < 0, t >= begins[..., -1:]
    behind = -arrays["logs"].shape[2] % C
    logs, beta = (
        jnp.pad(arrays[name], ((0, 0), (0, 0), (0, behind))).reshape(*arrays[name].shape[:2], -1, C)
        for name in ("logs", "beta")
    )
    # A document's sums begin anew with it: no other changes their bits.
    total = jnp.sum(jnp.where(seen, logs[..., None, :], 0), -1)
    read = jnp.where(follows, jnp.exp2(total), 0)
    write = jnp.where(writes, jnp.exp2(jnp.where(writes, total[..., -1:] - total, 0)), 0)
    begins = jnp.zeros((), jnp.float32) if begins is None else begins.astype(jnp.float32)
    rows = read, write, beta, total, jnp.broadcast_to(begins, total.shape)
    return jnp.stack(rows, axis=3), seen


def _decay_gradient(plan: Plan, arrays: Mapping[str, jax.Array], found: jax.Array, numbers: jax.Array, seen: jax.Array):
    """Of the log decays [B, H, N, C]: what is asked for from a position on, of what was written before it."""
    row = lambda which: found[:, :, :, which]
    parts = gpu_backward_chunks
    carry = numbers[:, :, :, READ, -1]
    behind = row(parts.WRITTEN).sum(-1) + carry * row(parts.CARRIED).sum(-1)
    passed = row(parts.ASKED) + row(parts.KEPT)
    passed = passed.at[..., -1].add(behind)
    if plan.documents:  # the first of a document carries nothing over
        seen = seen & (jnp.arange(C) != _begins(plan, arrays)[..., None])
    return jnp.sum(jnp.where(seen, passed[..., None], 0), -2)
