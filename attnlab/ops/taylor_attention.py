"""Attention with weights `1 + s + s^2 / 2` in place of `exp(s)`, as one op: its definition, and its blocks in XLA.

Weights are `(1 + s)^2 / 2 + 1 / 2`, at least 1/2 and of no great range, so that blocks need no running maximum: a sum
is taken and divided by. The backward pass forms the scores again; with g the gradient of the output and A the sum,

    ds = (1 + s) (g . v_s - g . o) / A      d q = sum ds k      d k_s = sum ds q      d v_s = sum w g / A

where ds is also multiplied by the scale in the gradients of q and k.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnlab.ops.attention_frame import AttentionSpec, attend, check_shapes, over_devices, plain_masks
from attnlab.ops.blockwise import (
    Config,
    HeadArray,
    Span,
    grouped,
    matmul,
    over_heads,
    over_tiles,
    put,
    take,
    varying,
    visible_of_tile,
)
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.feature_maps import Taylor
from attnlab.ops.masks import Mask


def definition(q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKe: jax.Array, mask: Mask, *, scale: float) -> jax.Array:
    """The formula, with all T x S weights. In float32, or float64 for float64 inputs."""
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (q_BTHd, k_BSKd, v_BSKe))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * scale
    weights = jnp.where(mask.visible(q.shape[1], k.shape[1]), 1 + s + s * s / 2, 0)
    total = weights.sum(-1, keepdims=True)
    weights /= jnp.where(total > 0, total, 1)
    return jnp.einsum("bhts,bshe->bthe", weights, v, precision="highest").astype(q_BTHd.dtype)


def blocks(q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKe: jax.Array, mask: Mask, *, scale: float) -> jax.Array:
    """The same, never more than one block of rows' weights at a time: memory is linear in T."""
    config = Config(Mask(causal=mask.causal, window=mask.window), scale, None)
    arrays = (q_BTHd, k_BSKd, v_BSKe)
    return _attention(config, *varying(arrays, (arrays, mask)), (mask.k_start, mask.k_end))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: Config, q, k, v, intervals):
    return _forward(config, q, k, v, intervals)[0]


def _forward(config: Config, q, k, v, intervals):
    B, T, H, _ = q.shape
    K, e = k.shape[2], v.shape[3]
    stat = jnp.promote_types(q.dtype, jnp.float32)
    out = (HeadArray((B, T, K, H // K, e), q.dtype, 2), HeadArray((B, K, H // K, T), stat, 1))
    o, total = over_heads(_forward_head, config, q, k, v, (), None, intervals, out)
    o = checkpoint_name(o.reshape(B, T, H, e), "attention_o")
    return o, (q, k, v, intervals, o, checkpoint_name(total, "attention_lse"))


def _backward(config: Config, residuals, do):
    q, k, v, intervals, o, total = residuals
    B, T, H, d = q.shape
    K = k.shape[2]
    out = (
        HeadArray((B, T, K, H // K, d), q.dtype, 2),
        HeadArray(k.shape, k.dtype, 2),
        HeadArray(v.shape, v.dtype, 2),
    )
    rest = grouped(o, K), grouped(do, K), total
    dq, dk, dv = over_heads(_backward_head, config, q, k, v, rest, None, intervals, out)
    return dq.reshape(q.shape), dk, dv, (None, None)


_attention.defvjp(_forward, _backward)


def _one_more(config: Config, q_Grd, k_Ld) -> jax.Array:
    """`1 + s` [G, r, L], s the scores of a tile."""
    G, r, d = q_Grd.shape
    # The factor goes into q, which is small, where that loses nothing.
    wide = jnp.finfo(q_Grd.dtype).bits >= 32
    products = matmul((q_Grd * config.scale if wide else q_Grd).reshape(G * r, d), k_Ld.T).reshape(G, r, -1)
    return 1 + (products if wide else products * config.scale)


def _seen(x: jax.Array, bounds, rows: Span, keys: Span) -> jax.Array:
    """x [G, r, L], 0 for keys that a row does not see."""
    visible = visible_of_tile(bounds, rows, keys)
    return x if visible is None else jnp.where(visible, x, 0)


def _forward_head(config: Config, q_TGd, k_Sd, v_Se, *, sinks, bounds):
    """One key head: o_TGe and the sums of weights, A_GT, at least the smallest normal number."""
    T, G, _ = q_TGd.shape
    q_GTd = q_TGd.swapaxes(0, 1)
    stat = jnp.promote_types(q_TGd.dtype, jnp.float32)

    def tile(rows: Span, keys: Span, carry):
        o_GTe, total_GT = carry
        v = take(v_Se, keys, 0)
        more = _one_more(config, take(q_GTd, rows, 1), take(k_Sd, keys, 0))
        weights = _seen((more * more + 1) / 2, bounds, rows, keys)
        total = jnp.maximum(weights.sum(-1), jnp.finfo(stat).tiny)
        o = matmul(weights.astype(v.dtype).reshape(-1, keys[1]), v).reshape(G, rows[1], -1)
        return put(o_GTe, o / total[..., None], rows), put(total_GT, total, rows)

    carry = jnp.zeros((G, T, v_Se.shape[1]), stat), jnp.ones((G, T), stat)
    o_GTe, total_GT = over_tiles(config, G, T, k_Sd.shape[0], bounds, tile, varying(carry, (q_TGd, k_Sd, v_Se, bounds)))
    return o_GTe.swapaxes(0, 1), total_GT


def _backward_head(config: Config, q_TGd, k_Sd, v_Se, o_TGe, do_TGe, total_GT, *, sinks, bounds):
    """One key head: dq_TGd, dk_Sd and dv_Se."""
    (T, G, d), (S, e), stat = q_TGd.shape, v_Se.shape, total_GT.dtype
    q_GTd, do_GTe = q_TGd.swapaxes(0, 1), do_TGe.swapaxes(0, 1)
    delta_GT = (o_TGe.astype(stat) * do_TGe.astype(stat)).sum(-1).T

    def tile(rows: Span, keys: Span, carry):
        dq_GTd, dk_dS, dv_eS = carry
        k, v = take(k_Sd, keys, 0), take(v_Se, keys, 0)
        q, do, total, delta = (take(x, rows, 1) for x in (q_GTd, do_GTe, total_GT, delta_GT))
        more = _one_more(config, q, k)
        q_, do_ = q.reshape(-1, d), do.reshape(-1, e)
        shares = _seen((more * more + 1) / 2, bounds, rows, keys) / total[..., None]
        dscores = more * (matmul(do_, v.T).reshape(more.shape) - delta[..., None]) / total[..., None]
        dscores = _seen(dscores, bounds, rows, keys).astype(k.dtype).reshape(-1, keys[1])
        shares = shares.astype(v.dtype).reshape(-1, keys[1])
        # dk and dv are accumulated transposed, as in attention_xla: a plain product.
        dk_dS = put(dk_dS, take(dk_dS, keys, 1) + matmul(q_.T, dscores), keys)
        dv_eS = put(dv_eS, take(dv_eS, keys, 1) + matmul(do_.T, shares), keys)
        return put(dq_GTd, matmul(dscores, k).reshape(q.shape), rows), dk_dS, dv_eS

    carry = tuple(jnp.zeros(shape, stat) for shape in ((G, T, d), (d, S), (e, S)))
    carry = varying(carry, (q_TGd, k_Sd, v_Se, do_TGe, bounds))
    dq_GTd, dk_dS, dv_eS = over_tiles(config, G, T, S, bounds, tile, carry)
    return dq_GTd.swapaxes(0, 1) * config.scale, dk_dS.T * config.scale, dv_eS.T


TAYLOR_ATTENTION = Op(
    "taylor_attention",
    AttentionSpec.of,
    {"definition": Implementation(definition), "blocks": Implementation(blocks, plain_masks())},
    preference=("blocks",),
    split=over_devices,
)


def pairs_are_fewer(positions: int, width: int) -> bool:
    """Whether causal rows of so many positions are to be attended to pair by pair rather than by the features of
    `attnlab.ops.feature_maps.Taylor`: below 2 F positions for F features, where pairs take fewer products."""
    return positions < 2 * Taylor(width).count


def taylor_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> jax.Array:
    """`o[t] = sum_s w[t, s] v[s] / sum_s w[t, s]`, `w = 1 + z + z^2 / 2`, `z = scale q[t] . k[s]`, over visible keys.

    q_BTHd, k_BSKd, v_BSKe, mask: as in `attnlab.ops.attention`; a row that sees no key gives exactly 0, with zero
        gradients.
    scale: default `d ** -0.5`, with which it is the linear recurrence of Taylor features (arXiv:2402.18668).
    impl: "auto" (blocks of rows), "definition" (all weights at once).

    Returns o_BTHe in the dtype of q. Scores, weights and their sums are float32 (float64 for float64 inputs).
    Differentiable (reverse mode) in q, k and v. Raises UserError for shapes that do not fit and for an unknown `impl`.

    Source: Xue et al. 2025, Deconstructing Attention, arXiv:2510.11602 (the weights); the blocks are ours.
    """
    check_shapes(q_BTHd, k_BSKd, v_BSKe, mask, None, None)
    scale = q_BTHd.shape[-1] ** -0.5 if scale is None else float(scale)
    return attend(TAYLOR_ATTENTION, (q_BTHd,), (k_BSKd, v_BSKe), mask, impl=impl, scale=scale)
