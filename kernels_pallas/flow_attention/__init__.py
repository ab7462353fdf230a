"""Causal flow attention in one sweep, every sum of a head on chip (Wu et al. 2022, arXiv:2202.06258)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.flow_attention import gpu, gpu_forward, layout, tpu_backward, tpu_forward
from kernels_pallas.flow_attention.gradient import Call, flow
from kernels_pallas.flow_attention.layout import Blocks, Sums
from kernels_pallas.flow_attention.plan import Rule

__all__ = ["Blocks", "Rule", "Sums", "flow_attention", "gpu_kernel_flops", "kernel_flops"]


def flow_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rule: Rule | None = None,
    *,
    documents: jax.Array | None = None,
    state: tuple[jax.Array, Sums] | None = None,
    platform: str = "tpu",
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array | None, Sums]:
    """Position i, the N-th of its document, with sums over the positions of the document up to and with it:

    I = (q + eps) . (sum k + eps),                     O = (k + eps) . (sum q + eps)
    I^ = (q + eps) . (sum k N / O + eps) / N,          O^ = (k + eps) . (sum q N / I + eps) / N
    competition = N exp(clip O^) / sum exp(clip O^),   o = sigmoid(I^) / I * q . sum k (competition v)^T

    Args:
      q, k: features [B, T, H, d], at least 0; v: values [B, T, H, e]; all bfloat16, or all float32.
      rule: `Rule()` by default. Without `allocation` the sigmoid is 1, without `competition` competition is; `clip` is
        to [-clip, clip].
      documents: int [B, T], ascending: positions see each other where it is equal. None: all are of document 0.
      state: positions before the first, int [B], and their sums: of document 0. None: none.
      platform: whose kernels: "tpu", or "cuda": NVIDIA's Hopper, bfloat16 and widths up to 128.
      interpret: runs the kernels as plain XLA operations on any platform, or, on a CPU, as its interpreter's parameters
        say (`jax.experimental.pallas.tpu.InterpretParams`). On cuda: by jax's interpreter of GPU kernels, on a CPU.
      blocks: what a grid step computes; `Blocks()` by default. On cuda there is no choice.

    Returns:
      o [B, T, H, e] in the dtype of v; O^ [B, T, H] in float32 (None without competition); the sums of the last
      position's document. Differentiable (reverse mode) in q, k, v and the state's sums. Sums are float32;
      products of bfloat16 inputs round pairs and weighted values to bfloat16.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    rule, blocks = rule or Rule(), blocks or Blocks()
    _check(q, k, v, rule, documents, state, blocks)
    count, sums = (None, None) if state is None else state
    if platform not in ("tpu", "cuda"):
        raise ValueError(f"flow_attention: no kernel for platform {platform!r}; allowed: tpu, cuda")
    if platform == "cuda":
        if reason := gpu.unsupported(q.dtype, q.shape[3], v.shape[3]):
            raise ValueError(f"flow_attention: {reason}")
        return gpu.flow(interpret, rule, q, k, v, documents, count, sums)
    return flow(Call(rule, tuning.kind(), interpret, blocks), q, k, v, documents, count, sums)


def kernel_flops(batch: int, length: int, heads: int, width: int, value_width: int) -> dict[str, float]:
    """FLOPs of one run of each kernel, by name: products of pairs, values and states."""
    of = lambda w: jax.ShapeDtypeStruct((batch, length, heads, w), jnp.bfloat16)
    plan = layout.plan_of(Rule(), Blocks(), of(width), of(value_width), False, False)
    return {"flow_forward": tpu_forward.flops(plan), "flow_backward": tpu_backward.flops(plan)}


def gpu_kernel_flops(batch: int, length: int, heads: int, width: int, value_width: int) -> dict[str, float]:
    """As `kernel_flops`, of the kernels for Hopper: pairs are products by queries and by keys. Sweeps of
    `linear_recurrence` in the gradient are not in it."""
    pairs, states = gpu_forward.CHUNK * (2 * width + value_width), 2 * width * value_width
    products = {"flow_forward": pairs + states, "flow_backward": 4 * gpu_forward.CHUNK * width}
    return {name: 2.0 * batch * length * heads * n for name, n in products.items()}


def _check(q, k, v, rule, documents, state, blocks) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"flow_attention: {what}")

    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    need(
        q.ndim == v.ndim == 4 and q.shape == k.shape and v.shape[:3] == q.shape[:3],
        f"{shapes} do not fit; expected q [B, T, H, d], k [B, T, H, d], v [B, T, H, e]",
    )
    (B, T, H, d), e = q.shape, v.shape[3]
    need(min(B, T, H, d, e) > 0, f"{shapes}; no size may be 0")
    dtypes = q.dtype, k.dtype, v.dtype
    need(
        len(set(dtypes)) == 1 and q.dtype in ("bfloat16", "float32"),
        f"q {q.dtype}, k {k.dtype}, v {v.dtype}; allowed: all bfloat16, or all float32",
    )
    need(rule.clip is not None and 0 <= rule.clip <= 50, f"clip={rule.clip}; allowed: from 0 to 50, whose exp fits")
    need(rule.epsilon >= 0, f"epsilon={rule.epsilon}; allowed: at least 0")
    need(
        documents is None or (documents.shape == (B, T) and documents.dtype.kind in "iu"),
        f"documents {getattr(documents, 'dtype', '')}{getattr(documents, 'shape', '')}; expected integers [{B}, {T}]",
    )
    need(blocks.chunk % 8 == 0 and min(blocks.chunk, blocks.chunks, blocks.heads) > 0, f"{blocks}; allowed: chunk a "
         "multiple of 8, on a TPU of 128, chunks and heads at least 1")  # fmt: skip
    if state is None:
        return
    vector = (B, H, d)
    expected = ((B,), Sums(vector, vector, vector, vector, (B, H), (B, H, d, e)))
    found = jax.tree.map(jnp.shape, state)
    need(tuple(found) == expected, f"state of shapes {tuple(found)}; expected {expected}")
