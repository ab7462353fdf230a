"""Softmax attention on TPU by jax's Pallas kernel, splash attention (`jax.experimental.pallas.ops.tpu`).

The kernel knows static masks and segment ids. Our intervals are both where they come from packed documents: rows of one
document share `k_start`, so `k_start` is the id, and causality and the window are the static part.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.attention_frame import AttentionSpec, zigzags
from attnlab.ops.masks import Mask, mean_visible_keys
from attnlab.parallel.sequence_parallel import SequenceParallel

_LANES = 128
_BLOCK = 512  # rows and keys of a tile, at most; a tile's scores are fp32 in a few MB of fast memory


# Matrix products of each kernel, against the two of a forward pass.
_KERNEL_WORK = {"fwd": 1.0, "dq": 1.5, "dkv": 2.0}


def _splash() -> Any:
    """Imported where it runs: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def unsupported(spec: AttentionSpec) -> str | None:
    """Why the kernel cannot serve, or None."""
    whole = spec.queries * spec.devices
    reasons = (
        (spec.dtype not in ("bfloat16", "float32"), f"it computes bfloat16 and float32, not {spec.dtype}"),
        (spec.sinks, "it has no sinks here"),
        (spec.intervals and not spec.documents, "its masks are static, or packed documents"),
        (whole != spec.keys, "queries and keys must be the same positions"),
        (spec.queries % _LANES != 0, f"T = {whole} is not a multiple of {_LANES * spec.devices}"),
        (
            any(w not in (64, 96) and w % _LANES for w in (spec.width, spec.value_width)),
            f"head widths must be 64, 96 or a multiple of {_LANES}",
        ),
    )
    return next((reason for fails, reason in reasons if fails), None)


def kernel_flops(spec: AttentionSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel; pairs that the static mask hides are not counted, those of documents are."""
    seen = mean_visible_keys(spec.keys, spec.causal, spec.window)
    forward = 2.0 * spec.batch * spec.heads * spec.queries * seen * (spec.width + spec.value_width)
    return {f"splash_mha_{part}": work * forward for part, work in _KERNEL_WORK.items()}


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """See `attnlab.ops.attention.attention`; `interpret` runs the kernel as plain XLA, on any platform.

    Scores and statistics are fp32, products bf16 for bf16 inputs. Backward recomputes the scores, from the output and
    the log-sum-exp, which carry the checkpoint name "attention_o".
    """
    del sinks_H  # `unsupported` refuses them
    T, H = q_BTHd.shape[1:3]
    kernel = _kernel((T, T), H, mask.causal, mask.window, soft_cap, interpret)
    position = jnp.arange(T, dtype=jnp.int32)
    starts = None if not mask.dynamic() else (mask.k_start, mask.k_start)
    return _run(kernel, (q_BTHd, k_BSKd, v_BSKe), starts, (position, position), scale)


def over_devices(
    exchange: SequenceParallel,
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    sinks_H: jax.Array | None,
    *,
    key_start: jax.Array | None,
    scale: float,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """`attention` of a device's queries against all keys: the split of `attention_frame.over_devices`."""
    del sinks_H
    (T, H), S, count = q_BTHd.shape[1:3], k_BSKd.shape[1], exchange.count
    order, index = exchange.order(S, zigzags(mask, T)), exchange.index()

    def own(info: Any) -> Any:  # the tiles of this device's rows
        if info is None:
            return None
        cut = lambda x, axis: None if x is None else jax.lax.dynamic_slice_in_dim(
            x, index * (x.shape[axis] // count), x.shape[axis] // count, axis
        )  # fmt: skip
        tiles = {name: cut(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")}
        return info._replace(**tiles, q_sequence=cut(info.q_sequence, 0))

    if mask.causal or mask.window is not None:
        kernel = _kernel((S, S), H, mask.causal, mask.window, soft_cap, interpret, tuple(order.tolist()), count)
        infos = [own(info) for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)]
        kernel = type(kernel)(*infos, **kernel.kwargs)
    else:
        kernel = _kernel((T, S), H, False, None, soft_cap, interpret)
    position = jax.lax.dynamic_slice_in_dim(jnp.asarray(order, jnp.int32), index * T, T)
    starts = None if key_start is None else (mask.k_start, key_start)
    return _run(kernel, (q_BTHd, k_BSKd, v_BSKe), starts, (position, jnp.arange(S, dtype=jnp.int32)), scale)


def _run(
    kernel: Any, arrays: tuple[jax.Array, ...], starts: Any, positions: tuple[jax.Array, ...], scale: float
) -> jax.Array:
    """The kernel for every sequence; `starts` and `positions` of queries and of keys."""
    q = arrays[0]
    # The kernel has no scale of its own: it goes into q, rounded once to the type of the products.
    arrays = [x.swapaxes(1, 2) for x in ((q.astype(jnp.float32) * scale).astype(q.dtype), *arrays[1:])]
    if starts is None:
        return jax.vmap(kernel)(*arrays).swapaxes(1, 2)
    starts = [jnp.broadcast_to(x, (q.shape[0], x.shape[1])) for x in starts]
    padding = [start > position for start, position in zip(starts, positions)]
    # A row that sees nothing has no softmax: each padding row is a document of its own, whose output is not used.
    ids = [jnp.where(pad, -1 - at, start) for pad, at, start in zip(padding, positions, starts)]
    o = jax.vmap(kernel)(*arrays, _splash().SegmentIds(*ids)).swapaxes(1, 2)
    return jnp.where(padding[0][:, :, None, None], 0, o)


def _kernel(
    shape: tuple[int, int],
    heads: int,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
    order: tuple[int, ...] | None = None,
    devices: int = 1,
) -> Any:
    """The kernel for so many queries and keys [H, T, d] of one sequence; its queries reordered, and over devices."""
    block = next(b for b in (_BLOCK, 384, 256, _LANES) if shape[0] // devices % b == 0)
    sizes = _splash().BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = _splash().MultiHeadMask([_static_mask(shape, causal, window, order)] * heads)
    return _splash().make_splash_mha(
        mask,
        block_sizes=sizes,
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=devices,
        residual_checkpoint_name="attention_o",
        interpret=interpret,
    )


@functools.cache
def _static_mask(shape: tuple[int, int], causal: bool, window: int | None, order: tuple[int, ...] | None) -> Any:
    if window is not None:
        mask = _splash().LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    elif not causal:
        return _splash().FullMask(shape)
    else:
        mask = _splash().CausalMask(shape)
    if order is not None:
        mask.q_sequence = np.array(order, np.int32)
    return mask
