"""Causal agent attention by fixed agents, in linear time and with a fixed state; refreshed ones: `agent_refreshed.py`.

    o_t    = sum_a w_ta V_a(t),   w_t = softmax_a(q_t . A_a / sqrt(d))
    V_a(t) = sum_{j <= t} e^{s_ja} v_j / sum_{j <= t} e^{s_ja},   s_ja = A_a . k_j / sqrt(d)

Not of the paper (Han et al. 2023, arXiv:2312.08874), whose operator sees both ways. The definition is that of
`agent_attention.py`.

Every exponent is taken against a maximum over positions that the result may see. So no weight exceeds 1, none that
counts is lost however the logits jump, and no position, document or padding touches another's rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnlab.parallel.sequence_parallel import SequenceParallel

CHUNK = 64  # positions computed together, unless said otherwise
LOWEST = -1e30  # stands for a maximum over nothing: exp(-inf - LOWEST) is 0 and not NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Averages:
    """The agents' averages over the keys so far, N / D, in fp32 (fp64 for fp64).

    Attributes:
      highest_BHm: largest logit M so far, below every logit before the first.
      total_BHm: D, the sum of e^(logit - M).
      values_BHme: N, the sum of e^(logit - M) v.
    """

    highest_BHm: jax.Array
    total_BHm: jax.Array
    values_BHme: jax.Array

    @classmethod
    def empty(cls, batch: int, heads: int, agents: int, width: int, dtype: jnp.dtype) -> Averages:
        """Over no keys."""
        shape = (batch, heads, agents)
        return cls(jnp.full(shape, LOWEST, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, width), dtype))


def chunk_sizes(length: int, chunk: int) -> tuple[int, int]:
    """Positions computed together, and those of a block in them: the root, which makes the least exponentials."""
    chunk = min(chunk, length)
    block = math.isqrt(chunk - 1) + 1
    return block * -(-chunk // block), block


def fixed_agent_attention(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    agents_BHmd: jax.Array,
    documents_BT: jax.Array | None = None,
    before: Averages | None = None,
    valid_BT: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
    exchange: SequenceParallel | None = None,
) -> tuple[jax.Array, Averages]:
    """Causal agent attention by agents that do not change along the sequence.

    Args:
      q_BTHd, k_BTHd, v_BTHe: queries, keys and values.
      agents_BHmd: agents; a batch axis of size 1 broadcasts.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      before: averages over the keys before the first, of the document of index 0; None: there are none.
      valid_BT: bool, keys that exist; None: all. The output where no key is seen is 0.
      chunk: positions that are computed together.
      exchange: how positions are split over devices, without `before`; None: they are not.

    Returns:
      o_BTHe in the dtype of q, and the averages after the last position, of its document.
    """
    run = functools.partial(_fixed, chunk=chunk)
    arrays = (q_BTHd, k_BTHd, v_BTHe, agents_BHmd, documents_BT, valid_BT)
    return run(*arrays, before) if exchange is None else over_devices(exchange, run, *arrays)


def over_devices(
    exchange: SequenceParallel, run: Callable[..., tuple[jax.Array, Averages]], q, k, v, agents, documents, valid
) -> tuple[jax.Array, Averages]:
    """Each device averages over its own keys first, and begins with what those before it found.

    `run` takes the arrays of `fixed_agent_attention`, `valid_BT` before `before`.
    """
    (B, T), (H, m) = q.shape[:2], agents.shape[1:3]
    documents = jnp.zeros((B, T), jnp.int32) if documents is None else exchange.local_documents(documents)
    last = jnp.broadcast_to(documents, (B, T)) == documents[:, -1:]
    last = last if valid is None else last & valid
    one = jnp.zeros((B, 1), jnp.int32)
    sets = jnp.broadcast_to(agents, (B, *agents.shape[1:])).astype(q.dtype)[:, None]
    own = averages_of(sets, k.swapaxes(1, 2), v.swapaxes(1, 2), one, one + T, None, last)
    own = jax.tree.map(lambda x: x[:, 0], own)

    def join(before, part):
        own, goes_on = part
        old_highest = jnp.where(goes_on[:, None, None], before.highest_BHm, LOWEST)
        highest = jnp.maximum(old_highest, own.highest_BHm)
        old = jnp.where(goes_on[:, None, None], jnp.exp(old_highest - highest), 0)
        new = jnp.exp(own.highest_BHm - highest)
        return Averages(
            highest,
            old * before.total_BHm + new * own.total_BHm,
            old[..., None] * before.values_BHme + new[..., None] * own.values_BHme,
        )

    start = Averages.empty(B, H, m, v.shape[-1], own.total_BHm.dtype)
    before, _ = exchange.exclusive_scan(join, (own, documents[:, -1] == 0), start)
    o, after = run(q, k, v, agents, documents, valid, before)
    return o, exchange.from_last(after)


def _fixed(q_BTHd, k_BTHd, v_BTHe, agents_BHmd, documents_BT, valid_BT, before, *, chunk: int):
    """`fixed_agent_attention` on one device."""
    B, T, H, d = q_BTHd.shape
    m, e = agents_BHmd.shape[2], v_BTHe.shape[-1]
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    agents = agents_BHmd.astype(q_BTHd.dtype)
    if agents.shape[0] == 1:
        product = lambda x: jnp.einsum("bthd,hmd->bhtm", x, agents[0], preferred_element_type=dtype) * d**-0.5
    else:
        product = lambda x: jnp.einsum("bthd,bhmd->bhtm", x, agents, preferred_element_type=dtype) * d**-0.5
    logits, weights, v = product(k_BTHd), jax.nn.softmax(product(q_BTHd), axis=-1), v_BTHe.swapaxes(1, 2)
    if valid_BT is not None:
        logits = jnp.where(valid_BT[:, None, :, None], logits, -jnp.inf)
    before = Averages.empty(B, H, m, e, dtype) if before is None else before

    # Rows and heads are one axis, G: beside an axis of size 1 (a batch of one row) XLA on CPU is slow at sums.
    logits, weights, v, before = jax.tree.map(lambda x: x.reshape(B * H, *x.shape[2:]), (logits, weights, v, before))
    size, block = chunk_sizes(T, chunk)
    count = -(-T // size)
    cut = functools.partial(cut_up, count=count, size=size, axis=1)
    pieces = (
        cut(logits, constant_values=-jnp.inf),
        cut(weights),
        cut(v),
        None if documents_BT is None else jnp.repeat(_from_zero(cut(documents_BT, mode="edge")), H, axis=1),
    )
    body = functools.partial(_chunk, block)
    if count == 1:
        after, o = body(before, jax.tree.map(lambda x: x[0], pieces))
        o = o[None]
    else:
        after, o = jax.lax.scan(jax.checkpoint(body), before, pieces)
    after = jax.tree.map(lambda x: x.reshape(B, H, *x.shape[1:]), after)
    o = jnp.moveaxis(o, 0, 1).reshape(B, H, count * size, e)[:, :, :T]
    return o.swapaxes(1, 2).astype(q_BTHd.dtype), after


def cut_up(x: jax.Array, *, count: int, size: int, axis: int, **padding) -> jax.Array:
    """[count, ...] pieces of an axis, padded behind."""
    behind = count * size - x.shape[axis]
    if behind:
        x = jnp.pad(x, [(0, behind if i == axis else 0) for i in range(x.ndim)], **padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _from_zero(documents_NBC: jax.Array) -> jax.Array:
    """Document indices of chunks, counted in each from the document that the chunk before ended in."""
    before = jnp.pad(documents_NBC[:-1, :, -1:], ((1, 0), (0, 0), (0, 0)))
    return documents_NBC - before


def _chunk(block: int, before: Averages, inputs) -> tuple[Averages, jax.Array]:
    """One chunk of C positions in n blocks of b: pairs within a block one by one, all earlier ones by matrix products.

    For a pair of a position t and an earlier block's key j the exponent splits at r, the largest logit of the document
    up to the position's block: s_j - M_t = (s_j - r) + (r - M_t), neither of which is above 0.
    """
    logits_GCm, weights_GCm, v_GCe, documents_GC = inputs
    highest_Gm, total_Gm, values_Gme = before.highest_BHm, before.total_BHm, before.values_BHme
    G, C, m = logits_GCm.shape
    n = C // block
    dtype = logits_GCm.dtype
    blocks = lambda x: x.reshape(G, n, block, *x.shape[2:])
    s_Gm, stop = blocks(logits_GCm), jax.lax.stop_gradient  # results do not depend on the maxima

    own, earlier, enters, goes_on = _sight(documents_GC, C, block)
    highest = jnp.where(own[..., None], stop(s_Gm)[:, :, None], -jnp.inf).max(3)
    if n > 1:
        known = jnp.where(earlier[..., None], stop(logits_GCm)[:, None], -jnp.inf).max(2)
        known = jnp.maximum(known, LOWEST)
        highest = jnp.maximum(highest, jnp.where(enters[..., None], known[:, :, None], -jnp.inf))
    carried = jnp.where(goes_on[..., None], stop(highest_Gm)[:, None], -jnp.inf)
    highest = stop(jnp.maximum(jnp.maximum(highest, blocks(carried)), LOWEST))

    close = jnp.exp(jnp.where(own[..., None], s_Gm[:, :, None] - highest[..., None, :], -jnp.inf))
    from_before = jnp.exp(carried - highest.reshape(G, C, m))
    total = close.sum(3) + blocks(from_before * total_Gm[:, None])
    if n > 1:
        far = jnp.exp(jnp.where(earlier[..., None], logits_GCm[:, None] - known[:, :, None], -jnp.inf))
        to_far = jnp.exp(jnp.where(enters[..., None], known[:, :, None] - highest, -jnp.inf))
        total += to_far * far.sum(2)[:, :, None]
    shares = blocks(weights_GCm) / jnp.where(total > 0, total, 1)

    pairs = (shares[..., None, :] * close).sum(-1)
    last = close[:, -1, -1]
    if n > 1:
        pairs = pairs[:, :, :, None] * jnp.eye(n, dtype=dtype)[:, None, :, None]
        pairs = pairs.reshape(G, n, block, C) + jnp.einsum("gntm,gnjm->gntj", shares * to_far, far)
        last = jnp.pad(last, ((0, 0), (C - block, 0), (0, 0))) + to_far[:, -1, -1:] * far[:, -1]
    o = _product("gtj,gje->gte", pairs.reshape(G, C, C), v_GCe, dtype)
    o += jnp.einsum("gtm,gme->gte", shares.reshape(G, C, m) * from_before, values_Gme)
    values = _product("gjm,gje->gme", last, v_GCe, dtype)
    values += from_before[:, -1, :, None] * values_Gme
    return Averages(highest[:, -1, -1], total[:, -1, -1], values), o.astype(v_GCe.dtype)


def _sight(documents_GC: jax.Array | None, C: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What sees what in a chunk.

    Returns:
      own: [G, n, b, b], keys of the position's block.
      earlier: [G, n, C], keys of earlier blocks and of the document that enters the block.
      enters: [G, n, b], positions of that document.
      goes_on: [G, C], positions that see what came before the chunk.
    """
    n = C // block
    before = jnp.tril(jnp.ones((block, block), bool))
    earlier = jnp.arange(C) < block * jnp.arange(n)[:, None]
    if documents_GC is None:
        enters = jnp.broadcast_to(jnp.arange(n)[:, None] > 0, (n, block))
        own = jnp.broadcast_to(before, (1, n, block, block))
        return own, earlier[None], enters[None], jnp.ones((1, C), bool)
    blocks = documents_GC.reshape(-1, n, block)
    # The first block is entered by what came before the chunk, which is not here.
    entering = jnp.concatenate([jnp.full_like(blocks[:, :1, -1], -1), blocks[:, :-1, -1]], axis=1)[..., None]
    own = before & (blocks[..., :, None] == blocks[..., None, :])
    return own, earlier & (documents_GC[:, None] == entering), blocks == entering, documents_GC == 0


def _product(spec: str, weights: jax.Array, v: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(spec, weights.astype(v.dtype), v, preferred_element_type=dtype)


def averages_of(
    agents_BEHmd, k_BHSd, v_BHSe, start_BE, end_BE, real_BE: jax.Array | None, valid_BS: jax.Array | None = None
) -> Averages:
    """Averages [B, E, ...] of each set of agents over its keys start <= j < end, those that are valid; a set that is
    not real sees none.

    One set at a time, and again in the backward pass, so that memory stays of order S.
    """
    dtype = jnp.promote_types(k_BHSd.dtype, jnp.float32)
    scale = k_BHSd.shape[-1] ** -0.5
    key = jnp.arange(k_BHSd.shape[2], dtype=jnp.int32)

    @jax.checkpoint
    def one(inputs):
        agents, start, end = inputs
        logits = jnp.einsum("bhmd,bhsd->bhms", agents, k_BHSd, preferred_element_type=dtype) * scale
        seen = (key >= start[:, None]) & (key < end[:, None])
        seen = (seen if valid_BS is None else seen & valid_BS)[:, None, None]
        logits = jnp.where(seen, logits, -jnp.inf)
        highest = jax.lax.stop_gradient(jnp.maximum(logits.max(-1), LOWEST))
        weights = jnp.exp(logits - highest[..., None])
        return Averages(highest, weights.sum(-1), _product("bhms,bhse->bhme", weights, v_BHSe, dtype))

    if real_BE is not None:
        end_BE = jnp.where(real_BE, end_BE, start_BE)
    out = jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (agents_BEHmd, start_BE, end_BE)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)
