"""Attention to the w keys of the prefix whose bias is highest, the same for all queries: a cache of w keys suffices.

Shapes: `B` batch, `T` positions, `K` key heads, `G` query heads of each, `w` keys that are kept, `C` rows of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.running_topw import running_topw
from attnlab.parallel.sequence_parallel import SequenceParallel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Live:
    """The keys that a stream has kept, oldest first; w - 1 of them where every query's own key is one of the w.

    Attributes:
      k, v: [B, K, w, d] and [B, K, w, e].
      bias: [B, K, w], float32 or wider.
      filled: bool [B, K, w]; places that hold none come first.
    """

    k: jax.Array
    v: jax.Array
    bias: jax.Array
    filled: jax.Array


@dataclasses.dataclass(frozen=True)
class DynamicMaskSpec:
    """The static facts by which an implementation is chosen."""

    batch: int
    positions: int
    heads: int
    kv_heads: int
    width: int
    keep: int
    dtype: str
    stream: bool
    own: bool

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} K{self.kv_heads} d{self.width} w{self.keep}"
        return f"{shape} {self.dtype}{' own' * self.own}{' stream' * self.stream}"

    @classmethod
    def of(cls, exchange: SequenceParallel | None, q, k, v, bias, documents, live, *, keep, own, **options):
        """Of the arrays of a device."""
        B, T, K, G, d = q.shape
        return cls(B, T, K * G, K, d, keep, str(q.dtype), live is not None, own)


def definition(
    q_BTKGd, k_BTKd, v_BTKe, bias_BTK, documents_BT, live: None, *, keep: int, own: bool, scale: float, chunk: int
):
    """The formula, with all T x T pairs, of whole sequences."""
    wide, T = jnp.promote_types(q_BTKGd.dtype, jnp.float32), q_BTKGd.shape[1]
    rank = jax.lax.stop_gradient(bias_BTK).transpose(0, 2, 1)
    t = jnp.arange(T)
    better = (rank[..., :, None] > rank[..., None, :]) | ((rank[..., :, None] == rank[..., None, :]) & (t[:, None] < t))
    same = (documents_BT[:, :, None] == documents_BT[:, None])[:, None]
    better &= same
    ahead = jnp.cumsum(better, axis=-2, dtype=jnp.int32)  # [row, key]: better ones up to the row
    if own:
        seen = same & (((ahead - better < keep - 1) & (t[:, None] > t)) | (t[:, None] == t))
    else:
        seen = (ahead < keep) & same & (t[:, None] >= t)
    logits = jnp.einsum("btkgd,bskd->bkgts", *(x.astype(wide) for x in (q_BTKGd, k_BTKd)), precision="highest") * scale
    o = _softmax(logits, bias_BTK.transpose(0, 2, 1)[:, :, None, None], seen[:, :, None], v_BTKe.transpose(0, 2, 1, 3))
    return jnp.moveaxis(o, 3, 1).astype(q_BTKGd.dtype), None


def chunked(
    q_BTKGd, k_BTKd, v_BTKe, bias_BTK, documents_BT, live: Live | None,
    *, keep: int, own: bool, scale: float, chunk: int,
):  # fmt: skip
    """Each chunk of rows against the keys that were live before it and its own: `[C, w + C]` scores at a time.

    Where a row's own key is one of its w, the others are the w - 1 best before it: those that die at the row or later.
    """
    B, T, K, G, d = q_BTKGd.shape
    C, streams = min(chunk, T), live is not None
    w = keep - own if streams else min(keep - own, T)
    k, v, bias = (jnp.moveaxis(x, 2, 1) for x in (k_BTKd, v_BTKe, bias_BTK))
    filled = live.filled if streams else jnp.zeros((B, K, 0), bool)
    if streams:
        put = lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=2)
        k, v, bias = put(live.k, k), put(live.v, v), put(live.bias, bias)
    top, P, n = running_topw(bias, documents_BT, filled, w, chunk=C), filled.shape[2], -(-T // C)
    gather = jax.vmap(jax.vmap(lambda x, i: x[jnp.maximum(i, 0)]))

    def with_live(x):  # [n, B, K, w + C, ...]: what each chunk of rows may see
        new = jnp.pad(x[:, :, P:], [(0, 0), (0, 0), (0, n * C - T)] + [(0, 0)] * (x.ndim - 3))
        new = new.reshape(B, K, n, C, *x.shape[3:])
        return jnp.moveaxis(jnp.concatenate([gather(x, top.before), new], axis=3), 2, 0)

    first = P + C * jnp.arange(n, dtype=jnp.int32)
    index = first[:, None] + jnp.arange(C, dtype=jnp.int32)
    index = jnp.broadcast_to(index[:, None, None], (n, B, K, C))
    index = jnp.concatenate([jnp.moveaxis(top.before, 2, 0), index], axis=3)
    rows = jnp.pad(q_BTKGd, ((0, 0), (0, n * C - T), (0, 0), (0, 0), (0, 0))).reshape(B, n, C, K, G, d)
    rows = rows.transpose(1, 0, 3, 4, 2, 5)
    start = jnp.pad(_starts(documents_BT, P), ((0, 0), (0, n * C - T))).reshape(B, n, C).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(parts):
        q, k, v, bias, index, death, start, first = parts
        row = (first + jnp.arange(C, dtype=jnp.int32))[:, None]
        at, dies = index[..., None, :], death[..., None, :]
        if own:  # all die where a document begins, whose first row is not to see them
            seen = (at == row) | ((at >= start[:, None, :, None]) & (at >= 0) & (at < row) & (dies >= row))
        else:
            seen = (at >= 0) & (at <= row) & (dies > row)
        wide = jnp.promote_types(q.dtype, jnp.float32)
        logits = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=wide, precision="highest") * scale
        return _softmax(logits, bias[:, :, None, None], seen[:, :, None], v).astype(q.dtype)

    parts = rows, with_live(k), with_live(v), with_live(bias), index, with_live(top.death), start, first
    o = jax.lax.map(of_chunk, parts) if n > 1 else of_chunk(jax.tree.map(lambda x: x[0], parts))[None]
    o = o.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * C, K, G, -1)[:, :T]
    if not streams:
        return o, None
    kept = [gather(x, top.after) for x in (k, v, bias)]
    like = (live.k, live.v, live.bias)
    return o, Live(*(x.astype(y.dtype) for x, y in zip(kept, like)), top.after >= 0)


def _starts(documents_BT: jax.Array, before: int) -> jax.Array:
    """The first key [B, T] of each row's document, where `before` keys of document 0 stand before the rows'."""
    new = documents_BT != jnp.pad(documents_BT, ((0, 0), (1, 0)))[:, :-1]
    return jax.lax.cummax(jnp.where(new, before + jnp.arange(new.shape[1], dtype=jnp.int32), 0), axis=1)


def _softmax(logits, bias, seen, v_BKSe):
    """softmax(logits + bias) v over what is seen of the last axis; logits [B, K, G, T, S]."""
    logits = jnp.where(seen, logits + bias, jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    weights = jnp.where(seen, weights, 0)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(weights.dtype).tiny)
    o = functools.partial(jnp.einsum, "bkgts,bkse->bkgte", precision="highest")
    return o(weights.astype(v_BKSe.dtype), v_BKSe, preferred_element_type=logits.dtype)


DYNAMIC_MASK_ATTENTION = Op(
    "dynamic_mask_attention",
    DynamicMaskSpec.of,
    {
        "definition": Implementation(
            definition, lambda spec: "it takes whole sequences, not a stream's" if spec.stream else None
        ),
        "chunked": Implementation(chunked),
    },
    preference=("chunked",),
)


def dynamic_mask_attention(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKe: jax.Array,
    bias_BTK: jax.Array,
    documents_BT: jax.Array,
    live: Live | None = None,
    *,
    keep: int,
    own: bool = False,
    scale: float | None = None,
    chunk: int,
    impl: str = "auto",
) -> tuple[jax.Array, Live | None]:
    """`o[t] = sum_s p[t, s] v[s]`, `p = softmax_s(scale q[t] . k[s] + bias[s])` over the `keep` keys of the document up
    to t, itself among them, whose bias is highest; of equal ones the oldest. The choice has no gradient.

    Args:
      bias_BTK: finite, float32 or wider.
      documents_BT: as of `attnlab.ops.documents`.
      live: of a stream, before these positions, which document 0 goes on with; None: whole sequences.
      keep: w.
      own: whether a position's own key is one of the w, in place of the worst where it is not among the best; w >= 2.
      scale: default `d ** -0.5`.
      chunk: C; changes only speed and memory.
      impl: "auto", or a name in `DYNAMIC_MASK_ATTENTION.table`.

    Returns:
      o_BTHe, and what is live after the last position, None of whole sequences. Scores, weights and their sums are
      float32 or wider.
    """
    (B, T, H, d), K = q_BTHd.shape, k_BTKd.shape[2]
    q = q_BTHd.reshape(B, T, K, H // K, d)
    rows, of_keys, of_bias = ("batch", None, "kv_heads", None, None), ("batch", None, "kv_heads", None), None
    of_bias, of_live = ("batch", None, "kv_heads"), ("batch", "kv_heads", None, None)
    live_axes = None if live is None else Live(of_live, of_live, of_live[:3], of_live[:3])
    axes = rows, of_keys, of_keys, of_bias, ("batch", None), ("batch",) if live is None else live_axes
    out_axes = [rows] if live is None else [rows, of_live, of_live, of_live[:3], of_live[:3]]
    scale = d**-0.5 if scale is None else float(scale)
    o, live = DYNAMIC_MASK_ATTENTION(
        q, k_BTKd, v_BTKe, bias_BTK, documents_BT, live,
        axes=axes, out_axes=out_axes, impl=impl, keep=keep, own=own, scale=scale, chunk=chunk,
    )  # fmt: skip
    return o.reshape(B, T, H, -1), live
