"""The gradient around the kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.flash_attention.call import NOTHING, Call
from kernels_pallas.flash_attention.gradient import row_bounds, seen_by_any
from kernels_pallas.parallax_attention import tpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(call: Call, q, probe, k, v, starts, ends):
    """o; see `parallax_attention`."""
    return _forward(call, q, probe, k, v, starts, ends)[0]


def _forward(call: Call, q, probe, k, v, starts, ends):
    bounds, some = row_bounds(q, k, starts, ends)
    k, v = seen_by_any(call, bounds, k, v)
    o, lse2, mean, mean_tilt = tpu.forward(call, q, probe, k, v, bounds)
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
    return *tpu.backward(call, q, probe, k, v, bounds, do, *statistics), None, None


attention.defvjp(_attention_forward, _attention_backward)
