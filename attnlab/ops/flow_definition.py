"""Flow attention written out: what is computed, the state of a stream, and the formulas with all pairs.

Wu et al. 2022, Flowformer (arXiv:2202.06258), section 3; the causal form is that of the authors' code, where every sum
runs over the positions so far. `attnlab.ops.flow_attention` is the op.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FlowRule:
    """What is computed.

    Attributes:
      competition: whether sources compete for the sinks (a softmax over sources scales their values).
      allocation: whether a sink's output is scaled by the sigmoid of its incoming flow.
      clip: competition sees outgoing flows clipped to [-clip, clip]; None: as they are.
      epsilon: added to features and to their sums.
      averages: causal form only: sums are divided by the number of their positions, and the state holds the averages.
    """

    competition: bool = True
    allocation: bool = True
    clip: float | None = 5.0
    epsilon: float = 1e-6
    averages: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowState:
    """Sums over the positions of the current document so far, or their averages; None where the rule needs them not.

    Attributes:
      count: [B] int32, positions N: beyond 2^24 fp32 could not count on.
      sources, sinks: [B, H, d], of keys k and of queries q.
      emitted: [B, H, d], of k N / O: what sources give where each emits 1.
      absorbed: [B, H, d], of q N / I: what sinks take where each receives 1.
      rivals: [B, H], of exp(clipped outgoing flow - peak).
      peak: [B, H], where the rule does not clip: a number that keeps the exponentials from overflowing; -inf at first.
      pairs: [B, H, d, e], of k (competition * v)^T.
    """

    count: jax.Array
    sources: jax.Array
    sinks: jax.Array | None
    emitted: jax.Array | None
    absorbed: jax.Array | None
    rivals: jax.Array | None
    peak: jax.Array | None
    pairs: jax.Array


class FlowOutput(NamedTuple):
    """Outputs o_BTHe, the state (None from the bidirectional form) and the sources' conserved outgoing flows [B, S, H]
    before clipping (None without competition)."""

    o: jax.Array
    state: FlowState | None
    outgoing: jax.Array | None


def empty_state(rule: FlowRule, batch: int, heads: int, width: int, value_width: int, dtype: jnp.dtype) -> FlowState:
    """The state before the first position."""
    vector = lambda used: jnp.zeros((batch, heads, width), dtype) if used else None
    scalar = lambda used, value: jnp.full((batch, heads), value, dtype) if used else None
    return FlowState(
        count=jnp.zeros((batch,), jnp.int32),
        sources=vector(True),
        sinks=vector(rule.allocation),
        emitted=vector(rule.allocation),
        absorbed=vector(rule.competition),
        rivals=scalar(rule.competition, 0),
        peak=scalar(rule.competition and rule.clip is None, -jnp.inf),
        pairs=jnp.zeros((batch, heads, width, value_width), dtype),
    )


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner products over the last axis."""
    return (a * b).sum(-1)


def clipped(flow: jax.Array, rule: FlowRule) -> jax.Array:
    """What competition sees of the outgoing flow."""
    return flow if rule.clip is None else jnp.clip(flow, -rule.clip, rule.clip)


def causal_definition(q, k, v, documents, state, rule: FlowRule) -> FlowOutput:
    """The formulas with every sum written as a [T, T] mask. Position i is the N-th of its document:

    I = (q + eps) . (sum k + eps),                     O = (k + eps) . (sum q + eps)
    I^ = (q + eps) . (sum k N / O + eps) / N,          O^ = (k + eps) . (sum q N / I + eps) / N
    competition = N exp(clip O^) / sum exp(clip O^),   o = sigmoid(I^) / I * q . sum k (competition v)^T
    """
    T, eps = q.shape[1], rule.epsilon
    index = jnp.zeros((1, T), jnp.int32) if documents is None else documents
    seen = jnp.tril(jnp.ones((T, T), bool)) & (index[:, :, None] == index[:, None, :])
    own = (index == 0)[..., None]  # these positions continue the state's document
    past = empty_state(rule, q.shape[0], *q.shape[2:], v.shape[3], q.dtype) if state is None else state
    weight = own * (past.count[:, None, None] if rule.averages else 1)

    def total(x_BTHd, before_BHd):
        here = jnp.einsum("bts,bshd->bthd", seen.astype(q.dtype), x_BTHd, precision="highest")
        return here + weight[..., None] * before_BHd[:, None]

    count = seen.sum(-1) + own[..., 0] * past.count[:, None]
    N = count[..., None].astype(q.dtype)
    K = total(k, past.sources)
    inflow = dot(q + eps, K + eps)
    Q = KO = QI = E = peak = outgoing = None
    u, allocation = v, 1.0
    if rule.allocation:
        Q = total(q, past.sinks)
        outflow = dot(k + eps, Q + eps)
        KO = total(k * (N / outflow)[..., None], past.emitted)
        allocation = jax.nn.sigmoid(dot(q + eps, KO + eps) / N)
    if rule.competition:
        QI = total(q * (N / inflow)[..., None], past.absorbed)
        outgoing = dot(k + eps, QI + eps) / N
        scores = clipped(outgoing, rule)
        rivals = jnp.where(seen[..., None], scores[:, None], -jnp.inf)  # [B, T, S, H]
        peak = jnp.zeros_like(scores)
        past_peak = peak[:, 0]
        if rule.clip is None:
            past_peak = past.peak
            peak = jnp.maximum(rivals.max(2), jnp.where(own, past_peak[:, None], -jnp.inf))
            peak = jax.lax.stop_gradient(peak)  # it divides out
        before = jnp.where(own, jnp.exp(jnp.minimum(past_peak[:, None] - peak, 0)), 0)
        E = jnp.exp(rivals - peak[:, :, None]).sum(2) + weight * before * past.rivals[:, None]
        u = v * (N * jnp.exp(scores - peak) / E)[..., None]
    flows = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * seen[:, None]
    o = jnp.einsum("bhts,bshe->bthe", flows, u, precision="highest")
    o += weight[..., None] * jnp.einsum("bthd,bhde->bthe", q, past.pairs, precision="highest")
    S = jnp.einsum("bs,bshd,bshe->bhde", seen[:, -1].astype(q.dtype) * jnp.ones_like(index), k, u, precision="highest")
    S += weight[:, -1, :, None, None] * past.pairs
    shared = lambda x: x / N[:, -1].reshape(-1, *[1] * (x.ndim - 1)) if rule.averages else x
    last = lambda x: None if x is None else shared(x[:, -1])
    after = FlowState(
        count=jnp.broadcast_to(count[:, -1], q.shape[:1]),
        sources=last(K),
        sinks=last(Q),
        emitted=last(KO),
        absorbed=last(QI),
        rivals=last(E),
        peak=peak[:, -1] if rule.competition and rule.clip is None else None,
        pairs=last(S[:, None]),
    )
    return FlowOutput(o * (allocation / inflow)[..., None], after, outgoing)


def bidirectional_definition(q, k, v, documents, rule: FlowRule) -> FlowOutput:
    """The formulas with every sum written as a [T, S] mask, n sinks and m sources:

    I = (q + eps) . (sum k + eps),                     O = (k + eps) . (sum q + eps)
    I^ = (q + eps) . (sum k / O + eps),                O^ = (k + eps) . (sum q / I + eps)
    competition = m softmax(clip O^),                  o = sigmoid(I^ n / m) / I * q . sum k (competition v)^T
    """
    n, m, eps = q.shape[1], k.shape[1], rule.epsilon
    seen, rivals = jnp.ones((1, n, m), q.dtype), jnp.ones((1, m, m), bool)
    if documents is not None:
        rivals = documents[:, :, None] == documents[:, None, :]
        seen = rivals.astype(q.dtype)
    over_sources = lambda x: jnp.einsum("bts,bshd->bthd", seen, x, precision="highest")
    over_sinks = lambda x: jnp.einsum("bts,bthd->bshd", seen, x, precision="highest")
    inflow = dot(q + eps, over_sources(k) + eps)
    allocation, u, outgoing = 1.0, v, None
    if rule.allocation:
        outflow = dot(k + eps, over_sinks(q) + eps)
        allocation = jax.nn.sigmoid(dot(q + eps, over_sources(k / outflow[..., None]) + eps) * (n / m))
    if rule.competition:
        outgoing = dot(k + eps, over_sinks(q / inflow[..., None]) + eps)
        scores = clipped(outgoing, rule)
        total = jax.nn.logsumexp(jnp.where(rivals[..., None], scores[:, None], -jnp.inf), axis=2)
        u = v * (rivals.sum(2)[..., None] * jnp.exp(scores - total))[..., None]
    flows = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * seen[:, None]
    o = jnp.einsum("bhts,bshe->bthe", flows, u, precision="highest")
    return FlowOutput(o * (allocation / inflow)[..., None], None, outgoing)
