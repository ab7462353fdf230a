"""A linear recurrence whose decays are of the written values' channels: memories of slots, each with a gate of its own.

`S_t = S_{t-1} diag(exp(g_t)) + k_t u_t^T`, `o_t = S_t^T q_t`: what `attnlab.ops.linear_recurrence` does for channels of
keys. A pair of positions has one product `q_t . k_s` for all channels of u, and a weight for each of them; around a
position between the two the weight is a product of one of t and one of s, both at most 1. So blocks of 1, 2, 4, ...
positions are joined two by two, as in `attnlab.ops.channel_decay`, but decays weigh what is written and read.

Shapes: `B` batch, `T` positions, `H` heads, `d` key width, `m` channels of values, `C` positions in a chunk.
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
from attnlab.parallel.sequence_parallel import SequenceParallel

_SUB = 16  # blocks up to this size are made by products under masks


@dataclasses.dataclass(frozen=True)
class ValueDecaySpec:
    """The static facts by which an implementation is chosen. Lengths and widths as in `value_decay`."""

    batch: int
    positions: int
    heads: int
    width: int
    value_width: int
    dtype: str
    chunk: int
    packed: bool

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} d{self.width}/{self.value_width} C{self.chunk}"
        return " ".join([shape, self.dtype, *(["packed"] if self.packed else [])])

    @classmethod
    def of(cls, exchange: SequenceParallel | None, q, k, u, log_decay, documents, state, *, chunk: int):
        """Of the arrays of a device."""
        return cls(*q.shape, u.shape[3], str(q.dtype), chunk, documents is not None)


def _widened(q, k, u, log_decay, documents, state) -> tuple[Any, ...]:
    """In the dtype of sums; where there is no state it is zero."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if state is None:
        state = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], u.shape[3]), wide)
    log_decay = jnp.maximum(log_decay.astype(wide), jnp.log(jnp.finfo(wide).tiny))
    return *(x.astype(wide) for x in (q, k, u)), log_decay, documents, state.astype(wide)


def _in_wide_sums(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on arrays in the dtype of sums, its output in that of q."""

    @functools.wraps(run)
    def wide(q, *rest, chunk: int):
        o, state = run(*_widened(q, *rest), chunk=chunk)
        return o.astype(q.dtype), state

    return wide


@_in_wide_sums
def definition(q, k, u, log_decay, documents, state, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The recurrence, position by position; `chunk` plays no part."""
    same = jnp.ones(q.shape[:2], bool)
    if documents is not None:
        same = documents == jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]

    def step(state, inputs):
        q, k, u, log_decay, same = inputs
        kept = jnp.where(same[:, None, None], jnp.exp(log_decay), 0)
        state = kept[..., None, :] * state + k[..., None] * u[..., None, :]
        return state, jnp.einsum("bhd,bhdm->bhm", q, state, precision="highest")

    state, o = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, u, log_decay, same)))
    return jnp.moveaxis(o, 0, 1), state


@_in_wide_sums
def chunked(q, k, u, log_decay, documents, state, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The same in memory and time linear in T, products batched over chunks; only the states need a loop."""
    B, T, H, m = u.shape
    if T == 1:
        return definition.__wrapped__(q, k, u, log_decay, documents, state, chunk=chunk)
    C = min(chunk, T)
    q, k, u, log_decay = (_in_chunks(x, C) for x in (q, k, u, log_decay))
    seen, follows, stays, goes_on = jnp.tril(jnp.ones((C, C), bool)), True, True, True
    if documents is not None:
        documents = jnp.pad(documents, ((0, 0), (0, -T % C)), mode="edge").reshape(B, 1, -1, C)
        last = documents[..., -1]
        before = jnp.pad(last[..., :-1], ((0, 0), (0, 0), (1, 0)))
        seen &= documents[..., :, None] == documents[..., None, :]
        follows, stays = (documents == x[..., None] for x in (before, last))
        goes_on = (last == before)[..., None]
    only = lambda where, x: jnp.where(where if where is True else where[..., None], x, 0)
    scores = jnp.einsum("bhncd,bhnsd->bhncs", q, k) * seen
    o, upto, behind = decayed_values(scores, u, log_decay)
    read = only(follows, jnp.exp(upto))
    written = jnp.einsum("bhnsd,bhnsm->bhndm", k, only(stays, jnp.exp(behind)) * u)
    carry = jnp.where(goes_on, jnp.exp(upto[..., -1, :]), 0)

    def step(state, chunk):
        kept, new = chunk
        return kept[..., None, :] * state + new, state

    by_chunk = lambda x: jnp.moveaxis(x, 2, 0)
    state, before = jax.lax.scan(step, state, (by_chunk(carry), by_chunk(written)))
    o += read * jnp.einsum("bhncd,nbhdm->bhncm", q, before)
    return jnp.moveaxis(o, 1, 3).reshape(B, -1, H, m)[:, :T], state


def decayed_values(
    scores: jax.Array, values: jax.Array, log_decay: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`o_im = sum_j scores_ij exp(g_{j+1,m} + ... + g_{i,m}) values_jm` over j <= i.

    Args:
      scores: [..., C, C]; those of j > i play no part.
      values, log_decay: [..., C, m]; g is 0 or less.

    Returns:
      o [..., C, m]; sums of g up to each position, itself included, and behind it, both [..., C, m].
    """
    *_, C, m = values.shape
    size = _padded(C)
    fill = lambda x, columns: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - C), (0, columns)])
    scores, values, log_decay = fill(scores, size - C), fill(values, 0), fill(log_decay, 0)
    blocks = lambda x, n: x.reshape(*x.shape[:-2], -1, n, m)
    row, col = jnp.arange(_SUB)[:, None], jnp.arange(_SUB)
    near = _diagonal_blocks(scores, _SUB)
    o = jnp.diagonal(scores, axis1=-2, axis2=-1)[..., None] * values
    upto, behind, n = log_decay[..., None, :], jnp.zeros_like(log_decay)[..., None, :], 1  # [..., blocks, n, m]
    while n < size:
        (upto_1, upto_2), (behind_1, behind_2) = ((x[..., 0::2, :, :], x[..., 1::2, :, :]) for x in (upto, behind))
        if n < _SUB:
            weight = jnp.exp(jnp.concatenate([behind_1, upto_2], axis=-2)).reshape(values.shape)
            across = (row ^ col >= n) & (row ^ col < 2 * n) & (row > col)
            found = (near * across) @ blocks(weight * values, _SUB)
            o += weight * found.reshape(values.shape)
        else:
            below = _diagonal_blocks(scores, 2 * n)[..., n:, :n]
            found = jnp.exp(upto_2) * (below @ (jnp.exp(behind_1) * blocks(values, n)[..., 0::2, :, :]))
            o += jnp.concatenate([jnp.zeros_like(found), found], axis=-2).reshape(o.shape)
        upto, behind, n = (
            jnp.concatenate([upto_1, upto_2 + upto_1[..., -1:, :]], axis=-2),
            jnp.concatenate([behind_1 + upto_2[..., -1:, :], behind_2], axis=-2),
            2 * n,
        )
    return o[..., :C, :], upto[..., 0, :C, :], behind[..., 0, :C, :]


def _diagonal_blocks(scores: jax.Array, n: int) -> jax.Array:
    """[..., blocks, n, n] on the diagonal of [..., C, C]."""
    split = scores.reshape(*scores.shape[:-2], scores.shape[-2] // n, n, -1, n)
    return jnp.moveaxis(jnp.diagonal(split, axis1=-4, axis2=-2), -1, -3)


def values_flops(C: int, m: int) -> float:
    """FLOPs of the matrix products of `decayed_values`."""
    size, n, flops = _padded(C), _SUB, 4 * 2.0 * _padded(C) * _SUB * m
    while n < size:
        flops += size * n * m
        n *= 2
    return flops


def flops_per_token(length: int, chunk: int, width: int, value_width: int) -> float:
    """FLOPs of the matrix products of `chunked` per position and head, the filled-up last chunk counted whole."""
    states = 2.0 * width * value_width
    if length == 1:
        return states
    C = min(chunk, length)
    return (2.0 * C * width + values_flops(C, value_width) / C + 2 * states) * -(-length // C) * C / length


def _padded(C: int) -> int:
    """The least `_SUB * 2^n` that holds C."""
    return max(_SUB, 1 << (C - 1).bit_length())


def _in_chunks(x_BTHw: jax.Array, chunk: int) -> jax.Array:
    """[B, H, N, C, w], zeros behind the end."""
    x = jnp.pad(x_BTHw, ((0, 0), (0, -x_BTHw.shape[1] % chunk), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 3, 1)


def _over_devices(chosen: Implementation, exchange: SequenceParallel, *arrays: Any, chunk: int):
    """Each device runs its positions from nothing and adds what the state of those before gives: it is linear in it."""
    q, k, u, log_decay, documents, state = _widened(*arrays)
    documents = None if documents is None else exchange.local_documents(documents)
    o, written = chosen.run(q, k, u, log_decay, documents, None, chunk=chunk)
    kept = jnp.exp(jnp.cumsum(log_decay, axis=1))
    if documents is not None:
        kept = jnp.where((documents == 0)[..., None, None], kept, 0)
    join = lambda before, own: own[0][..., None, :] * before + own[1]
    before, after = exchange.exclusive_scan(join, (kept[:, -1], written), state)
    o += kept * jnp.einsum("bthd,bhdm->bthm", q, before)
    return o.astype(arrays[0].dtype), after


VALUE_DECAY = Op(
    "value_decay",
    ValueDecaySpec.of,
    {"definition": Implementation(definition), "chunked": Implementation(chunked)},
    preference=("chunked",),
    split=_over_devices,
)


def value_decay(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    u_BTHm: jax.Array,
    log_decay_BTHm: jax.Array,
    *,
    documents_BT: jax.Array | None = None,
    state_BHdm: jax.Array | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`S_t = S_{t-1} diag(exp(g_t)) + k_t u_t^T`, `o_t = S_t^T q_t`: a query reads what its own position wrote too.

    Args:
      q_BTHd, k_BTHd, u_BTHm: queries, keys and what is written; there is no scale.
      log_decay_BTHm: g, 0 or less. A decay below the smallest normal number of its dtype counts as that number.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      state_BHdm: the state before the first position, read by document 0 only; None: nothing.
      chunk: positions in a chunk of `chunked`, changes only time and memory.
      impl: "auto", or a name in `VALUE_DECAY.table`.

    Returns:
      o_BTHm in the dtype of q, and the state after the last position in fp32 (fp64 for fp64 inputs), in which all sums
      are.

    Raises:
      UserError: shapes that do not fit, or an unknown `impl`.

    Source: Zhang et al. 2024, Gated Slot Attention, arXiv:2409.07146, of which it is the first pass.
    """
    q, k, u, g = q_BTHd.shape, k_BTHd.shape, u_BTHm.shape, log_decay_BTHm.shape
    if len(q) != 4 or q != k or len(u) != 4 or u[:3] != q[:3] or g != u:
        raise UserError(
            f"value_decay: q {q}, k {k}, u {u}, log_decay {g} do not fit; expected q, k [B, T, H, d], u, log_decay "
            "[B, T, H, m]"
        )
    if chunk < 1:
        raise UserError(f"value_decay: chunk={chunk} is not allowed; allowed: 1 or more")
    rows, states = ("batch", "seq", "heads", None), ("batch", "heads", None, None)
    return VALUE_DECAY(
        q_BTHd, k_BTHd, u_BTHm, log_decay_BTHm, documents_BT, state_BHdm,
        axes=(rows, rows, rows, rows, rows[:2], states), out_axes=[rows, states], impl=impl, chunk=chunk,
    )  # fmt: skip
