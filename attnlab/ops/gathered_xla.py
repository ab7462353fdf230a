"""Gathered attention as XLA's products: blocks of packed rows, one at a time, each against the keys that it can see.

The table of rows is made for one segment of the sequence at a time: the keys that a segment's rows can see are known
while tracing, and so the products of a causal mask's other half are never emitted.

Shapes: as in `attnlab.ops.gathered_attention`; N segments of L positions, I blocks of R rows per segment.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from attnlab.ops import gathered_rows as rows_lib
from attnlab.ops.blockwise import HIDDEN, LOG2E, LOWEST, Blocks, matmul, plan_blocks
from attnlab.ops.gathered_rows import Heads, Segments, Table
from attnlab.ops.head_subsets import spread, take_heads
from attnlab.ops.masks import Mask
from attnlab.parallel import partition

_SEGMENT = 256  # fewest positions of a segment
_SEGMENTS = 8  # key ranges of their own, as in the dense form
_SLACK = 0.2  # rows of the table beyond those wanted, as a share: more of it lets blocks be larger


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: hashable, a nondifferentiable argument."""

    mask: Mask  # its static part
    scale: float
    soft_cap: float | None
    heads: Heads
    active: int
    length: int
    keys: int

    def segment_length(self) -> int:
        if self.mask.window is not None or not self.mask.causal:
            return _SEGMENT
        return max(_SEGMENT, -(-self.length // _SEGMENTS))

    def segments(self) -> list[Segments]:
        """The whole segments, and what is left."""
        L = self.segment_length()
        full, rest = divmod(self.length, L)
        parts = [(0, full, L)] * (full > 0) + [(full * L, 1, rest)] * (rest > 0)
        return [Segments(*part, *self.blocks(part[2])) for part in parts]

    def blocks(self, L: int) -> tuple[int, int]:
        """I and R."""
        R = 1 + int(_SLACK * L * self.active / len(self.heads.key_heads))
        R = min(R - R % 8 if R > 8 else R, L)
        return self.heads.most_blocks(L, self.active, R), R

    def ranges(self, first: int) -> list[Blocks]:
        """Key ranges of the segments from position `first` on (0: the whole ones)."""
        plan = plan_blocks(self.length, self.keys, self.mask, self.segment_length(), _SEGMENTS)
        whole = self.segments()[0]
        return [b for b in plan if (b.first < whole.N * whole.L) == (first == 0)]


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    wanted_BTE: jax.Array,
    sinks_H: jax.Array | None = None,
    *,
    chosen: tuple[int, ...],
    active: int,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """See `attnlab.ops.gathered_attention.chosen_attention`."""
    (B, T, H, _), (S, K) = q_BTHd.shape, k_BSKd.shape[1:3]
    static = Mask(causal=mask.causal, window=mask.window)
    plan = _Plan(static, scale, soft_cap, Heads.of(chosen, H, K), active, T, S)
    bounds = zip(mask.bounds(T, S), (0, S))
    start, end = (jnp.broadcast_to(jnp.int32(full) if x is None else x, (B, T)) for x, full in bounds)
    return _gathered(plan, q_BTHd, k_BSKd, v_BSKe, sinks_H, (start, end, wanted_BTE))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(plan: _Plan, q, k, v, sinks, choice):
    return _gathered_forward(plan, q, k, v, sinks, choice)[0]


def _gathered_forward(plan: _Plan, q, k, v, sinks, choice):
    table = rows_lib.make_table(plan.heads, choice[2], plan.segments())
    rows = _query_rows(plan, q, sinks, choice, table)
    keys = _key_rows(plan, k), _key_rows(plan, v)
    o_Bre, lse_Br = _per_sequence(partial(_forward_blocks, plan), (*rows, table.group_Bi, *keys), (q.dtype, None))
    o_BTEe = checkpoint_name(rows_lib.of_pairs(o_Bre, table, choice[2]), "attention_o")
    lse_BTE = checkpoint_name(rows_lib.of_pairs(lse_Br[..., None], table, choice[2])[..., 0], "attention_lse")
    return o_BTEe, (q, k, v, sinks, choice, table, o_BTEe, lse_BTE)


def _gathered_backward(plan: _Plan, residuals, do_BTEe):
    q, k, v, sinks, choice, table, o_BTEe, lse_BTE = residuals
    stat, wanted, H = lse_BTE.dtype, choice[2], q.shape[2]
    delta_BTE = jnp.where(wanted, jnp.sum(o_BTEe.astype(stat) * do_BTEe.astype(stat), axis=-1), 0)
    rows = _query_rows(plan, q, sinks, choice, table)
    of_row = lambda x: rows_lib.of_chosen_rows(x, plan.heads, table)
    # Where a row is empty its weights are 0, whatever is gathered here.
    arrays = (*rows, of_row(do_BTEe), *(of_row(x[..., None])[..., 0] for x in (lse_BTE, delta_BTE)))
    arrays = (*arrays, table.group_Bi, _key_rows(plan, k), _key_rows(plan, v))
    dq_Brd, dk, dv = _per_sequence(partial(_backward_blocks, plan), arrays, (q.dtype, k.dtype, v.dtype))
    chosen, key_heads = plan.heads.chosen, plan.heads.key_heads
    dq = spread(rows_lib.of_pairs(dq_Brd, table, wanted), chosen, H)
    dk, dv = (spread(x.transpose(0, 3, 1, 2), key_heads, k.shape[2]) for x in (dk, dv))
    dsinks = None
    if sinks is not None:
        share = jnp.exp2(sinks[np.asarray(chosen)].astype(stat) * LOG2E - lse_BTE)
        dsinks_E = -jnp.sum(jnp.where(wanted, share * delta_BTE, 0), axis=(0, 1))
        dsinks = jnp.zeros(H, sinks.dtype).at[np.asarray(chosen)].set(dsinks_E.astype(sinks.dtype))
    return dq, dk, dv, dsinks, None


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _query_rows(plan: _Plan, q_BTHd, sinks_H, choice, table: Table):
    """Queries, first and last key (an empty row sees none), and sink of each row."""
    of_token = lambda x: rows_lib.of_tokens(x, plan.heads, table)
    stat = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    sink_Br = jnp.full(table.pair_Br.shape, LOWEST, stat)
    if sinks_H is not None:
        sink_Br = (sinks_H.astype(stat) * LOG2E)[jnp.maximum(table.pair_Br, 0) % q_BTHd.shape[2]]
    return rows_lib.of_rows(q_BTHd, table), of_token(choice[0]), of_token(choice[1]), sink_Br


def _key_rows(plan: _Plan, k_BSKd: jax.Array) -> jax.Array:
    """[B, M, S, d]: a block's keys lie together."""
    return take_heads(k_BSKd, plan.heads.key_heads).swapaxes(1, 2)


def _per_sequence(run, arrays, dtypes):
    """`run` for each sequence: one after the other on CPU, where plain products are faster than batched ones and
    those of low precision are slow; together elsewhere. Results are cast to `dtypes` (None: left)."""

    def cast(x, dtype):
        return x if dtype is None else x.astype(dtype)

    def one(arrays):
        floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        wide = [cast(x, jnp.promote_types(x.dtype, jnp.float32) if floating(x) else None) for x in arrays]
        return tuple(map(cast, run(*wide), dtypes))

    def together(arrays):
        return tuple(map(cast, jax.vmap(run)(*arrays), dtypes))

    return partition.by_platform(arrays, cpu=lambda arrays: jax.lax.map(one, arrays), default=together)


def _runs(plan: _Plan):
    """For each run of segments whose key ranges have one length: their rows, blocks, R, where the key range of each
    block begins, and that length."""
    row = block = 0
    for part in plan.segments():
        I, R = part.I, part.R
        for b in plan.ranges(part.first):
            origins = [int(np.clip(b.origin + i * b.step, 0, plan.keys - b.keys)) for i in range(b.count)]
            blocks = b.count * I
            yield slice(row, row + blocks * R), slice(block, block + blocks), R, np.repeat(np.int32(origins), I), b.keys
            row, block = row + blocks * R, block + blocks


def _forward_blocks(plan: _Plan, q_rd, start_r, end_r, sink_r, group_i, k_MSd, v_MSe):
    """o_re and lse_r (log2) of one sequence."""
    outs = []
    for rows, blocks, R, origins, n in _runs(plan):

        def block(_, x, n=n):
            q, start, end, sink, m, origin = x
            k, v = _take(k_MSd, m, origin, n), _take(v_MSe, m, origin, n)
            scores, _ = _scores(plan, q, k, start, end, origin)
            highest = jnp.maximum(jnp.maximum(scores.max(-1), LOWEST), sink)
            weights = jnp.exp2(scores - highest[:, None])
            total = weights.sum(-1) + jnp.exp2(sink - highest) * (sink > LOWEST)
            total = jnp.maximum(total, jnp.finfo(total.dtype).tiny)
            o = matmul(weights.astype(v.dtype), v) / total[:, None]
            return None, (o, highest + jnp.log2(total))

        cut = lambda x, rows=rows, R=R: x[rows].reshape(-1, R, *x.shape[1:])
        xs = (*map(cut, (q_rd, start_r, end_r, sink_r)), group_i[blocks], jnp.asarray(origins))
        _, ys = jax.lax.scan(block, None, xs)
        outs.append([y.reshape(-1, *y.shape[2:]) for y in ys])
    return tuple(jnp.concatenate(x) for x in zip(*outs, strict=True))


def _backward_blocks(plan: _Plan, q_rd, start_r, end_r, sink_r, do_re, lse_r, delta_r, group_i, k_MSd, v_MSe):
    """dq_rd, dk_MdS and dv_MeS of one sequence."""
    stat = lse_r.dtype
    carry = tuple(jnp.zeros((x.shape[0], x.shape[2], x.shape[1]), stat) for x in (k_MSd, v_MSe))
    outs = []
    for rows, blocks, R, origins, n in _runs(plan):

        def block(carry, x, n=n):
            dk_MdS, dv_MeS = carry
            q, start, end, do, lse, delta, m, origin = x
            k, v = _take(k_MSd, m, origin, n), _take(v_MSe, m, origin, n)
            scores, slope = _scores(plan, q, k, start, end, origin)
            weights = jnp.where(scores > LOWEST, jnp.exp2(scores - lse[:, None]), 0)
            dscores = weights * (matmul(do, v.T) - delta[:, None])
            if slope is not None:
                dscores *= slope
            dscores = dscores.astype(k.dtype)
            # Accumulated transposed: [d, R] @ [R, n] is a plain product.
            dk_MdS = _add(dk_MdS, matmul(q.T, dscores) * plan.scale, m, origin)
            dv_MeS = _add(dv_MeS, matmul(do.T, weights.astype(v.dtype)), m, origin)
            return (dk_MdS, dv_MeS), matmul(dscores, k) * plan.scale

        cut = lambda x, rows=rows, R=R: x[rows].reshape(-1, R, *x.shape[1:])
        xs = (*map(cut, (q_rd, start_r, end_r, do_re, lse_r, delta_r)), group_i[blocks], jnp.asarray(origins))
        carry, dq = jax.lax.scan(block, carry, xs)
        outs.append(dq.reshape(-1, dq.shape[-1]))
    return jnp.concatenate(outs), *carry


def _scores(plan: _Plan, q_Rd, k_nd, start_R, end_R, origin):
    """Scores in log2 units, hidden ones `HIDDEN`, and the soft-cap's slope (None without one)."""
    products = matmul(q_Rd, k_nd.T)
    slope = None
    if plan.soft_cap is None:
        scores = products * (plan.scale * LOG2E)
    else:
        capped = jnp.tanh(products * (plan.scale / plan.soft_cap))
        scores, slope = capped * (plan.soft_cap * LOG2E), 1 - capped * capped
    key = origin + jnp.arange(k_nd.shape[0], dtype=jnp.int32)
    return jnp.where((key >= start_R[:, None]) & (key < end_R[:, None]), scores, HIDDEN), slope


def _take(x_MSd, m, origin, n: int):
    return jax.lax.dynamic_slice(x_MSd, _index(m, origin, 0), (1, n, x_MSd.shape[2]))[0]


def _add(x_MdS, part_dn, m, origin):
    at = _index(m, 0, origin)
    old = jax.lax.dynamic_slice(x_MdS, at, (1, *part_dn.shape))
    return jax.lax.dynamic_update_slice(x_MdS, old + part_dn[None], at)


def _index(*at):
    return tuple(jnp.asarray(i, jnp.int32) for i in at)
