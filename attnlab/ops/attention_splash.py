"""Softmax attention on TPU by jax's Pallas kernel, splash attention (`jax.experimental.pallas.ops.tpu`).

The kernel knows static masks and segment ids. Our intervals are both where they come from packed documents: rows of one
document share `k_start`, so `k_start` is the id, and causality and the window are the static part.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

from attnlab.ops import partition
from attnlab.ops.masks import Mask

_LANES = 128
_BLOCK = 512  # rows and keys of a tile, at most; a tile's scores are fp32 in a few MB of fast memory


def unsupported(spec: Any, interpret: bool = False) -> str | None:
    """Why the kernel cannot serve an `AttentionSpec`, or None.

    Args:
      spec: what is asked for.
      interpret: the kernel will be interpreted, which any platform can.
    """
    platform = partition.platform()
    reasons = (
        (not interpret and platform != "tpu", f"it is a TPU kernel; the platform is {platform}"),
        (spec.dtype not in ("bfloat16", "float32"), f"it computes bfloat16 and float32, not {spec.dtype}"),
        (spec.sinks, "it has no sinks here"),
        (spec.intervals and not spec.documents, "its masks are static, or packed documents"),
        (spec.queries != spec.keys, "queries and keys must be the same positions"),
        (spec.queries % _LANES != 0, f"T = {spec.queries} is not a multiple of {_LANES}"),
        (
            any(w not in (64, 96) and w % _LANES for w in (spec.width, spec.value_width)),
            f"head widths must be 64, 96 or a multiple of {_LANES}",
        ),
    )
    return next((reason for fails, reason in reasons if fails), None)


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None,
    sinks_H: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """See `attnlab.ops.attention.attention`; `interpret` runs the kernel as plain XLA, on any platform.

    Scores and statistics are fp32, products bf16 for bf16 inputs. Backward recomputes the scores, from the output and
    the log-sum-exp, which carry the checkpoint name "attention_o".
    """
    del sinks_H  # `unsupported` refuses them
    T, H = q_BTHd.shape[1:3]
    kernel = _kernel(T, H, mask.causal, mask.window, soft_cap, interpret)
    # The kernel has no scale of its own: it goes into q, rounded once to the type of the products.
    q = (q_BTHd.astype(jnp.float32) * scale).astype(q_BTHd.dtype)
    arrays = [x.swapaxes(1, 2) for x in (q, k_BSKd, v_BSKe)]
    if not mask.dynamic():
        return jax.vmap(kernel)(*arrays).swapaxes(1, 2)
    start_BT = jnp.broadcast_to(mask.k_start, q_BTHd.shape[:2])
    position = jnp.arange(T, dtype=jnp.int32)
    padding = start_BT > position
    # A row that sees nothing has no softmax: each padding row is a document of its own, whose output is not used.
    ids = jnp.where(padding, -1 - position, start_BT)
    o = jax.vmap(kernel)(*arrays, splash.SegmentIds(ids, ids)).swapaxes(1, 2)
    return jnp.where(padding[:, :, None, None], 0, o)


def _kernel(length: int, heads: int, causal: bool, window: int | None, soft_cap: float | None, interpret: bool) -> Any:
    """The kernel for [H, T, d] of one sequence."""
    block = next(b for b in (_BLOCK, 384, 256, _LANES) if length % b == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash_masks.MultiHeadMask([_static_mask(length, causal, window)] * heads)
    return splash.make_splash_mha_single_device(
        mask,
        block_sizes=sizes,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name="attention_o",
        interpret=interpret,
    )


@functools.cache
def _static_mask(length: int, causal: bool, window: int | None) -> splash_masks.Mask:
    shape = (length, length)
    if window is not None:
        return splash_masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    return splash_masks.CausalMask(shape) if causal else splash_masks.FullMask(shape)
