"""Softmax attention and its gradients in NumPy's float64, as one would derive them: no program is compiled for them."""

from __future__ import annotations

import jax
import numpy as np


def attention(
    q, k, v, mask, do, *, sinks=None, key_bias=None, query_bias=None, scale=None, soft_cap=None, dlse=None
):  # fmt: skip
    """o, the gradients of q, k and v, and those of sinks and biases where they are given; with the lse behind them
    where `dlse` says its cotangent.

    Args: as of the op; q [B, T, H, d], k [B, S, K, d], v [B, S, K, e], do [B, T, H, e], dlse [B, T, H], biases
      [B or 1, S or T, heads].
    """
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    (B, T, H, d), (S, K) = q.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    grouped = lambda x: x.reshape(B, T, K, H // K, -1)
    seen = np.asarray(jax.tree.map(np.asarray, mask).visible(T, S))
    seen = seen.repeat(H // seen.shape[1], 1) if seen.shape[1] > 1 else seen
    seen = np.broadcast_to(seen, (B, H, T, S)).reshape(B, K, H // K, T, S)
    s = scale * np.einsum("btkgd,bskd->bkgts", grouped(q), k)
    slope = scale
    if soft_cap is not None:
        s = soft_cap * np.tanh(s / soft_cap)
        slope = scale * (1 - (s / soft_cap) ** 2)
    by_heads = lambda x: np.moveaxis(np.broadcast_to(x, (B, *x.shape[1:])), 2, 1)
    for bias, axis in ((key_bias, -2), (query_bias, -1)):
        if bias is not None:
            bias = np.asarray(bias, np.float64)
            bias = by_heads(bias.repeat(H // bias.shape[2], 2)).reshape(B, K, H // K, -1)
            s = s + np.expand_dims(bias, axis)
    s = np.where(seen, s, -np.inf)
    sink = -np.inf if sinks is None else np.asarray(sinks, np.float64).reshape(K, H // K, 1)
    high = np.maximum(s.max(-1), sink)
    high = np.where(np.isfinite(high), high, 0)
    weights, of_sink = np.exp(s - high[..., None]), np.exp(sink - high)
    total = weights.sum(-1) + of_sink
    share = 1 / np.where(total == 0, 1, total)
    p, of_sink = weights * share[..., None], of_sink * share
    dp = np.einsum("btkge,bske->bkgts", grouped(do), v)
    mean = (p * dp).sum(-1)
    by_lse = 0 if dlse is None else np.moveaxis(np.asarray(dlse, np.float64).reshape(B, T, K, H // K), 1, 3)
    of_logits = p * (dp + (by_lse - mean)[..., None])
    ds = of_logits * slope
    o = np.einsum("bkgts,bske->btkge", p, v).reshape(do.shape)
    dq = np.einsum("bkgts,bskd->btkgd", ds, k).reshape(q.shape)
    dk, dv = np.einsum("bkgts,btkgd->bskd", ds, grouped(q)), np.einsum("bkgts,btkge->bske", p, grouped(do))
    found = [o, dq, dk, dv]
    if sinks is not None:
        found.append((of_sink * (by_lse - mean)).sum((0, 3)).reshape(H))
    for bias, axis in ((key_bias, -2), (query_bias, -1)):
        if bias is not None:
            each = np.moveaxis(of_logits.sum(axis).reshape(B, H, -1), 1, 2)
            each = each.reshape(B, each.shape[1], bias.shape[2], -1).sum(3)
            found.append(each if bias.shape[0] == B else each.sum(0, keepdims=True))
    if dlse is not None:
        with np.errstate(divide="ignore"):
            lse = np.moveaxis(high + np.log(total), 3, 1).reshape(B, T, H)
        found.append(lse)
    return found
