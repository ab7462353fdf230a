"""Top-k routing: which of E choices each token takes, with what weight, and the loss that keeps the choices in use.

Everything is computed in fp32 (fp64 for fp64 inputs). `E` choices, `k` of them taken.
"""

import jax
import jax.numpy as jnp


def top_k_mask(logits_E: jax.Array, k: int) -> jax.Array:
    """Which k choices have the largest logits, bool [..., E]; of equal ones those of lower index.

    Logits, not probabilities: a softmax rounds different logits to equal probabilities. Exactly k are taken wherever
    no logit is NaN.
    """
    higher = logits_E[..., None, :] > logits_E[..., :, None]
    index = jnp.arange(logits_E.shape[-1])
    equal_before = (logits_E[..., None, :] == logits_E[..., :, None]) & (index < index[:, None])
    return jnp.sum(higher | equal_before, axis=-1) < k


def softmax(logits_E: jax.Array) -> jax.Array:
    """Probabilities over the last axis, in fp32 or wider."""
    return jax.nn.softmax(logits_E.astype(jnp.promote_types(logits_E.dtype, jnp.float32)), axis=-1)


def renormalised(p_E: jax.Array, taken_E: jax.Array) -> jax.Array:
    """`k p_e / sum of the taken p` for the taken ones, exactly 0 for the others: the mean over the taken is 1.

    Args:
      p_E: probabilities [..., E].
      taken_E: bool [..., E], k of them true.
    """
    kept = jnp.where(taken_E, p_E, 0)
    total = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), jnp.finfo(p_E.dtype).eps)
    return kept * (jnp.sum(taken_E, axis=-1, keepdims=True).astype(p_E.dtype) / total)


def straight_through(p_E: jax.Array, taken_E: jax.Array, *, dense: bool) -> jax.Array:
    """1 for the taken, 0 for the others, exactly; backward it is `p`.

    Args:
      p_E: probabilities [..., E].
      taken_E: bool [..., E].
      dense: whether the choices that were not taken receive a gradient too.

    Source: Jin et al. 2024, arXiv:2410.11842, eq. 9 and 10 (which leave `dense` open).
    """
    # p - p is exactly 0, whatever p is: the value is not rounded.
    through = taken_E.astype(p_E.dtype) + (p_E - jax.lax.stop_gradient(p_E))
    return through if dense else jnp.where(taken_E, through, 0)


def norm_logits(q_TEd: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """`|q_e| / std_e(|q_e|)`, [..., E] from [..., E, d]: the router without parameters.

    The standard deviation is over the E norms, with E - 1 in its denominator. `epsilon` is added to the variance, so
    that equal norms give equal logits and not NaN; a zero query has zero gradient.

    Raises ValueError for E < 2, which have no standard deviation.
    """
    if q_TEd.shape[-2] < 2:
        raise ValueError(f"norm_logits: {q_TEd.shape[-2]} choices; at least 2 have a standard deviation")
    q = q_TEd.astype(jnp.promote_types(q_TEd.dtype, jnp.float32))
    square = jnp.sum(q * q, axis=-1)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return norm * jax.lax.rsqrt(jnp.var(norm, axis=-1, keepdims=True, ddof=1) + epsilon)


def load(values_E: jax.Array, used: jax.Array | None = None) -> jax.Array:
    """Mean over the tokens that are used, [E] from [..., E]; `used` bool [...], None: all. Zero if none is."""
    axes = tuple(range(values_E.ndim - 1))
    dtype = jnp.promote_types(values_E.dtype, jnp.float32)
    if used is None:
        return jnp.mean(values_E.astype(dtype), axis=axes)
    kept = jnp.where(used[..., None], values_E.astype(dtype), 0)
    return jnp.sum(kept, axis=axes) / jnp.maximum(jnp.sum(used), 1).astype(dtype)


def load_balance(p_E: jax.Array, taken_E: jax.Array, used: jax.Array | None = None) -> jax.Array:
    """`E sum_e P_e f_e`, P the mean probability and f the share of tokens that take choice e: k when balanced.

    Args:
      p_E: probabilities [..., E] over all choices.
      taken_E: bool [..., E]; f has no gradient.
      used: bool [...], the tokens that count; None: all.

    Source: the released code of Jin et al. 2024, arXiv:2410.11842; its eq. 7 and 8 lack the factor E.
    """
    return p_E.shape[-1] * jnp.sum(load(p_E, used) * jax.lax.stop_gradient(load(taken_E.astype(p_E.dtype), used)))
