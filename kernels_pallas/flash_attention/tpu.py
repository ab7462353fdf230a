"""Flash attention on TPU: arrays as the kernels want them; keys too many for fast memory by blocks of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import tuning
from kernels_pallas.flash_attention import tpu_arrays, tpu_backward, tpu_forward
from kernels_pallas.flash_attention.call import LOG2E, NOTHING, Call
from kernels_pallas.flash_attention.pattern import Layout, Pattern
from kernels_pallas.flash_attention.tpu_plan import Plan


def forward(call: Call, q, k, v, bounds, sinks, gate, key_bias, heads_BN=None, pattern=None):
    """See `kernels_pallas.flash_attention.gradient`."""
    T, (S, K), e = q.shape[1], k.shape[1:3], v.shape[3]
    blocks, keys = tpu_arrays.forward_tiles(call, q, k, v, key_bias is not None, pattern=pattern)
    rows, whole = tpu_arrays.rounded(T, blocks.rows), tpu_arrays.rounded(S, keys)
    pattern = None if pattern is None else pattern.padded(rows, whole)
    bounds, low, high = tpu_arrays.padded_bounds(call, bounds, T, S, rows, whole)
    q, gate = (None if x is None else tpu_arrays.heads(x, rows) for x in (q, gate))
    k, v = tpu_arrays.heads(k, whole), tpu_arrays.heads(v, whole)
    bias = _bias(key_bias, K, S, whole)
    options = {"vmem": tuning.vmem_limit(call.kind), "interpret": call.interpret}
    if keys == whole:
        plan = Plan.of(call, blocks, low, high, sinks is not None or bias is not None, layout(pattern))
        o, lse2, *_ = tpu_forward.run(
            plan, q, k, v, bounds, sinks, gate, bias, heads_BN, None, pattern, out_dtype=q.dtype, **options
        )
    else:
        plan = Plan.of(call, blocks, low, high, sinks is not None or bias is not None)
        wide, lse2 = _by_key_blocks(plan, q, k, v, bounds, bias, heads_BN, pattern, keys, options)
        wide, lse2 = _with_sinks(wide, lse2, sinks)
        o = (wide if gate is None else wide * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(q.dtype)
    return o[:, :, :T, :e].swapaxes(1, 2), lse2[:, :, :T]


def backward(call: Call, q, k, v, bounds, key_bias, do, lse2, delta, heads_BN=None, pattern=None):
    """See `kernels_pallas.flash_attention.gradient`."""
    (T, d), (S, K), e, dtype = q.shape[1::2], k.shape[1:3], v.shape[3], q.dtype
    blocks, keys = tpu_arrays.backward_tiles(call, q, k, v, key_bias is not None, pattern=pattern)
    rows, whole = tpu_arrays.rounded(T, blocks.rows), tpu_arrays.rounded(S, keys)
    pattern = None if pattern is None else pattern.padded(rows, whole)
    bounds, low, high = tpu_arrays.padded_bounds(call, bounds, T, S, rows, whole)
    q, do = tpu_arrays.heads(q, rows), tpu_arrays.heads(do, rows)
    k, v = tpu_arrays.heads(k, whole), tpu_arrays.heads(v, whole)
    behind = ((0, 0), (0, 0), (0, rows - T))
    lse2, delta = jnp.pad(lse2, behind, constant_values=NOTHING), jnp.pad(delta, behind)
    bias = _bias(key_bias, K, S, whole)
    plan = Plan.of(call, blocks, low, high, bias is not None, layout(pattern))
    options = {"vmem": tuning.vmem_limit(call.kind), "interpret": call.interpret}
    if keys == whole:
        dq, dk, dv, dbias, _ = tpu_backward.run(
            plan, q, k, v, do, lse2, delta, bounds, bias, heads_BN, None, pattern, out_dtype=dtype, **options
        )
    else:

        def turn(dq, n):
            part = tpu_arrays.key_block(n, keys, k, v, bounds, bias)
            own, of_block = tpu_arrays.block_lse2(lse2, part[2]), None if pattern is None else pattern.block(n, keys)
            its, more = dataclasses.replace(plan, pattern=layout(of_block)), (heads_BN, None, of_block)
            more, *of_keys, _ = tpu_backward.run(
                its, q, part[0], part[1], do, own, delta, *part[2:], *more, out_dtype=jnp.float32, **options
            )
            return dq + more, of_keys

        dq, of_keys = lax.scan(turn, jnp.zeros(q.shape, jnp.float32), jnp.arange(whole // keys))
        dk, dv, dbias = (None if x is None else jnp.concatenate(list(x), 2) for x in of_keys)
    if heads_BN is not None:  # no tile was there to write the gradients of a head that has none
        has_rows = (heads_BN[..., None] == jnp.arange(K)).any(1)[..., None, None]
        dk, dv = jnp.where(has_rows, dk, 0), jnp.where(has_rows, dv, 0)
    back = lambda x, n, width: x[:, :, :n, :width].swapaxes(1, 2).astype(dtype)
    dbias = None if dbias is None else dbias[:, :, :S]
    return back(dq, T, d), back(dk, S, d), back(dv, S, e), dbias


def kernel_runs(call: Call, q, k, v, bias: bool) -> dict[str, int]:
    """How often each kernel runs in a forward and a backward, by name; of q, k, v only shapes and dtypes matter."""
    S = k.shape[1]
    counts = {}
    for name, tiles in (("flash_forward", tpu_arrays.forward_tiles), ("flash_backward", tpu_arrays.backward_tiles)):
        counts[name] = -(-S // tiles(call, q, k, v, bias)[1])
    return counts


def _bias(key_bias: jax.Array | None, heads: int, keys: int, whole: int) -> jax.Array | None:
    """[B, K, whole], zeros behind."""
    if key_bias is None:
        return None
    bias = key_bias[:, None] if key_bias.ndim == 2 else key_bias
    bias = jnp.broadcast_to(bias.astype(jnp.float32), (bias.shape[0], heads, keys))
    return jnp.pad(bias, ((0, 0), (0, 0), (0, whole - keys)))


def layout(pattern: Pattern | None) -> Layout | None:
    """`Plan.pattern`."""
    return None if pattern is None else pattern.layout()


def _by_key_blocks(plan: Plan, q, k, v, bounds, bias, heads_BN, pattern, keys: int, options: dict[str, Any]):
    """The output, float32 and ungated, and lse2, put together from those over each block of keys."""

    def turn(carry, n):
        o, lse2 = carry
        k_, v_, own, bias_ = tpu_arrays.key_block(n, keys, k, v, bounds, bias)
        of_block = None if pattern is None else pattern.block(n, keys)
        its, more = dataclasses.replace(plan, pattern=layout(of_block)), (heads_BN, None, of_block)
        o_, lse2_, *_ = tpu_forward.run(its, q, k_, v_, own, None, None, bias_, *more, out_dtype=jnp.float32, **options)
        if own is not None:
            some = (own[1] > own[0])[:, None]
            o_, lse2_ = jnp.where(some[..., None], o_, 0), jnp.where(some, lse2_, -NOTHING)
        return _merged(o, lse2, o_, lse2_), None

    empty = jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32), jnp.full(q.shape[:3], -NOTHING, jnp.float32)
    return lax.scan(turn, empty, jnp.arange(k.shape[2] // keys))[0]


def _merged(o, lse2, other, other_lse2):
    """Two outputs over different keys, as one."""
    top = jnp.maximum(lse2, other_lse2)
    a, b = jnp.exp2(lse2 - top), jnp.exp2(other_lse2 - top)
    o = (o * a[..., None] + other * b[..., None]) / (a + b)[..., None]
    return o, top + jnp.log2(a + b)


def _with_sinks(o, lse2, sinks):
    if sinks is None:
        return o, lse2
    sink = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None] * LOG2E, lse2.shape)
    return _merged(o, lse2, jnp.zeros_like(o), sink)
