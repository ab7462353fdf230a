"""The gradient around the kernels, the same for every platform.

A platform is a module with two functions, on arrays as the user gives them (B batch, T rows, H heads, S keys, K key
heads). `lse2` is the log-sum-exp in log2 units, float32 [B, H, T], sinks included.

    forward(call, q, k, v, bounds, sinks, gate, key_bias) -> (o, lse2)
        o [B, T, H, e]. What it gives for rows that see nothing is not used.
    backward(call, q, k, v, bounds, key_bias, do, lse2, delta) -> (dq, dk, dv, dkey_bias or None)
        do: the gradient of the ungated output; delta [B, H, T] float32: their product, less the gradient of lse. The
        gradient of a logit is `p (do . v - delta)`. Rows that see nothing have q = do = delta = 0 and lse2 = `NOTHING`,
        so that each p is 0 there. dkey_bias [B, K, S], float32.

Both take `heads_BN` by name where rows are packed (`kernels_pallas.routed_attention`): H is 1, and it says which key
head each tile of rows reads; dk and dv of a head that no tile reads are 0. Both take `pattern` where the mask is more
than intervals (`tpu_pattern`, on TPU alone); the lse2 of a row that sees nothing is then below -1e19. `bounds` is from
`masks.intervals`: None, or starts and ends. Keys and values that no row sees are 0, where there is no pattern.
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import masks
from kernels_pallas.flash_attention import gpu, tpu
from kernels_pallas.flash_attention.call import LOG2E, NOTHING, Call

_NO_KEYS = -1e19  # above the lse of a row that sees nothing
KERNELS: dict[str, types.ModuleType] = {"tpu": tpu, "cuda": gpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(call: Call, q, k, v, starts, ends, sinks, gate, key_bias, heads_BN=None, pattern=None):
    """o, and the natural lse; see `flash_attention`, and for `heads_BN` `routed_attention`."""
    return _forward(call, q, k, v, starts, ends, sinks, gate, key_bias, heads_BN, pattern)[0]


def _forward(call: Call, q, k, v, starts, ends, sinks, gate, key_bias, heads_BN, pattern):
    bounds, some = row_bounds(q, k, starts, ends)
    k, v = seen_by_any(call, bounds, k, v)
    more = _given(heads_BN=heads_BN, pattern=pattern)
    o, lse2 = KERNELS[call.platform].forward(call, q, k, v, bounds, sinks, gate, key_bias, **more)
    lse = lse2.swapaxes(1, 2) / LOG2E
    some = _some(some, pattern, sinks, lse)
    if some is not None:
        o = jnp.where(some[..., None], o, 0)
        lse = jnp.where(some, lse, -jnp.inf if sinks is None else sinks.astype(jnp.float32))
    return (o, lse), (k, v)


def _attention_forward(call: Call, q, k, v, *arrays):
    (o, lse), seen = _forward(call, q, k, v, *arrays)
    o, lse = checkpoint_name(o, "attention_o"), checkpoint_name(lse, "attention_lse")
    return (o, lse), ((q, *seen, *arrays), o, lse)


def _attention_backward(call: Call, residuals, cotangents):
    (q, k, v, starts, ends, sinks, gate, key_bias, heads_BN, pattern), o, lse = residuals
    do, dlse = (x.astype(jnp.float32) for x in cotangents)
    bounds, some = row_bounds(q, k, starts, ends)
    some = _some(some, pattern, sinks, lse)
    dgate, wide = None, o.astype(jnp.float32)
    if gate is not None:
        # The gate's gradient needs the gated output alone. `delta` takes `do` rounded as the kernels' products do: what
        # logits cannot matter for, as in a row of one key, then cancels.
        open_, closed = (jax.nn.sigmoid(sign * gate.astype(jnp.float32)) for sign in (1, -1))
        dgate = (do * wide * closed).astype(gate.dtype)
        do, wide = do * open_, jnp.where(open_ > 0, wide / open_, 0)
    do = do.astype(q.dtype)
    delta = (wide * do.astype(jnp.float32)).sum(-1)
    if some is not None:  # the lse of what sees nothing is no function of q, k or v
        do, q = (jnp.where(some[..., None], x, 0) for x in (do, q))
        delta = jnp.where(some, delta, 0)
    delta -= dlse
    dsinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(jnp.float32) - lse)
        dsinks = -(weight * delta).sum((0, 1)).astype(sinks.dtype)
    lse2 = lse * LOG2E
    if some is not None:
        delta, lse2 = jnp.where(some, delta, 0), jnp.where(some, lse2, NOTHING)
    rows = [x.swapaxes(1, 2) for x in (lse2, delta)]
    more = _given(heads_BN=heads_BN, pattern=pattern)
    dq, dk, dv, dbias = KERNELS[call.platform].backward(call, q, k, v, bounds, key_bias, do, *rows, **more)
    if key_bias is not None:
        dbias = (dbias.sum(1) if key_bias.ndim == 2 else dbias).astype(key_bias.dtype)
    return dq, dk, dv, None, None, dsinks, dgate, dbias, None, None


attention.defvjp(_attention_forward, _attention_backward)


def _given(**options):
    """Those that there are: not every platform has all."""
    return {name: x for name, x in options.items() if x is not None}


def _some(some_BT, pattern, sinks, lse_BTH):
    """Which rows see anything, [B, T, 1 or H]; None: all do, or it need not be known."""
    if pattern is None:
        return None if some_BT is None else some_BT[..., None]
    return None if sinks is not None else lse_BTH > _NO_KEYS


def row_bounds(q, k, starts, ends):
    """The intervals, and which rows see anything [B, T]; None: all see all."""
    bounds = masks.intervals(starts, ends, q.shape[1], k.shape[1])
    return bounds, None if bounds is None else bounds[1] > bounds[0]


def seen_by_any(call: Call, bounds, k, v):
    """Keys and values with 0 for what no row sees; what is saved for the backward, so that it is done once."""
    if bounds is None or call.keys_seen:
        return k, v
    seen = masks.seen_keys(*bounds, k.shape[1], low=call.low, high=call.high)[..., None, None]
    return jnp.where(seen, k, 0), jnp.where(seen, v, 0)
