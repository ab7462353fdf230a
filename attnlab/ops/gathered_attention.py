"""Softmax attention of some of the (query, head) pairs: the others cost nothing and are 0.

Every token wants at most `active` of the E heads it may choose from. A head's queries are gathered into blocks of R
rows; the blocks of all heads share one table, whose length follows from `active` alone, so that no choice overflows it
and no token is dropped. The table is made for one segment of the sequence at a time: the keys that a segment's rows can
see are known while tracing, and so the products of a causal mask's other half are never emitted.

Shapes: as in `attnlab.ops.attention`; E heads to choose from, M key heads among them, N segments of L positions,
I blocks of R rows per segment.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from attnlab.ops.attention import attention
from attnlab.ops.blockwise import HIDDEN, LOG2E, LOWEST, Blocks, matmul, plan_blocks
from attnlab.ops.cached_attention import cached_attention
from attnlab.ops.masks import Mask

_SEGMENT = 256  # fewest positions of a segment
_SEGMENTS = 8  # key ranges of their own, as in the dense form
_SLACK = 0.2  # rows of the table beyond those wanted, as a share: more of it lets blocks be larger


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: hashable, a nondifferentiable argument."""

    mask: Mask  # its static part
    scale: float
    soft_cap: float | None
    chosen: tuple[int, ...]  # the E heads to choose from
    group: tuple[int, ...]  # for each of them the place of its key head in `key_heads`
    key_heads: tuple[int, ...]  # M
    active: int
    length: int
    keys: int

    def segment_length(self) -> int:
        if self.mask.window is not None or not self.mask.causal:
            return _SEGMENT
        return max(_SEGMENT, -(-self.length // _SEGMENTS))

    def segments(self) -> list[tuple[int, int, int]]:
        """(first position, N, L) of the whole segments, and of what is left."""
        L = self.segment_length()
        full, rest = divmod(self.length, L)
        return [(0, full, L)] * (full > 0) + [(full * L, 1, rest)] * (rest > 0)

    def blocks(self, L: int) -> tuple[int, int]:
        """I and R: blocks that hold whatever L positions choose, the last block of each key head partly empty."""
        M, wanted = len(self.key_heads), L * self.active
        R = 1 + int(_SLACK * wanted / M)
        R = min(R - R % 8 if R > 8 else R, L)
        sizes = [min(self.group.count(m), self.active) for m in range(M)]
        return min((wanted + M * (R - 1)) // R, sum(-(-L * size // R) for size in sizes)), R

    def ranges(self, first: int) -> list[Blocks]:
        """Key ranges of the segments from position `first` on (0: the whole ones)."""
        plan = plan_blocks(self.length, self.keys, self.mask, self.segment_length(), _SEGMENTS)
        return [b for b in plan if (b.first < self.segments()[0][1] * self.segments()[0][2]) == (first == 0)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Table:
    """Which row each wanted pair has.

    pair_Br: t * H + h of each row, -1 where the row is empty. group_Bi: key head (its place) of each block.
    row_BTE: the row of each wanted pair, anything elsewhere.
    """

    pair_Br: jax.Array
    group_Bi: jax.Array
    row_BTE: jax.Array


def gathered_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    wanted_BTE: jax.Array,
    *,
    chosen: tuple[int, ...],
    active: int,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """`attnlab.ops.attention.attention` for all heads but `chosen`, and for these where wanted; 0 elsewhere.

    Args:
      q_BTHd, k_BSKd, v_BSKe, mask, scale, soft_cap, sinks_H: as there.
      wanted_BTE: bool, for each position which of the heads `chosen` it wants.
      chosen: heads, ascending.
      active: most heads that a position wants; that more are wanted is not noticed and gives wrong results.
      impl: of the attention of the other heads.

    Returns o_BTHe. Differentiable in q, k, v and sinks.
    """
    B, T, H, d = q_BTHd.shape
    S, K = k_BSKd.shape[1:3]
    scale = d**-0.5 if scale is None else float(scale)
    always = tuple(h for h in range(H) if h not in chosen)
    parts = {}
    if always:
        q, k, v, sinks = subset(q_BTHd, k_BSKd, v_BSKe, sinks_H, always)
        parts["always"] = attention(q, k, v, mask, scale=scale, soft_cap=soft_cap, sinks_H=sinks, impl=impl)
    if chosen:
        key_heads = tuple(sorted({h * K // H for h in chosen}))
        group = tuple(key_heads.index(h * K // H) for h in chosen)
        static = Mask(causal=mask.causal, window=mask.window)
        plan = _Plan(static, scale, soft_cap, chosen, group, key_heads, active, T, S)
        bounds = zip(mask.bounds(T, S), (0, S))
        start, end = (jnp.broadcast_to(jnp.int32(full) if x is None else x, (B, T)) for x, full in bounds)
        parts["chosen"] = _gathered(plan, q_BTHd, k_BSKd, v_BSKe, sinks_H, (start, end, wanted_BTE))
    if len(parts) == 1:
        return next(iter(parts.values()))
    return interleaved(parts["always"], parts["chosen"], always, chosen)


def subset(q_BTHd, k_BSKd, v_BSKe, sinks_H, heads: tuple[int, ...]):
    """Queries, keys, values and sinks of some heads, ascending; key heads stay shared where the groups stay even."""
    H, K = q_BTHd.shape[2], k_BSKd.shape[2]
    key_heads = [h * K // H for h in heads]
    distinct = sorted(set(key_heads))
    even = len({key_heads.count(m) for m in distinct}) == 1
    kept = distinct if even else key_heads
    sinks = None if sinks_H is None else sinks_H[np.asarray(heads)]
    return take_heads(q_BTHd, heads), take_heads(k_BSKd, kept), take_heads(v_BSKe, kept), sinks


def take_heads(x_BTHd: jax.Array, heads) -> jax.Array:
    """x[:, :, heads] for static heads, as slices of runs: their transpose is a padding, not a scatter."""
    if list(heads) == list(range(x_BTHd.shape[2])):
        return x_BTHd
    runs: list[list[int]] = []
    for h in heads:
        if runs and h == runs[-1][1]:
            runs[-1][1] = h + 1
        else:
            runs.append([h, h + 1])
    return jnp.concatenate([x_BTHd[:, :, a:b] for a, b in runs], axis=2)


def interleaved(a_BTHe: jax.Array, b_BTHe: jax.Array, a_heads: tuple[int, ...], b_heads: tuple[int, ...]) -> jax.Array:
    """One array [B, T, H, e] of the heads `a_heads` and `b_heads`, which together are 0 to H - 1."""
    order = [*a_heads, *b_heads]
    return take_heads(jnp.concatenate([a_BTHe, b_BTHe], axis=2), [order.index(h) for h in range(len(order))])


# The heads to choose from.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(plan: _Plan, q, k, v, sinks, choice):
    return _gathered_forward(plan, q, k, v, sinks, choice)[0]


def _gathered_forward(plan: _Plan, q, k, v, sinks, choice):
    table = _table(plan, choice[2], q.shape[2])
    rows = _query_rows(plan, q, sinks, choice, table)
    keys = _key_rows(plan, k), _key_rows(plan, v)
    o_Bre, lse_Br = _per_sequence(partial(_forward_blocks, plan), (*rows, table.group_Bi, *keys), (q.dtype, None))
    o_BTEe = checkpoint_name(_pairs(o_Bre, table, choice[2]), "attention_o")
    lse_BTE = checkpoint_name(_pairs(lse_Br[..., None], table, choice[2])[..., 0], "attention_lse")
    return o_BTEe, (q, k, v, sinks, choice, table, o_BTEe, lse_BTE)


def _gathered_backward(plan: _Plan, residuals, do_BTEe):
    q, k, v, sinks, choice, table, o_BTEe, lse_BTE = residuals
    stat, wanted = lse_BTE.dtype, choice[2]
    B, T, H, _ = q.shape
    E = len(plan.chosen)
    delta_BTE = jnp.where(wanted, jnp.sum(o_BTEe.astype(stat) * do_BTEe.astype(stat), axis=-1), 0)
    rows = _query_rows(plan, q, sinks, choice, table)
    # A row's place among the pairs [T, E] of the heads to choose from, from its place among all [T, H].
    place = np.zeros(H, np.int32)
    place[list(plan.chosen)] = np.arange(E)
    pair = jnp.maximum(table.pair_Br, 0)
    pair = pair // H * E + jnp.asarray(place)[pair % H]
    of_row = lambda x: jnp.take_along_axis(x.reshape(B, T * E, -1), pair[..., None], axis=1)
    # Where a row is empty its weights are 0, whatever is gathered here.
    arrays = (*rows, of_row(do_BTEe), of_row(lse_BTE)[..., 0], of_row(delta_BTE)[..., 0])
    arrays = (*arrays, table.group_Bi, _key_rows(plan, k), _key_rows(plan, v))
    dq_Brd, dk, dv = _per_sequence(partial(_backward_blocks, plan), arrays, (q.dtype, k.dtype, v.dtype))
    dq = _spread(_pairs(dq_Brd, table, wanted), plan.chosen, H)
    dk, dv = (_spread(x.transpose(0, 3, 1, 2), plan.key_heads, k.shape[2]) for x in (dk, dv))
    dsinks = None
    if sinks is not None:
        share = jnp.exp2(sinks[np.asarray(plan.chosen)].astype(stat) * LOG2E - lse_BTE)
        dsinks_E = -jnp.sum(jnp.where(wanted, share * delta_BTE, 0), axis=(0, 1))
        dsinks = jnp.zeros(H, sinks.dtype).at[np.asarray(plan.chosen)].set(dsinks_E.astype(sinks.dtype))
    return dq, dk, dv, dsinks, None


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _spread(x_BTEd: jax.Array, heads: tuple[int, ...], H: int) -> jax.Array:
    """x at its `heads` of H, zeros elsewhere."""
    others = tuple(h for h in range(H) if h not in heads)
    if not others:
        return x_BTEd
    B, T, _, d = x_BTEd.shape
    return interleaved(x_BTEd, jnp.zeros((B, T, len(others), d), x_BTEd.dtype), heads, others)


def _table(plan: _Plan, wanted_BTE: jax.Array, H: int) -> _Table:
    B = wanted_BTE.shape[0]
    E, M = len(plan.chosen), len(plan.key_heads)
    group = np.asarray(plan.group)
    member_EM = group[:, None] == np.arange(M)
    earlier_EE = (group[:, None] == group) & (np.arange(E) < np.arange(E)[:, None])
    pairs, groups, places, before = [], [], [], 0
    for first, N, L in plan.segments():
        I, R = plan.blocks(L)
        wanted = wanted_BTE[:, first : first + N * L].reshape(B, N, L, E).astype(jnp.int32)
        of_token = jnp.sum(wanted[..., None] * member_EM, axis=-2, dtype=jnp.int32)
        upto = jnp.cumsum(of_token, axis=2, dtype=jnp.int32)
        blocks = -(-upto[:, :, -1] // R)
        end = jnp.cumsum(blocks, axis=-1, dtype=jnp.int32)
        # Rows of a key head are in the order of their positions, then of their heads.
        rank = (upto - of_token)[..., group] + jnp.sum(wanted[..., None, :] * earlier_EE, axis=-1)
        row = ((end - blocks) * R)[:, :, None, group] + rank
        groups.append(jnp.minimum(jnp.sum(end[..., None, :] <= jnp.arange(I)[:, None], axis=-1), M - 1).reshape(B, -1))
        token = first + jnp.arange(N * L, dtype=jnp.int32).reshape(N, L, 1)
        pair = jnp.broadcast_to(token * H + np.asarray(plan.chosen, np.int32), wanted.shape).reshape(B, N, -1)
        empty = jnp.full((B, N, I * R), -1, jnp.int32)
        at = jnp.where(wanted > 0, row, I * R).reshape(B, N, -1)
        put = jax.vmap(jax.vmap(lambda x, i, p: x.at[i].set(p, mode="drop")))
        pairs.append(put(empty, at, pair).reshape(B, -1))
        row += before + I * R * jnp.arange(N)[:, None, None]
        places.append(row.reshape(B, N * L, E))
        before += N * I * R
    return _Table(*(jnp.concatenate(x, axis=1) for x in (pairs, groups, places)))


def _query_rows(plan: _Plan, q_BTHd, sinks_H, choice, table: _Table):
    """Queries, first and last key (an empty row sees none), and sink of each row."""
    B, T, H, d = q_BTHd.shape
    start, end, _ = choice
    pair = jnp.maximum(table.pair_Br, 0)
    q_Brd = jnp.take_along_axis(q_BTHd.reshape(B, T * H, d), pair[..., None], axis=1)
    of_token = lambda x: jnp.where(table.pair_Br < 0, 0, jnp.take_along_axis(x, pair // H, axis=1))
    stat = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    sink_Br = jnp.full(pair.shape, LOWEST, stat)
    if sinks_H is not None:
        sink_Br = (sinks_H.astype(stat) * LOG2E)[pair % H]
    return q_Brd, of_token(start), of_token(end), sink_Br


def _key_rows(plan: _Plan, k_BSKd: jax.Array) -> jax.Array:
    """[B, M, S, d]: a block's keys lie together."""
    return take_heads(k_BSKd, plan.key_heads).swapaxes(1, 2)


def _pairs(x_Bre: jax.Array, table: _Table, wanted_BTE: jax.Array) -> jax.Array:
    """[B, T, E, e]: what a wanted pair's row holds, 0 for the others."""
    B, T, E = wanted_BTE.shape
    row = jnp.where(wanted_BTE, table.row_BTE, 0).reshape(B, -1)
    x = jnp.take_along_axis(x_Bre, row[..., None], axis=1).reshape(B, T, E, -1)
    return jnp.where(wanted_BTE[..., None], x, 0)


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

    return jax.lax.platform_dependent(arrays, cpu=lambda arrays: jax.lax.map(one, arrays), default=together)


def _runs(plan: _Plan):
    """For each run of segments whose key ranges have one length: their rows, blocks, R, where the key range of each
    block begins, and that length."""
    row = block = 0
    for first, _, L in plan.segments():
        I, R = plan.blocks(L)
        for b in plan.ranges(first):
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


# One query and a cache.


def selected_cached_attention(
    q_BTHd: jax.Array,
    k_NSd: jax.Array,
    v_NSe: jax.Array,
    mask: Mask,
    wanted_BK: jax.Array,
    *,
    reads: int,
    soft_cap: float | None = None,
    impl: str = "auto",
) -> jax.Array:
    """`cached_attention` of one query that reads `reads` key heads of each sequence; the others' outputs are 0.

    Args:
      q_BTHd: T = 1.
      k_NSd, v_NSe, mask, soft_cap, impl: as in `cached_attention`.
      wanted_BK: bool, the key heads to read, at most `reads`.
    """
    B, _, H, d = q_BTHd.shape
    K, e = wanted_BK.shape[1], v_NSe.shape[2]
    _, read_Br = jax.lax.top_k(wanted_BK.astype(jnp.int32), reads)
    row = (jnp.arange(B)[:, None] * K + read_Br).reshape(-1)
    q = jnp.take_along_axis(q_BTHd.reshape(B, K, H // K, d), read_Br[:, :, None, None], axis=1)
    o = cached_attention(q.reshape(B, 1, -1, d), k_NSd[row], v_NSe[row], mask, soft_cap=soft_cap, impl=impl)
    o = o.reshape(B, reads, H // K, e)
    return jnp.zeros((B, K, H // K, e), o.dtype).at[jnp.arange(B)[:, None], read_Br].set(o).reshape(B, 1, H, e)
