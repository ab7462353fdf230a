"""Softmax attention in plain XLA, blockwise: never more than one block of query rows' scores at a time.

Forward and backward follow FlashAttention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691):
the backward recomputes the scores of each block from the saved log-sum-exp.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnlab.ops.blockwise import (
    LOG2E,
    LOWEST,
    Config,
    HeadArray,
    Span,
    grouped,
    matmul,
    over_heads,
    over_tiles,
    put,
    take,
    tile_scores,
    varying,
)
from attnlab.ops.masks import Mask


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """See `attnlab.ops.attention.attention`."""
    config = Config(Mask(causal=mask.causal, window=mask.window), scale, soft_cap)
    arrays = (q_BTHd, k_BSKd, v_BSKe, sinks_H)
    # Gradients come out varying over every mesh axis; what is cast here is summed back to its own axes.
    return _attention(config, *varying(arrays, (arrays, mask)), (mask.k_start, mask.k_end))


def attention_with_lse(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `attnlab.ops.attention.attention_with_lse`."""
    config = Config(Mask(causal=mask.causal, window=mask.window), scale, soft_cap)
    arrays = (q_BTHd, k_BSKd, v_BSKe, sinks_H)
    o, lse_BKGT = _attention_with_lse(config, *varying(arrays, (arrays, mask)), (mask.k_start, mask.k_end))
    B, T, H, _ = q_BTHd.shape
    return o, jnp.moveaxis(lse_BKGT.reshape(B, H, T), 1, 2) / LOG2E


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: Config, q, k, v, sinks, intervals):
    return _attention_forward(config, q, k, v, sinks, intervals)[0]


def _attention_forward(config: Config, q, k, v, sinks, intervals):
    B, T, H, _ = q.shape
    K, e = k.shape[2], v.shape[3]
    stat = jnp.promote_types(q.dtype, jnp.float32)
    out = (HeadArray((B, T, K, H // K, e), q.dtype, 2), HeadArray((B, K, H // K, T), stat, 1))
    o, lse = over_heads(_forward_head, config, q, k, v, (), sinks, intervals, out)
    o = checkpoint_name(o.reshape(B, T, H, e), "attention_o")
    return o, (q, k, v, sinks, intervals, o, checkpoint_name(lse, "attention_lse"))


def _attention_backward(config: Config, residuals, do, dlse=None):
    """`dlse` [B, K, G, T] is the gradient of the log-sum-exp in log2 units, None where only o is used."""
    q, k, v, sinks, intervals, o, lse = residuals
    B, T, H, d = q.shape
    K = k.shape[2]
    out = (
        HeadArray((B, T, K, H // K, d), q.dtype, 2),
        HeadArray(k.shape, k.dtype, 2),
        HeadArray(v.shape, v.dtype, 2),
        HeadArray((B, K, H // K), lse.dtype, 1),
    )
    rest = (grouped(o, K), grouped(do, K), lse, *(() if dlse is None else (dlse,)))
    dq, dk, dv, dsinks = over_heads(_backward_head, config, q, k, v, rest, sinks, intervals, out)
    dsinks = None if sinks is None else dsinks.sum(0).reshape(H).astype(sinks.dtype)
    return dq.reshape(q.shape), dk, dv, dsinks, (None, None)


_attention.defvjp(_attention_forward, _attention_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention_with_lse(config: Config, q, k, v, sinks, intervals):
    return _attention_with_lse_forward(config, q, k, v, sinks, intervals)[0]


def _attention_with_lse_forward(config: Config, q, k, v, sinks, intervals):
    o, residuals = _attention_forward(config, q, k, v, sinks, intervals)
    return (o, residuals[-1]), residuals


_attention_with_lse.defvjp(
    _attention_with_lse_forward,
    lambda config, residuals, cotangents: _attention_backward(config, residuals, *cotangents),
)


def _forward_head(config: Config, q_TGd, k_Sd, v_Se, *, sinks, bounds):
    """One key head: o_TGe and the log2-sum-exp2 of the scores, lse_GT, sinks included."""
    T, G, _ = q_TGd.shape
    q_GTd = q_TGd.swapaxes(0, 1)
    stat = jnp.promote_types(q_TGd.dtype, jnp.float32)
    sinks_G1 = None if sinks is None else sinks.astype(stat)[:, None] * LOG2E

    def tile(rows: Span, keys: Span, carry):
        o_GTe, lse_GT = carry
        k, v = take(k_Sd, keys, 0), take(v_Se, keys, 0)
        scores, _ = tile_scores(config, take(q_GTd, rows, 1), k, bounds, rows, keys)
        highest = jnp.maximum(scores.max(-1), LOWEST)
        if sinks_G1 is not None:
            highest = jnp.maximum(highest, sinks_G1)
        weights = jnp.exp2(scores - highest[..., None])
        total = weights.sum(-1)
        if sinks_G1 is not None:
            total += jnp.exp2(sinks_G1 - highest)
        total = jnp.maximum(total, jnp.finfo(stat).tiny)
        o = matmul(weights.astype(v.dtype).reshape(-1, keys[1]), v).reshape(G, rows[1], -1)
        return put(o_GTe, o / total[..., None], rows), put(lse_GT, highest + jnp.log2(total), rows)

    carry = jnp.zeros((G, T, v_Se.shape[1]), stat), jnp.zeros((G, T), stat)
    carry = varying(carry, (q_TGd, k_Sd, v_Se, sinks, bounds))
    o_GTe, lse_GT = over_tiles(config, G, T, k_Sd.shape[0], bounds, tile, carry)
    return o_GTe.swapaxes(0, 1), lse_GT


def _backward_head(config: Config, q_TGd, k_Sd, v_Se, o_TGe, do_TGe, lse_GT, dlse_GT=None, *, sinks, bounds):
    """One key head: dq_TGd, dk_Sd, dv_Se and dsinks_G (zeros without sinks)."""
    T, G, d = q_TGd.shape
    S, e = v_Se.shape
    stat = lse_GT.dtype
    q_GTd, do_GTe = q_TGd.swapaxes(0, 1), do_TGe.swapaxes(0, 1)
    delta_GT = (o_TGe.astype(stat) * do_TGe.astype(stat)).sum(-1).T
    if dlse_GT is not None:
        delta_GT -= dlse_GT * LOG2E  # d lse / d score is the weight, as for a value of 1

    def tile(rows: Span, keys: Span, carry):
        dq_GTd, dk_dS, dv_eS = carry
        k, v = take(k_Sd, keys, 0), take(v_Se, keys, 0)
        q, do, lse, delta = (take(x, rows, 1) for x in (q_GTd, do_GTe, lse_GT, delta_GT))
        scores, slope = tile_scores(config, q, k, bounds, rows, keys)
        weights = jnp.exp2(scores - lse[..., None])
        q_, do_ = q.reshape(-1, d), do.reshape(-1, e)
        dscores = weights * (matmul(do_, v.T).reshape(weights.shape) - delta[..., None])
        if slope is not None:
            dscores *= slope
        dscores = dscores.astype(k.dtype).reshape(-1, keys[1])
        weights = weights.astype(v.dtype).reshape(-1, keys[1])
        # dk and dv are accumulated transposed: [d, rows] @ [rows, keys] is a plain product, while
        # [keys, rows] @ [rows, d] would first transpose the whole tile of scores.
        dk_dS = put(dk_dS, take(dk_dS, keys, 1) + matmul(q_.T, dscores), keys)
        dv_eS = put(dv_eS, take(dv_eS, keys, 1) + matmul(do_.T, weights), keys)
        return put(dq_GTd, matmul(dscores, k).reshape(q.shape), rows), dk_dS, dv_eS

    carry = tuple(jnp.zeros(shape, stat) for shape in ((G, T, d), (d, S), (e, S)))
    carry = varying(carry, (q_TGd, k_Sd, v_Se, do_TGe, sinks, bounds))
    dq_GTd, dk_dS, dv_eS = over_tiles(config, G, T, S, bounds, tile, carry)
    dsinks = jnp.zeros((G,), stat)
    if sinks is not None:
        dsinks = -(jnp.exp2(sinks.astype(stat)[:, None] * LOG2E - lse_GT) * delta_GT).sum(-1)
    return dq_GTd.swapaxes(0, 1) * config.scale, dk_dS.T * config.scale, dv_eS.T, dsinks
