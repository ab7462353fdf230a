"""The one form of mask: every query row sees an interval of keys, `[k_start, k_end)`.

Causal attention, sliding windows, packed documents, bidirectional documents and queries appended to a cache
are all intervals. What is known before tracing (`causal`, `window`) is kept static beside them, so that
tiles that no row can see are never emitted.

Shapes: `B` batch, `T` query positions, `S` key positions.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.documents import document_index, positions_in_documents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Query row `t` of batch element `b` sees the keys `s` with `k_start[b, t] <= s < k_end[b, t]`.

    k_start, k_end: int32 `[B, T]` (or `[1, T]`, the same for every batch element), or None where the static
        part says it all. An empty interval is allowed: such a row's output is exactly 0, with zero gradients.
    causal: query `t` is key `t` and sees no later key. Static; narrows every interval to `k_end <= t + 1`.
    window: query `t` is key `t` and sees only the keys `s` with `|t - s| < window`: exactly `window` keys,
        itself included, when causal; `2 * window - 1` (symmetric) when not. Static; narrows every interval.
    documents: the intervals are those of packed documents (`mask_from_segments`): rows that see something and share
        `k_start` are one document, rows with `k_start > t` see nothing. Static; narrows nothing.

    Queries that are not keys of the same index (appended to a cache) must leave both static parts unset: see
    `mask_for_extension`.
    """

    k_start: jax.Array | None = None
    k_end: jax.Array | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    documents: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        _check_window(self.window)

    def dynamic(self) -> bool:
        """Whether any part of the mask is an array, known only at run time."""
        return self.k_start is not None or self.k_end is not None

    def bounds(self, length: int, keys: int, first: jax.Array | int = 0) -> tuple[jax.Array | None, jax.Array | None]:
        """`k_start`, `k_end` (`[B, T]` or `[1, T]`, int32) of `length` queries over `keys` keys, the static
        part folded in, in which the first query is key `first`. None where it bounds nothing: a start of 0, or an
        end of `keys`."""
        t = jnp.arange(length, dtype=jnp.int32)[None]
        t = t if isinstance(first, int) and first == 0 else first + t
        starts = [] if self.k_start is None else [self.k_start.astype(jnp.int32)]
        ends = [] if self.k_end is None else [self.k_end.astype(jnp.int32)]
        if self.window is not None:
            starts.append(t - (self.window - 1))
        if self.causal:
            ends.append(t + 1)
        elif self.window is not None:
            ends.append(t + self.window)
        start = None
        for s in starts:
            start = jnp.maximum(0 if start is None else start, s)
        end = None
        for e in ends:
            end = e if end is None else jnp.minimum(end, e)
        return start, end

    def seen(self, length: int, keys: int) -> jax.Array:
        """How many of `keys` keys each of `length` queries sees, int32 `[B, T]` (`[1, T]` when all rows agree)."""
        start, end = self.bounds(length, keys)
        start = jnp.zeros((1, length), jnp.int32) if start is None else jnp.maximum(start, 0)
        return jnp.maximum((keys if end is None else jnp.minimum(end, keys)) - start, 0)

    def visible(self, length: int, keys: int) -> jax.Array:
        """The mask written out for definitions, bool `[B, T, S]` (`[1, T, S]` when all rows agree)."""
        start, end = self.bounds(length, keys)
        s = jnp.arange(keys, dtype=jnp.int32)
        out = jnp.ones((1, length, keys), bool)
        if start is not None:
            out &= s >= start[..., None]
        if end is not None:
            out &= s < end[..., None]
        return out

    def static_range(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """Keys `[low, high)` outside which no query in `[first, last)` sees any, as known while tracing."""
        low, high = 0, keys
        if self.window is not None:
            low = max(0, first - self.window + 1)
            high = min(keys, last - 1 + self.window)
        if self.causal:
            high = min(high, last)
        return min(low, keys), max(high, min(low, keys))


def mask_from_segments(segments_BT: jax.Array | None, length: int, *, causal: bool, window: int | None = None) -> Mask:
    """Mask for self-attention over whole rows of packed documents.

    segments_BT: int `[B, T]` document ids, or None for one document a row. A document is a run of equal ids;
        0 is padding, whose rows see nothing and which nobody sees. Documents never see each other.
    length: T, checked against `segments_BT`.
    causal: each position sees itself and what came before; otherwise the whole document.
    window: keys further than `window - 1` from the query are hidden (see `Mask`), on both sides when not
        causal.

    Raises UserError for a window below 1 or segments of another shape.
    """
    _check_window(window)
    if segments_BT is None:
        return Mask(causal=causal, window=window)
    if segments_BT.ndim != 2 or segments_BT.shape[1] != length:
        raise UserError(f"segments: shape {segments_BT.shape}, expected [batch, {length}]")
    documents = document_index(segments_BT)
    return mask_of_documents(positions_in_documents(documents), segments_BT, causal=causal, window=window)


def mask_of_documents(offset_BT: jax.Array, segments_BT: jax.Array, *, causal: bool, window: int | None = None) -> Mask:
    """`mask_from_segments`, where `positions_in_documents` is at hand: `offset_BT`, 0 where a document begins."""
    _check_window(window)
    length = offset_BT.shape[1]
    t = jnp.arange(length, dtype=jnp.int32)[None]
    # A padding row's interval is empty, also where the static part gives the end.
    start = jnp.where(segments_BT == 0, t + 1, t - offset_BT)
    if causal:
        return Mask(start, None, causal=True, window=window, documents=True)
    last = jnp.pad(offset_BT[:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(last, t + 1, length), axis=1, reverse=True)
    return Mask(start, jnp.where(segments_BT == 0, t + 1, end), causal=False, window=window, documents=True)


def mask_for_extension(
    first: jax.Array | int,
    length: int,
    document_start_BT: jax.Array | None = None,
    *,
    window: int | None = None,
) -> Mask:
    """Causal mask for queries appended after a cache: query `t` is key `first + t` of the cache.

    first: int32 scalar, or `[B]`: how many keys stood in the cache before; may be traced.
    length: T, the number of appended queries.
    document_start_BT: int `[B, T]`, the cache index at which each query's document begins (None: 0). A start
        beyond the query itself marks a padding row, which sees nothing.
    window: exactly `window` keys, the query's own included.

    All of it is dynamic (`causal` and `window` of the result are unset, because query `t` is not key `t`).
    Raises UserError for a window below 1 or a document start of another shape.
    """
    _check_window(window)
    if document_start_BT is not None and document_start_BT.shape[1:] != (length,):
        raise UserError(f"document start: shape {document_start_BT.shape}, expected [batch, {length}]")
    position = jnp.reshape(jnp.asarray(first, jnp.int32), (-1, 1)) + jnp.arange(length, dtype=jnp.int32)[None]
    start = jnp.zeros_like(position)
    if document_start_BT is not None:
        start = jnp.maximum(start, document_start_BT.astype(jnp.int32))
    if window is not None:
        start = jnp.maximum(start, position - (window - 1))
    return Mask(start, jnp.broadcast_to(position + 1, start.shape))


def mean_visible_keys(length: int, causal: bool, window: int | None) -> float:
    """Mean number of keys that a query of an unpacked sequence of `length` positions sees."""
    if not causal:
        return float(length)
    w = min(window or length, length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


def mean_visible_pairs(length: int, causal: bool, window: int | None) -> float:
    """Mean number of pairs (j, l) of keys, both of which a query of an unpacked sequence sees."""
    if not causal:
        return float(length) ** 2
    w = min(window or length, length)
    return (w * (w + 1) * (2 * w + 1) / 6 + (length - w) * w**2) / length


def _check_window(window: int | None) -> None:
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise UserError(f"window: {window!r} is not allowed; allowed: None or an int >= 1")
