"""Causal flow attention on NVIDIA's Hopper: arrays as the kernels want them, and the gradient around them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.flow_attention import gpu_backward, gpu_forward
from kernels_pallas.flow_attention.gpu_forward import CHUNK, NUMBERS, TILE, VECTORS, WIDEST
from kernels_pallas.flow_attention.layout import Sums
from kernels_pallas.flow_attention.plan import Rule
from kernels_pallas.linear_recurrence import gpu as linear_recurrence


def unsupported(dtype: Any, d: int, e: int) -> str | None:
    """Why the kernel cannot serve heads of these widths, or None."""
    if dtype != jnp.bfloat16:
        return f"on GPUs it computes bfloat16, not {jnp.dtype(dtype)}"
    if max(d, e) > WIDEST:
        return f"on GPUs widths of keys and values are at most {WIDEST}, not {d} and {e}"
    return None


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static."""

    rule: Rule
    interpret: Any

    @property
    def device(self) -> hopper.Device:
        return hopper.device_of(self.interpret)


def flow(
    interpret: Any, rule: Rule, q, k, v, documents, count, before: Sums | None
) -> tuple[jax.Array, jax.Array | None, Sums]:
    """See `kernels_pallas.flow_attention.gradient.flow`."""
    counts, limits = _places(documents, q.shape[1], None if before is None else count)
    return _rule(_Call(rule, interpret), q, k, v, counts, limits, before)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(call: _Call, *arrays: Any) -> tuple[jax.Array, jax.Array | None, Sums]:
    return _forward(call, *arrays, save=False)[0]


def _forward(call: _Call, q, k, v, counts, limits, before: Sums | None, *, save: bool) -> tuple[Any, Any]:
    """The results, and of positions [B, H, ., T] and chunks what the gradient needs."""
    (B, T, H, d), e, rule = q.shape, v.shape[3], call.rule
    vectors, rivals, pairs = jnp.zeros((B, H, len(VECTORS), d)), jnp.zeros((B, H)), None
    if before is not None:
        vectors, rivals, pairs = _stacked(before), before.rivals, _padded_pairs(before.pairs)
    o, numbers, vectors, rivals, pairs, *kept = gpu_forward.forward(
        call.device, rule, *(_padded(x) for x in (q, k, v)), _padded_row(counts.astype(jnp.float32)),
        _padded_limits(limits), _padded_vectors(vectors), rivals, pairs, width=d, save=save,
    )  # fmt: skip
    outgoing = None
    if rule.competition:
        outgoing = jnp.moveaxis(numbers[:, :, NUMBERS.index("outgoing"), :T], 1, 2)
    found = {name: vectors[:, :, n, :d] for n, name in enumerate(VECTORS)}
    rivals = rivals if rule.competition else jnp.zeros((B, H))
    o = o[:, :T, :, :e]
    return (o, outgoing, Sums(**found, rivals=rivals, pairs=pairs[:, :, :d, :e])), (numbers, *kept)


def _rule_forward(call: _Call, *arrays: Any) -> tuple[Any, Any]:
    out, kept = _forward(call, *arrays, save=True)
    return out, (arrays, kept)


def _rule_backward(call: _Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    """Three sweeps of the linear recurrence whose values are weighted, then what flows add to two of them."""
    (q, k, v, counts, limits, before), (numbers, weights, vectors) = residuals
    (do, d_outgoing, d_after), (T, d), rule = cotangents, q.shape[1::2], call.rule
    scale, share, outgoing = (numbers[:, :, n, :T] for n in range(len(NUMBERS)))
    share = share if rule.competition else jnp.ones_like(share)
    take = weights[:, :, 0, :T]
    emit = weights[:, :, 1, :T] if rule.allocation else jnp.zeros_like(take)
    by_position = lambda x: jnp.moveaxis(x, 1, 2)[..., None]
    weighted = lambda x, by: (x.astype(jnp.float32) * by_position(by)).astype(q.dtype)
    dots = lambda x, y: jnp.moveaxis(jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1), 1, 2)
    arrays = {"q": q, "k": k, "u": weighted(v, share)}
    arrays |= {} if limits is None else {"starts": jnp.broadcast_to(limits, q.shape[:2])}
    arrays |= {} if before is None else {"state": before.pairs}
    recurrence = linear_recurrence.gradients(
        linear_recurrence.Call(call.interpret), arrays, weighted(do, scale), d_after.pairs
    )
    saved = scale, share, outgoing, take, emit
    delta, spent = dots(recurrence["q"], q), share * dots(recurrence["u"], v)
    d_outgoing = 0.0 if d_outgoing is None else jnp.moveaxis(d_outgoing, 2, 1)
    rows = _numbers(rule, counts, saved, delta, spent, d_outgoing)
    dq, dk, dvectors, drivals = gpu_backward.backward(
        call.device, rule, _padded(q), _padded(k), _padded(recurrence["q"]), _padded(recurrence["k"]),
        _padded_row(rows), _padded_limits(limits), vectors, _padded_vectors(_stacked(d_after)),
        d_after.rivals,
    )  # fmt: skip
    d_before = None
    if before is not None:
        found = {name: dvectors[:, :, n, :d] for n, name in enumerate(VECTORS)}
        d_before = Sums(**found, rivals=drivals, pairs=recurrence["state"])
    return dq[:, :T, :, :d], dk[:, :T, :, :d], weighted(recurrence["u"], share), None, None, d_before


_rule.defvjp(_rule_forward, _rule_backward)


def _numbers(rule: Rule, counts, saved, delta, spent, d_outgoing) -> jax.Array:
    """Those of `gpu_backward`, [B, H, 8, T]. delta: q . dq of the recurrence, as rounded, which is do . o; spent: of
    shares their gradient, times them."""
    scale, share, outgoing, take, emit = saved
    N = jnp.broadcast_to(counts.astype(jnp.float32)[:, None], delta.shape)
    zero = jnp.zeros_like(delta)
    alpha = base = rival = later = zero
    if rule.allocation:
        alpha = delta * (1 - scale * N / take) / N
    if rule.competition:
        clipped = jnp.clip(outgoing, -rule.clip, rule.clip)
        inside, exponential = jnp.abs(outgoing) < rule.clip, jnp.exp(clipped)
        base = jnp.where(inside, spent, 0) + d_outgoing
        rival, later = jnp.where(inside, exponential, 0), -spent * share / (N * exponential)
    rows = {
        gpu_backward.ALPHA: alpha, gpu_backward.DELTA: delta, gpu_backward.TAKE: take, gpu_backward.EMIT: emit,
        gpu_backward.BASE: base, gpu_backward.RIVAL: rival, gpu_backward.SPENT: later, gpu_backward.COUNT: N,
    }  # fmt: skip
    return jnp.stack([rows[n] for n in gpu_backward.ROWS_OF], axis=2)


def _padded(x: jax.Array) -> jax.Array:
    """[B, T, H, w] with zeros up to whole chunks and whole tiles."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK), (0, 0), (0, -x.shape[3] % TILE)])


def _padded_row(x: jax.Array) -> jax.Array:
    """[..., T]."""
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % CHUNK)])


def _padded_limits(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK)], mode="edge")


def _padded_vectors(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [*[(0, 0)] * 3, (0, -x.shape[3] % TILE)])


def _padded_pairs(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % TILE), (0, -x.shape[3] % TILE)])


def _stacked(sums: Sums) -> jax.Array:
    return jnp.stack([getattr(sums, name) for name in VECTORS], 2)


def _places(documents: jax.Array | None, length: int, count: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Each position's number in its document [B or 1, T], and its document's first position, -1 of document 0."""
    t = jnp.arange(length, dtype=jnp.int32)[None]
    if documents is None:
        return t + 1 if count is None else t + 1 + count[:, None], None
    new = jnp.pad(documents[:, 1:] != documents[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    first = jax.lax.cummax(jnp.where(new, t, 0), axis=1)
    own = documents == 0
    counts = t - first + 1
    return counts if count is None else counts + jnp.where(own, count[:, None], 0), jnp.where(own, -1, first)
