"""Running softmax: values so far averaged by a score that each has of its own, whatever the query.

    o_t = sum_{s <= t} exp(r_s) v_s / sum_{s <= t} exp(r_s)

With m the running maximum of r it is a linear recurrence that decays by `exp(m_{t-1} - m_t)` and writes
`exp(r_t - m_t) [v_t, 1]`: no exponent is above 0, and the last write, or an earlier one, has weight 1.

Shapes: `B` batch, `T` positions, `H` heads, `e` value width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.linear_recurrence import flops_per_token as recurrence_flops
from attnlab.ops.linear_recurrence import linear_recurrence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningState:
    """What a stream has seen of its document.

    Attributes:
      highest: [B, H], the maximum of its scores, -inf before the first.
      sums: [B, H, 1, e + 1], of `exp(r - highest) [v, 1]`.
    """

    highest: jax.Array
    sums: jax.Array

    @classmethod
    def start(cls, batch: int, heads: int, width: int, dtype: jnp.dtype) -> RunningState:
        """Before the first position."""
        return cls(jnp.full((batch, heads), -jnp.inf, dtype), jnp.zeros((batch, heads, 1, width + 1), dtype))


def running_softmax(
    scores_BTH: jax.Array,
    v_BTHe: jax.Array,
    *,
    documents_BT: jax.Array | None = None,
    state: RunningState | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[jax.Array, RunningState]:
    """Averages of the values so far, weighted by `exp(scores)`.

    Args:
      scores_BTH: of positions, finite.
      v_BTHe: values.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      state: of the positions before, read by document 0 only; None: there are none.
      chunk, impl: of `attnlab.ops.linear_recurrence`, but for "definition" on whole rows: all pairs.

    Returns:
      o_BTHe and the state after the last position, both in float32 (float64 where v is): all of it is computed there.

    Raises:
      UserError: shapes that do not fit, or an unknown `impl`.
    """
    if scores_BTH.shape != v_BTHe.shape[:3]:
        raise UserError(f"running_softmax: scores {scores_BTH.shape}; expected {v_BTHe.shape[:3]}, as v {v_BTHe.shape}")
    wide = jnp.promote_types(v_BTHe.dtype, jnp.float32)
    r, v = scores_BTH.astype(wide), v_BTHe.astype(wide)
    # The maximum divides itself out: it has no gradient.
    highest = jax.lax.stop_gradient(_running_maximum(r, documents_BT, state))
    before = _before(highest, documents_BT, state)
    written = jnp.exp(r - highest)
    sums, after = linear_recurrence(
        jnp.ones_like(written)[..., None],
        written[..., None],
        jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1),
        log_decay=jnp.minimum(before - highest, 0),
        documents_BT=documents_BT,
        state_BHde=None if state is None else state.sums,
        chunk=chunk,
        impl=impl,
    )
    o = sums[..., :-1] / sums[..., -1:]
    if impl == "definition" and state is None:
        o = _all_pairs(r, v, documents_BT)
    return o, RunningState(highest[:, -1], after)


def _running_maximum(r: jax.Array, documents: jax.Array | None, state: RunningState | None) -> jax.Array:
    """Of the scores of each position's document so far, [B, T, H]."""

    def join(before, own):
        (document, m), (own_document, own_m) = before, own
        return own_document, jnp.where(document == own_document, jnp.maximum(m, own_m), own_m)

    if documents is None:
        m = jax.lax.cummax(r, axis=1)
    else:
        _, m = jax.lax.associative_scan(join, (documents[..., None], r), axis=1)
    if state is None:
        return m
    goes_on = True if documents is None else documents[..., None] == 0
    return jnp.where(goes_on, jnp.maximum(m, state.highest[:, None]), m)


def _before(highest: jax.Array, documents: jax.Array | None, state: RunningState | None) -> jax.Array:
    """The maximum that the sums before each position are relative to; its own where there are none."""
    first = highest[:, 0]
    if state is not None:  # -inf: there are none
        first = jnp.where(jnp.isfinite(state.highest), state.highest, first)
    before = jnp.concatenate([first[:, None], highest[:, :-1]], axis=1)
    if documents is None:
        return before
    same = documents == jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(same[..., None], before, highest)


def _all_pairs(r: jax.Array, v: jax.Array, documents: jax.Array | None) -> jax.Array:
    """The definition: every weight written out."""
    seen = jnp.tril(jnp.ones((r.shape[1],) * 2, bool))[None]
    if documents is not None:
        seen &= documents[:, :, None] == documents[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None], jnp.moveaxis(r, 1, 2)[:, :, None], -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshe->bthe", weights, v, precision="highest")


def flops_per_token(length: int, chunk: int, width: int) -> float:
    """FLOPs of the matrix products per position and head, values of so many channels."""
    return recurrence_flops(length, chunk, 1, width + 1)
