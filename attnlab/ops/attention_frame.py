"""What ops of attention share: their spec, their checks, and how they run where positions are split over devices.

Such an op takes queries and what goes with them, each [B, T, H, ...], then keys and values, then the mask, then what
else it has: `attend` enters it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from attnlab.errors import UserError
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask
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

    def __str__(self) -> str:
        width = str(self.width) if self.width == self.value_width else f"{self.width}/{self.value_width}"
        features = [name for name in ("causal", "intervals", "documents", "soft_cap", "sinks") if getattr(self, name)]
        if self.window is not None:
            features.append(f"window={self.window}")
        if self.devices > 1:
            features.append(f"devices={self.devices}")
        shape = f"B{self.batch} T{self.queries} S{self.keys} H{self.heads} K{self.kv_heads} d{width}"
        return " ".join([shape, self.dtype, *features])

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, *arrays: Any, queries: int, keys: int, key_axis: int, **options: Any
    ) -> AttentionSpec:
        """Of the arrays of `attend`."""
        (B, T, H, d), k, v, mask = arrays[0].shape, arrays[queries], arrays[queries + 1], arrays[queries + 2]
        return cls(
            B, T, keys, H, k.shape[3 - key_axis], d, v.shape[3], str(arrays[0].dtype), mask.causal, mask.window,
            mask.dynamic(), options.get("soft_cap") is not None, any(x is not None for x in arrays[queries + 3 :]),
            mask.documents, 1 if exchange is None else exchange.count,
        )  # fmt: skip


def attend(
    op: Op,
    queries: tuple[jax.Array, ...],
    keys: tuple[jax.Array, jax.Array],
    mask: Mask,
    per_head: tuple[jax.Array | None, ...] = (),
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
    of_mask = dataclasses.replace(mask, k_start=("batch", seq), k_end=("batch", seq))
    axes = (*(of_queries[: x.ndim] for x in queries), of_keys, of_keys, of_mask, *((q_heads,) for _ in per_head))
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
    order = exchange.zigzag if zigzags(mask, T) else lambda x, undo=False: x
    ordered = lambda x: None if x is None else order(x)
    if chosen.split is not None:
        own = dataclasses.replace(mask, k_start=ordered(mask.k_start), k_end=ordered(mask.k_end))
        key_start = None if mask.k_start is None else exchange.all_gather(mask.k_start)
        arrays = (*map(order, of_queries), *of_keys, own, *per_head)
        out = chosen.split(exchange, *arrays, key_start=key_start, **options)
    else:
        own = Mask(*map(ordered, mask.bounds(T, keys, first=exchange.index() * T)))
        out = chosen.run(*map(order, of_queries), *of_keys, own, *per_head, **options)
    return jax.tree.map(lambda x: order(x, undo=True), out)


def zigzags(mask: Mask, length: int) -> bool:
    """Whether a device's `length` queries are in zig-zag order: those that stand later see more keys."""
    return mask.causal and mask.window is None and length % 2 == 0


def check_shapes(q, k, v, mask: Mask, soft_cap, sinks) -> None:
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
    for name, bound in (("k_start", mask.k_start), ("k_end", mask.k_end)):
        if bound is not None and bound.shape not in ((1, q.shape[1]), q.shape[:2]):
            raise UserError(f"attention: mask {name} {bound.shape}, expected {q.shape[:2]} or 1 row")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise UserError(f"attention: sinks {sinks.shape}, expected [{q.shape[2]}], one per query head")
    if soft_cap is not None and not soft_cap > 0:
        raise UserError(f"attention: soft_cap={soft_cap} is not allowed; allowed: None or a number > 0")
