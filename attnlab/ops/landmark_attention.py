"""Grouped softmax of landmark attention: a block's landmark takes weight for the block, whose tokens divide it.

Blocks are n positions, the last of which is the landmark. Of a query's own block the tokens up to it are keys as usual;
of each block before, the landmark is the one key, and its weight goes to the block's tokens by a softmax of their own.

Shapes: `B` batch, `T` queries, `S` keys, `N` blocks, `K` key heads, `G` query heads of each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.ops.attention import attention_with_lse
from attnlab.ops.attention_frame import NO_KEYS
from attnlab.ops.key_blocks import by_rows, top
from attnlab.ops.masks import Mask

ROWS = 64  # whose scores against all blocks exist at one time


def definition(
    q_BTHd: jax.Array, k_BTKd: jax.Array, v_BTKe: jax.Array, seen_BT, block_BT, landmark_BT, *, top_k=None, alike=False
):
    """All pairs of whole rows.

    Args:
      seen_BT: the document of each position, -1 of padding; positions see each other in one document only.
      block_BT: first position of each position's block.
      landmark_BT: bool.
      top_k, alike: see `landmark_attention`.
    """
    (B, T, H, d), K = q_BTHd.shape, k_BTKd.shape[2]
    wide, t = jnp.promote_types(q_BTHd.dtype, jnp.float32), jnp.arange(T)
    q, k, v = (x.astype(wide) for x in (q_BTHd.reshape(B, T, K, H // K, d), k_BTKd, v_BTKe))
    logits = jnp.einsum("btkgd,bskd->bkgts", q, k, precision="highest") * d**-0.5
    pairs = lambda x: x[:, None, None, None]  # of keys
    same = (seen_BT[:, :, None] == seen_BT[:, None]) & (seen_BT >= 0)[:, :, None]
    own = (block_BT[:, :, None] == block_BT[:, None])[:, None, None]
    seen = (same & (t[:, None] >= t))[:, None, None]
    outer = seen & jnp.where(pairs(landmark_BT), ~own, own)
    if top_k is not None:
        earlier = outer & ~own
        outer &= own | top(_ranks(logits, earlier, alike), earlier, top_k)
    p = _softmax(logits, outer)

    def of_block(x, block):  # [k, g, t, s] summed, or its largest, over the tokens of the key's block
        by_key = jnp.moveaxis(x, -1, 0)
        highest = jax.ops.segment_max(jax.lax.stop_gradient(by_key), block, T)[block]
        weights = jnp.exp(by_key - highest)
        return jnp.moveaxis(weights / jax.ops.segment_sum(weights, block, T)[block], 0, -1)

    inner = jax.vmap(of_block)(jnp.where(pairs(landmark_BT), jnp.finfo(wide).min, logits), block_BT)
    last = jax.vmap(lambda p, block, landmark: p[..., _landmark_of(block, landmark)])(p, block_BT, landmark_BT)
    weights = jnp.where(pairs(landmark_BT), 0, jnp.where(own, p, jnp.where(seen, last * inner, 0)))
    o = jnp.einsum("bkgts,bske->btkge", weights, v, precision="highest")
    return o.reshape(B, T, H, -1).astype(q_BTHd.dtype)


def _landmark_of(block_T: jax.Array, landmark_T: jax.Array) -> jax.Array:
    """The position of each position's landmark; its own where its block has none."""
    t = jnp.arange(len(block_T))
    last = jax.ops.segment_max(jnp.where(landmark_T, t, -1), block_T, len(block_T))[block_T]
    return jnp.where(last < 0, t, last)


def _softmax(logits: jax.Array, seen: jax.Array) -> jax.Array:
    logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    weights = jnp.where(seen, jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))), 0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(logits.dtype).tiny)


def landmark_attention(
    q_BTHd: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    own: Mask,
    blocks: tuple[jax.Array, jax.Array],
    first_BT: jax.Array,
    end_BT: jax.Array,
    *,
    top_k: int | None = None,
    alike: bool = False,
) -> jax.Array:
    """o_BTHe, `ROWS` queries at a time against all blocks.

    Args:
      keys: k_BSKd and v_BSKe.
      own: which of them, no landmarks, each query sees in its own block.
      blocks: k_BNnKd and v_BNnKe of complete blocks, their landmark last.
      first_BT, end_BT: each query sees blocks `first` to `end`; as many rows as there are, or one.
      top_k: of these only those with the `top_k` highest logits of their landmarks, for each query head by itself; of
        equal ones the first. None: all. The choice has no gradient.
      alike: all heads of a query choose the same, by the largest that they give each landmark of a softmax over those
        seen.

    Source: Mohtashami and Jaggi 2023, arXiv:2305.16300.
    """
    near = attention_with_lse(q_BTHd, *keys, own)
    (B, T, H, d), (N, n, K) = q_BTHd.shape, blocks[0].shape[1:4]
    if N == 0:
        return near[0]
    (tokens, landmarks), values = (blocks[0][:, :, : n - 1], blocks[0][:, :, n - 1]), blocks[1][:, :, : n - 1]

    @jax.checkpoint
    def of_rows(q, first, end):
        q = q.reshape(B, -1, K, H // K, d)
        outer, seen = _landmarks(q, landmarks, first, end)
        inner = _product("btkgd,bnjkd->bkgtnj", q, tokens) * d**-0.5
        if top_k is not None:
            seen = top(_ranks(outer, seen, alike), seen, top_k)
        p, lse = _shares(outer, seen)
        weights = p[..., None] * jax.nn.softmax(inner, axis=-1)
        return _rows(_product("bkgtnj,bnjke->btkge", weights.astype(values.dtype), values), lse)

    far = by_rows(of_rows, q_BTHd, *(jnp.broadcast_to(y, (B, T)) for y in (first_BT, end_BT)), rows=ROWS)
    return _merged(near, far).astype(q_BTHd.dtype)


def retrieving_attention(
    q_BTHd: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    own: Mask,
    cache: tuple[jax.Array, jax.Array],
    last_BN: jax.Array,
    first_BT: jax.Array,
    end_BT: jax.Array,
    *,
    size: int,
    top_k: int,
    alike: bool = False,
) -> jax.Array:
    """`landmark_attention` that reads of a cache all landmarks, but of other keys those of the chosen blocks alone.

    For each query head, or for all of a key head, `top_k` blocks are gathered: for few queries, which read fewer than
    there are.

    Args:
      cache: keys [B * K, S, d] and values [B * K, S, e] (`attnlab.ops.keys_values.KVCache`).
      last_BN: where in it the landmark of each block is.
      size: n.
      top_k: N or less.
      alike: see `landmark_attention`.
    """
    near, (B, T, H, d) = attention_with_lse(q_BTHd, *keys, own), q_BTHd.shape
    k, v = (x.reshape(B, -1, *x.shape[1:]) for x in cache)
    K = k.shape[1]
    batch, head = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    q = q_BTHd.reshape(B, T, K, H // K, d)
    outer, seen = _landmarks(q, k[batch, head, last_BN[:, None]].swapaxes(1, 2), first_BT, end_BT)
    ranked, chosen = jax.lax.top_k(jnp.where(seen, _ranks(outer, seen, alike), -jnp.inf), top_k)
    p, lse = _shares(jnp.take_along_axis(outer, chosen, axis=-1), ranked > -jnp.inf)
    if alike:
        chosen = chosen[:, :1, :1]
    at = last_BN[jnp.arange(B)[:, None, None, None, None], chosen][..., None] - (size - 1)
    at = at + jnp.arange(size - 1, dtype=jnp.int32)
    gather = lambda x: x[batch[..., None, None, None], head[..., None, None, None], at]
    if alike:  # once for all heads of a key head
        keys, values, of = gather(k)[:, :, 0], gather(v)[:, :, 0], "bktnj"
    else:
        keys, values, of = gather(k), gather(v), "bkgtnj"
    inner = _product(f"btkgd,{of}d->bkgtnj", q, keys) * d**-0.5
    weights = p[..., None] * jax.nn.softmax(inner, axis=-1)
    far = _rows(_product(f"bkgtnj,{of}e->btkge", weights.astype(v.dtype), values), lse)
    return _merged(near, far).astype(q_BTHd.dtype)


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, precision="highest", preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _landmarks(q_BTKgd: jax.Array, landmarks_BNKd: jax.Array, first_BT: jax.Array, end_BT: jax.Array):
    """Logits of landmarks and which of them are of blocks that a query sees, [B, K, g, T, N]."""
    number = jnp.arange(landmarks_BNKd.shape[1], dtype=jnp.int32)
    outer = _product("btkgd,bnkd->bkgtn", q_BTKgd, landmarks_BNKd) * q_BTKgd.shape[-1] ** -0.5
    seen = (number >= first_BT[..., None]) & (number < end_BT[..., None])
    return outer, jnp.broadcast_to(seen[:, None, None], outer.shape)


def _ranks(logits_BKgTN: jax.Array, seen: jax.Array, alike: bool) -> jax.Array:
    """By what landmarks are chosen, without gradient."""
    logits = jax.lax.stop_gradient(logits_BKgTN)
    if not alike:
        return logits
    return jnp.broadcast_to(_softmax(logits, seen).max((1, 2), keepdims=True), logits.shape)


def _shares(outer: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axis of what is seen, 0 where nothing is, and its log-sum-exp."""
    outer = jnp.where(seen, outer, NO_KEYS)
    highest = jax.lax.stop_gradient(outer.max(-1, keepdims=True))
    p = jnp.where(seen, jnp.exp(outer - highest), 0)
    total = p.sum(-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    return p / total, jnp.where(some, highest + jnp.log(total), NO_KEYS)[..., 0]


def _rows(o_BTKge: jax.Array, lse_BKgT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of all query heads, o_BTHe and lse_BTH."""
    B, T = o_BTKge.shape[:2]
    return o_BTKge.reshape(B, T, -1, o_BTKge.shape[-1]), lse_BKgT.transpose(0, 3, 1, 2).reshape(B, T, -1)


def _merged(near: tuple[jax.Array, jax.Array], far: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Attention to two sets of keys from that to each, o_BTHe and lse_BTH."""
    (o, lse), (o_far, lse_far) = near, far
    weight = jax.nn.sigmoid(lse_far - lse)[..., None]
    return (1 - weight) * o + weight * o_far
