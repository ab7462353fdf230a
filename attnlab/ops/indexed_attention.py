"""Softmax attention to keys that are named one by one for each query.

Shapes: `B` batch, `T` queries, `S` keys, `K` key heads, `H` query heads, `n` keys of a query, `h` 1 or K.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from attnlab.ops.key_blocks import by_rows
from attnlab.parallel import partition

ROWS = 64  # whose keys are gathered at one time


def indexed_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    index_BThn: jax.Array,
    valid_BThn: jax.Array,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`o[t] = sum_j p[t, j] v[index[t, j]]`, `p = softmax_j(scale q[t] . k[index[t, j]])` over the valid j.

    What a query gives depends on its own row of the index alone, to the last bit. One without valid keys gives 0.

    Args:
      index_BThn: int32; for each key head, or for all.
      valid_BThn: bool; an index that is not may be anything within the keys.
      scale: default `d ** -0.5`.

    Returns:
      o_BTHe in the dtype of q, and the weights, means over the query heads that share an index, [B, T, h, n], without
      gradient. Scores, weights and their sums are float32 or wider.
    """
    attend = partial(_attend, scale=q_BTHd.shape[3] ** -0.5 if scale is None else float(scale))
    arrays = q_BTHd, k_BSKd, v_BSKe, index_BThn, valid_BThn
    if partition.ways("batch") > 1:  # a loop over rows would gather them on every device
        return attend(*arrays)

    def row_by_row(*arrays):  # XLA's gathers from several rows of a batch are half as fast on CPUs
        of_row = lambda row: jax.tree.map(lambda x: x[0], attend(*(x[None] for x in row)))
        return jax.lax.map(of_row, arrays)

    return partition.by_platform(*arrays, cpu=row_by_row, default=attend)


def _attend(q_BTHd, k_BSKd, v_BSKe, index_BThn, valid_BThn, *, scale: float) -> tuple[jax.Array, jax.Array]:
    (B, _, H, d), K, h = q_BTHd.shape, k_BSKd.shape[2], index_BThn.shape[2]
    wide = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    batch, head = jnp.arange(B)[:, None, None, None], jnp.arange(K)[:, None]

    def of_index(x, index):  # [B, r, K, n, d]
        return x[batch, index, head] if h == K else x[batch[..., 0], index[:, :, 0]].swapaxes(2, 3)

    @jax.checkpoint
    def of_rows(q, index, valid):
        q, valid = q.reshape(B, -1, K, H // K, d), valid[:, :, :, None]
        product = lambda *args: jnp.einsum(*args, precision="highest", preferred_element_type=wide)
        logits = product("brkgd,brknd->brkgn", q, of_index(k_BSKd, index)) * scale
        logits = jnp.where(valid, logits, jnp.finfo(wide).min)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        weights = jnp.where(valid, weights, 0)
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(wide).tiny)
        v = of_index(v_BSKe, index)
        o = product("brkgn,brkne->brkge", weights.astype(v.dtype), v)
        shares = jax.lax.stop_gradient(weights.mean(3) if h == K else weights.mean((2, 3))[:, :, None])
        return o.reshape(B, o.shape[1], H, -1).astype(q.dtype), shares

    return by_rows(of_rows, q_BTHd, index_BThn, valid_BThn, rows=ROWS)
