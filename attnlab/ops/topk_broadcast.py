"""Top-k broadcast: the values of the k positions of the highest scores, averaged by them, given to every position.

Causally the k best are those of the document so far; without causality those of the document, one average for all.

Shapes: `B` batch, `T` positions, `H` heads, `e` value width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.documents import positions_in_documents
from attnlab.ops.dynamic_mask_attention import Live, dynamic_mask_attention


def topk_broadcast(
    scores_BTH: jax.Array,
    v_BTHe: jax.Array,
    documents_BT: jax.Array,
    live: Live | None = None,
    *,
    keep: int,
    causal: bool = True,
    chunk: int = 128,
    impl: str = "auto",
) -> tuple[jax.Array, Live | None]:
    """`o_t = sum_s p_s v_s`, `p = softmax(scores)` over the `keep` positions s of the highest scores that t may see.

    Of equal scores the oldest count. The choice has no gradient; scores have that of the softmax over the chosen.

    Args:
      scores_BTH: finite, float32 or wider.
      v_BTHe: values.
      documents_BT: of `attnlab.ops.documents`.
      live: of a stream, before these positions; its keys are of width 1, and 0. None: whole sequences.
      keep: k.
      causal: whether t sees its document up to itself, or all of it.
      chunk: rows computed together where causal; changes only speed and memory.
      impl: "auto" or "chunked": linear in T; "definition": all pairs.

    Returns:
      o_BTHe in the dtype of v, and what is live after the last position, None of whole sequences.

    Raises:
      UserError: shapes that do not fit, or a stream that is not causal.
    """
    if scores_BTH.shape != v_BTHe.shape[:3]:
        raise UserError(f"topk_broadcast: scores {scores_BTH.shape}; expected {v_BTHe.shape[:3]}, as v {v_BTHe.shape}")
    if causal:
        blank = jnp.zeros((*v_BTHe.shape[:3], 1), v_BTHe.dtype)  # dynamic mask attention of q . k = 0
        return dynamic_mask_attention(
            blank, blank, v_BTHe, scores_BTH, documents_BT, live, keep=keep, scale=1.0, chunk=chunk, impl=impl
        )
    if live is not None:
        raise UserError("topk_broadcast: a stream is causal; allowed with live: causal=True")
    run = _all_pairs if impl == "definition" else _of_documents
    return run(scores_BTH, v_BTHe, documents_BT, keep).astype(v_BTHe.dtype), None


def _of_documents(scores: jax.Array, v: jax.Array, documents: jax.Array, keep: int) -> jax.Array:
    """One average of each document, by a sort of its scores."""
    T, rank = scores.shape[1], jnp.moveaxis(jax.lax.stop_gradient(scores), 2, 1)
    first = (jnp.arange(T, dtype=jnp.int32) - positions_in_documents(documents))[:, None]  # of each one's document
    first = jnp.broadcast_to(first, rank.shape)
    order = jnp.lexsort((-rank, jnp.broadcast_to(documents[:, None], rank.shape)), axis=-1)
    place = jnp.argsort(order, axis=-1) - first
    best = jnp.take_along_axis(rank, jnp.take_along_axis(order, first, axis=-1), axis=-1)
    kept, best = (jnp.moveaxis(x, 1, 2) for x in (place < keep, best))
    weights = jnp.where(kept, jnp.exp(scores - best), 0)[..., None]
    rows = jnp.concatenate([weights * v.astype(weights.dtype), weights], axis=-1)
    sums = jax.vmap(lambda rows, document: jax.ops.segment_sum(rows, document, T + 1)[document])(rows, documents)
    return sums[..., :-1] / sums[..., -1:]


def _all_pairs(scores: jax.Array, v: jax.Array, documents: jax.Array, keep: int) -> jax.Array:
    """The definition: every weight written out."""
    rank, t = jnp.moveaxis(jax.lax.stop_gradient(scores), 2, 1), jnp.arange(scores.shape[1])
    same = (documents[:, :, None] == documents[:, None])[:, None]
    better = (rank[..., :, None] > rank[..., None, :]) | ((rank[..., :, None] == rank[..., None, :]) & (t[:, None] < t))
    kept = (better & same).sum(-2, dtype=jnp.int32) < keep
    logits = jnp.where(same & kept[:, :, None], jnp.moveaxis(scores, 2, 1)[:, :, None], -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bhts,bshe->bthe", weights, v.astype(weights.dtype), precision="highest")
