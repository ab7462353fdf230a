"""Causal flow attention on NVIDIA's Hopper: arrays as the kernel wants them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.flow_attention import gpu_forward
from kernels_pallas.flow_attention.gpu_forward import CHUNK, NUMBERS, TILE, VECTORS, WIDEST
from kernels_pallas.flow_attention.layout import Sums
from kernels_pallas.flow_attention.plan import Rule


def unsupported(dtype: Any, d: int, e: int) -> str | None:
    """Why the kernel cannot serve heads of these widths, or None."""
    if dtype != jnp.bfloat16:
        return f"on GPUs it computes bfloat16, not {jnp.dtype(dtype)}"
    if max(d, e) > WIDEST:
        return f"on GPUs widths of keys and values are at most {WIDEST}, not {d} and {e}"
    return None


def forward(
    interpret: Any, rule: Rule, q, k, v, documents, count, before: Sums | None
) -> tuple[jax.Array, jax.Array | None, Sums]:
    """See `kernels_pallas.flow_attention.gradient.flow`."""
    (B, T, H, d), e = q.shape, v.shape[3]
    fill = -T % CHUNK
    padded = lambda x: jnp.pad(x, [(0, 0), (0, fill), (0, 0), (0, -x.shape[3] % TILE)])
    races = bool(getattr(interpret, "detect_races", False))
    device = hopper.DEVICE if interpret is False else hopper.interpreted(races=races)
    counts, limits = _places(documents, T, None if before is None else count)
    counts = jnp.pad(counts.astype(jnp.float32), [(0, 0), (0, fill)])
    limits = None if limits is None else jnp.pad(limits, [(0, 0), (0, fill)], mode="edge")
    vectors, rivals, pairs = jnp.zeros((B, H, len(VECTORS), d)), jnp.zeros((B, H)), None
    if before is not None:
        vectors = jnp.stack([getattr(before, name) for name in VECTORS], 2)
        rivals = before.rivals
        pairs = jnp.pad(before.pairs, [(0, 0), (0, 0), (0, -d % TILE), (0, -e % TILE)])
    vectors = jnp.pad(vectors, [(0, 0), (0, 0), (0, 0), (0, -d % TILE)])
    o, numbers, vectors, rivals, pairs = gpu_forward.forward(
        device, rule, padded(q), padded(k), padded(v), counts, limits, vectors, rivals, pairs, width=d
    )
    outgoing = None
    if rule.competition:
        outgoing = jnp.moveaxis(numbers[:, :, NUMBERS.index("outgoing"), :T], 1, 2)
    found = {name: vectors[:, :, n, :d] for n, name in enumerate(VECTORS)}
    rivals = rivals if rule.competition else jnp.zeros((B, H))
    return o[:, :T, :, :e], outgoing, Sums(**found, rivals=rivals, pairs=pairs[:, :, :d, :e])


def _places(documents: jax.Array | None, length: int, count: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Each position's number in its document [B or 1, T], and its document's first position, -1 of document 0."""
    t = jnp.arange(length, dtype=jnp.int32)[None]
    if documents is None:
        return t + 1 if count is None else t + 1 + count[:, None], None
    new = jnp.pad(documents[:, 1:] != documents[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    first = jax.lax.cummax(jnp.where(new, t, 0), axis=1)
    own = documents == 0
    counts = t - first + 1
    return counts if count is None else counts + jnp.where(own, count[:, None], 0), jnp.where(own, -1, first)
