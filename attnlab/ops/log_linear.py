"""A linear recurrence whose memory is kept in levels, each of twice as many positions as the one below it.

Level 0 is the position t itself. For every set bit b of t, level b + 1 is the 2^b positions before those of the lower
bits: a Fenwick tree's parts of all that came before. Each level has a memory, `S_t^l`, the sum of decayed k_s u_s^T of
its positions s, and a query weighs what it reads of each: `o_t = sum_l w_t^l q_t S_t^l`. Positions t and s < t are a
level apart that their highest differing bit says. The last level has all that the others do not reach.

Source: Guo et al. 2025, Log-Linear Attention, arXiv:2506.04761.

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
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.linear_recurrence import chunk_weights
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

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} d{self.width}/{self.value_width} L{self.levels}"
        return " ".join([shape, f"C{self.chunk}", self.dtype, *(["packed"] if self.packed else [])])

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, q, k, u, log_decay, weights, documents, offsets, state, *, chunk: int
    ) -> LogLinearSpec:
        """Of the arrays of a device; where positions are split over several, each gets all of them."""
        B, T, H, d = q.shape
        T *= 1 if exchange is None else exchange.count
        return cls(B, T, H, d, u.shape[3], weights.shape[3], str(q.dtype), chunk, documents is not None)


def _in_wide_sums(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on arrays in the dtype of sums, with places and a state where there are none; its output as q."""

    @functools.wraps(run)
    def wide(q, k, u, log_decay, weights, documents, offsets, state, *, chunk: int):
        kind, (B, T, H, d), L = jnp.promote_types(q.dtype, jnp.float32), q.shape, weights.shape[3]
        if offsets is None:
            offsets = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        reached = L if state is not None else min(L, T.bit_length() + 1)  # the others are empty
        if state is None:
            state = jnp.zeros((B, H, reached - 1, d, u.shape[3]), kind)
        arrays = [x.astype(kind) for x in (q, k, u, log_decay, weights[..., :reached])]
        arrays[3] = jnp.maximum(arrays[3], jnp.log(jnp.finfo(kind).tiny))
        o, state = run(*arrays, documents, offsets, state.astype(kind), chunk=chunk)
        return o.astype(q.dtype), jnp.pad(state, ((0, 0), (0, 0), (0, L - reached), (0, 0), (0, 0)))

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


def _step(state_BHLde, q, k, u, log_decay, weights_BHL, document_B, offset_B):
    """One position: the new state and o_BHe."""
    kept = jnp.where((document_B == 0)[:, None], jnp.exp(log_decay), 0)
    state = kept[..., None, None, None] * state_BHLde
    written = k[..., None] * u[..., None, :]
    own = weights_BHL[..., :1] * jnp.sum(q * k, axis=-1, keepdims=True) * u
    reads = jnp.einsum("bhd,bhlde->bhle", q, state, precision="highest")
    o = own + jnp.sum(weights_BHL[..., 1:, None] * reads, axis=2)
    L = weights_BHL.shape[-1]
    target = _level(offset_B, offset_B + 1, L)
    here = (jnp.arange(1, L) == target[:, None])[:, None, :, None, None]
    return _merged(state, target) + jnp.where(here, written[:, :, None], 0), o


@_in_wide_sums
def definition(q, k, u, log_decay, weights, documents, offsets, state, *, chunk: int):
    """The recurrence, position by position: levels are merged as a binary counter carries. `chunk` plays no part."""
    starts = jnp.zeros_like(offsets)  # not 0 where a document begins
    if documents is not None:
        starts = documents - jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]
    by_time = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, u, log_decay, weights, starts, offsets))
    state, o = jax.lax.scan(lambda state, inputs: _step(state, *inputs), state, by_time)
    return jnp.moveaxis(o, 0, 1), state


@_in_wide_sums
def chunked(q, k, u, log_decay, weights, documents, offsets, state, *, chunk: int):
    """Pairs of a chunk in one masked product, its levels by the bits of positions; then a scan over chunks.

    Seen from t, a level of the state before the chunk is itself, or if t differs from the chunk's first position in a
    higher bit, part of that bit's level. So chunks and documents may begin anywhere.
    """
    (B, T, H, _), L = q.shape, weights.shape[3]
    if T == 1:
        document = jnp.zeros((B,), jnp.int32) if documents is None else documents[:, 0]
        state, o = _step(state, *(x[:, 0] for x in (q, k, u, log_decay, weights)), document, offsets[:, 0])
        return o[:, None], state
    C = min(chunk, T)
    ends = offsets[:, [min(T, n + C) - 1 for n in range(0, T, C)]][:, None] + 1  # of the positions that are there
    q, k, u, weights = (_in_chunks(x, C) for x in (q, k, u, weights))
    log_decay = _in_chunks(log_decay[..., None], C)[..., 0]
    edge = lambda x: jnp.pad(x, ((0, 0), (0, -T % C)), mode="edge").reshape(B, 1, -1, C)
    offsets = edge(offsets)
    passes = chunk_weights(log_decay, None if documents is None else edge(documents), T, C, q.dtype)
    pairs = passes.pairs * _chosen(weights, _level(offsets[..., None], offsets[..., None, :], L))
    o = (jnp.einsum("bhncd,bhnsd->bhncs", q, k) * pairs) @ u
    level, first = jnp.arange(1, L), offsets[..., :1]
    to_first = _level(offsets, first, L)[..., None]
    read = jnp.where(level >= to_first, weights[..., 1:], _chosen(weights, to_first)) * passes.read[..., None]
    written_in = (level == _level(offsets, ends[..., None], L)[..., None]).astype(q.dtype)

    def carry_over(state, inputs):
        q, k, u, read, written_in, kept, target = inputs
        flat = lambda x, weight: (weight[..., None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
        o = flat(q, read) @ state.reshape(B, H, -1, state.shape[-1])
        written = jnp.swapaxes(flat(k, written_in), -1, -2) @ u
        state = kept[..., None, None, None] * _merged(state, target[:, 0]) + written.reshape(state.shape)
        return state, o

    everyone = lambda x: jnp.broadcast_to(x, (B, H, *x.shape[2:]))
    inputs = q, k * passes.write[..., None], u, read, everyone(written_in), everyone(passes.carry)
    target = _level(first[..., 0], ends, L)
    state, across = jax.lax.scan(carry_over, state, tuple(jnp.moveaxis(x, 2, 0) for x in (*inputs, target)))
    o += jnp.moveaxis(across, 0, 2)
    return jnp.moveaxis(o, 1, 3).reshape(B, -1, H, o.shape[-1])[:, :T], state


def _in_chunks(x_BTHw: jax.Array, C: int) -> jax.Array:
    """[B, H, N, C, w], zeros behind the end."""
    x = jnp.pad(x_BTHw, ((0, 0), (0, -x_BTHw.shape[1] % C), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, C, *x.shape[2:]), 3, 1)


def flops_per_token(length: int, chunk: int, width: int, value_width: int, levels: int) -> float:
    """FLOPs of the matrix products of `chunked` per position and head, the filled-up last chunk counted whole; of whole
    sequences, which reach no more levels than their length has bits."""
    C, L = min(chunk, length), min(levels, length.bit_length() + 1)
    if length == 1:
        return 2.0 * (L - 1) * width * value_width
    filled = -(-length // C) * C / length
    return (2.0 * C * (width + value_width) + 4.0 * (L - 1) * width * value_width) * filled


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
    documents_BT: jax.Array | None = None,
    offsets_BT: jax.Array | None = None,
    state_BHLde: jax.Array | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`o_t = sum_l w_t^l q_t S_t^l`, each level's memory decayed as in `attnlab.ops.linear_recurrence`.

    Args:
      q_BTHd, k_BTHd, u_BTHe: queries, keys and what is written; there is no scale.
      log_decay_BTH: at most 0.
      weights_BTHL: w, of L >= 2 levels; level 0 is the position itself, the last all that the others do not reach.
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
    if len(q) != 4 or q != k or g != q[:3] or any(len(x) != 4 or x[:3] != g for x in (u, w)) or w[3] < 2 or chunk < 1:
        raise UserError(
            f"log_linear: q {q}, k {k}, u {u}, log_decay {g}, weights {w}, chunk {chunk} do not fit; expected "
            "q, k [B, T, H, d], u [B, T, H, e], log_decay [B, T, H], weights [B, T, H, 2 or more], chunk 1 or more"
        )
    rows, states = ("batch", "seq", "heads", None), ("batch", "heads", None, None, None)
    return LOG_LINEAR(
        q_BTHd, k_BTHd, u_BTHe, log_decay_BTH, weights_BTHL, documents_BT, offsets_BT, state_BHLde,
        axes=(rows, rows, rows, rows[:3], rows, rows[:2], rows[:2], states), out_axes=[rows, states],
        impl=impl, chunk=chunk,
    )  # fmt: skip
