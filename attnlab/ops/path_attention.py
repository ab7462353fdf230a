"""PaTH attention as one op: logits of queries and keys between which every position's Householder-like matrix stands.

A chunk of C positions applies `H_C ... H_1 = I - W^T R W` to a key, with W [C, d] the vectors w and
`R = (I + tril(diag(b) W W^T, -1))^-1 diag(b)`. A block of rows walks back over the chunks before it: its queries meet a
chunk's keys, taken to the chunk's end, and then go through the chunk themselves.

With a forget gate logits fade as in forgetting attention, by what all gates between query and key add to them.

Shapes: as in `attnlab.ops.attention`; `N` chunks, `G` query heads of a key head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.blockwise import Span, take
from attnlab.ops.delta_rule import invert_unit_triangular
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask
from attnlab.ops.row_blocks import head_axes, over_row_blocks, softmax_of_seen, weighted


@dataclasses.dataclass(frozen=True)
class PathSpec:
    """The static facts by which an implementation is chosen."""

    batch: int
    positions: int
    heads: int
    kv_heads: int
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"B{self.batch} T{self.positions} H{self.heads} K{self.kv_heads} d{self.width} {self.dtype}"

    @classmethod
    def of(cls, exchange: Any, q, k, *rest: Any, **options: Any) -> PathSpec:
        """Of the arrays of a device."""
        (B, T, H, d), K = q.shape, k.shape[2]
        return cls(B, T, H, K, d, str(q.dtype))


def definition(
    q_BTHd, k_BTKd, v_BTKe, w_BTKd, beta_BTK, left_BTH, start_BT, end_BT, *, scale: float, chunk: int
) -> jax.Array:
    """Position by position: all keys so far go through its matrix, then its query meets them as they are."""
    del chunk
    wide = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    q, k, v, w, beta = (x.astype(wide) for x in (q_BTHd, k_BTKd, v_BTKe, w_BTKd, beta_BTK))
    B, T, H, d = q.shape
    s = jnp.arange(T, dtype=jnp.int32)

    def step(keys_BTKd, inputs):
        t, q, w, beta, start, end = inputs
        along = jnp.einsum("bskd,bkd->bsk", keys_BTKd, w, precision="highest")
        moved = keys_BTKd - (beta[:, None] * along)[..., None] * w[:, None]
        keys_BTKd = jnp.where((s < t)[:, None, None], moved, keys_BTKd)
        logits = jnp.einsum("bkgd,bskd->bkgs", q.reshape(B, k.shape[2], -1, d), keys_BTKd, precision="highest") * scale
        if left_BTH is not None:
            own = jax.lax.dynamic_slice_in_dim(left_BTH, t, 1, axis=1)
            logits += faded(own, left_BTH, k.shape[2])[:, :, :, 0]
        seen = ((s >= start[:, None]) & (s < end[:, None]))[:, None, None]
        o = jnp.einsum("bkgs,bske->bkge", softmax_of_seen(logits, seen), v, precision="highest")
        return keys_BTKd, o.reshape(B, H, -1)

    rows = [jnp.moveaxis(x, 1, 0) for x in (q, w, beta, *_of_batch(B, start_BT, end_BT))]
    _, o = jax.lax.scan(step, k, (s, *rows))
    return jnp.moveaxis(o, 0, 1).astype(q_BTHd.dtype)


def in_blocks(
    q_BTHd, k_BTKd, v_BTKe, w_BTKd, beta_BTK, left_BTH, start_BT, end_BT, *, scale: float, chunk: int
) -> jax.Array:
    """Chunks of rows, each walking back over the chunks before it; formed again in the backward pass."""
    B, T = q_BTHd.shape[:2]
    C = min(chunk, T)
    wide = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    full = lambda x: jnp.pad(x, [(0, 0), (0, -T % C)] + [(0, 0)] * (x.ndim - 2))  # rows of no key, vectors of 0
    in_chunks = lambda x: full(x).astype(wide).reshape(B, -1, C, *x.shape[2:])
    q, k, w, beta = (in_chunks(x) for x in (q_BTHd, k_BTKd, w_BTKd, beta_BTK))
    parts = Chunk.of(q, k, w, beta)
    start, end = (full(x) for x in _of_batch(B, start_BT, end_BT))
    v, left = full(v_BTKe), None if left_BTH is None else full(left_BTH)

    def block(rows: Span, keys: Span) -> jax.Array:
        number, many = rows[0] // C, keys[1] // C
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 1, keepdims=False), parts)

        def back(q_BKGCd, before):
            c, other = before
            scores = jnp.einsum("bkgcd,bksd->bkgcs", q_BKGCd, other.keys, precision="highest")
            past = c < number
            q_BKGCd = jnp.where(past, other.passed(q_BKGCd), q_BKGCd)
            return q_BKGCd, jnp.where(past, scores, jnp.where(c == number, own.logits, 0))

        others = jax.tree.map(lambda x: jnp.moveaxis(x[:, :many], 1, 0), parts)
        order = jnp.arange(many, dtype=jnp.int32), others
        _, scores = jax.lax.scan(back, own.queries, order, reverse=True)
        scores = jnp.moveaxis(scores, 0, 4).reshape(*scores.shape[1:5], -1) * scale
        if left is not None:
            scores += faded(take(left, rows, 1), left[:, : many * C], k_BTKd.shape[2])
        key = jnp.arange(many * C, dtype=jnp.int32)
        first, last = (take(x, rows, 1)[:, None, None, :, None] for x in (start, end))
        p = softmax_of_seen(scores, (key >= first) & (key < last))
        return weighted(p, v[:, : many * C]).astype(q_BTHd.dtype)

    padded = v.shape[1]
    return over_row_blocks(block, padded, padded, Mask(causal=True), C)[:, :T]


def faded(rows_BRH: jax.Array, keys_BLH: jax.Array, K: int) -> jax.Array:
    """What is added to logits [B, K, G, R, L] of rows and keys of which so much is left, in logarithms."""
    by_heads = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], K, -1), 1, 3)
    return by_heads(rows_BRH)[..., None] - by_heads(keys_BLH)[..., None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """What chunks of C positions make of their own queries and keys; axes [B, ..., K, G or none, C, ...], in fp32.

    Attributes:
      logits: [.., K, G, C, C], not scaled, of a chunk's queries with its keys; right where the key is not later.
      queries: [.., K, G, C, d], as they meet what stands before the chunk.
      keys: [.., K, C, d], as they leave the chunk.
      w, inner: [.., K, C, d], [.., K, C, C]: the vectors, and R.
    """

    logits: jax.Array
    queries: jax.Array
    keys: jax.Array
    w: jax.Array
    inner: jax.Array

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, w: jax.Array, beta: jax.Array) -> Chunk:
        """Of q [.., C, H, d], k and w [.., C, K, d], beta [.., C, K]."""
        (C, K, d), lead = k.shape[-3:], q.shape[:-3]
        k, w = (jnp.swapaxes(x, -3, -2) for x in (k, w))
        q = jnp.moveaxis(q.reshape(*lead, C, K, -1, d), -4, -2)
        beta = jnp.swapaxes(beta, -2, -1)
        product = lambda *args: jnp.einsum(*args, precision="highest")
        gram = product("...id,...jd->...ij", w, w)
        inner = invert_unit_triangular(jnp.tril(beta[..., None] * gram, -1)) * beta[..., None, :]
        along = product("...ij,...jl->...il", inner, jnp.tril(product("...id,...jd->...ij", w, k), -1))
        read = jnp.tril(product("...gid,...jd->...gij", q, w))
        logits = product("...gid,...jd->...gij", q, k) - product("...gij,...jl->...gil", read, along)
        keys = k - product("...ij,...id->...jd", along, w)
        queries = q - product("...gij,...jl,...ld->...gid", read, inner, w)
        return cls(logits, queries, keys, w, inner)

    def passed(self, q_BKGrd: jax.Array) -> jax.Array:
        """Queries of later positions after this chunk: `q H_C ... H_1`."""
        read = jnp.einsum("bkgrd,bkid->bkgri", q_BKGrd, self.w, precision="highest")
        return q_BKGrd - jnp.einsum("bkgri,bkij,bkjd->bkgrd", read, self.inner, self.w, precision="highest")

    def taken(self, k_BKSd: jax.Array) -> jax.Array:
        """Keys of positions before this chunk after it: `H_C ... H_1 k`."""
        along = jnp.einsum("bksd,bkjd->bksj", k_BKSd, self.w, precision="highest")
        return k_BKSd - jnp.einsum("bksj,bkij,bkid->bksd", along, self.inner, self.w, precision="highest")


PATH_ATTENTION = Op(
    "path_attention",
    PathSpec.of,
    {"definition": Implementation(definition), "blocks": Implementation(in_blocks)},
    preference=("blocks",),
)


def path_attention(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKe: jax.Array,
    w_BTKd: jax.Array,
    beta_BTK: jax.Array,
    mask: Mask,
    *,
    left_BTH: jax.Array | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> jax.Array:
    """Softmax attention whose logits are `q_i^T H_i H_{i-1} ... H_{j+1} k_j / sqrt(d)`, `H_t = I - beta_t w_t w_t^T`,
    and with a forget gate `left_i - left_j` more.

    q_BTHd, k_BTKd, v_BTKe: as in `attnlab.ops.attention`.
    w_BTKd: vectors of length 1 or 0, of each key head. beta_BTK: between 0 and 2, so that no matrix makes keys longer.
    mask: causal, of whole rows; documents of one see nothing of each other. A row that sees no key gives exactly 0.
    left_BTH: float32 or wider, of each query head the sum of what the gates of its document add to logits up to each
        position, that one included; None: there is no gate.
    chunk: positions whose matrices are joined, changes only speed and memory.
    impl: "auto" (blocks), "definition" (position by position).

    Returns o_BTHe in the dtype of q; what is computed of w, and softmax statistics, are float32 (float64 for float64
    inputs). Differentiable (reverse mode) in all six. Raises UserError for shapes that do not fit.

    Source: Yang et al. 2025, PaTH Attention, arXiv:2505.16381.
    """
    (B, T, H, d), K = q_BTHd.shape, k_BTKd.shape[2]
    fits = k_BTKd.shape == w_BTKd.shape == (B, T, K, d) and beta_BTK.shape == (B, T, K) == v_BTKe.shape[:3]
    fits = fits and (left_BTH is None or left_BTH.shape == (B, T, H))
    if not fits or H % K or not mask.causal or not mask.plain():
        raise UserError(
            f"path_attention: q {q_BTHd.shape}, k {k_BTKd.shape}, v {v_BTKe.shape}, w {w_BTKd.shape}, beta "
            f"{beta_BTK.shape}, left {None if left_BTH is None else left_BTH.shape}; expected [B, T, H, d], "
            "[B, T, K, d], [B, T, K, e], [B, T, K, d], [B, T, K], [B, T, H] or none, H a multiple of K, and a causal "
            "mask of whole rows"
        )
    start, end = mask.interval(T, T)
    of_q, of_k = head_axes(H, K)
    heads, keys, rows = ("batch", None, of_q, None), ("batch", None, of_k, None), ("batch", None)
    return PATH_ATTENTION(
        q_BTHd, k_BTKd, v_BTKe, w_BTKd, beta_BTK, left_BTH, start, end,
        axes=(heads, keys, keys, keys, keys[:3], heads[:3], rows, rows), out_axes=[heads],
        impl=impl, scale=d**-0.5, chunk=chunk,
    )  # fmt: skip


def next_chunk(
    q_BCHd, k_BCKd, v_BCKe, w_BCKd, beta_BCK, start_BC, left_BCH, first, keys_BKSd, values_BKSe, left_BSH
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for the next positions of a stream.

    Args:
      q_BCHd, k_BCKd, v_BCKe, w_BCKd, beta_BCK: of these positions.
      start_BC: the slot at which each one's document begins; beyond its own: it sees nothing.
      left_BCH: as in `path_attention`, from any position on that is not behind one of them; None: there is no gate.
      first: the slot of the first of them.
      keys_BKSd, values_BKSe: of the positions before, keys as all matrices so far have left them, in fp32.
      left_BSH: of the slots before, from the same position on; None: there is no gate.

    Returns:
      o_BCHe, and the keys and values with these positions.
    """
    wide, (_, C, _, d), S = keys_BKSd.dtype, q_BCHd.shape, keys_BKSd.shape[2]
    own = Chunk.of(*(x.astype(wide) for x in (q_BCHd, k_BCKd, w_BCKd, beta_BCK)))
    before = jnp.einsum("bkgcd,bksd->bkgcs", own.queries, keys_BKSd, precision="highest")
    scores = jnp.concatenate([before, own.logits], axis=-1) * d**-0.5
    if left_BCH is not None:
        scores += faded(left_BCH, jnp.concatenate([left_BSH, left_BCH], axis=1), k_BCKd.shape[2])
    slot = jnp.concatenate([jnp.arange(S, dtype=jnp.int32), first + jnp.arange(C, dtype=jnp.int32)])
    there = jnp.concatenate([jnp.arange(S, dtype=jnp.int32) < first, jnp.ones((C,), bool)])
    seen = there & (slot >= start_BC[..., None]) & (slot <= (first + jnp.arange(C, dtype=jnp.int32))[:, None])
    p = softmax_of_seen(scores, seen[:, None, None])
    old = weighted(p[..., :S], values_BKSe.swapaxes(1, 2).astype(q_BCHd.dtype))
    o = old + weighted(p[..., S:], v_BCKe)
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), first, axis=2)
    return o.astype(q_BCHd.dtype), put(own.taken(keys_BKSd), own.keys), put(values_BKSe, v_BCKe.swapaxes(1, 2))


def _of_batch(B: int, *rows: jax.Array) -> list[jax.Array]:
    return [jnp.broadcast_to(x, (B, x.shape[1])) for x in rows]
