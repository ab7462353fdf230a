"""A linear recurrence, or the delta rule, whose memory is kept in levels, each of twice as many positions as the one
below it.

Level 0 is the position t itself. For every set bit b of t, level b + 1 is the 2^b positions before those of the lower
bits: a Fenwick tree's parts of all that came before. Each level has a memory, `S_t^l`, the sum of decayed k_s u_s^T of
its positions s, and a query weighs what it reads of each: `o_t = sum_l w_t^l q_t S_t^l`. Positions t and s < t are a
level apart that their highest differing bit says. The last level has all that the others do not reach.

With strengths beta every level's memory goes through the transition of the gated delta rule
(`attnlab.ops.delta_rule`), `S^l <- a_t (I - beta_t k_t k_t^T) S^l`, and level 0 is `beta_t k_t u_t^T`. The rule is
linear in the memory, so that the levels still add up to it.

Source: Guo et al. 2025, Log-Linear Attention, arXiv:2506.04761: of Mamba-2, and of Gated DeltaNet.

Shapes: `B` batch, `T` positions, `H` heads, `d` key width, `e` value width, `L` levels, `C` positions in a chunk, `N`
chunks. States have the levels from 1 on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.delta_rule import inverse_flops, invert_unit_triangular
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.linear_recurrence import Weights, chunk_weights
from attnlab.parallel.sequence_parallel import SequenceParallel


@dataclasses.dataclass(frozen=True)
class LogLinearSpec:
    """The static facts by which an implementation is chosen. Lengths and widths as in `log_linear`."""

    batch: int
    positions: int
    heads: int
    width: int
    value_width: int
    levels: int
    dtype: str
    chunk: int
    packed: bool
    corrected: bool = False  # by the delta rule

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} d{self.width}/{self.value_width} L{self.levels}"
        told = [word for word in ("corrected", "packed") if getattr(self, word)]
        return " ".join([shape, f"C{self.chunk}", self.dtype, *told])

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, q, k, u, log_decay, beta, weights, documents, offsets, state, *,
        chunk: int,
    ) -> LogLinearSpec:  # fmt: skip
        """Of the arrays of a device; where positions are split over several, each gets all of them."""
        B, T, H, d = q.shape
        T *= 1 if exchange is None else exchange.count
        packed, corrected = documents is not None, beta is not None
        return cls(B, T, H, d, u.shape[3], weights.shape[3], str(q.dtype), chunk, packed, corrected)


def _in_wide_sums(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on arrays in the dtype of sums, with places and a state where there are none; its output as q."""

    @functools.wraps(run)
    def wide(q, k, u, log_decay, beta, weights, documents, offsets, state, *, chunk: int):
        dtype, (B, T, H, d), L = q.dtype, q.shape, weights.shape[3]
        kind = jnp.promote_types(dtype, jnp.float32)
        if offsets is None:
            offsets = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        reached = L if state is not None else min(L, T.bit_length() + 1)  # the others are empty
        if state is None:
            state = jnp.zeros((B, H, reached - 1, d, u.shape[3]), kind)
        arrays = (q, k, u, log_decay, beta, weights[..., :reached])
        q, k, u, log_decay, *rest = jax.tree.map(lambda x: x.astype(kind), arrays)
        log_decay = jnp.maximum(log_decay, jnp.log(jnp.finfo(kind).tiny))
        o, state = run(q, k, u, log_decay, *rest, documents, offsets, state.astype(kind), chunk=chunk)
        return o.astype(dtype), jnp.pad(state, ((0, 0), (0, 0), (0, L - reached), (0, 0), (0, 0)))

    return wide


def _level(a: jax.Array, b: jax.Array, levels: int) -> jax.Array:
    """How many levels positions are apart, at most the last: one more than the highest bit in which they differ."""
    return jnp.minimum(32 - jax.lax.clz(a ^ b), levels - 1)


def _chosen(weights: jax.Array, level: jax.Array) -> jax.Array:
    """weights[..., i, level[..., i, j]] of weights [..., C, L]."""
    found = jnp.zeros((), weights.dtype)
    for index in range(weights.shape[-1]):
        found = jnp.where(level == index, weights[..., index, None], found)
    return found


def _merged(state_BHLde: jax.Array, target_B: jax.Array) -> jax.Array:
    """All levels up to the target are added up in it; 0: none."""
    target, level = target_B[:, None, None], jnp.arange(1, state_BHLde.shape[2] + 1)
    at = lambda where: where[..., None, None]
    total = jnp.sum(jnp.where(at(level <= target), state_BHLde, 0), axis=2, keepdims=True)
    return jnp.where(at(level > target), state_BHLde, jnp.where(at(level == target), total, 0))


def _step(state_BHLde, q, k, u, log_decay, beta_BH, weights_BHL, document_B, offset_B):
    """One position: the new state and o_BHe."""
    kept = jnp.where((document_B == 0)[:, None], jnp.exp(log_decay), 0)
    state = kept[..., None, None, None] * state_BHLde
    at = lambda key, state: jnp.einsum("bhd,bhlde->bhle", key, state, precision="highest")
    if beta_BH is not None:
        u = beta_BH[..., None] * u
        state -= (beta_BH[..., None] * k)[:, :, None, :, None] * at(k, state)[..., None, :]
    written = k[..., None] * u[..., None, :]
    own = weights_BHL[..., :1] * jnp.sum(q * k, axis=-1, keepdims=True) * u
    reads = at(q, state)
    o = own + jnp.sum(weights_BHL[..., 1:, None] * reads, axis=2)
    L = weights_BHL.shape[-1]
    target = _level(offset_B, offset_B + 1, L)
    here = (jnp.arange(1, L) == target[:, None])[:, None, :, None, None]
    return _merged(state, target) + jnp.where(here, written[:, :, None], 0), o


@_in_wide_sums
def definition(q, k, u, log_decay, beta, weights, documents, offsets, state, *, chunk: int):
    """The recurrence, position by position: levels are merged as a binary counter carries. `chunk` plays no part."""
    starts = jnp.zeros_like(offsets)  # not 0 where a document begins
    if documents is not None:
        starts = documents - jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, u, log_decay, beta, weights, starts, offsets))
    state, o = jax.lax.scan(lambda state, inputs: _step(state, *inputs), state, by_time)
    return jnp.moveaxis(o, 0, 1), state


@_in_wide_sums
def chunked(q, k, u, log_decay, beta, weights, documents, offsets, state, *, chunk: int):
    """Pairs of a chunk in one masked product, its levels by the bits of positions; then a scan over chunks.

    Seen from t, a level of the state before the chunk is itself, or if t differs from the chunk's first position in a
    higher bit, part of that bit's level. So chunks and documents may begin anywhere. With the delta rule the same holds
    of what `_corrected` makes of queries, keys and pairs.
    """
    (B, T, H, _), L = q.shape, weights.shape[3]
    if T == 1:
        document = jnp.zeros((B,), jnp.int32) if documents is None else documents[:, 0]
        here = jax.tree.map(lambda x: x[:, 0], (q, k, u, log_decay, beta, weights))
        state, o = _step(state, *here, document, offsets[:, 0])
        return o[:, None], state
    C = min(chunk, T)
    ends = offsets[:, [min(T, n + C) - 1 for n in range(0, T, C)]][:, None] + 1  # of the positions that are there
    q, k, u, weights = (_in_chunks(x, C) for x in (q, k, u, weights))
    log_decay, beta = jax.tree.map(lambda x: _in_chunks(x[..., None], C)[..., 0], (log_decay, beta))
    edge = lambda x: jnp.pad(x, ((0, 0), (0, -T % C)), mode="edge").reshape(B, 1, -1, C)
    offsets = edge(offsets)
    passes = chunk_weights(log_decay, None if documents is None else edge(documents), T, C, q.dtype)
    pairs, q, k, kept = _added(q, k, passes) if beta is None else _corrected(q, k, beta, passes)
    o = (pairs * _chosen(weights, _level(offsets[..., None], offsets[..., None, :], L))) @ u
    level, first = jnp.arange(1, L), offsets[..., :1]
    to_first = _level(offsets, first, L)[..., None]
    read = jnp.where(level >= to_first, weights[..., 1:], _chosen(weights, to_first))
    written_in = (level == _level(offsets, ends[..., None], L)[..., None]).astype(q.dtype)

    def carry_over(state, inputs):
        q, k, u, read, written_in, kept, target = inputs
        flat = lambda x, weight: (weight[..., None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
        o = flat(q, read) @ state.reshape(B, H, -1, state.shape[-1])
        written = jnp.swapaxes(flat(k, written_in), -1, -2) @ u
        before = _merged(state, target[:, 0])
        before = kept[:, :, None] * before if beta is None else jnp.einsum("bhij,bhlje->bhlie", kept, before)
        return before + written.reshape(state.shape), o

    everyone = lambda x: jnp.broadcast_to(x, (B, H, *x.shape[2:]))
    inputs = q, k, u, read, everyone(written_in), everyone(kept)
    target = _level(first[..., 0], ends, L)
    state, across = jax.lax.scan(carry_over, state, tuple(jnp.moveaxis(x, 2, 0) for x in (*inputs, target)))
    o += jnp.moveaxis(across, 0, 2)
    return jnp.moveaxis(o, 1, 3).reshape(B, -1, H, o.shape[-1])[:, :T], state


def _added(q: jax.Array, k: jax.Array, passes: Weights) -> tuple[jax.Array, ...]:
    """What pairs of a chunk exchange, [..., C, C]; queries of the state before it and keys in the state after it,
    [..., C, d]; what is kept from the one to the other, [..., 1, 1]."""
    pairs = jnp.einsum("bhncd,bhnsd->bhncs", q, k) * passes.pairs
    return pairs, q * passes.read[..., None], k * passes.write[..., None], passes.carry[..., None, None]


def _corrected(q: jax.Array, k: jax.Array, beta: jax.Array, passes: Weights) -> tuple[jax.Array, ...]:
    """`_added` of the delta rule, its transitions since the key was written, or since the chunk began, multiplied in:
    the inverse of `attnlab.ops.delta_rule.chunked`. The last is a matrix, [..., d, d]."""
    pairs, reader, writer, carry = _added(q, k, passes)
    overlap = jnp.einsum("bhncd,bhnsd->bhncs", k, k) * passes.pairs
    written = invert_unit_triangular(jnp.tril(beta[..., None] * overlap, -1)) * beta[..., None, :]
    pairs, begun = pairs @ written, k * passes.read[..., None]
    writer = jnp.swapaxes(written, -1, -2) @ writer
    kept = carry * jnp.eye(k.shape[-1], dtype=k.dtype) - jnp.swapaxes(writer, -1, -2) @ begun
    return pairs, reader - pairs @ begun, writer, kept


def _in_chunks(x_BTHw: jax.Array, C: int) -> jax.Array:
    """[B, H, N, C, w], zeros behind the end."""
    x = jnp.pad(x_BTHw, ((0, 0), (0, -x_BTHw.shape[1] % C), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, C, *x.shape[2:]), 3, 1)


def flops_per_token(
    length: int, chunk: int, width: int, value_width: int, levels: int, corrected: bool = False
) -> float:
    """FLOPs of the matrix products of `chunked` per position and head, the filled-up last chunk counted whole; of whole
    sequences, which reach no more levels than their length has bits. `corrected`: of the delta rule."""
    C, d, L = min(chunk, length), width, min(levels, length.bit_length() + 1)
    states = 2.0 * (L - 1) * d * value_width
    if length == 1:
        return states * (2 if corrected else 1)
    a_chunk = 2.0 * C * C * (d + value_width) + 2 * C * states
    if corrected:
        a_chunk += inverse_flops(C) + 2.0 * C**3 + 2.0 * C * d * (3 * C + d) + d * states
    return -(-length // C) * a_chunk / length


LOG_LINEAR = Op(
    "log_linear",
    LogLinearSpec.of,
    {"definition": Implementation(definition), "chunked": Implementation(chunked)},
    preference=("chunked",),
)


def log_linear(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    u_BTHe: jax.Array,
    log_decay_BTH: jax.Array,
    weights_BTHL: jax.Array,
    *,
    beta_BTH: jax.Array | None = None,
    documents_BT: jax.Array | None = None,
    offsets_BT: jax.Array | None = None,
    state_BHLde: jax.Array | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`o_t = sum_l w_t^l q_t S_t^l`, each level's memory decayed as in `attnlab.ops.linear_recurrence`, or decayed and
    corrected as in `attnlab.ops.delta_rule`.

    Args:
      q_BTHd, k_BTHd, u_BTHe: queries, keys and what is written; there is no scale.
      log_decay_BTH: at most 0.
      weights_BTHL: w, of L >= 2 levels; level 0 is the position itself, the last all that the others do not reach.
      beta_BTH: strengths of writing, by which all levels are corrected; None: nothing is, and u is written as it is.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      offsets_BT: positions of its document before each, those of the stream counted; None: a row's, from 0 on.
      state_BHLde: levels 1 to L - 1 before the first position, of document 0; None: nothing was before.
      chunk: positions in a chunk of "chunked", changes only time and memory.
      impl: "auto", or a name in `LOG_LINEAR.table`.

    Returns:
      o_BTHe in the dtype of q, and the state after the last position in fp32 (fp64 for fp64 inputs), in which all sums
      are.

    Raises:
      UserError: shapes that do not fit, or an unknown `impl`.
    """
    q, k, u, g, w = (x.shape for x in (q_BTHd, k_BTHd, u_BTHe, log_decay_BTH, weights_BTHL))
    beta = g if beta_BTH is None else beta_BTH.shape
    wide = len(q) == len(u) == len(w) == 4 and q == k and q[:3] == u[:3] == w[:3] == g == beta
    if not wide or w[3] < 2 or chunk < 1:
        raise UserError(
            f"log_linear: q {q}, k {k}, u {u}, log_decay {g}, beta {beta}, weights {w}, chunk {chunk} do not fit; "
            "expected q, k [B, T, H, d], u [B, T, H, e], log_decay and beta [B, T, H], weights [B, T, H, 2 or more], "
            "chunk 1 or more"
        )
    rows, states = ("batch", "seq", "heads", None), ("batch", "heads", None, None, None)
    return LOG_LINEAR(
        q_BTHd, k_BTHd, u_BTHe, log_decay_BTH, beta_BTH, weights_BTHL, documents_BT, offsets_BT, state_BHLde,
        axes=(rows, rows, rows, rows[:3], rows[:3], rows, rows[:2], rows[:2], states), out_axes=[rows, states],
        impl=impl, chunk=chunk,
    )  # fmt: skip
