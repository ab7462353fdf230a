"""Parallax, softmax attention tilted by a second score: its definition, its blockwise form, and the choice."""

from functools import partial

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import context
from attnlab.ops.attention import AttentionSpec, _check_shapes
from attnlab.ops.attention_xla import (
    _LOWEST,
    _Config,
    _grouped,
    _matmul,
    _over_heads,
    _over_tiles,
    _Part,
    _put,
    _scores,
    _take,
    _varying,
)
from attnlab.ops.dispatch import Implementation, choose
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
    visible = mask.visible(T, S)[:, None]
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
    config = _Config(Mask(causal=mask.causal, window=mask.window), scale, None)
    arrays = (q_BTHd, r_BTHd, k_BSKd, v_BSKe)
    return _parallax(config, *_varying(arrays, (arrays, mask)), (mask.k_start, mask.k_end))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _parallax(config: _Config, q, r, k, v, intervals):
    return _parallax_forward(config, q, r, k, v, intervals)[0]


def _parallax_forward(config: _Config, q, r, k, v, intervals):
    B, T, H, _ = q.shape
    K, e = v.shape[2:]
    stat = jnp.promote_types(q.dtype, jnp.float32)
    out = (_Part((B, T, K, H // K, e), q.dtype, 2), _Part((B, K, H // K, T), stat, 1))
    o, lse = _over_heads(_forward_head, config, q, k, v, (_grouped(r, K),), None, intervals, out)
    return o.reshape(B, T, H, e), (q, r, k, v, intervals, lse)


def _parallax_backward(config: _Config, residuals, do):
    q, r, k, v, intervals, lse = residuals
    B, T, H, d = q.shape
    K = k.shape[2]
    per_query = _Part((B, T, K, H // K, d), q.dtype, 2)
    out = (per_query, per_query, _Part(k.shape, k.dtype, 2), _Part(v.shape, v.dtype, 2))
    rest = (_grouped(r, K), _grouped(do, K), lse)
    dq, dr, dk, dv = _over_heads(_backward_head, config, q, k, v, rest, None, intervals, out)
    return dq.reshape(q.shape), dr.reshape(r.shape), dk, dv, (None, None)


_parallax.defvjp(_parallax_forward, _parallax_backward)


def _forward_head(config: _Config, q_TGd, k_Sd, v_Se, r_TGd, *, sinks, bounds):
    """One key head: o_TGe and the log2-sum-exp2 of the scores, lse_GT."""
    T, G, _ = q_TGd.shape
    q_GTd, r_GTd = q_TGd.swapaxes(0, 1), r_TGd.swapaxes(0, 1)
    stat = jnp.promote_types(q_TGd.dtype, jnp.float32)

    def tile(rows, keys, carry):
        o_GTe, lse_GT = carry
        k, v = _take(k_Sd, keys, 0), _take(v_Se, keys, 0)
        scores, _ = _scores(config, _take(q_GTd, rows, 1), k, bounds, rows, keys)
        highest = jnp.maximum(scores.max(-1, keepdims=True), _LOWEST)
        p = jnp.exp2(scores - highest)
        total = jnp.maximum(p.sum(-1, keepdims=True), jnp.finfo(stat).tiny)
        weights = p * (1 - _tilt(p, total, _take(r_GTd, rows, 1), k))
        o = _matmul(weights.astype(v.dtype).reshape(-1, keys[1]), v).reshape(G, rows[1], -1)
        return _put(o_GTe, o / total, rows), _put(lse_GT, (highest + jnp.log2(total))[..., 0], rows)

    carry = jnp.zeros((G, T, v_Se.shape[1]), stat), jnp.zeros((G, T), stat)
    carry = _varying(carry, (q_TGd, k_Sd, v_Se, r_TGd, bounds))
    o_GTe, lse_GT = _over_tiles(config, G, T, k_Sd.shape[0], bounds, tile, carry)
    return o_GTe.swapaxes(0, 1), lse_GT


def _backward_head(config: _Config, q_TGd, k_Sd, v_Se, r_TGd, do_TGe, lse_GT, *, sinks, bounds):
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
        k, v = _take(k_Sd, keys, 0), _take(v_Se, keys, 0)
        q, r, do, lse = (_take(y, rows, 1) for y in (*per_row, lse_GT))
        scores, _ = _scores(config, q, k, bounds, rows, keys)
        p = jnp.exp2(scores - lse[..., None])
        mean = lambda y: (p * y).sum(-1, keepdims=True)
        keep = 1 - _tilt(p, 1, r, k)
        q, r, do = q.reshape(-1, d), r.reshape(-1, d), do.reshape(-1, e)
        slope = _matmul(do, v.T).reshape(p.shape)
        slope -= mean(slope)
        dlogits = slope * keep
        flat = lambda y: y.astype(k.dtype).reshape(-1, keys[1])
        dlogits, dtilt = flat(p * (dlogits - mean(dlogits))), flat(-p * slope)
        dk = config.scale * _matmul(q.T, dlogits) + _matmul(r.T, dtilt)
        dk_dS = _put(dk_dS, _take(dk_dS, keys, 1) + dk, keys)
        dv_eS = _put(dv_eS, _take(dv_eS, keys, 1) + _matmul(do.T, flat(p * keep)), keys)
        into = lambda whole, y: _put(whole, y.reshape(G, rows[1], d), rows)
        return into(dq_GTd, config.scale * _matmul(dlogits, k)), into(dr_GTd, _matmul(dtilt, k)), dk_dS, dv_eS

    carry = tuple(jnp.zeros(shape, stat) for shape in ((G, T, d), (G, T, d), (d, S), (e, S)))
    carry = _varying(carry, (q_TGd, k_Sd, v_Se, r_TGd, do_TGe, lse_GT, bounds))
    dq_GTd, dr_GTd, dk_dS, dv_eS = _over_tiles(config, G, T, S, bounds, tile, carry)
    return dq_GTd.swapaxes(0, 1), dr_GTd.swapaxes(0, 1), dk_dS.T, dv_eS.T


def _tilt(p_GrL, total, r_Grd, k_Ld):
    """`r . k` less its mean over a row's weights, which sum to `total`: [G, r, L]."""
    t = _matmul(r_Grd.reshape(-1, r_Grd.shape[-1]), k_Ld.T).reshape(p_GrL.shape)
    return t - (p_GrL * t).sum(-1, keepdims=True) / total


IMPLEMENTATIONS: dict[str, Implementation] = {
    "definition": Implementation(definition),
    "xla": Implementation(blockwise),
}
_PREFERENCE = ("xla",)


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
    _check_shapes(q_BTHd, k_BSKd, v_BSKe, mask, None, None)
    if r_BTHd.shape != q_BTHd.shape or r_BTHd.dtype != q_BTHd.dtype:
        raise UserError(f"parallax: r {r_BTHd.shape} {r_BTHd.dtype} must be like q {q_BTHd.shape} {q_BTHd.dtype}")
    B, T, H, d = q_BTHd.shape
    S, K, e = v_BSKe.shape[1:]
    spec = AttentionSpec(B, T, S, H, K, d, e, str(q_BTHd.dtype), mask.causal, mask.window, mask.dynamic(), False, False)
    chosen = choose("parallax", impl, IMPLEMENTATIONS, spec, _PREFERENCE)
    scale = d**-0.5 if scale is None else float(scale)

    def run(queries, keys, _, part):
        return (chosen.run(*queries, *keys, part, scale=scale),)

    return context.attend(run, (q_BTHd, r_BTHd), (k_BSKd, v_BSKe), None, mask)[0]
