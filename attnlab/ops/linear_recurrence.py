"""The recurrence `S_t = a_t S_{t-1} + k_t u_t^T`, `o_t = q_t S_t`, of every mixer whose state has a fixed size.

Chunkwise: pairs within a chunk are one masked product, what comes from before it is read from the state at its start.
Lin et al. 2022 (arXiv:2202.10447) and Qin et al. 2024 (arXiv:2401.04658, section 3) describe the form.

Shapes: `B` batch, `T` positions, `H` heads, `K` heads of queries and keys, H or 1, `d` key width, `e` value width, `N`
chunks, `C` positions in a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import recurrence_kernel
from attnlab.ops.channel_decay import decayed_products, products_flops
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.feature_maps import Taylor
from attnlab.ops.position_decay import decays_between
from attnlab.parallel.sequence_parallel import SequenceParallel


@dataclasses.dataclass(frozen=True)
class RecurrenceSpec:
    """The static facts by which an implementation is chosen. Lengths and widths as in `linear_recurrence`."""

    batch: int
    positions: int
    heads: int
    width: int
    value_width: int
    dtype: str
    chunk: int
    decay: str  # none, constant, data, channels
    packed: bool
    features: Taylor | None = None  # of keys whose width is then its own
    shared: bool = False  # queries and keys by all heads

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} d{self.width}/{self.value_width} C{self.chunk}"
        made = [] if self.features is None else [f"features={self.features.count}"]
        told = [word for word in ("shared", "packed") if getattr(self, word)]
        return " ".join([shape, self.dtype, f"decay={self.decay}", *made, *told])

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, q, k, u, log_decay, documents, state, *, chunk: int,
        features: Taylor | None = None,
    ) -> RecurrenceSpec:  # fmt: skip
        """Of the arrays of a device; where positions are split over several, what each finds is added in wide sums."""
        dtype = q.dtype if exchange is None else jnp.promote_types(q.dtype, jnp.float32)
        decay = "none" if log_decay is None else {1: "constant", 3: "data", 4: "channels"}[log_decay.ndim]
        packed, shared = documents is not None, q.shape[2] < u.shape[2]
        return cls(*u.shape[:3], q.shape[3], u.shape[3], str(dtype), chunk, decay, packed, features, shared)


class Weights(NamedTuple):
    """How much positions of a chunk take from each other and from the states around them; None: all of it.

    The axes are of chunked arrays, of size 1 where the weights are the same along them.

    Attributes:
      pairs: [B, H, N, C, C], of the key in the last axis for the query in the one before; 0 for later keys.
      read: [B, H, N, C], of the state before the chunk for a query; or of its channels, [B, H, N, C, d].
      write: as `read`, of a key in the state after the chunk.
      carry: [B, H, N] or [B, H, N, d], of the state before in the state after the chunk.
    """

    pairs: jax.Array
    read: jax.Array | None
    write: jax.Array | None
    carry: jax.Array | None


def _widened(q, k, u, log_decay, documents, state) -> tuple[Any, ...]:
    """In the dtype of sums."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, u = (x.astype(wide) for x in (q, k, u))
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay.astype(wide), jnp.log(jnp.finfo(wide).tiny))  # differences stay finite
    return q, k, u, log_decay, documents, None if state is None else state.astype(wide)


def _in_wide_sums(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on arrays in the dtype of sums, features for queries and keys; its output in the dtype of q."""

    @functools.wraps(run)
    def wide(q, *rest, chunk: int, features: Taylor | None = None):
        wide_q, k, *others = _widened(q, *rest)
        made = (wide_q, k) if features is None else (features(wide_q), features(k))
        o, state = run(*made, *others, chunk=chunk)
        return o.astype(q.dtype), state

    return wide


@_in_wide_sums
def definition(
    q: jax.Array,
    k: jax.Array,
    u: jax.Array,
    log_decay: jax.Array | None,
    documents: jax.Array | None,
    state: jax.Array | None,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`o_t = sum_{s <= t} exp(sum of log_decay over s + 1 .. t) (q_t . k_s) u_s`, with all T x T pairs; the recurrence
    itself where decays differ from position to position: sums of them would lose digits."""
    del chunk
    B, T, H, _ = u.shape
    q, k = (of_all_heads(x, H) for x in (q, k))
    if log_decay is not None and log_decay.ndim > 1:
        of_channels = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        return _stepwise(q, k, u, of_channels, documents, state)
    logs = jnp.zeros((H,), q.dtype) if log_decay is None else log_decay
    total = jnp.moveaxis(jnp.cumsum(jnp.broadcast_to(logs, (B, T, H)), axis=1), 2, 1)
    documents = jnp.zeros((1, T), jnp.int32) if documents is None else documents
    seen = jnp.tril(jnp.ones((T, T), bool)) & (documents[:, None, :, None] == documents[:, None, None, :])
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, total[..., None] - total[..., None, :], 0)), 0)
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * weights
    o = jnp.einsum("bhts,bshe->bthe", scores, u, precision="highest")
    after = jnp.einsum("bhs,bshd,bshe->bhde", weights[:, :, -1], k, u, precision="highest")
    if state is not None:
        kept = jnp.where(documents[:, None] == 0, jnp.exp(total), 0)
        o += jnp.einsum("bht,bthd,bhde->bthe", kept, q, state, precision="highest")
        after += kept[:, :, -1, None, None] * state
    return o, after


def _stepwise(q, k, u, log_decay, documents, state) -> tuple[jax.Array, jax.Array]:
    """The recurrence, position by position, with a decay for each channel, or [B, T, H, 1]."""
    same = jnp.ones(q.shape[:2], bool)
    if documents is not None:
        same = documents == jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]

    def step(state, inputs):
        q, k, u, log_decay, same = inputs
        kept = jnp.where(same[:, None, None], jnp.exp(log_decay), 0)
        state = kept[..., None] * state + k[..., None] * u[..., None, :]
        return state, jnp.einsum("bhd,bhde->bhe", q, state, precision="highest")

    B, _, H, d = q.shape
    start = jnp.zeros((B, H, d, u.shape[3]), q.dtype) if state is None else state
    state, o = jax.lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, u, log_decay, same)))
    return jnp.moveaxis(o, 0, 1), state


@_in_wide_sums
def chunked(
    q: jax.Array,
    k: jax.Array,
    u: jax.Array,
    log_decay: jax.Array | None,
    documents: jax.Array | None,
    state: jax.Array | None,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """The same in memory and time linear in T. Products are batched over chunks, as only the states need a loop."""
    T, channels = u.shape[1], log_decay is not None and log_decay.ndim == 4
    if channels and T == 1:
        return _stepwise(q, k, u, log_decay, documents, state)
    C = min(chunk, T)
    q, k, u = (in_chunks(x, C) for x in (q, k, u))
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = in_chunks(log_decay, C)
    if documents is not None:
        documents = in_chunks(documents[..., None], C, mode="edge")
    if channels:
        scores, weights = _by_channel(q, k, log_decay, chunk_weights(None, documents, T, C, q.dtype))
    else:
        weights = chunk_weights(log_decay, documents, T, C, q.dtype)
        scores = of_all_heads(jnp.einsum("bhncd,bhnsd->bhncs", q, k) * weights.pairs, u.shape[1], axis=1)
    if q.shape[1] == u.shape[1]:
        written = jnp.einsum("bhnsd,bhnse->bhnde", scaled(k, weights.write), u)
        reading = lambda before: jnp.einsum("bhncd,bhnde->bhnce", scaled(q, weights.read), before)
    else:  # one query and one key for all heads: what differs from head to head scales what is written and what is read
        written = jnp.einsum("bgnsd,bhnse->bhnde", k, scaled(u, weights.write))
        reading = lambda before: scaled(jnp.einsum("bgncd,bhnde->bhnce", q, before), weights.read)
    before, state = chunk_states(written, weights.carry, state)
    o = jnp.einsum("bhncs,bhnse->bhnce", scores, u)
    if before is not None:
        o += reading(before)
    B, H, N, _, e = o.shape
    return jnp.moveaxis(o, 1, 3).reshape(B, N * C, H, e)[:, :T], state


def of_all_heads(x: jax.Array, heads: int, axis: int = 2) -> jax.Array:
    """x with so many heads, where it has one for all of them."""
    return jnp.broadcast_to(x, (*x.shape[:axis], heads, *x.shape[axis + 1 :]))


def _by_channel(q, k, log_decay, seen: Weights) -> tuple[jax.Array, Weights]:
    """Weighted scores, and the other weights, of decays [B, H, N, C, d]; `seen`: what is let through without them."""
    products, upto, behind = decayed_products(q[..., None, :, :], k, log_decay)
    logs = upto, behind, upto[..., -1, :]
    read, write, carry = (
        jnp.exp(x) if passes is None else jnp.exp(x) * passes[..., None] for x, passes in zip(logs, seen[1:])
    )
    return products[..., 0, :, :] * seen.pairs, Weights(seen.pairs, read, write, carry)


def _over_devices(
    chosen: Implementation, exchange: SequenceParallel, *arrays: Any, chunk: int, features: Taylor | None = None
):
    """Each device runs its positions from nothing and adds what the state of those before gives: it is linear in it."""
    q, k, u, log_decay, documents, state = _widened(*arrays)
    documents = None if documents is None else exchange.local_documents(documents)
    o, written = chosen.run(q, k, u, log_decay, documents, None, chunk=chunk, features=features)
    q = q if features is None else features(q)
    (B, T, H, _), d = u.shape, q.shape[3]
    logs = jnp.zeros((), q.dtype) if log_decay is None else log_decay
    logs = logs if logs.ndim == 4 else jnp.broadcast_to(logs, (B, T, H))[..., None]  # the last axis: d, or 1
    kept = jnp.exp(jnp.cumsum(logs, axis=1))
    if documents is not None:
        kept = jnp.where((documents == 0)[..., None, None], kept, 0)
    start = jnp.zeros((B, H, d, u.shape[3]), q.dtype) if state is None else state
    join = lambda before, own: own[0][..., None] * before + own[1]
    before, after = exchange.exclusive_scan(join, (kept[:, -1], written), start)
    o += jnp.einsum("bthd,bhde->bthe", kept * q, before)
    return o.astype(arrays[0].dtype), after


LINEAR_RECURRENCE = Op(
    "linear_recurrence",
    RecurrenceSpec.of,
    {
        "definition": Implementation(definition),
        "chunked": Implementation(chunked),
        "pallas": Implementation(
            recurrence_kernel.run,
            recurrence_kernel.unsupported,
            recurrence_kernel.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=recurrence_kernel.kernel_flops,
        ),
    },
    preference=("pallas", "chunked"),
    split=_over_devices,
)


def linear_recurrence(
    q_BTKd: jax.Array,
    k_BTKd: jax.Array,
    u_BTHe: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    documents_BT: jax.Array | None = None,
    state_BHde: jax.Array | None = None,
    features: Taylor | None = None,
    bonus_Hd: jax.Array | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`S_t = exp(log_decay_t) S_{t-1} + k_t u_t^T`, `o_t = q_t S_t`: a query reads what its own position wrote too.

    Args:
      q_BTKd, k_BTKd, u_BTHe: queries, keys and what is written. There is no scale and no denominator: for a sum of
        weights append a column of ones to u. One query and one key (K = 1) are all heads', without features, bonus and
        decays of channels: `chunked` takes their scores once, the TPU's kernel once for a group of heads.
      log_decay: at most 0; None: nothing decays; [H]: the same at all positions; [B, T, H]; [B, T, H, d]: of each
        channel of queries and keys, not of features. A decay below the smallest normal number of its dtype counts as
        that number.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      state_BHde: the state before the first position, read by document 0 only; None: nothing.
      features: of queries and keys, which then stand for them, on chip in the kernel; d of the state is their count.
      bonus_Hd: what a query's own position weighs, channel by channel, as in RWKV-6 (Peng et al. 2024,
        arXiv:2404.05892, eq. 16): `o_t = q_t (S_{t-1} + diag(bonus) k_t u_t^T)`. Not with features.
      chunk: positions in a chunk of `chunked`, changes only time and memory; the kernel has its own.
      impl: "auto", or a name in `LINEAR_RECURRENCE.table`.

    Returns:
      o_BTHe in the dtype of q, and the state after the last position [B, H, d, e] in fp32 (fp64 for fp64 inputs): what
      the last position's document wrote, all earlier ones forgotten. All sums are in that dtype.

    Raises:
      UserError: shapes that do not fit, or an unknown `impl`.
    """
    _check_shapes(q_BTKd, k_BTKd, u_BTHe, log_decay, documents_BT, state_BHde, features, bonus_Hd, chunk)
    if bonus_Hd is not None:
        run = functools.partial(linear_recurrence, state_BHde=state_BHde, chunk=chunk, impl=impl)
        return _read_before_written(run, q_BTKd, k_BTKd, u_BTHe, log_decay, documents_BT, bonus_Hd)
    rows, states = ("batch", "seq", "heads", None), ("batch", "heads", None, None)
    read = rows if q_BTKd.shape[2] == u_BTHe.shape[2] else (*rows[:2], None, None)
    decays = rows[:3] if log_decay is None else ("heads",) if log_decay.ndim == 1 else rows[: log_decay.ndim]
    return LINEAR_RECURRENCE(
        q_BTKd, k_BTKd, u_BTHe, log_decay, documents_BT, state_BHde,
        axes=(read, read, rows, decays, rows[:2], states), out_axes=[rows, states], impl=impl, chunk=chunk,
        features=features,
    )  # fmt: skip


def _read_before_written(run: Callable[..., Any], q, k, u, log_decay, documents, bonus) -> tuple[jax.Array, jax.Array]:
    """The state before a position is the one behind it where keys, values and decays stand one position later."""
    B, T, H, _ = q.shape
    same = jnp.broadcast_to(jnp.arange(T) > 0, (B, T))
    if documents is not None:
        same &= documents == jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (B, T, H))
    of_row = lambda x, n: x.reshape(x.shape + (1,) * (n - x.ndim))
    later = lambda x: jnp.where(of_row(same, x.ndim), jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))[:, :-1], 0)
    o, before = run(
        q, later(k), later(u), log_decay=None if log_decay is None else later(log_decay), documents_BT=documents
    )
    wide = before.dtype
    own = jnp.sum(q.astype(wide) * k.astype(wide) * bonus.astype(wide), axis=-1, keepdims=True)
    o = (o.astype(wide) + own * u.astype(wide)).astype(o.dtype)
    if log_decay is not None:
        before = of_row(jnp.exp(log_decay[:, -1].astype(wide)), 4) * before
    return o, before + k[:, -1, :, :, None].astype(wide) * u[:, -1, :, None].astype(wide)


def flops_per_token(
    length: int, chunk: int, width: int, value_width: int, channels: bool = False, shared_by: int = 1
) -> float:
    """FLOPs of the matrix products of `chunked` per position and head, all pairs of a chunk counted; `channels`: of
    decays of each channel; `shared_by`: heads that have one query and one key."""
    C = min(chunk, length)
    chunks = -(-length // C)
    states = 2.0 * width * value_width
    if channels and length == 1:
        return states
    scores = products_flops(1, C, width) / C if channels else 2.0 * C * width / shared_by
    pairs = scores + 2.0 * C * value_width
    return (pairs + states * (2 if chunks > 1 else 1)) * chunks * C / length


def chunk_weights(
    log_decay: jax.Array | None, documents_B1NC: jax.Array | None, length: int, chunk: int, dtype: jnp.dtype
) -> Weights:
    """The weights of `length` positions in chunks, the last one filled up with positions that write nothing.

    Args:
      log_decay: None, [H], or [B, H, N, C].
      documents_B1NC: None, or as in `linear_recurrence`.
    """
    row = jnp.arange(chunk)
    seen = row[:, None] >= row
    pairs, read, write, carry = seen.astype(dtype), None, None, None
    if log_decay is not None and log_decay.ndim == 1:
        # Filled-up positions decay nothing: the last chunk ends with its last position.
        starts = jnp.arange(0, length, chunk)[:, None] if length % chunk else jnp.zeros((1, 1), int)
        left = jnp.minimum(length - starts, chunk)
        power = lambda steps: jnp.exp(jnp.maximum(steps, 0) * log_decay[(slice(None),) + (None,) * steps.ndim])[None]
        pairs = jnp.where(seen, power(row[:, None] - row)[:, :, None], 0)
        read, write, carry = power(row[None] + 1), power(left - 1 - row), power(left[:, 0])
    elif log_decay is not None:
        if documents_B1NC is not None:
            seen &= documents_B1NC[..., None] == documents_B1NC[..., None, :]
        total, pairs = decays_between(log_decay, seen)
        read, write, carry = jnp.exp(total), pairs[..., -1, :], jnp.exp(total[..., -1])
    if documents_B1NC is not None:
        last = documents_B1NC[..., -1]
        before = jnp.pad(last[..., :-1], ((0, 0), (0, 0), (1, 0)))
        pairs = jnp.where(documents_B1NC[..., None] == documents_B1NC[..., None, :], pairs, 0)
        kept = lambda own, weight: own.astype(dtype) if weight is None else jnp.where(own, weight, 0)
        read = kept(documents_B1NC == before[..., None], read)
        write = kept(documents_B1NC == last[..., None], write)
        carry = kept(last == before, carry)
    return Weights(pairs, read, write, carry)


def in_chunks(x_BTHw: jax.Array, chunk: int, mode: str = "constant") -> jax.Array:
    """[B, H, N, C, w], zeros or the last position behind the end; [B, H, N, C] from [B, T, H]."""
    T = x_BTHw.shape[1]
    x = jnp.pad(x_BTHw, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x_BTHw.ndim - 2), mode=mode) if T % chunk else x_BTHw
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 3, 1)


def scaled(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """x [..., C, d] by a weight of each position, or of each channel; None: as it is."""
    if weight is None:
        return x
    return x * (weight if weight.ndim == x.ndim else weight[..., None])


def chunk_states(
    written_BHNde: jax.Array, carry_BHN: jax.Array | None, state_BHde: jax.Array | None
) -> tuple[jax.Array | None, jax.Array]:
    """The states before each chunk [B, H, N, d, e], None where all are zero, and the one after the last."""
    B, H, N, d, e = written_BHNde.shape
    carry = jnp.ones((1, 1, 1), written_BHNde.dtype) if carry_BHN is None else carry_BHN
    carry = carry[..., None, None] if carry.ndim == 3 else carry[..., None]
    carry = jnp.moveaxis(jnp.broadcast_to(carry, (B, H, N, *carry.shape[3:])), 2, 0)
    written = jnp.moveaxis(written_BHNde, 2, 0)
    first = written[0] if state_BHde is None else carry[0] * state_BHde + written[0]
    if N == 1:
        return None if state_BHde is None else state_BHde[:, :, None], first

    def step(state, chunk):
        kept, new = chunk
        return kept * state + new, state

    last, between = jax.lax.scan(step, first, (carry[1:], written[1:]))
    start = jnp.zeros_like(first) if state_BHde is None else state_BHde
    return jnp.moveaxis(jnp.concatenate([start[None], between]), 0, 2), last


def _check_shapes(q, k, u, log_decay, documents, state, features: Taylor | None, bonus, chunk: int) -> None:
    alone = features is None and bonus is None and (log_decay is None or log_decay.ndim != 4)
    heads = {u.shape[2], 1} if u.ndim == 4 and alone else {*u.shape[2:3]}
    if not (q.ndim == u.ndim == 4 and q.shape == k.shape and u.shape[:2] == q.shape[:2] and q.shape[2] in heads):
        raise UserError(
            f"linear_recurrence: q {q.shape}, k {k.shape}, u {u.shape} do not fit; expected q, k [B, T, H, d]"
            f"{' or [B, T, 1, d]' * alone}, u [B, T, H, e]; one query and key of all heads go without features, bonus "
            "and decays of channels"
        )
    (B, T, H, K), d = (*u.shape[:3], q.shape[2]), q.shape[3]
    decays = [(H,), (B, T, H)] + ([(B, T, H, d)] if features is None and K == H else [])
    if features is not None:
        if bonus is not None:
            raise UserError(f"linear_recurrence: bonus_Hd {bonus.shape}; allowed with features: None")
        if features.width != d:
            raise UserError(f"linear_recurrence: q {q.shape}; expected width {features.width}, that of {features}")
        d = features.count
    for name, x, allowed in (
        ("log_decay", log_decay, decays),
        ("documents_BT", documents, [(B, T)]),
        ("state_BHde", state, [(B, H, d, u.shape[3])]),
        ("bonus_Hd", bonus, [(H, d)]),
    ):
        if x is not None and x.shape not in allowed:
            raise UserError(f"linear_recurrence: {name} {x.shape}; expected {' or '.join(map(str, allowed))}")
    if chunk < 1:
        raise UserError(f"linear_recurrence: chunk={chunk} is not allowed; allowed: 1 or more")
