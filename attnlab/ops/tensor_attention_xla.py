"""Tensor attention by tiles: rows of queries and some j against all l that the rows can see, in plain XLA.

Of a tile, the products q_t * k1_j of all its (t, j) are rows that are held against the keys k2, as queries are in
ordinary attention: scores [t j, l]. The softmax runs over j and l, so that its statistics are carried from one j to the
next. The backward pass forms the scores again: with g the gradient of the output, D = g . o and p the weights,

    ds = p (g . (v1_j * v2_l) - D)      d q = sum ds k1 * k2      d k1_j = sum ds q * k2      d k2_l = sum ds q * k1
    d v1_j = sum p g * v2               d v2_l = sum p g * v1

where ds is also multiplied by the scale in the gradients of q, k1 and k2.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from attnlab.ops import blockwise
from attnlab.ops.blockwise import (
    BODIES,
    HIDDEN,
    LOG2E,
    LOWEST,
    HeadArray,
    Span,
    grouped,
    matmul,
    over_heads,
    plan_blocks,
    put,
    take,
    varying,
)
from attnlab.ops.masks import Mask

ROWS = 256  # rows t j of a tile's product


@dataclasses.dataclass(frozen=True)
class _Config(blockwise.Config):
    """What is static: that of softmax attention, the rows of a tile, and the most keys that one sees."""

    chunk: int = 1
    reach: int = 1


def tensor_attention(
    q_BTHd: jax.Array, k_BSHc: jax.Array, v_BSHc: jax.Array, mask: Mask, *, scale: float, reach: int, chunk: int
) -> jax.Array:
    """See `attnlab.ops.tensor_attention.tensor_attention`."""
    static = Mask(causal=mask.causal, window=mask.window)
    config = _Config(static, scale, None, chunk=chunk, reach=reach)
    arrays = (q_BTHd, k_BSHc, v_BSHc)
    return _attention(config, *varying(arrays, (arrays, mask)), (mask.k_start, mask.k_end))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: _Config, q, k, v, intervals):
    return _forward(config, q, k, v, intervals)[0]


def _forward(config: _Config, q, k, v, intervals):
    B, T, H, _ = q.shape
    stat = jnp.promote_types(q.dtype, jnp.float32)
    out = (HeadArray((B, T, H, 1, v.shape[3] // 2), q.dtype, 2), HeadArray((B, H, 1, T), stat, 1))
    o, lse = over_heads(_forward_head, config, q, k, v, (), None, intervals, out)
    o = o.reshape(B, T, H, -1)
    return o, (q, k, v, intervals, o, lse)


def _backward(config: _Config, residuals, do):
    q, k, v, intervals, o, lse = residuals
    B, T, H, d = q.shape
    out = HeadArray((B, T, H, 1, d), q.dtype, 2), HeadArray(k.shape, k.dtype, 2), HeadArray(v.shape, v.dtype, 2)
    rest = grouped(o, H), grouped(do, H), lse
    dq, dk, dv = over_heads(_backward_head, config, q, k, v, rest, None, intervals, out)
    return dq.reshape(q.shape), dk, dv, (None, None)


_attention.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """The keys and values that a tile's rows can see, and which of them: L of them, padded to whole groups of j.

    Attributes:
      k1_jbd, v1_jbe: in groups of b.
      k2_Ld, v2_Le: keys and values that pairs are made with.
      sees_jrb, sees_rL: whether row r sees them.
    """

    k1_jbd: jax.Array
    v1_jbe: jax.Array
    k2_Ld: jax.Array
    v2_Le: jax.Array
    sees_jrb: jax.Array
    sees_rL: jax.Array

    @classmethod
    def of(cls, k_Sc, v_Sc, bounds, rows: Span, keys: Span):
        """Of a tile of so many rows and keys."""
        together = max(1, min(keys[1], ROWS // rows[1]))
        (k1, k2), (v1, v2) = (jnp.split(take(x, keys, 0), 2, axis=-1) for x in (k_Sc, v_Sc))
        at = keys[0] + jnp.arange(keys[1], dtype=jnp.int32)
        sees = jnp.ones((rows[1], keys[1]), bool)
        for bound, inside in zip(bounds, (jnp.less_equal, jnp.greater)):
            if bound is not None:
                sees &= inside(take(bound, rows, 0)[:, None], at)
        pad = -keys[1] % together
        groups = lambda x: jnp.pad(x, ((0, pad), (0, 0))).reshape(-1, together, x.shape[1])
        return cls(groups(k1), groups(v1), k2, v2, groups(sees.T).swapaxes(1, 2), sees)

    def scores(self, config: _Config, q_rd, k1_bd, sees_rb):
        """Scores [r, b, L] in log2 units, hidden ones `HIDDEN`, and the products q * k1 [r b, d]."""
        products = (q_rd[:, None] * k1_bd.astype(q_rd.dtype)).reshape(-1, q_rd.shape[1])
        scores = matmul(products.astype(self.k2_Ld.dtype), self.k2_Ld.T) * (config.scale * LOG2E)
        visible = sees_rb[..., None] & self.sees_rL[:, None]
        return jnp.where(visible, scores.reshape(visible.shape), HIDDEN), products


def _forward_head(config: _Config, q_TGd, k_Sc, v_Sc, *, sinks, bounds):
    """One head: o_TGe and the log2-sum-exp2 of the scores, lse_GT."""
    T, e = q_TGd.shape[0], v_Sc.shape[1] // 2
    stat = jnp.promote_types(q_TGd.dtype, jnp.float32)
    q_Td = q_TGd[:, 0].astype(stat)

    def tile(rows: Span, keys: Span, carry):
        seen, q = _Tile.of(k_Sc, v_Sc, bounds, rows, keys), take(q_Td, rows, 0)

        def group(statistics, of_j):
            highest_r, total_r, o_re = statistics
            k1, v1, sees = of_j
            scores, _ = seen.scores(config, q, k1, sees)
            higher_r = jnp.maximum(highest_r, scores.max((1, 2)))
            weights = jnp.exp2(scores - higher_r[:, None, None])
            kept_r = jnp.exp2(highest_r - higher_r)
            inner = matmul(weights.astype(v1.dtype).reshape(-1, keys[1]), seen.v2_Le).reshape(*sees.shape, e)
            o = o_re * kept_r[:, None] + (inner * v1).sum(1)
            return (higher_r, total_r * kept_r + weights.sum((1, 2)), o), None

        start = jnp.full(rows[1:], LOWEST, stat), jnp.zeros(rows[1:], stat), jnp.zeros((rows[1], e), stat)
        start = varying(start, (q, seen.k2_Ld, seen.v2_Le, bounds))
        (highest, total, o), _ = jax.lax.scan(group, start, (seen.k1_jbd, seen.v1_jbe, seen.sees_jrb))
        total = jnp.maximum(total, jnp.finfo(stat).tiny)
        lse = (highest + jnp.log2(total))[None]
        return put(carry[0], (o / total[:, None])[None], rows), put(carry[1], lse, rows)

    carry = varying((jnp.zeros((1, T, e), stat), jnp.zeros((1, T), stat)), (q_TGd, k_Sc, v_Sc, bounds))
    o_GTe, lse_GT = _over_tiles(config, T, k_Sc.shape[0], bounds, tile, carry)
    return o_GTe.swapaxes(0, 1), lse_GT


def _backward_head(config: _Config, q_TGd, k_Sc, v_Sc, o_TGe, do_TGe, lse_GT, *, sinks, bounds):
    """One head: dq_TGd, dk_Sc, dv_Sc."""
    T, S, stat = q_TGd.shape[0], k_Sc.shape[0], lse_GT.dtype
    q_Td, do_Te = q_TGd[:, 0].astype(stat), do_TGe[:, 0].astype(stat)
    delta_T = (o_TGe[:, 0].astype(stat) * do_Te).sum(-1)

    def tile(rows: Span, keys: Span, carry):
        seen, L = _Tile.of(k_Sc, v_Sc, bounds, rows, keys), keys[1]
        q, do, delta, lse = (take(x, rows, 0) for x in (q_Td, do_Te, delta_T, lse_GT[0]))

        def group(sums, of_j):
            dq_rd, dk2_Ld, dv2_Le = sums
            k1, v1, sees = of_j
            flat, apart = lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(*sees.shape, -1)
            scores, products = seen.scores(config, q, k1, sees)
            weights = jnp.exp2(scores - lse[:, None, None])
            with_v1 = flat(do[:, None] * v1.astype(stat)).astype(v1.dtype)
            slopes = apart(matmul(with_v1, seen.v2_Le.T)) - delta[:, None, None]
            dscores = flat(weights * slopes).astype(k1.dtype)
            weights = flat(weights).astype(v1.dtype)
            of_products, inner = apart(matmul(dscores, seen.k2_Ld)), apart(matmul(weights, seen.v2_Le))
            dq = dq_rd + (of_products * k1).sum(1)
            dk2 = dk2_Ld + matmul(dscores.T, products.astype(k1.dtype))
            dv2 = dv2_Le + matmul(weights.T, with_v1)
            return (dq, dk2, dv2), ((of_products * q[:, None]).sum(0), (inner * do[:, None]).sum(0))

        start = jnp.zeros_like(q), *(jnp.zeros(x.shape, stat) for x in (seen.k2_Ld, seen.v2_Le))
        start = varying(start, (q, do, seen.k2_Ld, seen.v2_Le, bounds))
        groups = seen.k1_jbd, seen.v1_jbe, seen.sees_jrb
        (dq, dk2, dv2), (dk1, dv1) = jax.lax.scan(group, start, groups)
        first = lambda x: x.reshape(-1, x.shape[-1])[:L]
        dk, dv = jnp.concatenate([first(dk1), dk2], -1), jnp.concatenate([first(dv1), dv2], -1)
        add = lambda whole, part: put(whole, take(whole, keys, 1) + part[None], keys)
        return put(carry[0], dq[None], rows), add(carry[1], dk), add(carry[2], dv)

    carry = tuple(jnp.zeros((1, *shape), stat) for shape in (q_Td.shape, k_Sc.shape, v_Sc.shape))
    carry = varying(carry, (q_TGd, k_Sc, v_Sc, do_TGe, bounds))
    dq_GTd, dk, dv = _over_tiles(config, T, S, bounds, tile, carry)
    return dq_GTd.swapaxes(0, 1) * config.scale, dk[0] * config.scale, dv[0]


def _over_tiles(config: _Config, T: int, S: int, bounds, tile, carry):
    """Fold `carry = tile(rows, keys, carry)` over blocks of rows, each with the keys that its rows can see."""
    for blocks in plan_blocks(T, S, config.mask, min(config.chunk, T), BODIES):
        length = min(blocks.keys, config.reach + blocks.rows - 1)

        def body(i, carry, blocks=blocks, length=length):
            first, rows = blocks.origin_of(i, S), blocks.rows_of(i)
            if length < blocks.keys:
                first = jnp.clip(_first_seen(bounds, rows, S), first, first + blocks.keys - length)
            return tile(rows, (first, length), carry)

        carry = body(0, carry) if blocks.count == 1 else jax.lax.fori_loop(0, blocks.count, body, carry)
    return carry


def _first_seen(bounds, rows: Span, S: int):
    """The first key that any of the rows sees."""
    start, end = (other if x is None else take(x, rows, 0) for x, other in zip(bounds, (0, S)))
    return jnp.where(start < end, start, S).min()
