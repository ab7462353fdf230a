"""The w highest of the scores so far, at every position: who is in, and when each drops out for good.

What has dropped out never comes back: w better ones stand in its way, and stay. So each key is seen from its own
position until its *death*, and a stream needs the live ones alone. Of equal scores the older one is better.

Shapes: `B` batch, `K` heads, `P` keys that were live before (none, or w), `T` new ones, `S = P + T`, `C` of a chunk.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.ops.masks import NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningTop:
    """Who is live when, as indices into the S keys, oldest first.

    Attributes:
      death: int32 [B, K, S]: position t of the new ones, key `P + t`, sees key s where `s <= P + t < death`; NEVER if
        it outlives them all. Of an empty place anything.
      before: int32 [B, K, ceil(T / C), w], the live ones before each chunk, ascending; -1, which come first: none.
      after: int32 [B, K, w], those after the last position.
    """

    death: jax.Array
    before: jax.Array
    after: jax.Array


def running_topw(
    scores_BKS: jax.Array, documents_BT: jax.Array, filled_BKP: jax.Array, w: int, *, chunk: int
) -> RunningTop:
    """Of each prefix of each document the `w` highest scores.

    Args:
      scores_BKS: float32 or wider, finite; of the live ones first, oldest first.
      documents_BT: of the new positions, as of `attnlab.ops.documents`; the live ones are of document 0.
      filled_BKP: bool, which places hold a live one.
      w: how many are live at most.
      chunk: C, new positions that are worked on together. Each step compares C keys with w + C.
    """
    (B, K, S), P, T = scores_BKS.shape, filled_BKP.shape[2], documents_BT.shape[1]
    C, scores = min(chunk, T), jax.lax.stop_gradient(scores_BKS)
    pad = -T % C  # keys behind the last row: of its document, and better than none
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, pad)), constant_values=-jnp.inf)
    documents = jnp.pad(documents_BT, ((0, 0), (0, pad)), mode="edge")
    documents = jnp.pad(documents, ((0, 0), (P, 0)))[:, None]
    index = jnp.where(filled_BKP, jnp.arange(P, dtype=jnp.int32), -1)
    index = jnp.sort(jnp.concatenate([jnp.full((B, K, w - P), -1, jnp.int32), index], axis=-1), axis=-1)
    at = lambda x, i: jnp.take_along_axis(jnp.broadcast_to(x, (B, K, x.shape[-1])), jnp.maximum(i, 0), axis=-1)

    def step(carry, c):
        index, death = carry
        first = P + c * C
        own = first + jnp.arange(C, dtype=jnp.int32)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, C, -1)
        new, of_row = cut(scores), cut(documents)
        old = jnp.where(index < 0, -jnp.inf, at(scores, index))
        everyone, of_key = (
            jnp.concatenate([old, new], -1),
            jnp.concatenate([at(documents, index), _wide(of_row, K)], -1),
        )
        rank = jnp.argsort(jnp.argsort(-old, axis=-1, stable=True), axis=-1).astype(jnp.int32)
        earlier = (old[..., None, :] >= new[..., None]) & (of_key[..., None, :w] == of_row[..., None])
        earlier = (earlier & (index >= 0)[..., None, :]).sum(-1, dtype=jnp.int32)
        # hits[j, m]: the new key j is better than key m, which is older or not.
        older = jnp.arange(C)[:, None] < jnp.arange(-w, C)
        hits = (new[..., None] > everyone[..., None, :]) | (older & (new[..., None] == everyone[..., None, :]))
        same = of_row[..., None] == of_key[..., None, :]
        better = jnp.concatenate([rank, earlier], -1)[..., None, :] + jnp.cumsum(hits & same, axis=-2, dtype=jnp.int32)
        gone = ((better >= w) | ~same) & (jnp.arange(C)[:, None] >= jnp.arange(-w, C))
        lived = (~gone).sum(-2, dtype=jnp.int32)  # rows before the first at which it is gone
        dies = jnp.where(lived < C, first + lived, NEVER)
        everywhere = jnp.concatenate([index, _wide(own[None, None], K, B)], axis=-1)
        place = jnp.where(everywhere < 0, NEVER, everywhere)
        put = jax.vmap(jax.vmap(lambda x, i, y: x.at[i].min(y, mode="drop")))
        keeps = (lived == C) & (everywhere >= 0) & (everyone > -jnp.inf)
        after = jnp.sort(jnp.where(keeps, everywhere, -1), axis=-1)[..., -w:]
        return (after, put(death, place, dies)), index

    death = jnp.full(scores.shape, NEVER, jnp.int32)
    steps = jnp.arange((T + pad) // C, dtype=jnp.int32)
    (after, death), before = jax.lax.scan(step, (index, death), steps)
    return RunningTop(death[..., :S], jnp.moveaxis(before, 0, 2), after)


def _wide(x: jax.Array, K: int, B: int | None = None) -> jax.Array:
    return jnp.broadcast_to(x, (B or x.shape[0], K, x.shape[2]))
