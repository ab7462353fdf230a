"""Causal agent attention by agents that are made anew of the queries, chunk by chunk, over a cache of keys and values.

The averages are those of `agent_causal.py`; not of the paper (Han et al. 2023, arXiv:2312.08874).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.ops.agent_causal import Averages, averages_of, cut_up, fixed_agent_attention


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
    entering = averages_of(agents, k_BTHd.swapaxes(1, 2), v_BTHe.swapaxes(1, 2), start, times, times < T)
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
    entering = averages_of(agents, keys, values, jnp.zeros_like(times), times, None)
    rows = lambda x: jnp.moveaxis(cut_up(x[:, chunk:], count=n, size=chunk, axis=1), 0, 1).reshape(B * n, chunk, H, -1)
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
        return averages_of(begun, *of_cache, start, stream.length + times, times < T)

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
