"""Parallax, softmax attention tilted by a second score: its definition, its blockwise form, and the choice."""

from functools import partial

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import parallax_flash
from attnlab.ops.attention_frame import AttentionSpec, attend, check_shapes, over_devices, plain_masks
from attnlab.ops.blockwise import (
    LOWEST,
    Config,
    HeadArray,
    grouped,
    matmul,
    over_heads,
    over_tiles,
    put,
    take,
    tile_scores,
    varying,
)
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask


def definition(
    q_BTHd: jax.Array, r_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKe: jax.Array, mask: Mask, *, scale: float
) -> jax.Array:
    """The formula, with all T x S scores. In float32, or float64 for float64 inputs."""
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    T, H, _ = q_BTHd.shape[1:]
    S, K = k_BSKd.shape[1:3]
    einsum = partial(jnp.einsum, precision="highest")
    q, r, k, v = (x.astype(dtype) for x in (q_BTHd, r_BTHd, k_BSKd, v_BSKe))
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    logits = einsum("bthd,bshd->bhts", q, k) * scale
    visible = mask.visible(T, S)
    highest = jax.lax.stop_gradient(jnp.where(visible, logits, jnp.finfo(dtype).min).max(-1, keepdims=True))
    # Hidden logits are replaced before exp too: exp of a hidden large one would be inf, and its gradient NaN.
    p = jnp.where(visible, jnp.exp(jnp.where(visible, logits - highest, 0)), 0)
    total = p.sum(-1, keepdims=True)
    p /= jnp.where(total > 0, total, 1)
    tilt = einsum("bthd,bshd->bhts", r, k)
    weights = p * (1 - (tilt - (p * tilt).sum(-1, keepdims=True)))
    return einsum("bhts,bshe->bthe", weights, v).astype(q_BTHd.dtype)


def blockwise(
    q_BTHd: jax.Array, r_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKe: jax.Array, mask: Mask, *, scale: float
) -> jax.Array:
    """Blocks of queries, the scores of one at a time; the backward pass forms them again."""
    config = Config(Mask(causal=mask.causal, window=mask.window), scale, None)
    arrays = (q_BTHd, r_BTHd, k_BSKd, v_BSKe)
    return _parallax(config, *varying(arrays, (arrays, mask)), (mask.k_start, mask.k_end))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _parallax(config: Config, q, r, k, v, intervals):
    return _parallax_forward(config, q, r, k, v, intervals)[0]


def _parallax_forward(config: Config, q, r, k, v, intervals):
    B, T, H, _ = q.shape
    K, e = v.shape[2:]
    stat = jnp.promote_types(q.dtype, jnp.float32)
    out = (HeadArray((B, T, K, H // K, e), q.dtype, 2), HeadArray((B, K, H // K, T), stat, 1))
    o, lse = over_heads(_forward_head, config, q, k, v, (grouped(r, K),), None, intervals, out)
    return o.reshape(B, T, H, e), (q, r, k, v, intervals, lse)


def _parallax_backward(config: Config, residuals, do):
    q, r, k, v, intervals, lse = residuals
    B, T, H, d = q.shape
    K = k.shape[2]
    per_query = HeadArray((B, T, K, H // K, d), q.dtype, 2)
    out = (per_query, per_query, HeadArray(k.shape, k.dtype, 2), HeadArray(v.shape, v.dtype, 2))
    rest = (grouped(r, K), grouped(do, K), lse)
    dq, dr, dk, dv = over_heads(_backward_head, config, q, k, v, rest, None, intervals, out)
    return dq.reshape(q.shape), dr.reshape(r.shape), dk, dv, (None, None)


_parallax.defvjp(_parallax_forward, _parallax_backward)


def _forward_head(config: Config, q_TGd, k_Sd, v_Se, r_TGd, *, sinks, bounds):
    """One key head: o_TGe and the log2-sum-exp2 of the scores, lse_GT."""
    T, G, _ = q_TGd.shape
    q_GTd, r_GTd = q_TGd.swapaxes(0, 1), r_TGd.swapaxes(0, 1)
    stat = jnp.promote_types(q_TGd.dtype, jnp.float32)

    def tile(rows, keys, carry):
        o_GTe, lse_GT = carry
        k, v = take(k_Sd, keys, 0), take(v_Se, keys, 0)
        scores, _ = tile_scores(config, take(q_GTd, rows, 1), k, bounds, rows, keys)
        highest = jnp.maximum(scores.max(-1, keepdims=True), LOWEST)
        p = jnp.exp2(scores - highest)
        total = jnp.maximum(p.sum(-1, keepdims=True), jnp.finfo(stat).tiny)
        weights = p * (1 - _tilt(p, total, take(r_GTd, rows, 1), k))
        o = matmul(weights.astype(v.dtype).reshape(-1, keys[1]), v).reshape(G, rows[1], -1)
        return put(o_GTe, o / total, rows), put(lse_GT, (highest + jnp.log2(total))[..., 0], rows)

    carry = jnp.zeros((G, T, v_Se.shape[1]), stat), jnp.zeros((G, T), stat)
    carry = varying(carry, (q_TGd, k_Sd, v_Se, r_TGd, bounds))
    o_GTe, lse_GT = over_tiles(config, G, T, k_Sd.shape[0], bounds, tile, carry)
    return o_GTe.swapaxes(0, 1), lse_GT


def _backward_head(config: Config, q_TGd, k_Sd, v_Se, r_TGd, do_TGe, lse_GT, *, sinks, bounds):
    """One key head: dq_TGd, dr_TGd, dk_Sd, dv_Se.

    With t the tilt less its mean, e = do . v and c = e - sum p e: d logit = p (c (1 - t) - sum p c (1 - t)), and
    d tilt = -p c.
    """
    T, G, d = q_TGd.shape
    S, e = v_Se.shape
    stat = lse_GT.dtype
    per_row = [y.swapaxes(0, 1) for y in (q_TGd, r_TGd, do_TGe)]

    def tile(rows, keys, carry):
        dq_GTd, dr_GTd, dk_dS, dv_eS = carry
        k, v = take(k_Sd, keys, 0), take(v_Se, keys, 0)
        q, r, do, lse = (take(y, rows, 1) for y in (*per_row, lse_GT))
        scores, _ = tile_scores(config, q, k, bounds, rows, keys)
        p = jnp.exp2(scores - lse[..., None])
        mean = lambda y: (p * y).sum(-1, keepdims=True)
        keep = 1 - _tilt(p, 1, r, k)
        q, r, do = q.reshape(-1, d), r.reshape(-1, d), do.reshape(-1, e)
        slope = matmul(do, v.T).reshape(p.shape)
        slope -= mean(slope)
        dlogits = slope * keep
        flat = lambda y: y.astype(k.dtype).reshape(-1, keys[1])
        dlogits, dtilt = flat(p * (dlogits - mean(dlogits))), flat(-p * slope)
        dk = config.scale * matmul(q.T, dlogits) + matmul(r.T, dtilt)
        dk_dS = put(dk_dS, take(dk_dS, keys, 1) + dk, keys)
        dv_eS = put(dv_eS, take(dv_eS, keys, 1) + matmul(do.T, flat(p * keep)), keys)
        into = lambda whole, y: put(whole, y.reshape(G, rows[1], d), rows)
        return into(dq_GTd, config.scale * matmul(dlogits, k)), into(dr_GTd, matmul(dtilt, k)), dk_dS, dv_eS

    carry = tuple(jnp.zeros(shape, stat) for shape in ((G, T, d), (G, T, d), (d, S), (e, S)))
    carry = varying(carry, (q_TGd, k_Sd, v_Se, r_TGd, do_TGe, lse_GT, bounds))
    dq_GTd, dr_GTd, dk_dS, dv_eS = over_tiles(config, G, T, S, bounds, tile, carry)
    return dq_GTd.swapaxes(0, 1), dr_GTd.swapaxes(0, 1), dk_dS.T, dv_eS.T


def _tilt(p_GrL, total, r_Grd, k_Ld):
    """`r . k` less its mean over a row's weights, which sum to `total`: [G, r, L]."""
    t = matmul(r_Grd.reshape(-1, r_Grd.shape[-1]), k_Ld.T).reshape(p_GrL.shape)
    return t - (p_GrL * t).sum(-1, keepdims=True) / total


PARALLAX = Op(
    "parallax",
    AttentionSpec.of,
    {
        "definition": Implementation(definition, plain_masks()),
        "xla": Implementation(blockwise, plain_masks()),
        "flash": Implementation(
            parallax_flash.attention,
            plain_masks(parallax_flash.unsupported),
            worth=parallax_flash.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=parallax_flash.kernel_flops,
        ),
    },
    preference=("flash", "xla"),
    split=over_devices,
)


def parallax(
    q_BTHd: jax.Array,
    r_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Softmax attention with a first-order correction along a probe r, where local linear attention would solve for it:

        o = sum_s p_s (1 - (t_s - sum_j p_j t_j)) v_s,   p = softmax(scale * q . k),   t_s = r . k_s  (not scaled)

    q_BTHd, k_BSKd, v_BSKe, mask, scale, impl: as in `attnlab.ops.attention`; r_BTHd: probes, r = 0 is softmax
    attention. Weights sum to 1 and may be negative. A row that sees no key gives exactly 0, with zero gradients.

    Returns o_BTHe in the dtype of q; scores and statistics are float32 (float64 for float64 inputs). Differentiable
    (reverse mode) in q, r, k and v. Raises UserError for what does not fit.

    Source: Zuo et al. 2026, Parallax, arXiv:2605.29157, algorithm 1.
    """
    check_shapes(q_BTHd, k_BSKd, v_BSKe, mask, None, None)
    if r_BTHd.shape != q_BTHd.shape or r_BTHd.dtype != q_BTHd.dtype:
        raise UserError(f"parallax: r {r_BTHd.shape} {r_BTHd.dtype} must be like q {q_BTHd.shape} {q_BTHd.dtype}")
    scale = q_BTHd.shape[-1] ** -0.5 if scale is None else float(scale)
    return attend(PARALLAX, (q_BTHd, r_BTHd), (k_BSKd, v_BSKe), mask, scale=scale, impl=impl)
