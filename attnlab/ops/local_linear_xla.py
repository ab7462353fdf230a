"""Local linear attention by blocks of queries, its d x d systems solved without being formed.

A block of query rows takes three passes over its keys: softmax weights and their mean key; conjugate gradients, of
which an iteration is two products with the keys; the output. The backward pass forms the weights again, solves a second
system with the same matrix and never differentiates the solver (implicit function theorem). Scores of one block are all
that is ever held, so that memory grows linearly with the length.

With p the softmax weights of a row, m = sum p k their mean key, x = A^-1 (q - m), t = (k - m) . x, and for the
gradient g of the output e = g . v, c = e - sum p e, u = A^-1 sum p c k, s = (k - m) . u and h = (c - s)(1 + t):

    d logit = p (h - sum p h)           d v = p (1 + t) g        d ridge = -u . x
    d q = scale sum (d logit) k + u     d k = scale (d logit) q + p (c - s) x - p (1 + t) u

Where A keeps only the second moments within blocks b of channels, the term s t in h is the sum over blocks of s_b t_b,
and d k of a block has its own s_b and t_b in place of s and t.

The authors' backward pass leaves out that the ridge they add, lambda times the sum of the weights, depends on q and k.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from attnlab.ops import blockwise
from attnlab.ops.blockwise import (
    LOWEST,
    HeadArray,
    grouped,
    over_heads,
    over_tiles,
    put,
    take,
    tile_scores,
    varying,
)
from attnlab.ops.conjugate_gradient import Solution, Solver, conjugate_gradient
from attnlab.ops.masks import Mask

_NO_SCALE = 1e-30  # in place of 0, by which scores would be divided: exp of any score is then 1


@dataclasses.dataclass(frozen=True)
class SolverConfig(blockwise.Config):
    """What is static: that of softmax attention and the solver's."""

    iterations: int = 0
    tolerance: float | None = None
    early_exit: bool = True
    channel_blocks: int = 1


def local_linear(
    q_BTHd: jax.Array,
    ridge_BTH: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float,
    solver: Solver,
    early_exit: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `attnlab.ops.local_linear.local_linear`: the output, residuals and iterations.

    early_exit: whether a block stops when all its rows are done. False also computes all heads at once on every
        platform, so that the program's products can be counted before it runs.
    """
    B, T, H, _ = q_BTHd.shape
    static = Mask(causal=mask.causal, window=mask.window)
    scale = scale or _NO_SCALE
    most = solver.max_iterations if early_exit else solver.iterations
    options = {"tolerance": solver.tolerance, "early_exit": early_exit, "channel_blocks": solver.blocks}
    config = SolverConfig(static, scale, None, iterations=most, **options)
    stat = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    ridge_BKGT = ridge_BTH.astype(stat).swapaxes(1, 2).reshape(B, k_BSKd.shape[2], -1, T)
    arrays = varying((q_BTHd, k_BSKd, v_BSKe, ridge_BKGT), (q_BTHd, k_BSKd, v_BSKe, ridge_BKGT, mask))
    o, *facts = _local_linear(config, *arrays, (mask.k_start, mask.k_end))
    return o, *(x.reshape(B, H, T).swapaxes(1, 2) for x in facts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local_linear(config: SolverConfig, q, k, v, ridge, intervals):
    return _local_linear_forward(config, q, k, v, ridge, intervals)[0]


def _local_linear_forward(config: SolverConfig, q, k, v, ridge, intervals):
    B, T, H, d = q.shape
    K, e = v.shape[2:]
    G, stat = H // K, ridge.dtype
    per_row = HeadArray((B, K, G, T), stat, 1)
    out = (HeadArray((B, T, K, G, e), q.dtype, 2), HeadArray((B, T, K, G, d), stat, 2), per_row, per_row, per_row)
    o, x, lse, residual, counts = _run(_forward_head, config, q, k, v, (ridge,), intervals, out)
    return (o.reshape(B, T, H, e), residual, counts), (q, k, v, ridge, intervals, x, lse)


def _local_linear_backward(config: SolverConfig, residuals, cotangents):
    q, k, v, ridge, intervals, x, lse = residuals
    B, T, H, d = q.shape
    K = k.shape[2]
    out = (
        HeadArray((B, T, K, H // K, d), q.dtype, 2),
        HeadArray(k.shape, k.dtype, 2),
        HeadArray(v.shape, v.dtype, 2),
        HeadArray(ridge.shape, ridge.dtype, 1),
    )
    rest = (ridge, grouped(cotangents[0], K), x, lse)
    dq, dk, dv, dridge = _run(_backward_head, config, q, k, v, rest, intervals, out)
    return dq.reshape(q.shape), dk, dv, dridge, (None, None)


_local_linear.defvjp(_local_linear_forward, _local_linear_backward)


def _run(head, config: SolverConfig, q, k, v, rest, intervals, out: tuple[HeadArray, ...]):
    """`head` over batch and key heads: as softmax attention does it, or all at once, for products to be countable."""
    if config.early_exit:
        return over_heads(head, config, q, k, v, rest, None, intervals, out)
    (B, T), S, K = q.shape[:2], k.shape[1], k.shape[2]
    start, end = dataclasses.replace(config.mask, k_start=intervals[0], k_end=intervals[1]).bounds(T, S)
    bounds = [None if x is None else jnp.broadcast_to(x, (B, T)) for x in (start, end)]
    arrays = (grouped(q, K), k, v, *rest)
    axes = [1, 1, 1, *(0 if x.ndim == 4 else 1 for x in rest)]

    def of_head(arrays, bounds):
        parts = head(config, *arrays, sinks=None, bounds=bounds)
        return tuple(x.astype(p.dtype) for x, p in zip(parts, out, strict=True))

    inner = jax.vmap(of_head, (axes, None), tuple(p.axis - 1 for p in out))
    return jax.vmap(inner)(list(arrays), bounds)


def _forward_head(config: SolverConfig, q_TGd, k_Sd, v_Se, ridge_GT, *, sinks, bounds):
    """One key head: the output o_TGe; what the backward pass reads, x_TGd and lse_GT; residual_GT and iterations_GT."""
    T, G, d = q_TGd.shape
    e, stat = v_Se.shape[1], ridge_GT.dtype
    q_GTd = q_TGd.swapaxes(0, 1)

    def tile(rows, keys, carry):
        k, v = take(k_Sd, keys, 0), take(v_Se, keys, 0)
        q, ridge = take(q_GTd, rows, 1), take(ridge_GT, rows, 1)
        scores, _ = tile_scores(config, q, k, bounds, rows, keys)
        highest = jnp.maximum(scores.max(-1, keepdims=True), LOWEST)
        p = jnp.exp2(scores - highest)
        total = jnp.maximum(p.sum(-1, keepdims=True), jnp.finfo(stat).tiny)
        fit = _Fit.of(config, (p / total).reshape(-1, keys[1]), k, ridge)
        solved = fit.solve(config, jnp.where(_seen(highest), q.astype(stat).reshape(-1, d) - fit.mean, 0))
        weights = fit.p * (1 + fit.centred(solved.x_Nd))
        o = _product(weights.astype(v.dtype), v)
        lse = (highest + jnp.log2(total))[..., 0]
        new = o, solved.x_Nd, lse, solved.residual_N, solved.iterations_N
        return tuple(put(a, b.reshape(G, rows[1], *a.shape[2:]), rows) for a, b in zip(carry, new, strict=True))

    carry = [jnp.zeros(shape, stat) for shape in ((G, T, e), (G, T, d), (G, T), (G, T), (G, T))]
    carry = varying(tuple(carry), (q_TGd, k_Sd, v_Se, ridge_GT, bounds))
    o, x, lse, residual, counts = over_tiles(config, G, T, k_Sd.shape[0], bounds, tile, carry)
    return o.swapaxes(0, 1), x.swapaxes(0, 1), lse, residual, counts


def _backward_head(config: SolverConfig, q_TGd, k_Sd, v_Se, ridge_GT, do_TGe, x_TGd, lse_GT, *, sinks, bounds):
    """One key head: dq_TGd, dk_Sd, dv_Se and dridge_GT."""
    T, G, d = q_TGd.shape
    S, e = v_Se.shape
    stat = lse_GT.dtype
    per_row = [y.swapaxes(0, 1) for y in (q_TGd, do_TGe, x_TGd)]

    def tile(rows, keys, carry):
        dq_GTd, dk_dS, dv_eS, dridge_GT = carry
        k, v = take(k_Sd, keys, 0), take(v_Se, keys, 0)
        q, do, x, lse, ridge = (take(y, rows, 1) for y in (*per_row, lse_GT, ridge_GT))
        scores, _ = tile_scores(config, q, k, bounds, rows, keys)
        fit = _Fit.of(config, jnp.exp2(scores - lse[..., None]).reshape(-1, keys[1]), k, ridge)
        mean = lambda y: (fit.p * y).sum(-1, keepdims=True)
        q, do, x = q.astype(stat).reshape(-1, d), do.reshape(-1, e), x.reshape(-1, d)

        slope = _product(do, v.T)
        slope -= mean(slope)
        u = fit.solve(config, fit.sum_of_keys(fit.p * slope)).x_Nd
        tilt = 1 + fit.centred(x)
        slope -= fit.centred(u)
        dlogits = slope * tilt
        if fit.blocks > 1:
            between, dk_between = fit.between_blocks(u, x)
            dlogits += between
        # This mean is ridge * u . x where both systems are solved; taken itself, it makes the sum 0 in any case.
        dlogits = fit.p * (dlogits - mean(dlogits))
        slope, weights = fit.p * slope, fit.p * tilt

        dq = config.scale * _product(dlogits, fit.k) + u
        dk = config.scale * _product(q.T, dlogits) + _product(x.T, slope) - _product(u.T, weights)
        if fit.blocks > 1:
            dk += dk_between
        dv = _product(do.T, weights.astype(v.dtype))
        dk_dS = put(dk_dS, take(dk_dS, keys, 1) + dk, keys)
        dv_eS = put(dv_eS, take(dv_eS, keys, 1) + dv, keys)
        dridge = -(u * x).sum(-1)
        shape = (G, rows[1])
        return put(dq_GTd, dq.reshape(*shape, d), rows), dk_dS, dv_eS, put(dridge_GT, dridge.reshape(shape), rows)

    carry = tuple(jnp.zeros(shape, stat) for shape in ((G, T, d), (d, S), (e, S), (G, T)))
    carry = varying(carry, (q_TGd, k_Sd, v_Se, ridge_GT, do_TGe, x_TGd, lse_GT, bounds))
    dq_GTd, dk_dS, dv_eS, dridge_GT = over_tiles(config, G, T, S, bounds, tile, carry)
    return dq_GTd.swapaxes(0, 1), dk_dS.T, dv_eS.T, dridge_GT


@dataclasses.dataclass(frozen=True)
class _Fit:
    """The regressions of N rows on L keys: weights p, which sum to 1 (or are all 0), keys, mean key and ridge.

    Second moments are kept within each of `blocks` blocks of channels.
    """

    p: jax.Array
    k: jax.Array
    mean: jax.Array
    ridge: jax.Array
    blocks: int

    @classmethod
    def of(cls, config: SolverConfig, p_NL, k_Ld, ridge):
        k = k_Ld.astype(p_NL.dtype)
        return cls(p_NL, k, _product(p_NL, k), ridge.reshape(-1, 1), config.channel_blocks)

    def sum_of_keys(self, weights_NL):
        """`sum weights (k - mean)`: the mean's part is 0 but for rounding where the weights sum to 0."""
        return _product(weights_NL, self.k) - weights_NL.sum(-1, keepdims=True) * self.mean

    def centred(self, y_Nd, k_Ld=None):
        """`(k - mean) . y` for all keys [N, L], its weighted mean exactly 0 for a row that sees one key."""
        t = _product(y_Nd, (self.k if k_Ld is None else k_Ld).T)
        return t - (self.p * t).sum(-1, keepdims=True)

    def covariance(self, y_Nd):
        """`(sum p (k - mean)(k - mean)^T + ridge) y`."""
        if self.blocks == 1:
            return _product(self.p * self.centred(y_Nd), self.k) + self.ridge * y_Nd
        # One block after the other: each needs its own `centred`, as large as the tile's scores.
        image = jax.lax.map(lambda yk: _product(self.p * self.centred(*yk), yk[1]), self._apart(y_Nd, self.k))
        return image.swapaxes(0, 1).reshape(y_Nd.shape) + self.ridge * y_Nd

    def between_blocks(self, u_Nd, x_Nd):
        """What moments between blocks would put into the gradients and must not: off h [N, L], and off d k [d, L]."""
        s, t = self.centred(u_Nd), self.centred(x_Nd)

        def block(product, uxk):
            u, x, k = uxk
            own_s, own_t = self.centred(u, k), self.centred(x, k)
            dk = _product(x.T, self.p * (s - own_s)) + _product(u.T, self.p * (t - own_t))
            return product - own_s * own_t, dk

        product, dk = jax.lax.scan(block, s * t, self._apart(u_Nd, x_Nd, self.k))
        return product, dk.reshape(u_Nd.shape[1], -1)

    def _apart(self, *arrays):
        """Each [rows, d] as [blocks, rows, d / blocks]."""
        return tuple(y.reshape(len(y), self.blocks, -1).swapaxes(0, 1) for y in arrays)

    def solve(self, config: SolverConfig, b_Nd) -> Solution:
        return conjugate_gradient(
            self.covariance,
            b_Nd,
            iterations=config.iterations,
            tolerance=config.tolerance,
            early_exit=config.early_exit,
        )


def _seen(highest_Gr1):
    """[G r, 1]: whether a row sees any key."""
    return highest_Gr1.reshape(-1, 1) > LOWEST


def _product(a, b):
    """a @ b. Full precision on accelerators: the solver sees small differences of large sums."""
    stat = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.matmul(a, b, precision="highest", preferred_element_type=stat)
