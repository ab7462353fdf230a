"""The one form of mask: which keys each query row sees, said without a pair being written down.

A mask is a term, or a union of two (`either`). A term is an interval of keys, `[k_start, k_end)`, and narrows it by
intervals of integer coordinates of the keys (`Axis`) and by a set of groups of keys (`Groups`).

Causal attention, sliding windows, packed documents, bidirectional documents and queries appended to a cache are all
intervals and nothing else (`Mask.plain`). What is known before tracing (`causal`, `window`) is kept static beside them,
so that tiles that no row can see are never emitted. Arrays of a mask may be NumPy's: what is made of them alone is then
known while tracing.

Shapes: `B` batch, `T` query positions, `S` key positions, `h` heads: 1, key heads or query heads; `W` words of 32 bits.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import UserError
from attnlab.ops.documents import document_ends, document_index, positions_in_documents

NEVER = 2**31 - 1  # no coordinate; every interval without an upper end ends here

Array = Any  # jax.Array, or np.ndarray where it is known while tracing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Axis:
    """A row sees only keys whose coordinate lies in its interval, `lo <= key < hi`.

    key: int32 `[B, S]` or `[B, h, S]`, below 2^31 - 1. lo, hi: int32 `[B, T]` or `[B, h, T]`, or None: no bound.
        B may be 1 in each: the same for every batch element.
    name: of the coordinate, for messages.
    """

    key: Array
    lo: Array | None = None
    hi: Array | None = None
    name: str = dataclasses.field(default="", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """A row sees only keys whose group's bit is set.

    group: int32 `[B, S]` or `[B, h, S]`. A key whose group has no bit, -1 or another number outside of 0 and 32 W,
        nobody sees in this term.
    bits: uint32 `[B, h, ceil(T / rows), W]`, bit `g % 32` of word `g // 32` for group g. B may be 1.
    rows: consecutive rows that share their bits. Static.
    size: groups are runs of consecutive keys, each of at most `size`, numbered upwards without gaps, keys of group -1
        between them aside; None: in any order. Static.
    chosen: rows chose their groups by activations: what a row gives is then, to the last bit, none of what later rows
        choose. Static.
    """

    group: Array
    bits: Array
    rows: int = dataclasses.field(default=1, metadata={"static": True})
    size: int | None = dataclasses.field(default=None, metadata={"static": True})
    chosen: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        _check_count("mask groups: rows", self.rows)
        _check_count("mask groups: size", self.size, optional=True)

    def known_group(self) -> Array:
        """`group` by head, `[B, h, S]`, -1 for every group that has no bit: what all forms of a mask read."""
        group = by_head(self.group)
        has_bit = (group >= 0) & (group < 32 * self.bits.shape[-1])
        return numpy_if(isinstance(group, np.ndarray)).where(has_bit, group, -1)


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
    axes, groups: narrow the interval further.
    either: a second term: what it shows is seen too. Its own `either` is None.

    Queries that are not keys of the same index (appended to a cache) must leave both static parts unset: see
    `mask_for_extension`.
    """

    k_start: jax.Array | None = None
    k_end: jax.Array | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    documents: bool = dataclasses.field(default=False, metadata={"static": True})
    axes: tuple[Axis, ...] = ()
    groups: Groups | None = None
    either: Mask | None = None

    def __post_init__(self):
        _check_count("window", self.window, optional=True)
        if isinstance(self.either, Mask) and self.either.either is not None:
            raise UserError("mask: a union of three terms is not allowed; allowed: two")

    def dynamic(self) -> bool:
        """Whether the interval has arrays; those of a second term count."""
        ours = self.k_start is not None or self.k_end is not None
        return ours or (self.either is not None and self.either.dynamic())

    def plain(self) -> bool:
        """Whether it is one interval of keys a row, and nothing else."""
        return not self.axes and self.groups is None and self.either is None

    def terms(self) -> tuple[Mask, ...]:
        """The masks of which this one is the union, each without `either`."""
        if self.either is None:
            return (self,)
        return dataclasses.replace(self, either=None), self.either

    def heads(self) -> int:
        """How many heads' masks it holds: 1 (all heads see alike), the key heads or the query heads.

        Raises UserError where its arrays disagree.
        """
        found = {1}
        for term in self.terms():
            found |= {x.shape[1] for axis in term.axes for x in (axis.key, axis.lo, axis.hi) if np.ndim(x) == 3}
            if term.groups is not None:
                found |= {x.shape[1] for x in (term.groups.group, term.groups.bits) if np.ndim(x) > 2}
        if len(found) > 2:
            raise UserError(f"mask: arrays of {sorted(found)} heads; allowed: 1 and one other number")
        return max(found)

    def sequences(self) -> int:
        """How many sequences' masks it holds: 1 (all see alike), or the batch."""
        return max((x.shape[0] for x in jax.tree.leaves(self)), default=1)

    def grouping(self) -> str:
        """How its keys are grouped: "", not at all; few, 32 groups at most; runs of keys (`Groups.size`); or many."""
        found = ""
        for term in self.terms():
            if term.groups is not None and found != "many":
                few = term.groups.bits.shape[-1] == 1
                found = "many" if not few and term.groups.size is None else "runs" if not few else found or "few"
        return found

    def known(self) -> bool:
        """Whether all of it is known while tracing."""
        return all(isinstance(x, np.ndarray) for x in jax.tree.leaves(self))

    def bounds(self, length: int, keys: int, first: jax.Array | int = 0) -> tuple[jax.Array | None, jax.Array | None]:
        """`k_start`, `k_end` (`[B, T]` or `[1, T]`, int32) of `length` queries over `keys` keys, the static
        part folded in, in which the first query is key `first`. None where it bounds nothing: a start of 0, or an
        end of `keys`. Of a plain mask: others are not said by it."""
        if not self.plain():
            raise ValueError("bounds: the mask is more than an interval; it has no bounds")
        t = jnp.arange(length, dtype=jnp.int32)[None]
        t = t if isinstance(first, int) and first == 0 else first + t
        starts = [] if self.k_start is None else [self.k_start.astype(jnp.int32)]
        ends = [] if self.k_end is None else [self.k_end.astype(jnp.int32)]
        if self.window is not None:
            starts.append(t - (self.window - 1))
        if self.causal:
            ends.append(t + 1)
        elif self.window is not None:
            ends.append(t + min(self.window, NEVER // 2))
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

    def visible(self, length: int, keys: int, rows: slice | None = None, columns: slice | None = None) -> Array:
        """The mask written out, bool `[B, h, T, S]`, B and h 1 where all agree: for definitions, and single rows.

        rows, columns: those of the `length` queries and `keys` keys that are wanted; None: all. NumPy's where the mask
            is known while tracing.
        """
        rows, columns = rows or slice(0, length), columns or slice(0, keys)
        out = None
        for term in self.terms():
            seen = term._seen(length, keys, rows, columns)
            out = seen if out is None else out | seen
        return out

    def _seen(self, length: int, keys: int, rows: slice, columns: slice) -> Array:
        xp = numpy_if(self.known())
        start, end = (x[:, None, rows, None] for x in self.interval(length, keys))
        s = xp.arange(keys, dtype=xp.int32)[columns]
        out = (s >= start) & (s < end)
        for axis in self.axes:
            key = by_head(axis.key)[..., None, columns]
            if axis.lo is not None:
                out = out & (key >= by_head(axis.lo)[..., rows, None])
            if axis.hi is not None:
                out = out & (key < by_head(axis.hi)[..., rows, None])
        if self.groups is not None:
            group = self.groups.known_group()[..., None, columns]
            bits = xp.repeat(self.groups.bits, self.groups.rows, axis=2)[:, :, rows]
            batch, heads = (max(group.shape[i], bits.shape[i]) for i in (0, 1))
            bits = xp.broadcast_to(bits, (batch, heads, *bits.shape[2:]))
            at = xp.broadcast_to(xp.maximum(group, 0) >> 5, (batch, heads, bits.shape[2], group.shape[3]))
            word = xp.take_along_axis(bits, at, axis=3)
            out = out & (group >= 0) & (((word >> (group & 31).astype(xp.uint32)) & 1) == 1)
        return out

    def interval(self, length: int, keys: int, first: Array | int = 0) -> tuple[Array, Array]:
        """`bounds` of a term as arrays `[B, T]`, within 0 and `keys`; NumPy's where the mask is known."""
        xp = numpy_if(self.known() and isinstance(first, int))
        t = first + xp.arange(length, dtype=xp.int32)[None]
        start, end = xp.zeros((1, length), xp.int32), xp.full((1, length), keys, xp.int32)
        if self.k_start is not None:
            start = xp.maximum(start, xp.asarray(self.k_start, xp.int32))
        if self.k_end is not None:
            end = xp.minimum(end, xp.asarray(self.k_end, xp.int32))
        if self.window is not None:
            start = xp.maximum(start, t - (self.window - 1))
            end = xp.minimum(end, t + min(self.window, NEVER // 2))
        if self.causal:
            end = xp.minimum(end, t + 1)
        return start.astype(xp.int32), end.astype(xp.int32)

    def unfolded(self, length: int, keys: int, first: Array | int = 0) -> Mask:
        """The same with nothing static: intervals of queries of which the first is key `first`."""
        terms = []
        for term in self.terms():
            start, end = term.interval(length, keys, first)
            terms.append(
                dataclasses.replace(term, k_start=start, k_end=end, causal=False, window=None, documents=False)
            )
        return terms[0] if len(terms) == 1 else dataclasses.replace(terms[0], either=terms[1])

    def reach(self, length: int, keys: int) -> Array:
        """One past the last key that each row may see, int32 `[B, T]`: by its intervals of keys alone; 0: none."""
        xp, out = numpy_if(self.known()), 0
        for term in self.terms():
            start, end = term.interval(length, keys)
            out = xp.maximum(out, xp.where(start < end, end, 0))
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
    _check_count("window", window, optional=True)
    if segments_BT is None:
        return Mask(causal=causal, window=window)
    if segments_BT.ndim != 2 or segments_BT.shape[1] != length:
        raise UserError(f"segments: shape {segments_BT.shape}, expected [batch, {length}]")
    documents = document_index(segments_BT)
    return mask_of_documents(positions_in_documents(documents), segments_BT, causal=causal, window=window)


def mask_of_documents(offset_BT: jax.Array, segments_BT: jax.Array, *, causal: bool, window: int | None = None) -> Mask:
    """`mask_from_segments`, where `positions_in_documents` is at hand: `offset_BT`, 0 where a document begins."""
    _check_count("window", window, optional=True)
    length = offset_BT.shape[1]
    t = jnp.arange(length, dtype=jnp.int32)[None]
    # A padding row's interval is empty, also where the static part gives the end.
    start = jnp.where(segments_BT == 0, t + 1, t - offset_BT)
    if causal:
        return Mask(start, None, causal=True, window=window, documents=True)
    end = jnp.where(segments_BT == 0, t + 1, document_ends(offset_BT))
    return Mask(start, end, causal=False, window=window, documents=True)


def mask_for_extension(
    first: jax.Array | int,
    length: int,
    document_start_BT: jax.Array | None = None,
    *,
    window: int | None = None,
    axes: tuple[Axis, ...] = (),
    groups: Groups | None = None,
    either: Mask | None = None,
) -> Mask:
    """Causal mask for queries appended after a cache: query `t` is key `first + t` of the cache.

    first: int32 scalar, or `[B]`: how many keys stood in the cache before; may be traced.
    length: T, the number of appended queries.
    document_start_BT: int `[B, T]`, the cache index at which each query's document begins (None: 0). A start
        beyond the query itself marks a padding row, which sees nothing.
    window: exactly `window` keys, the query's own included.
    axes, groups, either: as in `Mask`: bounds and bits of the appended queries, keys of the whole cache.

    All of it is dynamic (`causal` and `window` of the result are unset, because query `t` is not key `t`).
    Raises UserError for a window below 1 or a document start of another shape.
    """
    _check_count("window", window, optional=True)
    if document_start_BT is not None and document_start_BT.shape[1:] != (length,):
        raise UserError(f"document start: shape {document_start_BT.shape}, expected [batch, {length}]")
    position = jnp.reshape(jnp.asarray(first, jnp.int32), (-1, 1)) + jnp.arange(length, dtype=jnp.int32)[None]
    start = jnp.zeros_like(position)
    if document_start_BT is not None:
        start = jnp.maximum(start, document_start_BT.astype(jnp.int32))
    if window is not None:
        start = jnp.maximum(start, position - (window - 1))
    return Mask(start, jnp.broadcast_to(position + 1, start.shape), axes=axes, groups=groups, either=either)


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


def by_head(x: Array) -> Array:
    """`[B, n]` as `[B, 1, n]`; `[B, h, n]` as it is."""
    return x[:, None] if x.ndim == 2 else x


def numpy_if(known: bool) -> ModuleType:
    """NumPy, or jax's where something is traced."""
    return np if known else jnp


def _check_count(name: str, value: int | None, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}: {value!r} is not allowed; allowed: {'None or ' * optional}an int >= 1")
