"""Softmax attention under any mask in plain XLA: each tile of query rows against a table of the tiles it may see.

The table (`attnlab.ops.mask_tiles`) leaves out tiles that are empty. A few of a row's tiles at a time are gathered,
full ones first: the mask is evaluated in what is left. So time goes with the tiles that hold a visible pair, and no
array of queries by keys is made. Forward and backward follow FlashAttention (Dao 2023, arXiv:2307.08691).

Shapes: `G` query heads of a key head, `g` is 1 or G, `r` rows of a tile, `L` keys of the tiles computed at a time; `b`
and `m` are 1, or batch and key heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.blockwise import HIDDEN, LOG2E, LOWEST, matmul, varying
from attnlab.ops.mask_evaluation import Side, by_key_head, gathered, sides_of
from attnlab.ops.mask_tiles import EMPTY, FULL, PARTIAL, table_of, tile_kinds
from attnlab.ops.masks import Array, Mask, numpy_if
from attnlab.parallel import partition

# Rows and keys of a tile, and tiles of keys computed at a time: full ones (about as many), and others.
ON_CPU = 64, 64, 4, 2
ELSEWHERE = 128, 128, 4, 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything static that the two passes need (hashable: a nondifferentiable argument).

    scale, soft_cap: of the op. rows, keys: of a tile. full, masked: tiles at a time. length, count: T and S.
    """

    scale: float
    soft_cap: float | None
    rows: int
    keys: int
    full: int
    masked: int
    length: int
    count: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Which tiles are computed, and what says the mask in them; leading axes [b, m], which a head's own is without.

    index: `[..., nq, L]`, tiles of keys, full ones first. full, count: `[..., nq]`, how many are full, and how many.
    """

    index: Array
    full: Array
    count: Array
    sides: tuple[Side, ...]


def worth(spec: AttentionSpec) -> bool:
    """Whether "auto" takes it: not where the mask is an interval and others serve."""
    return spec.pattern or spec.biases


def attention(q, k, v, mask: Mask, sinks=None, key_bias=None, query_bias=None, **options) -> jax.Array:
    """See `attnlab.ops.attention.attention`."""
    return attention_with_lse(q, k, v, mask, sinks, key_bias, query_bias, **options)[0]


def attention_with_lse(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    sinks_H: jax.Array | None = None,
    key_bias_BSh: jax.Array | None = None,
    query_bias_BTh: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `attnlab.ops.attention.attention_with_lse`."""
    (T, H), (S, K) = q_BTHd.shape[1:3], k_BSKd.shape[1:3]
    sizes = ON_CPU if partition.platform() == "cpu" else ELSEWHERE
    config = Config(scale, soft_cap, *sizes, T, S)
    if chosen := any(term.groups is not None and term.groups.chosen for term in mask.terms()):
        config = dataclasses.replace(config, masked=1)
    plan = _plan(config, mask, H, K, in_order=chosen)
    config = dataclasses.replace(config, full=_full_at_a_time(plan.full, config.full))
    arrays = varying((q_BTHd, k_BSKd, v_BSKe, sinks_H, key_bias_BSh, query_bias_BTh), (q_BTHd, k_BSKd, v_BSKe, mask))
    o, lse_BTH = _attention(config, *arrays, plan)
    return o, lse_BTH / LOG2E


def _plan(config: Config, mask: Mask, H: int, K: int, in_order: bool = False) -> Plan:
    """The tiles that a key head computes: those that one of its query heads sees.

    in_order: ascending, and none is taken for full. One at a time, a tile that a row sees nothing of leaves the row's
        sums as they are, to the last bit: so which tiles are there may depend on other rows of the tile of rows.
    """
    sizes = config.length, config.count, config.rows, config.keys
    kinds = tile_kinds(mask, *sizes)
    xp = numpy_if(isinstance(kinds, np.ndarray))
    if kinds.shape[1] == H > K:
        kinds = kinds.reshape(kinds.shape[0], K, H // K, *kinds.shape[2:])
        least, most = kinds.min(2), kinds.max(2)
        kinds = xp.where(most == EMPTY, EMPTY, xp.where(least == FULL, FULL, PARTIAL)).astype(xp.int8)
    if in_order:
        kinds = xp.minimum(kinds, PARTIAL)
    table = table_of(kinds, full_first=True)
    # A step reads all of its places, also where the last one's reach over the end.
    index = xp.pad(table.index, [(0, 0)] * 3 + [(0, config.full + 2 + config.masked)], mode="edge")
    full = (table.kind == FULL).sum(-1, dtype=xp.int32)
    return Plan(index, full, table.count, sides_of(mask, config.length, config.count, H, K, config.rows, config.keys))


def _full_at_a_time(full: Array, usual: int) -> int:
    """About `usual`, so that few full tiles are left for the last steps, where their numbers are known."""
    if not isinstance(full, np.ndarray):
        return usual
    return min(range(max(1, usual - 1), usual + 3), key=lambda n: ((full % n).sum(), abs(n - usual)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: Config, q, k, v, sinks, key_bias, query_bias, plan: Plan):
    return _forward(config, q, k, v, sinks, key_bias, query_bias, plan)[0]


def _forward(config: Config, q, k, v, sinks, key_bias, query_bias, plan: Plan):
    (B, T, H, _), K, e = q.shape, k.shape[2], v.shape[3]
    stat = jnp.promote_types(q.dtype, jnp.float32)
    heads = _of_heads(config, q, k, v, sinks, key_bias, query_bias) | {"plan": plan}
    padded = heads["q"].shape[3]
    out = [((H // K, padded, e), q.dtype), ((H // K, padded), stat)]
    o, lse = _over_heads(partial(_forward_head, config), heads, B, K, out)
    o = checkpoint_name(_by_position(o, T), "attention_o")
    lse = checkpoint_name(_by_position(lse[..., None], T)[..., 0], "attention_lse")
    return (o, lse), (q, k, v, sinks, key_bias, query_bias, plan, o, lse)


def _backward(config: Config, residuals, cotangents):
    q, k, v, sinks, key_bias, query_bias, plan, o, lse = residuals
    do, dlse = cotangents
    (B, T, H, d), K, e = q.shape, k.shape[2], v.shape[3]
    stat, G = lse.dtype, H // K
    delta = (o.astype(stat) * do.astype(stat)).sum(-1) - dlse * LOG2E  # d lse / d logit is the weight
    heads = _of_heads(config, q, k, v, sinks, key_bias, query_bias) | {"plan": plan}
    of_rows = lambda x: _rows_of_heads(config, x, K)
    heads |= {"do": of_rows(do), "lse": of_rows(lse[..., None])[..., 0], "delta": of_rows(delta[..., None])[..., 0]}
    rows, nk, bk = heads["q"].shape[3], *heads["k"].shape[2:4]
    g = [0 if x is None else G if x.shape[2] == H > K else 1 for x in (key_bias, query_bias)]
    out = [((G, rows, d), stat), *(((nk, n, bk), stat) for n in (d, e, g[0])), ((g[1], rows), stat), ((G,), stat)]
    dq, dk, dv, dkey_bias, dquery_bias, dsinks = _over_heads(partial(_backward_head, config), heads, B, K, out)
    by_key = lambda x: jnp.moveaxis(x, 2, 3).reshape(B, K, x.shape[3], -1)[..., : config.count]  # [B, K, d, S]
    of_keys = lambda x, like: by_key(x).transpose(0, 3, 1, 2).astype(like.dtype)
    return (
        _by_position(dq * config.scale, T).astype(q.dtype),
        of_keys(dk * config.scale, k),
        of_keys(dv, v),
        None if sinks is None else dsinks.sum(0).reshape(H).astype(sinks.dtype),
        None if key_bias is None else _of_bias(by_key(dkey_bias), key_bias),
        None if query_bias is None else _of_bias(dquery_bias[..., :T], query_bias),
        None,
    )


_attention.defvjp(_forward, _backward)


def _of_bias(x_BKgn: jax.Array, bias: jax.Array) -> jax.Array:
    """The gradient of a bias [B or 1, n, h]."""
    x = x_BKgn.reshape(x_BKgn.shape[0], -1, x_BKgn.shape[-1])
    if bias.shape[2] == 1:
        x = x.sum(1, keepdims=True)
    if bias.shape[0] == 1:
        x = x.sum(0, keepdims=True)
    return x.swapaxes(1, 2).astype(bias.dtype)


# Arrays by key head.


def _of_heads(config: Config, q, k, v, sinks, key_bias, query_bias) -> dict[str, Any]:
    """q [B, K, G, T, d], k and v [B, K, nk, bk, d], sinks [1, K, G], biases [b, m, g, T] and [b, m, g, nk, bk]."""
    H, K = q.shape[2], k.shape[2]

    def of_keys(x):
        x = jnp.pad(x, ((0, 0), (0, -config.count % config.keys), (0, 0), (0, 0))).swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1, config.keys, x.shape[-1])

    def of_bias(x, size):
        x = by_key_head(x.swapaxes(1, 2), H, K) * LOG2E
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % size)))

    found = {"q": _rows_of_heads(config, q, K), "k": of_keys(k), "v": of_keys(v)}
    if sinks is not None:
        found["sinks"] = sinks.reshape(1, K, H // K) * LOG2E
    if key_bias is not None:
        bias = of_bias(key_bias, config.keys)
        found["key_bias"] = bias.reshape(*bias.shape[:3], -1, config.keys)
    if query_bias is not None:
        found["query_bias"] = of_bias(query_bias, config.rows)
    return found


def _rows_of_heads(config: Config, x: jax.Array, K: int) -> jax.Array:
    """[B, T, H, d] as [B, K, G, T, d], rows up to a whole number of tiles."""
    B, T, H, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % config.rows), (0, 0), (0, 0)))
    return x.reshape(B, -1, K, H // K, d).transpose(0, 2, 3, 1, 4)


def _by_position(x: jax.Array, T: int) -> jax.Array:
    """[B, K, G, T, d] as [B, T, H, d]."""
    B, K, G, _, d = x.shape
    return x[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, d)


def _over_heads(head: Callable, arrays: dict[str, Any], B: int, K: int, out: list[tuple[tuple[int, ...], Any]]):
    """Run `head(arrays, counts)`, written for one key head, over batch and key heads: [B, K, ...] of each of `out`.

    `counts`, of each tile of rows: how many tiles of keys, the first ones, are taken for full, and how many there are.
    One head after the other on CPU, each with its own counts, and all together elsewhere.
    """

    def one_by_one(arrays):
        wide = lambda x: (
            x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x
        )

        def body(i, results):
            own = lambda x: x[i // K if x.shape[0] > 1 else 0, i % K if x.shape[1] > 1 else 0]
            of_head = jax.tree.map(lambda x: wide(own(jnp.asarray(x))), arrays)
            parts = head(of_head, (of_head["plan"].full, of_head["plan"].count))
            put = lambda whole, part: whole.at[i // K, i % K].set(part.astype(whole.dtype))
            return tuple(map(put, results, parts))

        carry = varying(tuple(jnp.zeros((B, K, *shape), dtype) for shape, dtype in out), arrays)
        return _loop(B * K, body, carry)

    def together(arrays):
        full, count = (jnp.asarray(x) for x in (arrays["plan"].full, arrays["plan"].count))
        most = full.min((0, 1)), count.max((0, 1))

        def over(axis, run):  # vmap over the first axis where it is not 1
            def mapped(arrays):
                leaves, kind = jax.tree.flatten(arrays)
                axes = [0 if x.shape[0] > 1 else None for x in leaves]
                leaves = [x if a == 0 else x[0] for x, a in zip(leaves, axes)]
                fn = lambda leaves: run(jax.tree.unflatten(kind, leaves))
                if all(a is None for a in axes):
                    return jax.tree.map(lambda x: x[None], fn(leaves))
                return jax.vmap(fn, (axes,))(leaves)

            return mapped

        results = over(0, over(1, lambda own: head(own, most)))(jax.tree.map(jnp.asarray, arrays))
        return varying(tuple(x.astype(dtype) for x, (_, dtype) in zip(results, out, strict=True)), arrays)

    return partition.by_platform(arrays, cpu=one_by_one, default=together)


# One key head.


def _sweep(config: Config, counts, tile, step: Callable, carry):
    """Fold `carry = step(first, n, masked, carry)` over the tiles of keys of a tile of rows, n from `first` on."""
    full, count = counts[0][tile], counts[1][tile]
    n, whole = config.full, full // config.full
    carry = _loop(whole, lambda c, carry: step(c * n, n, False, carry), carry)
    rest = -(-(count - whole * n) // config.masked)
    return _loop(rest, lambda c, carry: step(whole * n + c * config.masked, config.masked, True, carry), carry)


def _step(config: Config, of_head: dict[str, Any], tile, at: tuple[Any, int, bool], q_Grd, factor: float):
    """Of one step of a tile of rows: the tiles of keys, k_Ld, v_Le, scores [G, r, L] in log2 units, hidden ones
    `HIDDEN`, and the soft-cap's slope."""
    plan, (first, n, masked) = of_head["plan"], at
    index = jax.lax.dynamic_slice(plan.index, (tile, first), (1, n))[0]
    tiles = [index[j] for j in range(n)]
    k, v = (_keys(of_head[name], tiles) for name in ("k", "v"))
    (G, r, d), slope = q_Grd.shape, None
    scores = matmul(q_Grd.reshape(G * r, d), k.T).reshape(G, r, -1)
    if config.soft_cap is None:
        scores = scores * (config.scale * LOG2E / factor)
    else:
        capped = jnp.tanh(scores * (config.scale / config.soft_cap / factor))
        scores, slope = capped * (config.soft_cap * LOG2E), 1 - capped * capped
    if "key_bias" in of_head:
        scores = scores + gathered(of_head["key_bias"], tiles)[:, None]
    if "query_bias" in of_head:
        scores = scores + _rows(of_head["query_bias"], tile, r)[..., None]
    if masked:
        found = [side.visible(tile, tiles, r) for side in plan.sides]
        used = first + jnp.arange(n, dtype=jnp.int32) < plan.count[tile]
        seen = jnp.repeat(used, config.keys) & (found[0] if len(found) == 1 else found[0] | found[1])
        scores = jnp.where(seen, scores, HIDDEN)
    return tiles, k, v, scores, slope


def _keys(x: jax.Array, tiles: list[jax.Array]) -> jax.Array:
    """[nk, bk, d] at some tiles: [L, d]."""
    return jnp.concatenate([jax.lax.dynamic_index_in_dim(x, j, 0, keepdims=False) for j in tiles], axis=0)


def _loop(count, body: Callable, carry):
    """fori_loop from 0, whose index is int32 in float64 programs, too."""
    return jax.lax.fori_loop(0, count, lambda i, carry: body(i.astype(jnp.int32), carry), carry)


def _rows(x: jax.Array, tile, size: int) -> jax.Array:
    """The rows of a tile, on axis 1."""
    return jax.lax.dynamic_slice_in_dim(x, tile * size, size, 1)


def _put(x: jax.Array, part: jax.Array, first) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, first, 1)


def _factor(config: Config, dtype: Any) -> float:
    """What goes into q, which is small, rather than into the products, where that loses nothing."""
    return config.scale * (LOG2E if config.soft_cap is None else 1 / config.soft_cap) if dtype.itemsize >= 4 else 1.0


def _forward_head(config: Config, of_head: dict[str, Any], counts) -> tuple[jax.Array, jax.Array]:
    """o [G, T, e] and the log2-sum-exp2 of the scores [G, T], sinks included."""
    q, r = of_head["q"], config.rows
    (G, T, _), e = q.shape, of_head["v"].shape[-1]
    stat = jnp.promote_types(q.dtype, jnp.float32)
    factor = _factor(config, q.dtype)
    first = jnp.full((G, r), LOWEST, stat), jnp.zeros((G, r), stat)
    if "sinks" in of_head:
        highest = jnp.maximum(of_head["sinks"].astype(stat), LOWEST)[:, None]
        first = jnp.broadcast_to(highest, (G, r)), jnp.ones((G, r), stat)

    def rows_of_tile(tile, carry):
        q_tile = _rows(q, tile, r) * factor

        def step(first, n, masked, so_far):
            highest, total, o = so_far
            _, _, v, scores, _ = _step(config, of_head, tile, (first, n, masked), q_tile, factor)
            new = jnp.maximum(highest, scores.max(-1))
            weights, shrink = jnp.exp2(scores - new[..., None]), jnp.exp2(highest - new)
            more = matmul(weights.astype(v.dtype).reshape(G * r, -1), v).reshape(G, r, e)
            return new, total * shrink + weights.sum(-1), o * shrink[..., None] + more

        begin = varying((*first, jnp.zeros((G, r, e), stat)), of_head)
        highest, total, o = _sweep(config, counts, tile, step, begin)
        total = jnp.maximum(total, jnp.finfo(stat).tiny)
        o_GTe, lse_GT = carry
        return _put(o_GTe, o / total[..., None], tile * r), _put(lse_GT, highest + jnp.log2(total), tile * r)

    carry = varying((jnp.zeros((G, T, e), stat), jnp.zeros((G, T), stat)), of_head)
    return _loop(T // r, rows_of_tile, carry)


def _backward_head(config: Config, of_head: dict[str, Any], counts) -> tuple[jax.Array, ...]:
    """dq [G, T, d], dk and dv [nk, d, bk], of the key bias [nk, g, bk], of the query bias [g, T], of the sinks [G]."""
    q, r = of_head["q"], config.rows
    (G, T, d), e = q.shape, of_head["v"].shape[-1]
    (nk, bk, _), stat = of_head["k"].shape, of_head["lse"].dtype
    factor = _factor(config, q.dtype)
    heads = [of_head[name].shape[0] if name in of_head else 0 for name in ("key_bias", "query_bias")]

    def rows_of_tile(tile, carry):
        dq, *rest, dquery_bias = carry
        q_, do, lse, delta = (_rows(x, tile, r) for x in (q, of_head["do"], of_head["lse"], of_head["delta"]))
        scaled, q_, do = q_ * factor, q_.reshape(G * r, d), do.reshape(G * r, e)

        def step(first, n, masked, so_far):
            dq, dquery, dk, dv, dkey = so_far
            tiles, k, v, scores, slope = _step(config, of_head, tile, (first, n, masked), scaled, factor)
            weights = jnp.exp2(scores - lse[..., None])
            dscores = weights * (matmul(do, v.T).reshape(weights.shape) - delta[..., None])
            if heads[0]:
                dkey = _add(dkey, dscores.sum(1).reshape(heads[0], -1, dscores.shape[2]).sum(1), tiles)
            if heads[1]:
                dquery = dquery + dscores.sum(2).reshape(heads[1], -1, r).sum(1)
            dscores = dscores if slope is None else dscores * slope
            dscores = dscores.astype(k.dtype).reshape(G * r, -1)
            dk = _add(dk, matmul(q_.T, dscores), tiles)
            dv = _add(dv, matmul(do.T, weights.astype(v.dtype).reshape(G * r, -1)), tiles)
            return dq + matmul(dscores, k).reshape(G, r, d), dquery, dk, dv, dkey

        begin = varying((jnp.zeros((G, r, d), stat), jnp.zeros((heads[1], r), stat)), of_head)
        dq_tile, dquery, *rest = _sweep(config, counts, tile, step, (*begin, *rest))
        return _put(dq, dq_tile, tile * r), *rest, _put(dquery_bias, dquery, tile * r)

    shapes = (G, T, d), (nk, d, bk), (nk, e, bk), (nk, heads[0], bk), (heads[1], T)
    carry = varying(tuple(jnp.zeros(shape, stat) for shape in shapes), of_head)
    dq, dk, dv, dkey_bias, dquery_bias = _loop(T // r, rows_of_tile, carry)
    dsinks = jnp.zeros((G,), stat)
    if "sinks" in of_head:
        dsinks = -(jnp.exp2(of_head["sinks"].astype(stat)[:, None] - of_head["lse"]) * of_head["delta"]).sum(-1)
    return dq, dk, dv, dkey_bias, dquery_bias, dsinks


def _add(x: jax.Array, parts: jax.Array, tiles: list[jax.Array]) -> jax.Array:
    """x [nk, d, bk] plus [d, L], the columns of some tiles; a tile that is repeated behind the last has zeros.

    Tiles are contiguous: columns of one matrix as wide as S, a power of two, would meet in few sets of a cache.
    """
    bk = x.shape[2]
    for i, j in enumerate(tiles):
        own = jax.lax.dynamic_index_in_dim(x, j, 0)
        x = jax.lax.dynamic_update_slice_in_dim(x, own + parts[None, :, i * bk : (i + 1) * bk], j, 0)
    return x
