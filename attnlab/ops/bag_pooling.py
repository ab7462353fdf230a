"""Attention pooling of bags by several branches: one vector a branch, whatever the order of a bag's instances.

Zhang et al. 2024, Attention-Challenging Multiple Instance Learning (ACMIL), arXiv:2311.07125, sections 3.2 to 3.4, with
the authors' code where the paper leaves a choice. Axes: B bags, N instances, M branches, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pooled(logits_BMN: jax.Array, kept_BMN: jax.Array, h_BND: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a = softmax(logits)` over the instances that are kept, and `z = a h`.

    Args:
      logits_BMN: in the dtype that sums are to have.
      kept_BMN: bool.
      h_BND: features.

    Returns:
      z [B, M, D] and a [B, M, N], in the dtype of the logits; both 0 where a bag keeps nothing.
    """
    a_BMN = attention(logits_BMN, kept_BMN)
    precise = jax.lax.Precision.HIGHEST
    return jnp.einsum("bmn,bnd->bmd", a_BMN, h_BND.astype(a_BMN.dtype), precision=precise), a_BMN


def attention(logits_BMN: jax.Array, kept_BMN: jax.Array) -> jax.Array:
    """The softmax [B, M, N] of `pooled`."""
    most = jnp.max(jnp.where(kept_BMN, logits_BMN, -jnp.inf), axis=-1, keepdims=True)
    most = jax.lax.stop_gradient(jnp.where(jnp.isfinite(most), most, 0))
    weights = jnp.where(kept_BMN, jnp.exp(jnp.where(kept_BMN, logits_BMN - most, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def some_of_the_strongest(
    logits_BMN: jax.Array, present_BN: jax.Array, key: jax.Array, top: int, share: float
) -> jax.Array:
    """Which instances stochastic top-k masking hides: of the k with the largest logits, `floor(share k)` at random.

    Each bag and branch draws by itself. k is `top`, or the number of a bag's instances where that is smaller. The
    choice has no gradient.

    Args:
      logits_BMN, present_BN: bool, the bag's own instances; others are neither counted nor hidden.
      key: of the draw.
      top: 1 or more.
      share: 0 or more, below 1, so that an instance is left.

    Returns:
      bool [B, M, N].
    """
    top = min(top, logits_BMN.shape[-1])
    present_BMN = jnp.broadcast_to(present_BN[:, None], logits_BMN.shape)
    ranked = jnp.where(present_BMN, jax.lax.stop_gradient(logits_BMN), -jnp.inf)
    _, strongest_BMk = jax.lax.top_k(ranked, top)
    there_BMk = jnp.take_along_axis(present_BMN, strongest_BMk, axis=-1)
    # In a table, so that a product such as 5 * 0.6 is rounded once and not by each device in its way.
    of_so_many = jnp.asarray([int(share * count) for count in range(top + 1)])
    hidden_BM = of_so_many[jnp.sum(there_BMk, axis=-1)]
    lot_BMk = jnp.where(there_BMk, jax.random.uniform(key, strongest_BMk.shape), jnp.inf)
    place_BMk = jnp.argsort(jnp.argsort(lot_BMk, axis=-1), axis=-1)
    chosen_BMk = place_BMk < hidden_BM[..., None]
    b, m = jnp.indices(strongest_BMk.shape[:2], sparse=True)
    return jnp.zeros(logits_BMN.shape, bool).at[b[..., None], m[..., None], strongest_BMk].set(chosen_BMk)


def likeness(a_MN: jax.Array) -> jax.Array:
    """[...], the mean cosine between the attention [..., M, N] of two branches, over all pairs; of one branch 0."""
    branches = a_MN.shape[-2]
    if branches == 1:
        return jnp.zeros(a_MN.shape[:-2], a_MN.dtype)
    square = jnp.sum(a_MN * a_MN, axis=-1, keepdims=True)
    unit = a_MN * jax.lax.rsqrt(jnp.where(square > 0, square, 1))
    # sum_{i != j} u_i u_j = |sum_i u_i|^2 - sum_i |u_i|^2
    together = jnp.sum(jnp.sum(unit, axis=-2) ** 2, axis=-1) - jnp.sum(unit * unit, axis=(-2, -1))
    return together / (branches * (branches - 1))
