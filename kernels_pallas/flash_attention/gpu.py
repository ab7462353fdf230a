"""Flash attention on NVIDIA's Hopper: the sizes that kernels want, and which of them run (the seam of `gradient`)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.flash_attention import gpu_backward, gpu_backward_rows, gpu_forward, gpu_pattern
from kernels_pallas.flash_attention.call import LOG2E, NOTHING, Call
from kernels_pallas.flash_attention.pattern import Pattern

WIDEST = 256
_NARROW = 128  # widest heads whose gradients one kernel makes
_NUMBERS = 30  # of a mask (`gpu_pattern.numbers`) for which that kernel has shared memory, with heads of 64


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes of the three kernels."""

    forward: gpu_forward.Blocks
    backward: gpu_backward.Blocks
    rows: gpu_backward_rows.Blocks


def default_blocks(d: int, e: int, pattern: bool = False) -> Blocks:
    """Tile sizes for heads so wide, chosen by what compiles without spills; none has been timed.

    pattern: those of a mask that is more than intervals: tiles of keys are those of its lists, as many keys in flight.
    """
    widest = max(_up(d, 64), _up(e, 64))
    if pattern:
        narrow, keys = widest == 64, gpu_pattern.TILE[1]
        forward = gpu_forward.Blocks(keys=keys, stages=6 if narrow else 4 if widest <= _NARROW else 2)
        backward = gpu_backward.Blocks(rows=128 if narrow else 64, keys=keys * (2 if widest <= _NARROW else 1))
        return Blocks(forward, backward, gpu_backward_rows.Blocks(keys=keys))
    if widest == 64:
        forward, backward = gpu_forward.Blocks(keys=128, stages=3), gpu_backward.Blocks(rows=128, keys=128)
    elif widest <= _NARROW:
        forward, backward = gpu_forward.Blocks(keys=128, stages=2), gpu_backward.Blocks(rows=64, keys=128)
    else:
        forward, backward = gpu_forward.Blocks(keys=64, stages=2), gpu_backward.Blocks(rows=64, keys=64)
    return Blocks(forward, backward, gpu_backward_rows.Blocks(keys=128 if widest == 64 else 64))


def kernel_widths(d: int, e: int) -> dict[str, int]:
    """Widths of the products that each kernel makes for a pair of a row and a key, added up, by the kernel's name."""
    if max(d, e) <= _NARROW:
        return {"flash_forward": d + e, "flash_backward": 3 * d + 2 * e}
    return {"flash_forward": d + e, "flash_backward_keys": 3 * (d + e), "flash_backward_rows": 3 * d + 2 * e}


def packed_rows(blocks: Blocks, d: int, e: int) -> int:
    """What rows of a tile of packed rows are a multiple of, for heads so wide: the rows that a kernel takes at once."""
    backward = gpu_backward_rows.block_rows(max(d, e) > _NARROW)
    return math.lcm(gpu_forward.WARPGROUPS * blocks.forward.rows, blocks.backward.rows, backward)


def forward(call: Call, q, k, v, bounds, sinks, gate, key_bias, heads_BN=None, pattern=None):
    """See `gradient`."""
    device, blocks = _prepared(call, q, v, heads_BN, pattern)
    (T, S), e = (q.shape[1], k.shape[1]), v.shape[3]
    rows, keys = gpu_forward.WARPGROUPS * blocks.forward.rows, blocks.forward.keys
    mask = None
    if pattern is None:
        bounds = padded_bounds(bounds, T, S, rows, keys)
    else:
        pattern = pattern.padded(_up(T, rows), _up(S, keys))
        mask = gpu_pattern.of_rows(pattern, rows)
    q, k, v = padded(q, rows, 64), padded(k, keys, 64), padded(v, keys, 64)
    gate = None if gate is None else padded(gate.astype(q.dtype), rows, 64)
    sinks = None if sinks is None else sinks.astype(jnp.float32) * LOG2E
    o, lse2 = gpu_forward.forward(
        device, q, k, v, bounds, sinks, gate, _bias(key_bias, keys), heads_BN, mask,
        scale=call.scale, soft_cap=call.soft_cap, blocks=blocks.forward,
    )  # fmt: skip
    return o[:, :T, :, :e], lse2[..., :T]


def backward(call: Call, q, k, v, bounds, key_bias, do, lse2, delta, heads_BN=None, pattern=None):
    """See `gradient`."""
    device, blocks = _prepared(call, q, v, heads_BN, pattern)
    (T, d), (S, e) = q.shape[1::2], v.shape[1::2]
    wide = max(d, e) > _NARROW
    split = wide or call.deterministic or _crowded(pattern, max(d, e))
    rows = gpu_backward_rows.block_rows(wide) if split else blocks.backward.rows
    keys = max(blocks.backward.keys, blocks.rows.keys if split else 0)
    of_keys = of_rows = None
    if pattern is None:
        bounds = padded_bounds(bounds, T, S, rows, keys)
    else:
        pattern = pattern.padded(_up(T, rows), _up(S, keys))
        of_keys = gpu_pattern.of_keys(pattern, blocks.backward.keys, blocks.backward.rows, q.shape[2], k.shape[2])
        of_rows = gpu_pattern.of_rows(pattern, gpu_backward_rows.block_rows(wide)) if split else None
    # Both halves of a wide head, and both of a narrow one, are as wide as a tile is.
    width = 128 if wide or max(d, e) > 64 else 64
    q, k, v, do = (padded(x, n, width) for x, n in ((q, rows), (k, keys), (v, keys), (do, rows)))
    more = (0, 0), (0, 0), (0, q.shape[1] - T)
    lse2, delta = jnp.pad(lse2, more, constant_values=NOTHING), jnp.pad(delta, more)
    stats = gpu_backward.statistics(lse2, delta, call.scale, call.soft_cap)
    options = {"scale": call.scale, "soft_cap": call.soft_cap, "wide": wide}
    arrays = device, q, k, v, do, stats, bounds, _bias(key_bias, keys), heads_BN
    if split:
        dk, dv, dbias = gpu_backward.backward(*arrays, None, of_keys, blocks=blocks.backward, **options)
        dq = gpu_backward_rows.backward_rows(*arrays, of_rows, blocks=blocks.rows, **options)
    else:
        total = jax.new_ref(jnp.zeros(q.shape, jnp.float32))
        dk, dv, dbias = gpu_backward.backward(*arrays, total, of_keys, blocks=blocks.backward, **options)
        dq = (total[...] * call.scale).astype(q.dtype)
    dbias = None if dbias is None else dbias[..., :S]
    return dq[:, :T, :, :d], dk[:, :S, :, :d], dv[:, :S, :, :e], dbias


def _prepared(
    call: Call, q: jax.Array, v: jax.Array, heads_BN: jax.Array | None, pattern: Pattern | None
) -> tuple[hopper.Device, Blocks]:
    """The primitives and tile sizes; ValueError for what the kernels cannot do."""
    d, e = q.shape[3], v.shape[3]
    name = "flash_attention" if heads_BN is None else "routed_attention"
    if q.dtype != jnp.bfloat16:
        raise ValueError(f"{name} on cuda: q, k and v are {q.dtype}; allowed: bfloat16")
    if max(d, e) > WIDEST:
        raise ValueError(f"{name} on cuda: head widths {d} and {e}; allowed: up to {WIDEST}")
    if not call.scale > 0:
        raise ValueError(f"{name} on cuda: scale={call.scale}; allowed: a number > 0")
    blocks = default_blocks(d, e, pattern is not None) if call.blocks is None else call.blocks
    if not isinstance(blocks, Blocks):
        raise ValueError(f"{name} on cuda: blocks={blocks}; allowed: None or {Blocks.__module__}.Blocks")
    if heads_BN is not None:
        tile, rows = q.shape[1] // heads_BN.shape[1], packed_rows(blocks, d, e)
        if tile % rows:
            raise ValueError(f"{name} on cuda: tiles of {tile} rows; allowed: multiples of {rows}")
    if pattern is not None:
        _check_tiles(blocks, pattern, wide=max(d, e) > _NARROW)
    return hopper.device_of(call.interpret), blocks


def _crowded(pattern: Pattern | None, width: int) -> bool:
    """Whether shared memory does not hold both the mask and what adds up dq, with heads so wide."""
    return pattern is not None and width <= 64 and gpu_pattern.numbers(pattern) > _NUMBERS


def _check_tiles(blocks: Blocks, pattern: Pattern, *, wide: bool) -> None:
    """Raises ValueError where the tiles are not those of the pattern's lists."""
    rows, keys = gpu_pattern.TILE
    axes = sum(term.axes for term in pattern.layout().terms)
    if axes > gpu_pattern.MOST_AXES:
        raise ValueError(
            f"flash_attention on cuda: a pattern of {axes} coordinates of keys; allowed: up to {gpu_pattern.MOST_AXES}"
        )
    own = blocks.forward.rows, blocks.forward.keys, blocks.rows.keys, blocks.backward.keys // (1 if wide else 2)
    if pattern.tile != gpu_pattern.TILE or own != (rows, keys, keys, keys) or blocks.backward.rows % rows:
        raise ValueError(
            f"flash_attention on cuda: blocks={blocks} and a pattern in tiles of {pattern.tile}; allowed: a pattern in "
            f"tiles of {gpu_pattern.TILE}, {keys} keys of a tile, {keys} keys of a warpgroup, multiples of {rows} rows"
        )


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def padded(x: jax.Array, length: int, width: int) -> jax.Array:
    """[B, T, H, d] with zeros up to multiples of a length and a width."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % length), (0, 0), (0, -x.shape[3] % width)])


def _bias(key_bias: jax.Array | None, keys: int) -> jax.Array | None:
    """[B, K or 1, S] in log2 units."""
    if key_bias is None:
        return None
    bias = (key_bias[:, None] if key_bias.ndim == 2 else key_bias).astype(jnp.float32) * LOG2E
    return jnp.pad(bias, [(0, 0), (0, 0), (0, -bias.shape[2] % keys)])


def padded_bounds(bounds: Any, T: int, S: int, rows: int, keys: int) -> tuple[jax.Array, jax.Array] | None:
    """Intervals for padded rows, which see nothing, and keys, which nobody sees; None where there is none of either."""
    if bounds is None:
        if T % rows == 0 and S % keys == 0:
            return None
        bounds = jnp.zeros((1, T), jnp.int32), jnp.full((1, T), S, jnp.int32)
    return tuple(jnp.pad(x, [(0, 0), (0, -T % rows)]) for x in bounds)
