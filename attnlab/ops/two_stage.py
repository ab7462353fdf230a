"""The two-stage recurrence of momentum and forgetting over a chunk, as one matrix.

    S_t = eta_t S_{t-1} + g_t          W_t = keep_t W_{t-1} + S_t

is linear in the inputs g and in what came in, so that any number of steps is

    W_t = beta_t W_0 + rho_t S_0 + sum_{i <= t} kappa_{t,i} g_i        S_t = h_t S_0 + sum_{i <= t} H_{t,i} g_i

with H_{t,i} = eta_{i+1} ... eta_t, L_{t,i} = keep_{i+1} ... keep_t and kappa = L H: scalars, whatever the shape of W.
Products are made of sums of logarithms, so that nothing is divided by a product that has vanished.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.ops.position_decay import decays_between

# Gates below exp(LOG_FLOOR) count as that: a gate of exactly 0 has no logarithm.
LOG_FLOOR = -30.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoStage:
    """Coefficients of the C steps of a chunk; t is the row, i the column.

    Attributes:
      log_keep_C: sum of log keep from the beginning of the document or the chunk, this step included.
      beta_C, kappa_CC: of the weights before the chunk, and of the inputs, in the weights after each step.
      rho_C, h_C, momentum_CC: of the momentum in the weights, of the momentum in the momentum, and H. None without
        momentum, where S_t = g_t.
    """

    log_keep_C: jax.Array
    beta_C: jax.Array
    kappa_CC: jax.Array
    rho_C: jax.Array | None = None
    h_C: jax.Array | None = None
    momentum_CC: jax.Array | None = None


def two_stage(log_keep_C: jax.Array, log_eta_C: jax.Array | None, seen_CC: jax.Array) -> TwoStage:
    """The coefficients for log-gates [..., C], in their dtype (float32 or wider).

    Args:
      log_keep_C: log of what remains of the weights, at most 0.
      log_eta_C: log of what remains of the momentum, at most 0; None: no momentum.
      seen_CC: bool [..., C, C], whether step i precedes or is step t and is of its document. The state before the
        chunk is that of every document in it.

    Source: the closed form of Behrouz et al. 2025, arXiv:2501.00663, section 3.2, with the momentum of eq. 10 and the
    forgetting of eq. 13, derived for gates that depend on the step.
    """
    log_keep_C, keep_CC = decays_between(log_keep_C, seen_CC)
    if log_eta_C is None:
        return TwoStage(log_keep_C, jnp.exp(log_keep_C), keep_CC)
    log_h_C, momentum_CC = decays_between(log_eta_C, seen_CC)
    h_C = jnp.exp(log_h_C)
    return TwoStage(
        log_keep_C=log_keep_C,
        beta_C=jnp.exp(log_keep_C),
        kappa_CC=jnp.matmul(keep_CC, momentum_CC, precision="highest"),
        rho_C=jnp.sum(keep_CC * h_C[..., None, :], axis=-1),
        h_C=h_C,
        momentum_CC=momentum_CC,
    )


def before(stage: TwoStage, seen_CC: jax.Array) -> TwoStage:
    """The coefficients of the weights before each step instead of after it: at a document's first those of W_0."""
    follows_C = jnp.pad(jnp.diagonal(seen_CC, offset=-1, axis1=-2, axis2=-1), [(0, 0)] * (seen_CC.ndim - 2) + [(1, 0)])

    def shifted(rows: jax.Array, axis: int, otherwise: float) -> jax.Array:
        follows = follows_C if axis == -1 else follows_C[..., None]
        return jnp.where(follows, jnp.roll(rows, 1, axis=axis), otherwise)

    return dataclasses.replace(
        stage,
        beta_C=shifted(stage.beta_C, -1, 1.0),
        kappa_CC=shifted(stage.kappa_CC, -2, 0.0),
        rho_C=None if stage.rho_C is None else shifted(stage.rho_C, -1, 0.0),
    )


def log_gate(logits: jax.Array) -> jax.Array:
    """log(sigmoid(logits)), not below LOG_FLOOR."""
    return jnp.maximum(jax.nn.log_sigmoid(logits), LOG_FLOOR)
