"""Causal flow attention in chunks, with the state of a stream; `flow_attention.py` is the op.

Shapes: `B` batch, `T` sinks, `S` sources, `H` heads, `d` key width, `e` value width, `N` chunks, `C` positions in a
chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops.flow_definition import FlowOutput, FlowRule, FlowState, clipped
from attnlab.ops.linear_recurrence import chunk_weights, linear_recurrence
from attnlab.parallel.sequence_parallel import SequenceParallel


def causal_chunked(
    q,
    k,
    v,
    documents,
    state: FlowState | None,
    rule: FlowRule,
    chunk: int,
    exchange: SequenceParallel | None = None,
    recurrence: Callable[..., Any] | None = None,
) -> FlowOutput:
    """`causal_definition` in chunks. The four flows share one product of queries and keys within a chunk.

    Sums of a call are taken from zero and then joined to those before it, so that sums and averages differ only there.
    `recurrence`: of q, k, u and documents, makes the output and the pairs' sum; None: the op.
    """
    eps = rule.epsilon
    if exchange is not None and documents is not None:
        documents = exchange.local_documents(documents)
    earlier = _Earlier(state, exchange, documents, q.shape[:2], rule)
    places = _Places.of(documents, earlier.count, q.shape[1], rule, q.dtype)
    N = places.count.astype(q.dtype)[..., None]
    share, total = (1, N) if rule.averages else (N, 1)  # inflow * total is I; N / I is share / inflow
    running = RunningFlows(q, k, documents, chunk, eps)
    after = {"count": jnp.broadcast_to(places.count[:, -1], q.shape[:1])}

    def flow(name, x_BTHd, local_BTH, own_BHd):
        """(x + eps) . (sum + eps), the sum being the call's own and what came before."""
        y = local_BTH + eps * (x_BTHd.sum(-1) + eps * x_BTHd.shape[-1])
        before = earlier.sum(name, own_BHd)
        if before is not None:
            y += places.weight * jnp.einsum("bthd,bhd->bth", x_BTHd + eps, before)
        after[name] = places.join(before, own_BHd, rule)
        return y

    inflow = flow("sources", q, *running.received(None)) / total
    allocation, u, outgoing = 1.0, v, None
    if rule.allocation:
        outflow = flow("sinks", k, *running.sent(None)) / total
        allocation = jax.nn.sigmoid(flow("emitted", q, *running.received(share / outflow)) / N)
    if rule.competition:
        outgoing = flow("absorbed", k, *running.sent(share / inflow)) / N
        weights, after["rivals"], after["peak"] = _running_softmax(outgoing, running, earlier, places, rule)
        u = times_rows(v, weights)
    if recurrence is None:
        o, own = linear_recurrence(q, k, u, documents_BT=documents, chunk=chunk)
    else:
        o, own = recurrence(q, k, u, documents)
    before = earlier.sum("pairs", own)
    if before is not None:
        o += places.weight[..., None] * jnp.einsum("bthd,bhde->bthe", q, before)
    after["pairs"] = places.join(before, own, rule)
    o = times_rows(o, allocation / (inflow * total))
    names = [f.name for f in dataclasses.fields(FlowState)]
    after = FlowState(**(dict.fromkeys(names) | after))
    return FlowOutput(o, after if exchange is None else exchange.from_last(after), outgoing)


class _Earlier:
    """What stands before the first position: a stream's state, or what the devices before this one hold.

    Each sum is asked for when the call's own is known: the three that depend on each other are three exchanges.

    Attributes:
      count: [B] int32, positions of the document so far; None: nothing stands before.
    """

    def __init__(self, state: FlowState | None, exchange: SequenceParallel | None, documents, shape, rule: FlowRule):
        self.state, self.exchange, self.rule = state, exchange, rule
        self.count = None if state is None else state.count
        if exchange is not None:
            self.goes_on = jnp.ones(shape[:1], bool) if documents is None else documents[:, -1] == 0
            here = jnp.broadcast_to(places_in_documents(documents, shape[1])[0][:, -1], shape[:1])
            self.count = self._running(here)

    def sum(self, name: str, own: jax.Array) -> jax.Array | None:
        """The state's entry `name`, or what adds up to it; `own` is what the call adds."""
        if self.exchange is None:
            return None if self.state is None else getattr(self.state, name)
        return self._averaged(self._running(own))

    def rivals(self, peak_BH: jax.Array, own_BH: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """The running sum of exponentials and the peak that they are relative to."""
        if self.exchange is None:
            if self.state is None or self.state.rivals is None:
                return None
            peak = jnp.zeros_like(self.state.rivals) if self.state.peak is None else self.state.peak
            return self.state.rivals, peak

        def join(before, part):
            own_peak, own, goes_on = part
            old_peak = jnp.where(goes_on[:, None], before[0], -jnp.inf)
            peak = jnp.maximum(old_peak, own_peak)
            return peak, before[1] * jnp.exp(old_peak - peak) + own * jnp.exp(own_peak - peak)

        start = jnp.full_like(own_BH, -jnp.inf), jnp.zeros_like(own_BH)
        (peak, before), _ = self.exchange.exclusive_scan(join, (peak_BH, own_BH, self.goes_on), start)
        return self._averaged(before), peak

    def _running(self, own: jax.Array) -> jax.Array:
        def join(before, part):
            own, goes_on = part
            return jnp.where(goes_on.reshape(-1, *[1] * (own.ndim - 1)), before, 0) + own

        return self.exchange.exclusive_scan(join, (own, self.goes_on), jnp.zeros_like(own))[0]

    def _averaged(self, total: jax.Array) -> jax.Array:
        if not self.rule.averages:
            return total
        return total / jnp.maximum(self.count, 1).reshape(-1, *[1] * (total.ndim - 1)).astype(total.dtype)


class RunningFlows:
    """Running sums from zero over the positions of a document, of sources as sinks see them and the other way round.

    Products of pairs within a chunk, and vectors at the chunks' starts: nothing of size T x T or T x d x e.
    """

    def __init__(self, q, k, documents, chunk: int, epsilon: float):
        self.length, self.epsilon = q.shape[1], epsilon
        C = min(chunk, self.length)
        self.chunk = C
        self.q, self.k = self._chunks(q), self._chunks(k)
        if documents is not None:
            documents = self._chunks(documents[..., None], "edge")
        self.weights = chunk_weights(None, documents, self.length, C, q.dtype)
        products = jnp.einsum("bhncd,bhnsd->bhncs", self.q, self.k)
        # (q + eps) . k = q . k + eps sum(k): one product serves both directions.
        self.to_sinks = (products + epsilon * self.k.sum(-1)[..., None, :]) * self.weights.pairs
        self.to_sources = (products + epsilon * self.q.sum(-1)[..., None]) * self.weights.pairs.swapaxes(-1, -2)

    def received(self, weights_BTH):
        """`sum_{j <= i} weights_j (q_i + eps) . k_j` [B, T, H], and `sum weights_j k_j` [B, H, d] at the end."""
        return self._run(self.q, self.k, self.to_sinks, "bhncs,bhns->bhnc", -1, weights_BTH)

    def sent(self, weights_BTH):
        """`sum_{i <= j} weights_i (k_j + eps) . q_i` [B, T, H], and `sum weights_i q_i` [B, H, d] at the end."""
        return self._run(self.k, self.q, self.to_sources, "bhncs,bhnc->bhns", -2, weights_BTH)

    def exp_sums(self, scores_BTH, rule: FlowRule):
        """Running sums of exp(score) [B, T, H] as (peak, sum of exp(score - peak)): where scores are not clipped their
        exp may overflow."""
        scores, w = self._chunks(scores_BTH), self.weights
        if rule.clip is not None:
            rivals = jnp.exp(scores)
            local = jnp.einsum("...cs,...s->...c", w.pairs, rivals)
            before, _ = _carried(_times(rivals, w.write).sum(-1)[..., None], w.carry)
            total = local if before is None else local + _times(before, w.read)
            return jnp.zeros_like(scores_BTH), self._rows(total)
        seen = lambda x, weight: x if weight is None else jnp.where(weight > 0, x, -jnp.inf)
        total = jax.nn.logsumexp(seen(scores[..., None, :], w.pairs), axis=-1)
        before = _carried_logs(jax.nn.logsumexp(seen(scores, w.write), axis=-1), w.carry)
        if before is not None:
            total = jnp.logaddexp(total, seen(jnp.broadcast_to(before[..., None], total.shape), w.read))
        total = self._rows(total)
        peak = jax.lax.stop_gradient(total)
        return peak, jnp.exp(total - peak)

    def _run(self, here, there, products, contraction: str, axis: int, weights_BTH):
        if weights_BTH is None:
            flow, written = products.sum(axis), there
        else:
            weights = self._chunks(weights_BTH)
            flow, written = jnp.einsum(contraction, products, weights), times_rows(there, weights)
        if self.weights.write is not None:
            written = written * self.weights.write[..., None]
        before, last = _carried(written.sum(-2), self.weights.carry)
        if before is not None:
            flow += _times(jnp.einsum("bhncd,bhnd->bhnc", here + self.epsilon, before), self.weights.read)
        return self._rows(flow), last

    def _chunks(self, x_BTHw, mode: str = "constant"):
        """[B, H, N, C, w] of [B, T, H, w], filled up behind the end."""
        fill = -self.length % self.chunk
        if fill:
            x_BTHw = jnp.pad(x_BTHw, [(0, 0), (0, fill)] + [(0, 0)] * (x_BTHw.ndim - 2), mode=mode)
        return jnp.moveaxis(x_BTHw.reshape(x_BTHw.shape[0], -1, self.chunk, *x_BTHw.shape[2:]), 3, 1)

    def _rows(self, x_BHNC):
        x = jnp.moveaxis(x_BHNC, 1, 3)
        return x.reshape(x.shape[0], -1, x.shape[3])[:, : self.length]


def _carried(written_BHNd, carry_BHN):
    """Sums before each chunk (None where there is one chunk: zero) and after the last.

    A tree of sums over chunks: no difference of long sums, in which late documents of a row would lose their digits.
    """
    if written_BHNd.shape[2] == 1:
        return None, written_BHNd[:, :, 0]
    if carry_BHN is None:
        after = jnp.cumsum(written_BHNd, axis=2)
    else:
        join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
        _, after = jax.lax.associative_scan(join, (carry_BHN[..., None], written_BHNd), axis=2)
    return jnp.pad(after[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0))), after[:, :, -1]


def _carried_logs(written_BHN, carry_BHN):
    """Logarithms of the sums before each chunk, from those of what each chunk writes; None where there is one chunk."""
    if written_BHN.shape[2] == 1:
        return None
    if carry_BHN is None:
        after = jax.lax.cumlogsumexp(written_BHN, axis=2)
    else:
        join = lambda a, b: (a[0] & b[0], jnp.where(b[0], jnp.logaddexp(a[1], b[1]), b[1]))
        carry = jnp.broadcast_to(carry_BHN > 0, written_BHN.shape)
        _, after = jax.lax.associative_scan(join, (carry, written_BHN), axis=2)
    return jnp.pad(after[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-jnp.inf)


def _times(x, weight):
    return x if weight is None else x * weight


def times_rows(x, weight):
    """x [..., e] times weight [...], as rows: beside axes of size 1 its gradient takes XLA on CPU 20 times as long."""
    return (x.reshape(-1, x.shape[-1]) * weight.reshape(-1, 1)).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where positions stand in their documents.

    Attributes:
      count: [B or 1, T] int32, N: positions of the document up to and with this one, those of the state too.
      own: [B or 1, T, 1], whether the position continues the state's document; None without a state.
      weight: [B, T, 1], by which what the state holds counts at a position; None without a state.
    """

    count: jax.Array
    own: jax.Array | None
    weight: jax.Array | None
    here: jax.Array

    @classmethod
    def of(cls, documents, before_B: jax.Array | None, length: int, rule: FlowRule, dtype: jnp.dtype) -> _Places:
        here = places_in_documents(documents, length)[0]
        if before_B is None:
            return cls(here, None, None, here[:, -1])
        own = (jnp.zeros((1, length), jnp.int32) if documents is None else documents) == 0
        count = here + own * before_B[:, None]
        weight = (own * before_B[:, None] if rule.averages else own).astype(dtype)
        return cls(count, own[..., None], weight[..., None], here[:, -1])

    def join(self, before, here, rule: FlowRule):
        """The state's sums or averages after the last position, from those before and the sums of the call."""
        if here is None:
            return None
        per_row = lambda x: x.reshape(-1, *[1] * (here.ndim - 1))
        N, added = (per_row(x).astype(here.dtype) for x in (self.count[:, -1], self.here))
        if before is None:
            return here / N if rule.averages else here
        before = jnp.where(per_row(self.own[:, -1]), before, 0)
        # As a change of the average, which stays where it is when N is too large for the change to be seen.
        return before + (here - added * before) / N if rule.averages else before + here


def places_in_documents(documents, length: int):
    """[B or 1, T] int32: positions of the document up to and with each, and the index of the document's last."""
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if documents is None:
        return index + 1, jnp.full_like(index, length - 1)
    new = documents[:, 1:] != documents[:, :-1]
    starts = jnp.where(jnp.pad(new, ((0, 0), (1, 0)), constant_values=True), index, 0)
    ends = jnp.where(jnp.pad(new, ((0, 0), (0, 1)), constant_values=True), index, length - 1)
    return index - jax.lax.cummax(starts, axis=1) + 1, jax.lax.cummin(ends, axis=1, reverse=True)


def _running_softmax(outgoing_BTH, running: RunningFlows, earlier: _Earlier, places: _Places, rule: FlowRule):
    """`N exp(score) / (running sum of exp(score))` [B, T, H], and the state's rivals and peak at the end."""
    scores = clipped(outgoing_BTH, rule)
    local_peak, local = running.exp_sums(scores, rule)
    peak, total = local_peak, local
    past, before = earlier.rivals(local_peak[:, -1], local[:, -1]), None
    if past is not None:
        rivals, past_peak = past
        if rule.clip is None:
            peak = jnp.maximum(local_peak, jnp.where(places.own, past_peak[:, None], -jnp.inf))
            local = local * jnp.exp(local_peak - peak)
        before = rivals[:, None] * jnp.exp(jnp.minimum(past_peak[:, None] - peak, 0))
        total = local + places.weight * before
    N = places.count.astype(scores.dtype)[..., None]
    weights = jnp.exp(scores - peak) * (N / total)
    rivals = places.join(None if before is None else before[:, -1], local[:, -1], rule)
    return weights, rivals, peak[:, -1] if rule.clip is None else None
