"""Softmax attention whose output is multiplied by the logistic function of a gate: `o * sigmoid(gate)`.

The implementations are those of attention, by the same names. Our kernel multiplies before it writes; behind the others
the product is XLA's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import attention_flash
from attnlab.ops.attention import ATTENTION
from attnlab.ops.attention_frame import AttentionSpec, attend, check_shapes, over_devices
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask


def gated(o_BTHe: jax.Array, gate_BTHe: jax.Array) -> jax.Array:
    """`o * sigmoid(gate)` in float32 or wider, in the dtype of o."""
    wide = jnp.promote_types(jnp.promote_types(o_BTHe.dtype, gate_BTHe.dtype), jnp.float32)
    return (o_BTHe.astype(wide) * jax.nn.sigmoid(gate_BTHe.astype(wide))).astype(o_BTHe.dtype)


def _apart(way: Implementation) -> Implementation:
    """An implementation of attention, and the product behind it."""

    def run(q, gate, k, v, mask, sinks=None, **options):
        return gated(way.run(q, k, v, mask, sinks, **options), gate)

    def split(exchange, q, gate, k, v, mask, sinks=None, **options):
        return gated(way.split(exchange, q, k, v, mask, sinks, **options), gate)

    return dataclasses.replace(way, run=run, split=None if way.split is None else split)


class _Table(Mapping[str, Implementation]):
    """Attention's, also of what enters it later."""

    def __getitem__(self, name: str) -> Implementation:
        way = ATTENTION.table[name]
        return dataclasses.replace(way, run=attention_flash.gated_attention) if name == "flash" else _apart(way)

    def __iter__(self) -> Iterator[str]:
        return iter(ATTENTION.table)

    def __len__(self) -> int:
        return len(ATTENTION.table)


GATED_ATTENTION = Op("gated_attention", AttentionSpec.of, _Table(), ATTENTION.preference, split=over_devices)


def gated_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    gate_BTHe: jax.Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """`attnlab.ops.attention.attention`, multiplied by `sigmoid(gate)`; see there for the other arguments.

    Returns o_BTHe in the dtype of q. Differentiable in the gate's logits, too. Raises UserError for what does not fit.

    Source: Qiu et al. 2025, Gated Attention for Large Language Models, position G1.
    """
    check_shapes(q_BTHd, k_BSKd, v_BSKe, mask, soft_cap, sinks_H)
    if gate_BTHe.shape != (*q_BTHd.shape[:3], v_BSKe.shape[3]):
        raise UserError(f"attention: gate {gate_BTHe.shape}, expected {(*q_BTHd.shape[:3], v_BSKe.shape[3])}")
    scale = q_BTHd.shape[-1] ** -0.5 if scale is None else float(scale)
    options = {"scale": scale, "soft_cap": soft_cap, "impl": impl}
    return attend(GATED_ATTENTION, (q_BTHd, gate_BTHe), (k_BSKd, v_BSKe), mask, (sinks_H,), **options)
