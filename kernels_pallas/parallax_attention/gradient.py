"""The gradient around the kernels, the same for every platform.

A platform is a module with two functions, on arrays as the user gives them; `bounds` is from `masks.intervals`.

    forward(call, q, probe, k, v, bounds) -> Output
        o and the mean of values [B, T, H, e] in the dtype of q; lse2 and the mean tilt [B, H, T], float32. What it
        gives for rows that see nothing is not used.
    backward(call, q, probe, k, v, bounds, do, lse2, delta, mean_slope, keep) -> (dq, dprobe, dk, dv)
        With p the weights of a row, c the product `do . v` less its mean, `mean_slope`, and `1 - t` the tilt's product
        taken from `keep`: d logit = p (c (1 - t) - delta), d tilt = -p c, d v = p (1 - t) do. Rows that see nothing
        have q = probe = do = 0, an lse2 of `NOTHING`, and other statistics that are finite.
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.flash_attention.call import NOTHING, Call
from kernels_pallas.flash_attention.gradient import row_bounds, seen_by_any
from kernels_pallas.parallax_attention import gpu, tpu

KERNELS: dict[str, types.ModuleType] = {"tpu": tpu, "cuda": gpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(call: Call, q, probe, k, v, starts, ends):
    """o; see `parallax_attention`."""
    return _forward(call, q, probe, k, v, starts, ends)[0]


def _forward(call: Call, q, probe, k, v, starts, ends):
    bounds, some = row_bounds(q, k, starts, ends)
    k, v = seen_by_any(call, bounds, k, v)
    o, lse2, mean, mean_tilt = KERNELS[call.platform].forward(call, q, probe, k, v, bounds)
    if some is not None:
        o = jnp.where(some[..., None, None], o, 0)
    return o, (k, v, lse2, mean, mean_tilt)


def _attention_forward(call: Call, q, probe, k, v, starts, ends):
    o, (k, v, lse2, mean, mean_tilt) = _forward(call, q, probe, k, v, starts, ends)
    o, mean = (checkpoint_name(x, "attention_o") for x in (o, mean))
    lse2, mean_tilt = (checkpoint_name(x, "attention_lse") for x in (lse2, mean_tilt))
    return o, (q, probe, k, v, starts, ends, o, mean, lse2, mean_tilt)


def _attention_backward(call: Call, residuals, do):
    q, probe, k, v, starts, ends, o, mean, lse2, mean_tilt = residuals
    bounds, some = row_bounds(q, k, starts, ends)
    if some is not None:  # rows that see nothing may hold anything
        here, of_head = some[..., None, None], some[:, None]
        q, probe, do, mean = (jnp.where(here, x, 0) for x in (q, probe, do, mean))
        lse2, mean_tilt = jnp.where(of_head, lse2, NOTHING), jnp.where(of_head, mean_tilt, 0)
    do = do.astype(q.dtype)
    wide, mean = do.astype(jnp.float32), mean.astype(jnp.float32)
    row = lambda x: (wide * x).sum(-1).swapaxes(1, 2)
    statistics = lse2, row(o.astype(jnp.float32) - mean), row(mean), 1 + mean_tilt
    return *KERNELS[call.platform].backward(call, q, probe, k, v, bounds, do, *statistics), None, None


attention.defvjp(_attention_forward, _attention_backward)
