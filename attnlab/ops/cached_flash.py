"""Softmax attention over a cache by our Pallas kernel (`kernels_pallas.decode`), which reads what queries see."""

from __future__ import annotations

import functools
from typing import Any

import jax

from attnlab.ops import attention_xla
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.masks import Mask
from attnlab.parallel import partition
from kernels_pallas import tuning


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import decode

    return decode


def unsupported(spec: AttentionSpec) -> str | None:
    """Why the kernel cannot serve, or None."""
    rows = spec.queries * spec.heads // spec.kv_heads
    if spec.dtype not in ("bfloat16", "float32"):
        return f"it computes bfloat16 and float32, not {spec.dtype}"
    if rows > _kernels().most_rows():
        return f"it takes {_kernels().most_rows()} queries of a key head's query heads at most, not {rows}"
    return None


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSe: jax.Array,
    mask: Mask,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """See `attnlab.ops.cached_attention.cached_attention`; gradients are those of XLA's form."""
    bounds = mask.bounds(q_BTHd.shape[1], k_BKSd.shape[2])
    return _attention((scale, soft_cap, interpret), q_BTHd, k_BKSd, v_BKSe, sinks_H, bounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, sinks, bounds):
    scale, soft_cap, interpret = static
    options = {"scale": scale, "soft_cap": soft_cap, "platform": "tpu", "interpret": interpret}
    with tuning.device_kind(partition.device_kind()):
        return _kernels().decode_attention(q, k, v, starts=bounds[0], ends=bounds[1], sinks=sinks, **options)[0]


def _forward(static, q, k, v, sinks, bounds):
    return _attention(static, q, k, v, sinks, bounds), (q, k, v, sinks, bounds)


def _backward(static, residuals, do):
    *arrays, bounds = residuals
    scale, soft_cap, _ = static

    def xla(q, k, v, sinks):
        by_position = (x.swapaxes(1, 2) for x in (k, v))
        return attention_xla.attention(q, *by_position, Mask(*bounds), sinks, scale=scale, soft_cap=soft_cap)

    return *jax.vjp(xla, *arrays)[1](do), (None, None)


_attention.defvjp(_forward, _backward)
