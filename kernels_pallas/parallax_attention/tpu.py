"""Parallax on TPU: flash attention's kernels with a probe; keys too many for fast memory by blocks of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import tuning
from kernels_pallas.flash_attention import tpu_arrays, tpu_backward, tpu_forward
from kernels_pallas.flash_attention.call import NOTHING, Call
from kernels_pallas.flash_attention.tpu_forward import Output
from kernels_pallas.flash_attention.tpu_plan import Plan

# Bytes of fast memory beside what belongs to keys: more rows, and in the forward tilts.
_FORWARD_REST, _BACKWARD_REST = 2 * tuning.FORWARD_REST, tuning.BACKWARD_REST + 4 * 2**20


def forward(call: Call, q, probe, k, v, bounds) -> Output:
    """See `gradient`."""
    T, S, e = q.shape[1], k.shape[1], v.shape[3]
    blocks, keys = _forward_tiles(call, q, k, v)
    rows, whole = tpu_arrays.rounded(T, blocks.rows), tpu_arrays.rounded(S, keys)
    bounds, low, high = tpu_arrays.padded_bounds(call, bounds, T, S, rows, whole)
    q, probe = (tpu_arrays.heads(x, rows) for x in (q, probe))
    k, v = (tpu_arrays.heads(x, whole) for x in (k, v))
    plan = Plan.of(call, blocks, low, high, False)
    options = {"vmem": tuning.vmem_limit(call.kind), "interpret": call.interpret}
    if keys == whole:
        out = tpu_forward.run(plan, q, k, v, bounds, None, None, None, None, probe, out_dtype=q.dtype, **options)
    else:
        out = _by_key_blocks(plan, q, probe, k, v, bounds, keys, options)
    back = lambda x: x[:, :, :T, :e].swapaxes(1, 2).astype(q.dtype)
    return Output(back(out.o), out.lse2[:, :, :T], back(out.mean), out.mean_tilt[:, :, :T])


def backward(call: Call, q, probe, k, v, bounds, do, lse2, delta, mean_slope, keep):
    """See `gradient`."""
    (T, d), S, e, dtype = q.shape[1::2], k.shape[1], v.shape[3], q.dtype
    blocks, keys = _backward_tiles(call, q, k, v)
    rows, whole = tpu_arrays.rounded(T, blocks.rows), tpu_arrays.rounded(S, keys)
    bounds, low, high = tpu_arrays.padded_bounds(call, bounds, T, S, rows, whole)
    q, probe, do = (tpu_arrays.heads(x, rows) for x in (q, probe, do))
    k, v = (tpu_arrays.heads(x, whole) for x in (k, v))
    behind = ((0, 0), (0, 0), (0, rows - T))
    lse2 = jnp.pad(lse2, behind, constant_values=NOTHING)
    delta, *of_probe = (jnp.pad(x, behind) for x in (delta, mean_slope, keep))
    plan = Plan.of(call, blocks, low, high, False)
    options = {"vmem": tuning.vmem_limit(call.kind), "interpret": call.interpret}

    of_probe = tpu_backward.Probe(probe, *of_probe)

    def against(k, v, bounds, lse2, out_dtype):
        found = tpu_backward.run(
            plan, q, k, v, do, lse2, delta, bounds, None, None, of_probe, out_dtype=out_dtype, **options
        )
        return (found.dq, found.dprobe), (found.dk, found.dv)

    if keys == whole:
        of_rows, of_keys = against(k, v, bounds, lse2, dtype)
    else:

        def turn(of_rows, n):
            k_, v_, own, _ = tpu_arrays.key_block(n, keys, k, v, bounds)
            more, of_keys = against(k_, v_, own, tpu_arrays.block_lse2(lse2, own), jnp.float32)
            return jax.tree.map(jnp.add, of_rows, more), of_keys

        nothing = jnp.zeros(q.shape, jnp.float32)
        of_rows, of_keys = lax.scan(turn, (nothing, nothing), jnp.arange(whole // keys))
        of_keys = [jnp.concatenate(list(x), 2) for x in of_keys]
    back = lambda x, n, width: x[:, :, :n, :width].swapaxes(1, 2).astype(dtype)
    return *(back(x, T, d) for x in of_rows), back(of_keys[0], S, d), back(of_keys[1], S, e)


def kernel_runs(call: Call, q, k, v) -> dict[str, int]:
    """How often each kernel runs in a forward and a backward, by name; of q, k, v only shapes and dtypes matter."""
    tiles = {"parallax_forward": _forward_tiles, "parallax_backward": _backward_tiles}
    return {name: -(-k.shape[1] // of(call, q, k, v)[1]) for name, of in tiles.items()}


def _forward_tiles(call: Call, q, k, v) -> tuple[tuning.ForwardBlocks, int]:
    blocks, keys = tpu_arrays.forward_tiles(call, q, k, v, rest=_FORWARD_REST, kernels="parallax")
    return dataclasses.replace(blocks, ones=True), keys


def _backward_tiles(call: Call, q, k, v) -> tuple[tuning.BackwardBlocks, int]:
    return tpu_arrays.backward_tiles(call, q, k, v, rest=_BACKWARD_REST, kernels="parallax")


def _by_key_blocks(plan: Plan, q, probe, k, v, bounds, keys: int, options: dict[str, Any]) -> Output:
    """What `tpu_forward.run` gives, in float32, put together from that over each block of keys."""

    def turn(known: Output, n):
        k_, v_, own, _ = tpu_arrays.key_block(n, keys, k, v, bounds)
        more = tpu_forward.run(plan, q, k_, v_, own, None, None, None, None, probe, out_dtype=jnp.float32, **options)
        if own is not None:
            some = (own[1] > own[0])[:, None]
            wide = some[..., None]
            more = Output(
                jnp.where(wide, more.o, 0),
                jnp.where(some, more.lse2, -NOTHING),
                jnp.where(wide, more.mean, 0),
                jnp.where(some, more.mean_tilt, 0),
            )
        return _merged(known, more), None

    values = jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32)
    lse2 = jnp.full(q.shape[:3], -NOTHING, jnp.float32)
    nothing = Output(values, lse2, values, jnp.zeros_like(lse2))
    return lax.scan(turn, nothing, jnp.arange(k.shape[2] // keys))[0]


def _merged(a: Output, b: Output) -> Output:
    """Two over different keys, as one: what is between their means comes off the output."""
    top = jnp.maximum(a.lse2, b.lse2)
    total = jnp.exp2(a.lse2 - top) + jnp.exp2(b.lse2 - top)
    lse2 = top + jnp.log2(total)
    x, y = (jnp.exp2(part.lse2 - top) / total for part in (a, b))
    tilt = x * a.mean_tilt + y * b.mean_tilt
    x_wide, y_wide = x[..., None], y[..., None]
    off = lambda part: part.o - (part.mean_tilt - tilt)[..., None] * part.mean
    return Output(x_wide * off(a) + y_wide * off(b), lse2, x_wide * a.mean + y_wide * b.mean, tilt)
