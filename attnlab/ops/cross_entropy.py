"""Cross-entropy over a vocabulary that is never held whole."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnlab.ops.linear import project


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden_ND: jax.Array, kernel_DV: jax.Array, targets_N: jax.Array, weights_N: jax.Array, chunk: int = 8192
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and log-partition of `softmax(hidden @ kernel)`, a chunk of the vocabulary at a time.

    Logits, statistics and gradients' sums are fp32 (fp64 for fp64 inputs); the products take the inputs as they are.

    Args:
      hidden_ND: final hidden states; here and below N may be several axes.
      kernel_DV: output projection.
      targets_N: int32, the right token; any value where the weight is 0.
      weights_N: weight of each position; positions of weight 0 give 0 and pass no gradient.
      chunk: columns of the vocabulary held at a time.

    Returns:
      nll_N, weights * (lse - logit[target]), in nats, and lse_N, weights * log-sum-exp of the logits. `weights` and
      `targets` get no gradient.
    """
    return _forward(hidden_ND, kernel_DV, targets_N, weights_N, chunk)[0]


def _chunks(vocab: int, chunk: int) -> list[tuple[int, int]]:
    return [(lo, min(lo + chunk, vocab)) for lo in range(0, vocab, chunk)]


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return project(hidden, kernel.astype(hidden.dtype), dtype)


def _forward(hidden, kernel, targets, weights, chunk):
    used = weights != 0
    hidden = jnp.where(
        used[..., None], hidden, 0
    )  # nothing of an unused row, not even NaN, reaches the kernel's gradient
    n, dtype = hidden.shape[:-1], jnp.promote_types(hidden.dtype, jnp.float32)
    peak = jnp.full(n, -jnp.inf, dtype)
    total = jnp.zeros(n, dtype)
    right = jnp.zeros(n, dtype)
    for lo, hi in _chunks(kernel.shape[1], chunk):
        logits = _logits(hidden, kernel[:, lo:hi])
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        total = total * jnp.exp(peak - new_peak) + jnp.sum(jnp.exp(logits - new_peak[..., None]), axis=-1)
        peak = new_peak
        here = jnp.arange(lo, hi) == targets[..., None]
        right = right + jnp.sum(jnp.where(here, logits, 0), axis=-1)
    lse = peak + jnp.log(total)
    outputs = (jnp.where(used, weights * (lse - right), 0), jnp.where(used, weights * lse, 0))
    return outputs, (hidden, kernel, targets, weights, lse)


def _backward(chunk, residuals, cotangents):
    hidden, kernel, targets, weights, lse = residuals
    d_nll, d_lse = (c * weights for c in cotangents)
    d_hidden = jnp.zeros(hidden.shape, lse.dtype)
    d_kernel, rows = [], tuple(range(hidden.ndim - 1))
    for lo, hi in _chunks(kernel.shape[1], chunk):
        columns = kernel[:, lo:hi]
        p = jnp.exp(_logits(hidden, columns) - lse[..., None])
        here = jnp.arange(lo, hi) == targets[..., None]
        d_logits = ((d_nll + d_lse)[..., None] * p - jnp.where(here, d_nll[..., None], 0)).astype(hidden.dtype)
        d_hidden = d_hidden + jnp.matmul(d_logits, columns.astype(hidden.dtype).T, preferred_element_type=lse.dtype)
        d_kernel.append(jnp.tensordot(hidden, d_logits, (rows, rows), preferred_element_type=lse.dtype))
    d_kernel = d_kernel[0] if len(d_kernel) == 1 else jnp.concatenate(d_kernel, axis=1)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def likeliest(hidden_ND: jax.Array, kernel_DV: jax.Array, chunk: int = 8192) -> jax.Array:
    """int32 [N], the column of the largest logit of `hidden @ kernel`, the first of equal ones; arguments as above."""
    best = jnp.full(hidden_ND.shape[:-1], -jnp.inf, jnp.promote_types(hidden_ND.dtype, jnp.float32))
    column = jnp.zeros(best.shape, jnp.int32)
    for lo, hi in _chunks(kernel_DV.shape[1], chunk):
        logits = _logits(hidden_ND, kernel_DV[:, lo:hi])
        highest = jnp.max(logits, axis=-1)
        column = jnp.where(highest > best, lo + jnp.argmax(logits, axis=-1).astype(jnp.int32), column)
        best = jnp.maximum(best, highest)
    return column
