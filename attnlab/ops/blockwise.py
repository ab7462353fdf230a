"""The frame of attention in plain XLA: blocks of query rows against ranges of keys, head by head or all together.

Softmax attention, Parallax and local linear attention say what a tile computes; here is how tiles are planned, run and
masked. Key ranges that the static part of the mask rules out are never emitted. Scores are kept in the log2 domain,
`exp2` being the cheaper exponential.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from attnlab.ops.masks import Mask
from attnlab.parallel import partition

# Finite stand-ins for minus infinity: a hidden score, and the smallest running maximum. exp2(HIDDEN -
# anything that can be a maximum) is exactly 0, for rows that see nothing too.
HIDDEN = -1e30
LOWEST = -1e20
LOG2E = math.log2(math.e)

ROWS = 256  # query rows in a block, counted over the heads that share a key head
# Bodies emitted, whatever T, which bounds the compile time: groups of query blocks with a key range of their
# own, or, where ranges are known at run time only, lengths of key range to choose from (each a multiple of
# LEAST_KEYS).
BODIES = 8
LEAST_KEYS = 128
ALIGN = 64  # key ranges begin at multiples of this: products and reductions over ragged rows are much slower


Span = tuple[int | jax.Array, int]  # first (may be traced), size


@dataclasses.dataclass(frozen=True)
class Blocks:
    """`count` consecutive blocks of `rows` queries from `first` on, each against `keys` keys from
    `origin + i * step` on (moved inside the keys where it would reach out)."""

    first: int
    count: int
    rows: int
    keys: int
    origin: int
    step: int

    def rows_of(self, i) -> Span:
        return self.first + i * self.rows, self.rows

    def origin_of(self, i, keys: int):
        return jnp.clip(self.origin + i * self.step, 0, keys - self.keys) if self.step else self.origin


def plan_blocks(length: int, keys: int, mask: Mask, rows: int, groups: int) -> list[Blocks]:
    """Cut `length` queries into blocks, each with a key range of static length that covers what the static
    part of the mask lets its rows see. Neighbouring blocks share a range where more than `groups` of them
    would differ."""

    def key_range(first: int, last: int) -> tuple[int, int]:
        low, high = mask.static_range(first, last, keys)
        return low - low % ALIGN, high - (low - low % ALIGN)

    full = length // rows
    per_group = -(-full // groups)
    plan: list[Blocks] = []
    for block in range(0, full, per_group or 1):
        count = min(per_group, full - block)
        first = block * rows
        origin, reach = key_range(first, first + count * rows)
        if plan and (plan[-1].origin, plan[-1].keys) == (origin, reach):
            plan[-1] = dataclasses.replace(plan[-1], count=plan[-1].count + count)
        else:
            plan.append(Blocks(first, count, rows, reach, origin, 0))
    if mask.window is not None and full > groups:
        behind = mask.window - 1 + (1 - mask.window) % ALIGN
        reach = min(keys, rows + behind + (0 if mask.causal else behind))
        if full * reach < sum(b.count * b.keys for b in plan):
            plan = [Blocks(0, full, rows, reach, -behind, rows)]
    if full * rows < length:
        origin, reach = key_range(full * rows, length)
        plan.append(Blocks(full * rows, 1, length - full * rows, reach, origin, 0))
    return plan


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything static that the two passes need (hashable: a nondifferentiable argument)."""

    mask: Mask  # its static part only
    scale: float
    soft_cap: float | None
    skip: bool = False  # choose each block's key range at run time, from its rows' intervals


@dataclasses.dataclass(frozen=True)
class HeadArray:
    """One array that a head function returns, over all batch elements (axis 0) and key heads (`axis`)."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axis: int


def grouped(x_BTHd, K: int):
    B, T, H, d = x_BTHd.shape
    return x_BTHd.reshape(B, T, K, H // K, d)


def over_heads(head, config: Config, q, k, v, rest, sinks_H, intervals, out: tuple[HeadArray, ...]):
    """Run `head`, written for one key head, over batch and key heads: one after the other on CPU, where a
    plain matrix product is several times faster than a batched one, and all together elsewhere."""
    B, T, H, _ = q.shape
    S, K = k.shape[1:3]
    bounds = dataclasses.replace(config.mask, k_start=intervals[0], k_end=intervals[1]).bounds(T, S)
    start, end = (None if x is None else jnp.asarray(x) for x in bounds)  # of a known mask NumPy's
    sinks_KG = None if sinks_H is None else sinks_H.reshape(K, H // K)
    # Residuals of shape [B, K, ...] (the log-sum-exp) have their key heads on axis 1, all else on axis 2.
    axes = [2, 2, 2, *(1 if x.ndim == 4 else 2 for x in rest)]

    # A choice at run time saves work only where the heads are not batched together.
    serial = dataclasses.replace(config, skip=any(x is not None for x in intervals))

    def one_by_one(arrays, sinks, start, end):
        def body(i, results):
            b, h = i // K, i % K
            # Products of low precision are slow on CPU: they are done in float32.
            of_head = [
                slice_of(slice_of(x, b, 1, 0), h, 1, axis)
                .reshape(_without(x.shape, axis))
                .astype(jnp.promote_types(x.dtype, jnp.float32))
                for x, axis in zip(arrays, axes, strict=True)
            ]
            bounds = [None if x is None else (x[0] if x.shape[0] == 1 else x[b]) for x in (start, end)]
            parts = head(serial, *of_head, sinks=None if sinks is None else sinks[h], bounds=bounds)
            new = []
            for whole, part, p in zip(results, parts, out, strict=True):
                at = [0] * whole.ndim
                at[0], at[p.axis] = b, h
                part = jnp.expand_dims(part.astype(p.dtype), (0, p.axis))
                new.append(jax.lax.dynamic_update_slice(whole, part, at))
            return tuple(new)

        carry = varying([jnp.zeros(p.shape, p.dtype) for p in out], (arrays, sinks, start, end))
        return jax.lax.fori_loop(0, B * K, body, tuple(carry))

    def together(arrays, sinks, start, end):
        def of_head(arrays, sinks, bounds):
            parts = head(config, *arrays, sinks=sinks, bounds=bounds)
            return tuple(x.astype(p.dtype) for x, p in zip(parts, out, strict=True))

        bounds = [None if x is None else jnp.broadcast_to(x, (B, T)) for x in (start, end)]
        inner = jax.vmap(of_head, ([a - 1 for a in axes], 0, None), tuple(p.axis - 1 for p in out))
        results = jax.vmap(inner, (0, None, 0))(list(arrays), sinks, bounds)
        return varying(results, (arrays, sinks, start, end))

    arrays = (grouped(q, K), k, v, *rest)
    return partition.by_platform(arrays, sinks_KG, start, end, cpu=one_by_one, default=together)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[1:axis] + shape[axis + 1 :]


def _in_log2(config: Config, products, done):
    """q . k, already multiplied by `done`, to scores in log2 units, and the soft-cap's slope if any."""
    if config.soft_cap is None:
        return products * (config.scale * LOG2E / done), None
    capped = jnp.tanh(products * (config.scale / config.soft_cap / done))
    return capped * (config.soft_cap * LOG2E), 1 - capped * capped


def tile_scores(config: Config, q_Grd, k_Ld, bounds, rows: Span, keys: Span):
    """Scores in log2 units, hidden ones `HIDDEN`, and the soft-cap's slope (None without one)."""
    G, r, d = q_Grd.shape
    # The factor goes into q, which is small, where that loses nothing; products of low precision are scaled
    # after.
    factor = config.scale * (LOG2E if config.soft_cap is None else 1 / config.soft_cap)
    factor = factor if jnp.finfo(q_Grd.dtype).bits >= 32 else 1.0
    products = matmul((q_Grd * factor).reshape(G * r, d), k_Ld.T).reshape(G, r, -1)
    scores, slope = _in_log2(config, products, factor)
    visible = visible_of_tile(bounds, rows, keys)
    return scores if visible is None else jnp.where(visible, scores, HIDDEN), slope


def visible_of_tile(bounds, rows: Span, keys: Span) -> jax.Array | None:
    """Which keys of a tile its rows see, bool [r, L]; None: all."""
    start, end = (None if x is None else take(x, rows, 0)[:, None] for x in bounds)
    key = keys[0] + jnp.arange(keys[1], dtype=jnp.int32)
    seen = [None if start is None else key >= start, None if end is None else key < end]
    seen = [x for x in seen if x is not None]
    return None if not seen else functools.reduce(jnp.logical_and, seen)


def matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def over_tiles(config: Config, G: int, T: int, S: int, bounds, tile, carry):
    """Fold `carry = tile(rows, keys, carry)` over all blocks of query rows, each with its range of keys: the
    static one, or within it, with `config.skip`, the shortest of a few lengths that holds every key its rows
    see."""
    rows = max(ROWS // G, min(ROWS, 64))
    for blocks in plan_blocks(T, S, config.mask, rows, 1 if config.skip else BODIES):
        unit = -(-blocks.keys // (BODIES * LEAST_KEYS)) * LEAST_KEYS
        lengths = [min(n, blocks.keys) for n in range(unit, blocks.keys + unit, unit)]
        if config.skip and len(lengths) > 1:
            low, choice = _run_time_ranges(blocks, bounds, S, unit)
            # One loop for each length, over its blocks only. A conditional inside one loop over all blocks
            # would copy the accumulators in every iteration.
            order = jnp.argsort(choice)
            for n, keys in enumerate(lengths):

                def body(j, carry, blocks=blocks, keys=keys, order=order, low=low):
                    i = order[j]
                    origin = blocks.origin_of(i, S)
                    first = jnp.clip(low[i], origin, origin + blocks.keys - keys)
                    return tile(blocks.rows_of(i), (first, keys), carry)

                first, last = (choice < n).sum(dtype=jnp.int32), (choice <= n).sum(dtype=jnp.int32)
                carry = jax.lax.fori_loop(first, last, body, carry)
        elif blocks.count == 1:
            carry = tile(blocks.rows_of(0), (blocks.origin, blocks.keys), carry)
        else:

            def body(i, carry, blocks=blocks):
                return tile(blocks.rows_of(i), (blocks.origin_of(i, S), blocks.keys), carry)

            carry = jax.lax.fori_loop(0, blocks.count, body, carry)
    return carry


def _run_time_ranges(blocks: Blocks, bounds, S: int, unit: int) -> tuple[jax.Array, jax.Array]:
    """For each block its first visible key, and how many units of keys it needs, less one."""
    rows = (blocks.first, blocks.count * blocks.rows)
    of_block = [None if x is None else take(x, rows, 0).reshape(blocks.count, blocks.rows) for x in bounds]
    start = 0 if of_block[0] is None else of_block[0]
    end = S if of_block[1] is None else jnp.minimum(of_block[1], S)
    low = jnp.where(start < end, start, S).min(1)
    high = jnp.where(start < end, end, 0).max(1)
    return low, jnp.clip((high - low - 1) // unit, 0, -(-blocks.keys // unit) - 1)


def varying(tree, like):
    """Inside `shard_map`, what a loop begins with must vary over the mesh axes that its results vary over."""

    def axes(x) -> frozenset[str]:
        kind = jax.typeof(x)
        # The name depends on the version of jax.
        return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying

    wanted = frozenset().union(*map(axes, jax.tree.leaves(like)))

    def vary(x):
        missing = tuple(sorted(wanted - axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def take(x, span: Span, axis: int):
    return slice_of(x, span[0], span[1], axis)


def put(x, part, span: Span):
    """x[:, first : first + size] = part."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, span[0], 1)


def slice_of(x, first, size: int, axis: int):
    if isinstance(first, int):
        return jax.lax.slice_in_dim(x, first, first + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)
