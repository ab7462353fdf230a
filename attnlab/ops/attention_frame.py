"""What ops of attention share: their spec, their checks, and how they run where positions are split over devices.

Such an op takes queries and what goes with them, each [B, T, H, ...], then keys and values, then the mask, then what
else it has: `attend` enters it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask, by_head
from attnlab.parallel import partition, sequence_parallel
from attnlab.parallel.sequence_parallel import SequenceParallel

NO_KEYS = -1e20  # the log-sum-exp of no keys, finite so that differences are


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static facts by which an implementation is chosen.

    Lengths, heads and widths are those of a device: its queries, and the keys that they are held against, which are
    gathered where positions are split. Of the mask it is what is asked for; where `devices` is not 1, implementations
    without a split of their own get intervals that say the same.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: str
    causal: bool
    window: int | None
    intervals: bool
    soft_cap: bool
    sinks: bool
    documents: bool = False
    devices: int = 1  # over which the queries are split
    pattern: int = 0  # of a mask that is more than an interval of keys: how many it holds, of sequences and heads
    groups: str = ""  # of keys that it holds: few (32 at most), runs (`Groups.size`) or many
    key_bias: int = 0  # heads of it; 0: none
    query_bias: int = 0
    axes: int = 0  # coordinates of keys that the mask's terms hold

    def __str__(self) -> str:
        width = str(self.width) if self.width == self.value_width else f"{self.width}/{self.value_width}"
        names = ("causal", "intervals", "documents", "pattern", "soft_cap", "sinks", "key_bias", "query_bias")
        features = [name for name in names if getattr(self, name)]
        if self.groups:
            features.append(f"groups={self.groups}")
        if self.window is not None:
            features.append(f"window={self.window}")
        if self.devices > 1:
            features.append(f"devices={self.devices}")
        shape = f"B{self.batch} T{self.queries} S{self.keys} H{self.heads} K{self.kv_heads} d{width}"
        return " ".join([shape, self.dtype, *features])

    @property
    def biases(self) -> bool:
        """Whether there are any."""
        return bool(self.key_bias or self.query_bias)

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, *arrays: Any, queries: int, keys: int, key_axis: int, **options: Any
    ) -> AttentionSpec:
        """Of the arrays of `attend`."""
        (B, T, H, d), k, v, mask = arrays[0].shape, arrays[queries], arrays[queries + 1], arrays[queries + 2]
        rest, masks = arrays[queries + 3 :], 0 if mask.plain() else mask.sequences() * mask.heads()
        return cls(
            B, T, keys, H, k.shape[3 - key_axis], d, v.shape[3], str(arrays[0].dtype), mask.causal, mask.window,
            mask.dynamic(), options.get("soft_cap") is not None, any(x is not None for x in rest[:1]),
            mask.documents, 1 if exchange is None else exchange.count, masks, mask.grouping(),
            *(0 if x is None else x.shape[2] for x in (*rest[1:3], None, None)[:2]),
            sum(len(term.axes) for term in mask.terms()),
        )  # fmt: skip


def plain_masks(supports: Callable[[Any], str | None] = lambda spec: None) -> Callable[[Any], str | None]:
    """`supports` of an implementation that knows masks of intervals only, and no biases, from its other reasons."""

    def reason(spec: Any) -> str | None:
        if spec.pattern:
            return "it serves masks that are an interval of keys, not axes, groups or a union"
        return "it has no biases" if spec.biases else supports(spec)

    return reason


def attend(
    op: Op,
    queries: tuple[jax.Array, ...],
    keys: tuple[jax.Array, jax.Array],
    mask: Mask,
    per_head: tuple[jax.Array | None, ...] = (),
    biases: tuple[jax.Array | None, jax.Array | None] = (None, None),
    *,
    impl: str,
    ranks: tuple[int, ...] = (4,),
    key_axis: int = 1,
    **options: Any,
) -> Any:
    """`op(*queries, *keys, mask, *per_head)` on each device's own batch, heads and queries, against all keys.

    Args:
      op: its spec is `AttentionSpec.of`, its split `over_devices`.
      queries: each [B, T, H, ...].
      keys: keys and values, [B, S, K, d] and [B, S, K, e], or [B, K, S, ...] where `key_axis` is 2.
      mask: of the whole sequence.
      per_head: arrays [H], or None.
      biases: of keys [B, S, h] and of queries [B, T, h], for ops that take them after one array per head; or None.
      impl: of the op.
      ranks: numbers of axes of the results, which are like the queries.
      key_axis: of the positions.
      options: of the op.
    """
    (T, H), S, K = queries[0].shape[1:3], keys[0].shape[key_axis], keys[0].shape[3 - key_axis]
    seq = "seq" if sequence_parallel.splits(T) else None
    # Groups of query heads stay with their key head: both are split alike, or neither; a lone key head is everybody's.
    n_heads = partition.ways("heads")
    whole = H % n_heads or (K % n_heads and K > 1)
    q_heads, kv_heads = None if whole else "heads", None if whole or K == 1 else "kv_heads"
    k_seq = seq if S % partition.ways("seq") == 0 else None
    of_queries = ("batch", seq, q_heads, None)
    of_keys = ("batch", k_seq, kv_heads, None) if key_axis == 1 else ("batch", kv_heads, k_seq, None)
    of_h = lambda h: None if h == 1 else q_heads if h == H else kv_heads
    of_rest = tuple((q_heads,) for _ in per_head)
    if any(x is not None for x in biases):
        of_rest += tuple(("batch", s, None if x is None else of_h(x.shape[2])) for s, x in zip((None, seq), biases))
        per_head += biases
    mask = mask if seq is None else _rows_apart(mask, T)
    axes = (*(of_queries[: x.ndim] for x in queries), of_keys, of_keys, axes_of(mask, seq, of_h), *of_rest)
    return op(
        *queries,
        *keys,
        mask,
        *per_head,
        axes=axes,
        out_axes=[of_queries[:rank] for rank in ranks],
        impl=impl,
        facts={"queries": len(queries), "keys": S, "key_axis": key_axis},
        **options,
    )


def over_devices(
    chosen: Implementation,
    exchange: SequenceParallel,
    *arrays: Any,
    queries: int,
    keys: int,
    key_axis: int,
    **options: Any,
) -> Any:
    """Any implementation on a device's queries: keys are gathered, queries put in zig-zag order where that is fair.

    Query t of a device is then not key t: `chosen.run` gets a mask of intervals alone. An implementation with a split
    of its own gets the mask as it is, with the `k_start` of its queries, and that of all positions as `key_start`.
    """
    of_queries, of_keys, (mask, *per_head) = arrays[:queries], arrays[queries : queries + 2], arrays[queries + 2 :]
    T = of_queries[0].shape[1]
    if of_keys[0].shape[key_axis] != keys:
        of_keys = [exchange.all_gather(x, key_axis) for x in of_keys]
    fair = zigzags(mask, T) and len(per_head) < 2  # biases are not dealt out
    order = exchange.zigzag if fair else lambda x, undo=False: x
    ordered = lambda x: None if x is None else order(x)
    if chosen.split is not None:
        own = dataclasses.replace(mask, k_start=ordered(mask.k_start), k_end=ordered(mask.k_end))
        key_start = None if mask.k_start is None else exchange.all_gather(mask.k_start)
        arrays = (*map(order, of_queries), *of_keys, own, *per_head)
        out = chosen.split(exchange, *arrays, key_start=key_start, **options)
    elif not mask.plain():
        own = mask.unfolded(T, keys, first=exchange.index() * T)
        out = chosen.run(*of_queries, *of_keys, own, *per_head, **options)
    else:
        own = Mask(*map(ordered, mask.bounds(T, keys, first=exchange.index() * T)))
        out = chosen.run(*map(order, of_queries), *of_keys, own, *per_head, **options)
    return jax.tree.map(lambda x: order(x, undo=True), out)


def zigzags(mask: Mask, length: int) -> bool:
    """Whether a device's `length` queries are in zig-zag order: those that stand later see more keys."""
    return mask.plain() and mask.causal and mask.window is None and length % 2 == 0


def axes_of(mask: Mask, seq: str | None, of_h: Callable[[int], str | None]) -> Mask:
    """Logical axes of a mask's arrays: rows are split as queries are, keys are whole everywhere."""

    def named(x: Any, of_n: str | None) -> tuple[str | None, ...]:
        return ("batch", of_n) if x is None or x.ndim == 2 else ("batch", of_h(x.shape[1]), of_n)

    def of_term(term: Mask) -> Mask:
        axes = tuple(
            dataclasses.replace(a, key=named(a.key, None), lo=named(a.lo, seq), hi=named(a.hi, seq)) for a in term.axes
        )
        groups = term.groups
        if groups is not None:
            bits = (*named(groups.bits[..., 0], seq), None)
            groups = dataclasses.replace(groups, group=named(groups.group, None), bits=bits)
        rows = ("batch", seq)
        return dataclasses.replace(term, k_start=rows, k_end=rows, axes=axes, groups=groups)

    own = of_term(mask)
    return own if mask.either is None else dataclasses.replace(own, either=of_term(mask.either))


def _rows_apart(mask: Mask, length: int) -> Mask:
    """The same with bits of every row, which may then be cut anywhere."""

    def of_term(term: Mask) -> Mask:
        if term.groups is None or term.groups.rows == 1:
            return term
        bits = jnp.repeat(term.groups.bits, term.groups.rows, axis=2)[:, :, :length]
        return dataclasses.replace(term, groups=dataclasses.replace(term.groups, bits=bits, rows=1))

    own = of_term(mask)
    return own if mask.either is None else dataclasses.replace(own, either=of_term(mask.either))


def check_shapes(q, k, v, mask: Mask, soft_cap, sinks, key_bias=None, query_bias=None) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise UserError(f"attention: q {q.shape}, k {k.shape}, v {v.shape}; each must be [batch, length, heads, width]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UserError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit; "
            "expected q [B, T, H, d], k [B, S, K, d], v [B, S, K, e]"
        )
    if q.shape[2] % k.shape[2]:
        raise UserError(f"attention: {q.shape[2]} query heads over {k.shape[2]} kv heads; H must be a multiple of K")
    if not (q.dtype == k.dtype == v.dtype):
        raise UserError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype}; all three must have one dtype")
    _check_mask(mask, q.shape, k.shape)
    for name, bias, n in (("key_bias", key_bias, k.shape[1]), ("query_bias", query_bias, q.shape[1])):
        heads = {1, q.shape[2], k.shape[2]}
        if bias is not None and (bias.shape[:-1] not in ((1, n), (q.shape[0], n)) or bias.shape[-1] not in heads):
            allowed = f"[{q.shape[0]} or 1, {n}, h], h one of {sorted(heads)}"
            raise UserError(f"attention: {name} {bias.shape}, expected {allowed}")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise UserError(f"attention: sinks {sinks.shape}, expected [{q.shape[2]}], one per query head")
    if soft_cap is not None and not soft_cap > 0:
        raise UserError(f"attention: soft_cap={soft_cap} is not allowed; allowed: None or a number > 0")


def _check_mask(mask: Mask, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> None:
    """Raises UserError where arrays of the mask are not those of so many rows, keys and heads, or of another dtype."""
    (B, T, H), (S, K) = q_shape[:3], k_shape[1:3]

    def check(name: str, x: Any, n: int) -> None:
        if x is None:
            return
        # Of another dtype implementations would compare, or take bits, each in its own way.
        dtype = jnp.uint32 if name == "bits" else jnp.int32
        if x.dtype != dtype:
            raise UserError(f"attention: mask {name} is {x.dtype}; allowed: {jnp.dtype(dtype)}")
        heads = {1, K, H} if x.ndim == 3 else {1}
        if x.ndim not in (2, 3) or x.shape[0] not in (1, B) or x.shape[-1] != n or by_head(x).shape[1] not in heads:
            kind = f"[{B} or 1, {n}], or with heads (1, {K} or {H}) between"
            raise UserError(f"attention: mask {name} {x.shape}, expected {kind}")

    for term in mask.terms():
        for name, bound in (("k_start", term.k_start), ("k_end", term.k_end)):
            if bound is not None and bound.shape not in ((1, T), (B, T)):
                raise UserError(f"attention: mask {name} {bound.shape}, expected {(B, T)} or 1 row")
            if bound is not None and not jnp.issubdtype(bound.dtype, jnp.integer):
                raise UserError(f"attention: mask {name} is {bound.dtype}; allowed: integers")
        for axis in term.axes:
            for name, x, n in (("key", axis.key, S), ("lo", axis.lo, T), ("hi", axis.hi, T)):
                check(f"axis {axis.name!r} {name}", x, n)
        if term.groups is not None:
            check("group", term.groups.group, S)
            bits, words = term.groups.bits, -(-T // term.groups.rows)
            if bits.ndim != 4 or not bits.shape[-1]:
                allowed = f"[{B} or 1, heads (1, {K} or {H}), {words}, words of 32 groups]"
                raise UserError(f"attention: mask bits {bits.shape}, expected {allowed}")
            check("bits", bits[..., 0], words)
    mask.heads()
