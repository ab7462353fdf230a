"""Softmax attention under any mask in plain XLA: tiles of query rows against a table of the tiles they may see.

The table (`attnlab.ops.mask_tiles`) leaves out tiles that are empty. A group of tiles of rows goes together, each
against a few of its tiles at a time, full ones first: the mask is evaluated in what is left. So time goes with the
tiles that hold a visible pair, and no array of queries by keys is made. Forward and backward follow FlashAttention
(Dao 2023, arXiv:2307.08691).

Shapes: `G` query heads of a key head, `g` is 1 or G, `r` rows of a tile, `b` tiles of rows in a group, `n` tiles of
keys computed at a time and `L` keys of them; `m` and `h` are 1, or batch and key heads; `B` and `K` are 1 in arrays of
one head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.attention_tiles_plan import Config, Plan, Sizes, planned
from attnlab.ops.blockwise import HIDDEN, LOG2E, LOWEST, matmul, varying
from attnlab.ops.masks import Mask
from attnlab.parallel import partition

# On CPUs products of one tile of rows are too small for XLA to use several cores; those of a group are not (as of jax
# 0.11), and its arrays stay in the caches.
ON_CPU = Sizes(rows=64, keys=64, full=8, masked=3, group=8, pairs=128)
ELSEWHERE = Sizes(rows=128, keys=128, full=4, masked=4, group=1, pairs=4)


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
    chosen = any(term.groups is not None and term.groups.chosen for term in mask.terms())
    config, plan = planned(Config(scale, soft_cap, sizes, T, S), mask, H, K, in_order=chosen)
    arrays = varying((q_BTHd, k_BSKd, v_BSKe, sinks_H, key_bias_BSh, query_bias_BTh), (q_BTHd, k_BSKd, v_BSKe, mask))
    o, lse_BTH = _attention(config, *arrays, plan)
    return o, lse_BTH / LOG2E


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: Config, q, k, v, sinks, key_bias, query_bias, plan: Plan):
    return _forward(config, q, k, v, sinks, key_bias, query_bias, plan)[0]


def _forward(config: Config, q, k, v, sinks, key_bias, query_bias, plan: Plan):
    (B, T, H, _), K, e = q.shape, k.shape[2], v.shape[3]
    arrays = _arrays(config, q, k, v, sinks, key_bias, query_bias, plan)
    nq, r, _, G, _ = arrays["q"].shape[1:]
    out = [((nq, r, G, e), 3, q.dtype), ((nq, r, G), 3, jnp.promote_types(q.dtype, jnp.float32))]
    o, lse = _over_heads(partial(_forward_head, config), arrays, B, K, out)
    o = checkpoint_name(o.reshape(B, -1, H, e)[:, :T], "attention_o")
    lse = checkpoint_name(lse.reshape(B, -1, H)[:, :T], "attention_lse")
    return (o, lse), (q, k, v, sinks, key_bias, query_bias, plan, o, lse)


def _backward(config: Config, residuals, cotangents):
    q, k, v, sinks, key_bias, query_bias, plan, o, lse = residuals
    (B, T, H, d), (S, K, e), stat = q.shape, v.shape[1:], lse.dtype
    arrays = _arrays(config, q, k, v, sinks, key_bias, query_bias, plan)
    rows = {"o": o, "do": cotangents[0], "dlse": cotangents[1]}
    arrays |= {name: _tiled_rows(config, x, K) for name, x in rows.items()}
    arrays["lse"] = _tiled_rows(config, lse, K, fill=-HIDDEN)  # weights of rows that only fill a tile are 0, not inf
    (nq, r, _, G, _), (nk, bk) = arrays["q"].shape[1:], arrays["k"].shape[2:4]
    g, gq = (arrays[name].shape[-1] if name in arrays else 0 for name in ("key_bias", "query_bias"))
    out = [((nq, r, G, d), 3), *(((nk, n, bk), 1) for n in (d, e, g)), ((nq, r, gq), 3), ((G,), 1)]
    found = _over_heads(partial(_backward_head, config), arrays, B, K, [(*spec, stat) for spec in out])
    dq, dk, dv, dkey_bias, dquery_bias, dsinks = found
    of_keys = lambda x: x.transpose(0, 2, 4, 1, 3).reshape(B, -1, K, x.shape[3])[:, :S]  # of [B, K, nk, d, bk]
    return (
        (dq.reshape(B, -1, H, d)[:, :T] * config.scale).astype(q.dtype),
        (of_keys(dk) * config.scale).astype(k.dtype),
        of_keys(dv).astype(v.dtype),
        None if sinks is None else dsinks.sum(0).reshape(H).astype(sinks.dtype),
        None if key_bias is None else _of_bias(of_keys(dkey_bias).reshape(B, S, -1), key_bias),
        None if query_bias is None else _of_bias(dquery_bias.reshape(B, nq * r, -1)[:, :T], query_bias),
        None,
    )


_attention.defvjp(_forward, _backward)


def _of_bias(x_Bnh: jax.Array, bias: jax.Array) -> jax.Array:
    """The gradient of a bias [B or 1, n, h]."""
    x = x_Bnh.sum(2, keepdims=True) if bias.shape[2] == 1 else x_Bnh
    return (x.sum(0, keepdims=True) if bias.shape[0] == 1 else x).astype(bias.dtype)


# By tiles and heads.


def _arrays(config: Config, q, k, v, sinks, key_bias, query_bias, plan: Plan) -> dict[str, Any]:
    """q [B, nq, r, K, G, d], k and v [B, K, nk, bk, d], sinks [K, G], biases [m, h, nk, bk, g] and [m, nq, r, h, g].

    A tile of keys is read often, and so is contiguous; rows stay where they are.
    """
    H, K, size = q.shape[2], k.shape[2], config.sizes.keys
    heads = lambda x: 1 if x.shape[2] == 1 else K
    of_keys = lambda x: jnp.moveaxis(_tiled(x, size, size, heads(x)), 3, 1)
    found = {"q": _tiled_rows(config, q, K), "k": of_keys(k)[..., 0, :], "v": of_keys(v)[..., 0, :]}
    if sinks is not None:
        found["sinks"] = jnp.asarray(sinks).reshape(K, H // K) * LOG2E
    if key_bias is not None:
        found["key_bias"] = of_keys(key_bias * LOG2E)
    if query_bias is not None:
        found["query_bias"] = _tiled_rows(config, query_bias * LOG2E, heads(query_bias))
    return found | {"plan": jax.tree.map(jnp.asarray, plan)}


def _tiled_rows(config: Config, x: jax.Array, K: int, fill: float = 0) -> jax.Array:
    """[B, T, H, ...] as [B, nq, r, K, G, ...], rows up to a whole number of groups."""
    return _tiled(x, config.sizes.rows, config.sizes.rows * config.sizes.group, K, fill)


def _tiled(x: jax.Array, size: int, whole: int, K: int, fill: float = 0) -> jax.Array:
    more = (0, 0), (0, -x.shape[1] % whole), *[(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, more, constant_values=fill)
    return x.reshape(x.shape[0], -1, size, K, x.shape[2] // K, *x.shape[3:])


@dataclasses.dataclass(frozen=True)
class Head:
    """A key head of a row of the batch: its row and number in the arrays of all, `at`, and in those of results, `to`.

    plan: its own. loops: `Plan.whole` and `rest` that loops go by. wide: whether to compute in float32 at least.
    """

    arrays: dict[str, Any]
    at: tuple[Any, Any]
    to: tuple[Any, Any]
    plan: Plan
    loops: tuple[jax.Array, jax.Array]
    wide: bool

    def rows(self, name: str, tiles: jax.Array) -> jax.Array:
        """Of an array [m, nq, r, h, ...] the head's at some tiles [b]: [b, r, ...]."""
        x = self.arrays[name]
        batch, head = (a if x.shape[axis] > 1 else 0 for a, axis in zip(self.at, (0, 3)))
        return self._widened(x.at[batch, tiles, :, head].get(mode="promise_in_bounds"))

    def keys(self, name: str, tiles: jax.Array) -> jax.Array:
        """Of an array [m, h, nk, bk, ...] the head's at some tiles [b, n]: [b, L, ...]."""
        x = self.arrays[name]
        batch, head = (a if x.shape[axis] > 1 else 0 for a, axis in zip(self.at, (0, 1)))
        found = x.at[batch, head, tiles].get(mode="promise_in_bounds")
        return self._widened(found.reshape(found.shape[0], -1, *found.shape[3:]))

    def _widened(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if self.wide else x

    def put(self, x: jax.Array, tiles: jax.Array, parts: jax.Array) -> jax.Array:
        """Set the head's of an array of results [B, nq, r, K, ...] at some tiles."""
        at = x.at[self.to[0], tiles, :, self.to[1]]
        return at.set(parts.astype(x.dtype), mode="promise_in_bounds", unique_indices=True)


def _over_heads(head: Callable, arrays: dict[str, Any], B: int, K: int, out: list[tuple[tuple[int, ...], int, Any]]):
    """Run `head(own: Head, results)`, which adds a key head's to results of zeros, over batch and key heads.

    out: of each result the shape that one head has, the key heads' axis in `[B, ...]`, and the dtype.
    One head after the other on CPU, each with its own numbers of tiles; all together elsewhere.
    """
    zeros = lambda B, K: tuple(jnp.zeros((B, *shape[: axis - 1], K, *shape[axis - 1 :]), t) for shape, axis, t in out)

    def of_head(plan, batch, head):
        own = lambda x: x[batch if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]
        return jax.tree.map(own, plan)

    def one_by_one(arrays):
        def body(i, results):
            at = i // K, i % K
            own = of_head(arrays["plan"], *at)
            return head(Head(arrays, at, at, own, (own.whole, own.rest), wide=True), results)

        return _loop(B * K, body, varying(zeros(B, K), arrays))

    def together(arrays):
        plan = arrays["plan"]
        loops = plan.whole.max((0, 1)), plan.rest.max((0, 1))

        def one(batch, key_head):
            at = batch, key_head
            found = head(Head(arrays, at, (0, 0), of_head(plan, *at), loops, wide=False), varying(zeros(1, 1), arrays))
            return tuple(x[0].squeeze(axis - 1) for x, (_, axis, _) in zip(found, out, strict=True))

        of_all = lambda n: jnp.arange(n, dtype=jnp.int32)
        found = jax.vmap(lambda batch: jax.vmap(partial(one, batch))(of_all(K)))(of_all(B))
        return tuple(jnp.moveaxis(x, 1, axis) for x, (_, axis, _) in zip(found, out, strict=True))

    return partition.by_platform(arrays, cpu=one_by_one, default=together)


# One key head.


def _sweep(config: Config, head: Head, tiles, step: Callable, carry):
    """Fold `carry = step(number, masked, carry)` over a group's steps of full tiles of keys, and over those left."""
    whole, rest = (steps[tiles].max() for steps in head.loops)
    if config.sizes.full:
        carry = _loop(whole, lambda c, carry: step(c, False, carry), carry)
    return _loop(rest, lambda c, carry: step(c, True, carry), carry)


def _step(config: Config, head: Head, tiles, at: tuple[Any, bool], q_brGd, factor: float):
    """Of one step of a group: the tiles of keys [b, n], k_bLd, v_bLe, scores [b, r, G, L] in log2 units, hidden ones
    `HIDDEN`, and the soft-cap's slope."""
    plan, sizes, (number, masked) = head.plan, config.sizes, at
    n, whole = sizes.masked if masked else sizes.full, plan.whole[tiles]
    first = whole * sizes.full + number * n if masked else jnp.broadcast_to(number * n, whole.shape)
    index = jax.vmap(lambda tile, first: jax.lax.dynamic_slice(plan.index, (tile, first), (1, n))[0])(tiles, first)
    k, v = (head.keys(name, index) for name in ("k", "v"))
    (b, r, G, d), slope = q_brGd.shape, None
    scores = matmul(q_brGd.reshape(b, r * G, d), k.swapaxes(1, 2)).reshape(b, r, G, -1)
    if config.soft_cap is None:
        scores = scores * (config.scale * LOG2E / factor)
    else:
        capped = jnp.tanh(scores * (config.scale / config.soft_cap / factor))
        scores, slope = capped * (config.soft_cap * LOG2E), 1 - capped * capped
    if "key_bias" in head.arrays:
        scores = scores + head.keys("key_bias", index).swapaxes(1, 2)[:, None]
    if "query_bias" in head.arrays:
        scores = scores + head.rows("query_bias", tiles)[..., None]
    if masked:
        found = [jax.vmap(lambda tile, own, side=side: side.visible(tile, own, r))(tiles, index) for side in plan.sides]
        used = first[:, None] + jnp.arange(n, dtype=jnp.int32) < plan.count[tiles][:, None]
        seen = (found[0] if len(found) == 1 else found[0] | found[1]).swapaxes(1, 2)
        seen = jnp.repeat(used, sizes.keys, axis=1)[:, None, None] & seen
    else:
        seen = (number < whole)[:, None, None, None]
    scores = jnp.where(seen, scores, HIDDEN)
    return index, k, v, scores, slope


def _loop(count, body: Callable, carry):
    """fori_loop from 0, whose index is int32 in float64 programs, too."""
    return jax.lax.fori_loop(0, count, lambda i, carry: body(i.astype(jnp.int32), carry), carry)


def _over_groups(config: Config, head: Head, body: Callable, carry):
    """Fold `carry = body(tiles, carry)` over the groups of tiles of rows."""
    order, b = head.plan.order, config.sizes.group
    of_group = lambda i: jax.lax.dynamic_slice_in_dim(order, i * b, b)
    return _loop(order.shape[0] // b, lambda i, carry: body(of_group(i), carry), carry)


def _factor(config: Config, dtype: Any) -> float:
    """What goes into q, which is small, rather than into the products, where that loses nothing."""
    return config.scale * (LOG2E if config.soft_cap is None else 1 / config.soft_cap) if dtype.itemsize >= 4 else 1.0


def _forward_head(config: Config, head: Head, results):
    """results: o and the log2-sum-exp2 of the scores, sinks included."""
    b, e = config.sizes.group, head.arrays["v"].shape[-1]
    r, G, stat = *results[1].shape[2::2], results[1].dtype
    first = jnp.full((b, r, G), LOWEST, stat), jnp.zeros((b, r, G), stat)
    if "sinks" in head.arrays:
        highest = jnp.maximum(head.arrays["sinks"][head.at[1]].astype(stat), LOWEST)
        first = jnp.broadcast_to(highest, (b, r, G)), jnp.ones((b, r, G), stat)

    def rows_of_group(tiles, results):
        q = head.rows("q", tiles)
        factor = _factor(config, q.dtype)
        scaled = q * factor

        def step(number, masked, so_far):
            highest, total, o = so_far
            _, _, v, scores, _ = _step(config, head, tiles, (number, masked), scaled, factor)
            new = jnp.maximum(highest, scores.max(-1))
            weights, shrink = jnp.exp2(scores - new[..., None]), jnp.exp2(highest - new)
            more = matmul(weights.astype(v.dtype).reshape(b, r * G, -1), v).reshape(b, r, G, e)
            return new, total * shrink + weights.sum(-1), o * shrink[..., None] + more

        begin = varying((*first, jnp.zeros((b, r, G, e), stat)), (head.arrays, head.at))
        highest, total, o = _sweep(config, head, tiles, step, begin)
        total = jnp.maximum(total, jnp.finfo(stat).tiny)
        parts = o / total[..., None], highest + jnp.log2(total)
        return tuple(head.put(x, tiles, part) for x, part in zip(results, parts, strict=True))

    return _over_groups(config, head, rows_of_group, results)


def _backward_head(config: Config, head: Head, results):
    """results: dq, dk and dv [B, K, nk, bk, d], of the key bias [B, K, nk, bk, g], of the query bias, of the sinks."""
    b, stat = config.sizes.group, results[0].dtype
    r, G, d = *results[0].shape[2:5:2], results[0].shape[-1]
    heads, query_heads = results[3].shape[3], results[4].shape[-1]

    def rows_of_group(tiles, results):
        dq, *of_keys, dquery_bias, dsinks = results
        q, o, do, lse, dlse = (head.rows(name, tiles) for name in ("q", "o", "do", "lse", "dlse"))
        factor = _factor(config, q.dtype)
        scaled, q_, do_ = q * factor, q.reshape(b, r * G, -1), do.reshape(b, r * G, -1)
        q_T, do_T = q_.swapaxes(1, 2), do_.swapaxes(1, 2)  # outside the loop, where they are laid out anew once
        delta = (o.astype(stat) * do.astype(stat)).sum(-1) - dlse * LOG2E  # d lse / d logit is the weight
        if "sinks" in head.arrays:
            absorbed = jnp.exp2(head.arrays["sinks"][head.at[1]].astype(stat) - lse) * delta
            dsinks = dsinks.at[head.to].add(-absorbed.sum((0, 1)))

        def step(number, masked, so_far):
            dq, dquery, of_keys = so_far
            index, k, v, scores, slope = _step(config, head, tiles, (number, masked), scaled, factor)
            weights = jnp.exp2(scores - lse[..., None])
            dscores = weights * (matmul(do_, v.swapaxes(1, 2)).reshape(weights.shape) - delta[..., None])
            dkey = jnp.zeros((b, 0, dscores.shape[3]), stat)
            if heads:
                dkey = dscores.sum(1).reshape(b, heads, -1, dscores.shape[3]).sum(2)
            if query_heads:
                dquery = dquery + dscores.sum(3).reshape(b, r, query_heads, -1).sum(3)
            dscores = dscores if slope is None else dscores * slope
            dscores = dscores.astype(k.dtype).reshape(b, r * G, -1)
            dk = matmul(q_T, dscores)
            dv = matmul(do_T, weights.astype(v.dtype).reshape(b, r * G, -1))
            dq = dq + matmul(dscores, k).reshape(b, r, G, d)
            return dq, dquery, _add(of_keys, (dk, dv, dkey), head.to, index)

        begin = jnp.zeros((b, r, G, d), stat), jnp.zeros((b, r, query_heads), stat)
        begin = *varying(begin, (head.arrays, head.at)), tuple(of_keys)
        dq_own, dquery, of_keys = _sweep(config, head, tiles, step, begin)
        return head.put(dq, tiles, dq_own), *of_keys, head.put(dquery_bias, tiles, dquery), dsinks

    return _over_groups(config, head, rows_of_group, results)


def _add(sums: tuple[jax.Array, ...], parts: tuple[jax.Array, ...], to: tuple[Any, Any], index: jax.Array):
    """Each of sums [B, K, nk, d, bk], at the head `to`, plus parts [b, d, L], columns of the tiles `index` [b, n].

    Tiles are contiguous: columns of one matrix as wide as S, a power of two, would meet in few sets of a cache.
    """

    def plus(x, part):
        of_tiles = part.reshape(*part.shape[:2], index.shape[1], x.shape[-1]).swapaxes(1, 2)
        return x.at[*to, index].add(of_tiles, mode="promise_in_bounds")

    return jax.tree.map(plus, sums, parts)
