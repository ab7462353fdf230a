"""Causal agent attention: by fixed agents (linear time, fixed state), and by agents refreshed from queries (a cache).

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

import jax
import jax.numpy as jnp

from attnlab.ops import context, partition

CHUNK = 64  # positions computed together, unless said otherwise
_LOWEST = -1e30  # stands for a maximum over nothing: exp(-inf - _LOWEST) is 0 and not NaN


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
        return cls(jnp.full(shape, _LOWEST, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, width), dtype))


# --- fixed agents -----------------------------------------------------------------------------------------------------


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
) -> tuple[jax.Array, Averages]:
    """Causal agent attention by agents that do not change along the sequence.

    Args:
      q_BTHd, k_BTHd, v_BTHe: queries, keys and values.
      agents_BHmd: agents; a batch axis of size 1 broadcasts.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      before: averages over the keys before the first, of the document of index 0; None: there are none.
      valid_BT: bool, keys that exist; None: all. The output where no key is seen is 0.
      chunk: positions that are computed together.

    Returns:
      o_BTHe in the dtype of q, and the averages after the last position, of its document.
    """
    run = functools.partial(_fixed, chunk=chunk)
    arrays = (q_BTHd, k_BTHd, v_BTHe, agents_BHmd, documents_BT, valid_BT)
    if before is not None or not context.split(q_BTHd.shape[1]):
        return run(*arrays, before)
    heads = None if q_BTHd.shape[2] % partition.ways("heads") else "heads"
    rows, averages = ("batch", "seq", heads, None), ("batch", heads, None, None)
    axes = (rows, rows, rows, averages, rows[:2], rows[:2])

    def on_device(*arrays):
        o, after = _on_parts(run, *arrays)
        return o, *jax.tree.leaves(after)

    o, *after = partition.local(on_device, arrays, axes, [rows, averages[:3], averages[:3], averages])
    return o, Averages(*after)


def _on_parts(run, q, k, v, agents, documents, valid):
    """Each device averages over its own keys first, and begins with what those before it found."""
    ours, (B, T), (H, m) = context.parts(), q.shape[:2], agents.shape[1:3]
    documents = jnp.zeros((B, T), jnp.int32) if documents is None else ours.documents(documents)
    last = jnp.broadcast_to(documents, (B, T)) == documents[:, -1:]
    last = last if valid is None else last & valid
    one = jnp.zeros((B, 1), jnp.int32)
    sets = jnp.broadcast_to(agents, (B, *agents.shape[1:])).astype(q.dtype)[:, None]
    own = _averages_of(sets, k.swapaxes(1, 2), v.swapaxes(1, 2), one, one + T, None, last)
    own = jax.tree.map(lambda x: x[:, 0], own)

    def join(before, part):
        own, goes_on = part
        old_highest = jnp.where(goes_on[:, None, None], before.highest_BHm, _LOWEST)
        highest = jnp.maximum(old_highest, own.highest_BHm)
        old = jnp.where(goes_on[:, None, None], jnp.exp(old_highest - highest), 0)
        new = jnp.exp(own.highest_BHm - highest)
        return Averages(
            highest,
            old * before.total_BHm + new * own.total_BHm,
            old[..., None] * before.values_BHme + new[..., None] * own.values_BHme,
        )

    start = Averages.empty(B, H, m, v.shape[-1], own.total_BHm.dtype)
    before, _ = ours.running(join, (own, documents[:, -1] == 0), start)
    o, after = run(q, k, v, agents, documents, valid, before)
    return o, ours.of_last(after)


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
    logits, weights, v, before = (jax.tree.map(lambda x: x.reshape(B * H, *x.shape[2:]), y) for y in (logits, weights, v, before))
    size, block = chunk_sizes(T, chunk)
    count = -(-T // size)
    cut = functools.partial(_cut, count=count, size=size, axis=1)
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


def _cut(x: jax.Array, *, count: int, size: int, axis: int, **padding) -> jax.Array:
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
        known = jnp.maximum(known, _LOWEST)
        highest = jnp.maximum(highest, jnp.where(enters[..., None], known[:, :, None], -jnp.inf))
    carried = jnp.where(goes_on[..., None], stop(highest_Gm)[:, None], -jnp.inf)
    highest = stop(jnp.maximum(jnp.maximum(highest, blocks(carried)), _LOWEST))

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


# --- refreshed agents -------------------------------------------------------------------------------------------------


def definition_refreshed_agents(
    q_BTHd: jax.Array, first_agents_Hmd: jax.Array, documents_BT: jax.Array, chunk: int
) -> jax.Array:
    """Agents [B, T, H, m, d] of every position, written out, as `refreshed_agent_attention` describes them."""
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    m = first_agents_Hmd.shape[1]
    same = documents_BT[:, :, None] == documents_BT[:, None]
    t = jnp.arange(documents_BT.shape[1])
    place = (same & (t < t[:, None])).sum(-1)
    group = chunk // m * jnp.arange(m)
    begin = ((place // chunk - 1) * chunk)[..., None, None] + group[:, None]
    member = same[:, :, None] & (place[:, None, None] >= begin) & (place[:, None, None] < begin + chunk // m)
    weights = member.astype(dtype) / (chunk // m)
    means = jnp.einsum("btmj,bjhd->bthmd", weights, q_BTHd.astype(dtype), precision="highest").astype(q_BTHd.dtype)
    return jnp.where((place >= chunk)[..., None, None, None], means, first_agents_Hmd.astype(q_BTHd.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """What refreshed agents need of the positions so far.

    Attributes:
      k, v: [B * H, S, d] and [B * H, S, e], keys and values; slot j holds position j.
      length: int32 scalar, positions seen.
      age: [B] int32, those of them in the current document.
      agents: [B, H, m, d], agents of the current chunk where it is not its document's first.
      sums: [B, H, m, d], sums over the groups of the current chunk's queries.
      averages: of the current chunk's agents over the current document.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    age: jax.Array
    agents: jax.Array
    sums: jax.Array
    averages: Averages

    @classmethod
    def empty(cls, batch: int, heads: int, agents: int, width: int, room: int, dtype: jnp.dtype) -> Stream:
        """Before the first position, with room for `room` of them."""
        wide = jnp.promote_types(dtype, jnp.float32)
        cache = jnp.zeros((batch * heads, room, width), dtype)
        count, means = jnp.zeros((), jnp.int32), jnp.zeros((batch, heads, agents, width), wide)
        averages = Averages.empty(batch, heads, agents, width, wide)
        return cls(cache, cache, count, jnp.zeros((batch,), jnp.int32), means, means, averages)


def refreshed_agent_attention(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    first_agents_Hmd: jax.Array,
    documents_BT: jax.Array | None = None,
    stream: Stream | None = None,
    *,
    chunk: int,
) -> tuple[jax.Array, Stream | None]:
    """Causal agent attention whose agents are made anew for every chunk of a document.

    The agents of a chunk are the means of m groups of the queries of the chunk before it, and of a document's first
    chunk `first_agents_Hmd`; chunks count from the document's start. All of them average over the document up to the
    position. At a chunk's start that is one pass over the keys so far; from there on the agents are fixed ones.

    Args:
      q_BTHd, k_BTHd, v_BTHe: queries, keys and values (e = d with a stream).
      first_agents_Hmd: agents that have seen nothing.
      documents_BT: of `attnlab.ops.documents.document_index`; None, without a stream only: one document.
      stream: of the positions before the first; None: there are none.
      chunk: positions between refreshes, a multiple of m.

    Returns:
      o_BTHe in the dtype of q, and the stream after the last position (None without one). More positions than the
      stream has room for give NaN.
    """
    first = first_agents_Hmd[None]
    if stream is not None:
        return _extend(q_BTHd, k_BTHd, v_BTHe, first, documents_BT, stream, chunk)
    if documents_BT is None:
        return _aligned(q_BTHd, k_BTHd, v_BTHe, first, chunk), None
    T, m = q_BTHd.shape[1], first.shape[2]
    o, _ = fixed_agent_attention(q_BTHd, k_BTHd, v_BTHe, first, documents_BT)
    place = _places(documents_BT, None)
    times, rank = _refreshes(place, chunk, (T - 1) // chunk)
    if not times.shape[1]:
        return o, None
    agents = _means(q_BTHd, times, chunk, m)
    start = jnp.take_along_axis(jnp.arange(T) - place, jnp.minimum(times, T - 1), axis=1)
    entering = _averages_of(agents, k_BTHd.swapaxes(1, 2), v_BTHe.swapaxes(1, 2), start, times, times < T)
    pooled, _ = _in_slots(q_BTHd, k_BTHd, v_BTHe, agents, entering, times, rank - 1, place >= chunk, chunk)
    return jnp.where((place >= chunk)[..., None, None], pooled, o), None


def _aligned(q_BTHd, k_BTHd, v_BTHe, first, chunk: int) -> jax.Array:
    """One document a row: every chunk but the first is a row of its own, with averages over all keys before it."""
    B, T, H, d = q_BTHd.shape
    m, n = first.shape[2], (T - 1) // chunk
    begin = min(chunk, T)
    o, _ = fixed_agent_attention(*(x[:, :begin] for x in (q_BTHd, k_BTHd, v_BTHe)), first)
    if not n:
        return o
    times = jnp.broadcast_to(chunk * jnp.arange(1, n + 1, dtype=jnp.int32), (B, n))
    wide = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    groups = q_BTHd[:, : n * chunk].reshape(B, n, m, chunk // m, H, d).astype(wide)
    agents = groups.mean(3).swapaxes(2, 3).astype(q_BTHd.dtype)
    keys, values = k_BTHd.swapaxes(1, 2), v_BTHe.swapaxes(1, 2)
    entering = _averages_of(agents, keys, values, jnp.zeros_like(times), times, None)
    rows = lambda x: jnp.moveaxis(_cut(x[:, chunk:], count=n, size=chunk, axis=1), 0, 1).reshape(B * n, chunk, H, -1)
    later, _ = fixed_agent_attention(
        *map(rows, (q_BTHd, k_BTHd, v_BTHe)), agents.reshape(B * n, H, m, d), before=_fold(entering)
    )
    return jnp.concatenate([o, later.reshape(B, n * chunk, H, -1)[:, : T - chunk]], axis=1)


def _extend(q_BTHd, k_BTHd, v_BTHe, first, documents_BT, stream: Stream, chunk: int) -> tuple[jax.Array, Stream]:
    B, T, H, d = q_BTHd.shape
    m, room = first.shape[2], stream.k.shape[1]
    rows = lambda x, cache: x.swapaxes(1, 2).reshape(B * H, T, -1).astype(cache.dtype)
    put = lambda cache, x: jax.lax.dynamic_update_slice_in_dim(cache, rows(x, cache), stream.length, axis=1)
    keys, values = put(stream.k, k_BTHd), put(stream.v, v_BTHe)

    # A document's first chunk; the other positions' results of this are not used.
    o, after = fixed_agent_attention(q_BTHd, k_BTHd, v_BTHe, first, documents_BT, stream.averages)
    place = _places(documents_BT, stream.age)
    times, rank = _refreshes(place, chunk, -(-T // chunk))
    begun = _means(q_BTHd, times, chunk, m, stream.sums)
    index = stream.length + jnp.arange(T) - place
    start = jnp.take_along_axis(index, jnp.minimum(times, T - 1), axis=1)
    shape = (B, H, room, -1)

    def averages() -> Averages:
        of_cache = (x.reshape(shape).astype(q_BTHd.dtype) for x in (keys, values))
        return _averages_of(begun, *of_cache, start, stream.length + times, times < T)

    def nothing() -> Averages:
        empty = Averages.empty(B * times.shape[1], H, m, d, stream.averages.total_BHm.dtype)
        return jax.tree.map(lambda x: x.reshape(B, -1, *x.shape[1:]), empty)

    entering = jax.lax.cond(jnp.any(times < T), averages, nothing)

    # Slot 0 is the chunk that goes on from before.
    both = lambda a, b: jnp.concatenate([a[:, None].astype(b.dtype), b], axis=1)
    agents = both(stream.agents, begun)
    entering = jax.tree.map(both, stream.averages, entering)
    times = both(jnp.zeros((B,), times.dtype), times)
    later = place >= chunk
    pooled, of_slots = _in_slots(q_BTHd, k_BTHd, v_BTHe, agents, entering, times, rank, later, chunk)
    o = jnp.where(later[..., None, None], pooled, o)
    o = jnp.where(stream.length + T <= room, o, jnp.nan)

    last, slot = later[:, -1], rank[:, -1]
    pick = lambda x: jax.vmap(lambda of_row, i: of_row[i])(x, slot)
    choose = lambda a, b: jnp.where(last.reshape(-1, *[1] * (a.ndim - 1)), pick(b), a)
    after = jax.tree.map(choose, after, of_slots)
    sums = _begun_sums(q_BTHd, place, documents_BT, stream, chunk, m)
    agents = pick(agents).astype(stream.agents.dtype)
    return o, Stream(keys, values, stream.length + T, place[:, -1] + 1, agents, sums, after)


def _places(documents_BT: jax.Array, age_B: jax.Array | None) -> jax.Array:
    """[B, T] how many positions of the same document come before."""
    t = jnp.arange(documents_BT.shape[1], dtype=jnp.int32)
    first = jnp.pad(documents_BT[:, 1:] != documents_BT[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(first, t, 0), axis=1)
    if age_B is not None:
        start = jnp.where(documents_BT == 0, -age_B[:, None], start)
    return t - start


def _refreshes(place_BT: jax.Array, chunk: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Times [B, count] at which a chunk begins that is not its document's first, T behind the last of them; and how
    many there are up to each position [B, T]. Each follows a whole chunk of its own, which bounds their number."""
    T = place_BT.shape[1]
    begins = (place_BT > 0) & (place_BT % chunk == 0)
    times = jnp.sort(jnp.where(begins, jnp.arange(T, dtype=jnp.int32), T), axis=1)[:, :count]
    return times, jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def _means(q_BTHd, times_BE, chunk: int, m: int, sums_BHmd: jax.Array | None = None) -> jax.Array:
    """Agents [B, E, H, m, d]: group means of the chunk before each time; `sums`: of its queries that came before."""
    B, T, H, d = q_BTHd.shape
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    reach = min(chunk, T)
    index = times_BE[..., None] + jnp.arange(-reach, 0)
    q = _gather(q_BTHd, jnp.clip(index, 0, T - 1)).astype(dtype)
    q = jnp.where((index >= 0)[..., None, None], q, 0)
    q = jnp.pad(q, ((0, 0), (0, 0), (chunk - reach, 0), (0, 0), (0, 0)))
    total = q.reshape(B, -1, m, chunk // m, H, d).sum(3).swapaxes(2, 3)
    if sums_BHmd is not None:
        total += jnp.where((times_BE < chunk)[..., None, None, None], sums_BHmd[:, None], 0)
    return (total / (chunk // m)).astype(q_BTHd.dtype)


def _begun_sums(q_BTHd, place_BT, documents_BT, stream: Stream, chunk: int, m: int) -> jax.Array:
    """`Stream.sums` after these positions."""
    reach = min(chunk, q_BTHd.shape[1])
    place, last = place_BT[:, -reach:], place_BT[:, -1:]
    member = (documents_BT[:, -reach:] == documents_BT[:, -1:]) & (place // chunk == last // chunk)
    group = jnp.where(member, place % chunk // (chunk // m), m)
    dtype = stream.sums.dtype
    of_group = jax.nn.one_hot(group, m, dtype=dtype)
    total = jnp.einsum("btm,bthd->bhmd", of_group, q_BTHd[:, -reach:].astype(dtype), precision="highest")
    same = (documents_BT[:, -1] == 0) & (last[:, 0] // chunk == (stream.age - 1) // chunk)
    return total + jnp.where(same[:, None, None, None], stream.sums, 0)


def _averages_of(
    agents_BEHmd, k_BHSd, v_BHSe, start_BE, end_BE, real_BE: jax.Array | None, valid_BS: jax.Array | None = None
) -> Averages:
    """Averages [B, E, ...] of each set of agents over its keys start <= j < end, those that are valid; a set that is not
    real sees none.

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
        highest = jax.lax.stop_gradient(jnp.maximum(logits.max(-1), _LOWEST))
        weights = jnp.exp(logits - highest[..., None])
        return Averages(highest, weights.sum(-1), _product("bhms,bhse->bhme", weights, v_BHSe, dtype))

    if real_BE is not None:
        end_BE = jnp.where(real_BE, end_BE, start_BE)
    out = jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (agents_BEHmd, start_BE, end_BE)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)


def _in_slots(
    q_BTHd, k_BTHd, v_BTHe, agents_BEHmd, entering: Averages, times_BE, slot_BT, later_BT, chunk: int
) -> tuple[jax.Array, Averages]:
    """Each set of agents over the chunk that begins at its time, as a row of its own: o_BTHe at positions `later` than
    their document's first chunk, and the averages [B, E, ...] at the chunks' ends."""
    B, T, H, d = q_BTHd.shape
    E, m = times_BE.shape[1], agents_BEHmd.shape[3]
    size = min(chunk, T)
    index = times_BE[..., None] + jnp.arange(size)
    inside = jnp.minimum(index, T - 1)
    own = jnp.take_along_axis(jnp.where(later_BT, slot_BT, -1), inside.reshape(B, -1), axis=1).reshape(B, E, size)
    valid = (index < T) & (own == jnp.arange(E)[:, None])
    q, k, v = (_gather(x, inside).reshape(B * E, size, H, -1) for x in (q_BTHd, k_BTHd, v_BTHe))
    o, after = fixed_agent_attention(
        q, k, v, agents_BEHmd.reshape(B * E, H, m, d), before=_fold(entering), valid_BT=valid.reshape(B * E, size)
    )
    slot = jnp.maximum(slot_BT, 0)
    at = jnp.clip(jnp.arange(T) - jnp.take_along_axis(times_BE, slot, axis=1), 0, size - 1)
    o = _gather(o.reshape(B, E * size, H, -1), slot * size + at)
    return o, jax.tree.map(lambda x: x.reshape(B, E, *x.shape[1:]), after)


def _fold(averages: Averages) -> Averages:
    """[B, E, ...] to [B * E, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), averages)


def _gather(x_BTHd: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b, ...]]."""
    return jax.vmap(lambda x, i: x[i])(x_BTHd, index)
