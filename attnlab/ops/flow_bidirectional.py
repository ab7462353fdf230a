"""Flow attention that sees both ways, in linear time; `flow_attention.py` is the op.

Shapes: `B` batch, `T` sinks, `S` sources, `H` heads, `d` key width, `e` value width, `N` chunks, `C` positions in a
chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.ops.flow_causal import RunningFlows, places_in_documents
from attnlab.ops.flow_definition import FlowOutput, FlowRule, clipped, dot
from attnlab.ops.linear_recurrence import linear_recurrence
from attnlab.parallel.sequence_parallel import SequenceParallel


def bidirectional_linear(
    q, k, v, documents, rule: FlowRule, chunk: int, exchange: SequenceParallel | None = None
) -> FlowOutput:
    """`bidirectional_definition` in linear time.

    By sums over all positions, or of packed documents in both directions, each in chunks. Where positions are split
    over devices, sums over all are added up, and packed documents are gathered.
    """
    if exchange is not None and documents is not None:
        whole = bidirectional_linear(*map(exchange.all_gather, (q, k, v, documents)), rule, chunk)
        return FlowOutput(*(None if x is None else exchange.own(x) for x in whole))
    n, m, eps = q.shape[1], k.shape[1], rule.epsilon
    sums = _Totals(q, k, eps, exchange) if documents is None else _DocumentFlows(q, k, documents, chunk, eps)
    flow = lambda y_BTH, x_BTHd: y_BTH + eps * (x_BTHd.sum(-1) + eps * x_BTHd.shape[-1])
    inflow = flow(sums.received(None), q)
    allocation, u, outgoing = 1.0, v, None
    if rule.allocation:
        outflow = flow(sums.sent(None), k)
        allocation = jax.nn.sigmoid(flow(sums.received(1 / outflow), q) * (n / m))
    if rule.competition:
        outgoing = flow(sums.sent(1 / inflow), k)
        u = v * sums.softmax(clipped(outgoing, rule), rule)[..., None]
    return FlowOutput(sums.mix(u) * (allocation / inflow)[..., None], None, outgoing)


class _Totals:
    """Sums over all sinks and all sources of a row."""

    def __init__(self, q, k, epsilon: float, exchange: SequenceParallel | None):
        self.q, self.k, self.epsilon = q, k, epsilon
        self.exchange = exchange

    def received(self, weights_BSH):
        return self._read(self.q, self.k, weights_BSH)

    def sent(self, weights_BTH):
        return self._read(self.k, self.q, weights_BTH)

    def softmax(self, scores_BSH, rule: FlowRule):
        if self.exchange is None:
            return scores_BSH.shape[1] * jax.nn.softmax(scores_BSH, axis=1)
        peak = self.exchange.max(jax.lax.stop_gradient(scores_BSH.max(1, keepdims=True)))
        weights = jnp.exp(scores_BSH - peak)
        return scores_BSH.shape[1] * self.exchange.count * weights / self.exchange.sum(weights.sum(1, keepdims=True))

    def mix(self, u_BSHe):
        return jnp.einsum("bthd,bhde->bthe", self.q, self._over_all(jnp.einsum("bshd,bshe->bhde", self.k, u_BSHe)))

    def _read(self, here, there, weights):
        total = there.sum(1) if weights is None else jnp.einsum("bshd,bsh->bhd", there, weights)
        return jnp.einsum("bthd,bhd->bth", here + self.epsilon, self._over_all(total))

    def _over_all(self, total):
        return total if self.exchange is None else self.exchange.sum(total)


class _DocumentFlows:
    """Sums over the document of each position: those up to it and those from it on, less itself."""

    def __init__(self, q, k, documents, chunk: int, epsilon: float):
        self.q, self.k, self.documents, self.chunk, self.epsilon = q, k, documents, chunk, epsilon
        self.forward = RunningFlows(q, k, documents, chunk, epsilon)
        self.backward = RunningFlows(*(jnp.flip(x, 1) for x in (q, k, documents)), chunk, epsilon)

    def received(self, weights_BTH):
        return self._both("received", self.q, self.k, weights_BTH)

    def sent(self, weights_BTH):
        return self._both("sent", self.k, self.q, weights_BTH)

    def softmax(self, scores_BTH, rule: FlowRule):
        count, last = places_in_documents(self.documents, scores_BTH.shape[1])
        at_end = lambda x: jnp.take_along_axis(x, last[..., None], axis=1)
        peak, total = map(at_end, self.forward.exp_sums(scores_BTH, rule))
        return at_end(count[..., None]) * jnp.exp(scores_BTH - peak) / total

    def mix(self, u_BTHe):
        recurrence = lambda *x, documents: linear_recurrence(*x, documents_BT=documents, chunk=self.chunk)[0]
        o = recurrence(self.q, self.k, u_BTHe, documents=self.documents)
        flipped = (jnp.flip(x, 1) for x in (self.q, self.k, u_BTHe))
        o += jnp.flip(recurrence(*flipped, documents=jnp.flip(self.documents, 1)), 1)
        return o - dot(self.q, self.k)[..., None] * u_BTHe

    def _both(self, name: str, here, there, weights):
        flipped = None if weights is None else jnp.flip(weights, 1)
        sums = getattr(self.forward, name)(weights)[0] + jnp.flip(getattr(self.backward, name)(flipped)[0], 1)
        own = dot(here + self.epsilon, there)
        return sums - (own if weights is None else weights * own)
