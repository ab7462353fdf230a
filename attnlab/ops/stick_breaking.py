"""Stick-breaking attention as one op: keys, the nearest first, each take a share of what those nearer have left."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.ops.attention_frame import AttentionSpec, attend, check_shapes, over_devices, plain_masks
from attnlab.ops.blockwise import Span, take
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask
from attnlab.ops.row_blocks import bounds_of, by_key_heads, over_row_blocks, weighted


def definition(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKe: jax.Array, mask: Mask, *, scale: float, current: bool
) -> jax.Array:
    """The formula, key by key from the last to the first, with all T x S shares. In float32, or float64."""
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    T, H = q_BTHd.shape[1:3]
    S, K = k_BSKd.shape[1:3]
    q, k, v = (x.astype(dtype) for x in (q_BTHd, k_BSKd, v_BSKe))
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    start, end = mask.interval(T, S)
    key = jnp.arange(S, dtype=jnp.int32)
    own = (key == end[..., None] - 1) & (start < end)[..., None]
    others = (key >= start[..., None]) & (key < end[..., None] - (not current))
    shares = jax.nn.sigmoid(jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * scale)
    shares = jnp.where(others[:, None], shares, 0)

    def take_share(left_BHT, share_BHT):
        return left_BHT * (1 - share_BHT), left_BHT * share_BHT

    left, weights = jax.lax.scan(take_share, jnp.ones_like(shares[..., 0]), jnp.moveaxis(shares, 3, 0), reverse=True)
    weights = jnp.moveaxis(weights, 0, 3) + jnp.where(own[:, None], left[..., None], 0)
    return jnp.einsum("bhts,bshe->bthe", weights, v, precision="highest").astype(q_BTHd.dtype)


def in_blocks(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKe: jax.Array, mask: Mask, *, scale: float, current: bool
) -> jax.Array:
    """Blocks of rows; what nearer keys leave is a sum of logarithms, so that no share is divided by another."""
    T, S = q_BTHd.shape[1], k_BSKd.shape[1]

    def block(rows: Span, keys: Span) -> jax.Array:
        k, v = take(k_BSKd, keys, 1), take(v_BSKe, keys, 1)
        logits = by_key_heads(take(q_BTHd, rows, 1), k) * scale
        start, end = bounds_of(mask, T, S, rows)
        key = keys[0] + jnp.arange(keys[1], dtype=jnp.int32)
        seen = (key >= start) & (key < end - (not current))
        # Hidden logits are replaced before exp: of a large one it would be inf, and its gradient NaN.
        leaves = jnp.where(seen, jax.nn.log_sigmoid(-jnp.where(seen, logits, 0)), 0)
        left = jax.lax.cumsum(leaves, axis=4, reverse=True)  # by this key and those nearer
        nearer = jnp.pad(left[..., 1:], [(0, 0)] * 4 + [(0, 1)])
        weights = jnp.where(seen, jnp.exp(jax.nn.log_sigmoid(jnp.where(seen, logits, 0)) + nearer), 0)
        own = (key == end - 1) & (start < end)
        return weighted(weights + jnp.where(own, jnp.exp(left[..., :1]), 0), v).astype(q_BTHd.dtype)

    return over_row_blocks(block, T, S, mask)


STICK_BREAKING = Op(
    "stick_breaking",
    AttentionSpec.of,
    {"definition": Implementation(definition, plain_masks()), "blocks": Implementation(in_blocks, plain_masks())},
    preference=("blocks",),
    split=over_devices,
)


def stick_breaking(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    current: bool = False,
    impl: str = "auto",
) -> jax.Array:
    """Attention by shares: with z = scale q . k, row i gives key j the weight

        p_ij = sigmoid(z_ij) prod_{j < l < i} (1 - sigmoid(z_il))
        o_i = sum_{j < i} p_ij v_j + (1 - sum_{j < i} p_ij) v_i

    so that weights sum to 1. There is no softmax, and order is what stands between.

    q_BTHd, k_BSKd, v_BSKe: as in `attnlab.ops.attention`.
    mask: causal: the last key that a row sees is its own. A row that sees none gives exactly 0, with zero gradients.
    scale: default `d ** -0.5`.
    current: whether a row's own key is the first to take a share: j <= i, with l up to i.
    impl: "auto" (blocks: of rows, formed again in the backward pass), "definition".

    Returns o_BTHe in the dtype of q. Shares and their logarithms are float32 (float64 for float64 inputs).
    Differentiable (reverse mode) in q, k and v. Raises UserError for shapes that do not fit.

    Source: Tan et al. 2024, Stick-breaking Attention, arXiv:2410.17980, section 3.
    """
    check_shapes(q_BTHd, k_BSKd, v_BSKe, mask, None, None)
    scale = q_BTHd.shape[-1] ** -0.5 if scale is None else float(scale)
    options = {"scale": scale, "current": current, "impl": impl}
    return attend(STICK_BREAKING, (q_BTHd,), (k_BSKd, v_BSKe), mask, **options)
