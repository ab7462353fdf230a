"""Softmax attention of one or a few new queries over a cache: every key that a query sees is read once, no other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import masks, tuning
from kernels_pallas.decode import tpu
from kernels_pallas.flash_attention import definition as flash_definition

__all__ = ["decode_attention", "definition", "most_rows"]

PLATFORMS = ("tpu",)


def most_rows() -> int:
    """How many queries of one key head, `T * H / K`, the kernel is made for."""
    return 128


def definition(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """`decode_attention` with all scores, in any dtype; gradients too."""
    return flash_definition(q, k.swapaxes(1, 2), v.swapaxes(1, 2), **options)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    sinks: jax.Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    platform: str | None = None,
    interpret: Any = False,
    block: int | None = None,
    splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.flash_attention.flash_attention` over keys and values that lie as a cache does; no gradient.

    Args:
      q: queries [B, T, H, d], few: `T * H / K` at most `most_rows()`.
      k, v: [B, K, S, d] and [B, K, S, e], in the dtype of q, bfloat16 or float32.
      starts, ends: int [B, T] or [1, T]: query `t` sees the slots `starts[t] <= s < ends[t]`. Blocks of slots that no
        query of a sequence sees are not read, whatever the cache's size; what is in slots that none sees (NaN, too)
        changes nothing. A rolling cache is one whose slots are in the order of their positions.
      sinks, soft_cap, scale: as there.
      platform, interpret: as there.
      block: slots read at a time, a multiple of 128; by default about 2 MiB of them.
      splits: parts of the slots, which cores of one device share; by default as many as there are cores to be filled.

    Returns:
      o [B, T, H, e] in the dtype of q, and lse [B, T, H], float32; for a query that sees nothing 0 and -inf (with
      sinks: its sink).

    Raises:
      ValueError: shapes, dtypes or options that do not fit, or no kernel for the platform.
    """
    if platform is None:
        default = jax.default_backend()
        platform = "tpu" if interpret else {"gpu": "cuda"}.get(default, default)
    _check(q, k, v, starts, ends, sinks, platform, block)
    (B, T, d), (K, S) = (q.shape[0], q.shape[1], q.shape[3]), k.shape[1:3]
    block = tuning.decode_block(K, S, d + v.shape[3], q.dtype.itemsize) if block is None else block
    splits = tuning.decode_splits(tuning.kind(), B) if splits is None else splits
    bounds = masks.intervals(starts, ends, T, S) or (jnp.zeros((1, T), jnp.int32), jnp.full((1, T), S, jnp.int32))
    scale = d**-0.5 if scale is None else float(scale)
    o, lse2 = tpu.run(q, k, v, bounds, scale=scale, cap=soft_cap, block=block, splits=splits, interpret=interpret)
    o, lse = tpu.merged(o, lse2, sinks)
    some = jnp.broadcast_to(bounds[1] > bounds[0], (B, T))[..., None]
    o = jnp.where(some[..., None], o, 0)
    lse = jnp.where(some, lse, -jnp.inf if sinks is None else sinks.astype(jnp.float32))
    return o.astype(q.dtype), lse


def _check(q, k, v, starts, ends, sinks, platform: str, block: int | None) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"decode_attention: {what}")

    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    need(q.ndim == k.ndim == v.ndim == 4, f"{shapes}; each must have 4 axes")
    (B, T, H, d), (K, S) = q.shape, k.shape[1:3]
    fits = k.shape == (B, K, S, d) and v.shape[:3] == (B, K, S)
    need(fits, f"{shapes} do not fit; expected q [B, T, H, d], k [B, K, S, d], v [B, K, S, e]")
    need(min(*q.shape, *k.shape, *v.shape) > 0, f"{shapes}; no size may be 0")
    need(H % K == 0, f"{H} query heads over {K} key heads; H must be a multiple of K")
    need(T * H // K <= most_rows(), f"{T} queries of {H // K} heads a key head; at most {most_rows()} rows")
    known = q.dtype == k.dtype == v.dtype and q.dtype in ("bfloat16", "float32")
    need(known, f"q {q.dtype}, k {k.dtype}, v {v.dtype}; allowed: all bfloat16, or all float32")
    for name, bound in (("starts", starts), ("ends", ends)):
        if bound is not None:
            need(bound.shape in ((B, T), (1, T)), f"{name} {bound.shape}; expected [{B}, {T}] or [1, {T}]")
            need(bound.dtype.kind in "iu", f"{name} {bound.dtype}; expected integers")
    need(sinks is None or sinks.shape == (H,), f"sinks {getattr(sinks, 'shape', ())}; expected [{H}], one per head")
    need(platform in PLATFORMS, f"no kernel for platform {platform!r}; allowed: {', '.join(PLATFORMS)}")
    need(block is None or (block > 0 and block % 128 == 0), f"block={block}; allowed: a multiple of 128")
