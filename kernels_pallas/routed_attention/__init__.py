"""Softmax attention of packed rows: each tile of rows reads one key head, and no tile is spent on what is not there.

The kernels are those of `kernels_pallas.flash_attention` for TPU; a tile's key head comes from scalar memory.
"""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import tuning
from kernels_pallas.flash_attention import tpu_kernel_runs
from kernels_pallas.flash_attention.call import Call
from kernels_pallas.flash_attention.gradient import attention
from kernels_pallas.routed_attention import moving

_REST = 4 * 2**20  # bytes of fast memory for tiles of rows


def routed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    ends: jax.Array,
    tile_heads: jax.Array,
    *,
    soft_cap: float | None = None,
    scale: float | None = None,
    interpret: Any = False,
    blocks: tuning.Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`o[r] = sum_s p[r, s] v[s]`, `p = softmax_s(scale * q[r] . k[s])` over the keys that packed row `r` sees.

    Args:
      q: rows [B, R, d], bfloat16 or float32; k: keys [B, S, K, d]; v: values [B, S, K, e], of the same dtype.
      starts, ends: int [B, R]. Row `r` sees the keys `starts[r] <= s < ends[r]` of its tile's key head. A row that is
        there to fill a tile sees nothing; a tile of such rows costs no product.
      tile_heads: int [B, N], the key head that each of the N tiles of R / N rows reads; tiles of a head stand side by
        side. `row_tile` says how long tiles are best.
      soft_cap, scale: as in `flash_attention`.
      interpret: as in `flash_attention`; not interpreted, the kernels are for TPU.
      blocks: tiles of both directions, whose `rows` are R / N; by default those of `tuning.routed_blocks`.

    Returns:
      o [B, R, e] in the dtype of q, and lse [B, R] in float32, the natural logarithm of the softmax's denominator. Both
      differentiable (reverse mode) in q, k and v. A row that sees nothing has o = 0, gradients 0 and an lse of -inf. A
      key head that no tile reads gets gradients of 0. What no row of a sequence sees, NaN included, changes nothing.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    _check(q, k, v, starts, ends, tile_heads, soft_cap)
    (R, d), N = q.shape[1:], tile_heads.shape[1]
    kind = tuning.kind()
    blocks = tuning.routed_blocks(kind, R // N, k.shape[1]) if blocks is None else blocks
    for name in ("forward", "backward"):
        rows = getattr(getattr(blocks, name, None), "rows", None)
        if rows != R // N:
            raise ValueError(f"routed_attention: blocks.{name} has tiles of {rows} rows; allowed: {R // N}, R / N")
    scale = d**-0.5 if scale is None else float(scale)
    soft_cap = None if soft_cap is None else float(soft_cap)
    call = Call("tpu", kind, scale, soft_cap, interpret, blocks, True, True, True)
    o, lse = attention(call, q[:, :, None], k, v, starts, ends, None, None, None, tile_heads)
    return o[:, :, 0], lse[:, :, 0]


def pack_rows(x: jax.Array, place: jax.Array, tile_heads: jax.Array, tile: int, *, interpret: Any = False) -> jax.Array:
    """Packed rows [B, N * tile, d]: the element of x whose place each is; 0 where there is none.

    Args:
      x: elements of heads [B, M, L, d], finite; bfloat16 or float32.
      place: int32 [B, M, L], the row of each element, or -1. Those of a head ascend, and are in tiles of its own.
      tile_heads: int32 [B, N], the head of each tile of rows; tiles of a head stand side by side.
      tile: rows of a tile.
      interpret: as in `flash_attention`; not interpreted, the kernel is for TPU.

    Differentiable (reverse mode) in x: `unpack_rows` is its transpose, and it that of `unpack_rows`.
    """
    return moving.packed(tile, tuning.vmem_limit(tuning.kind()), interpret, x, place, tile_heads)


def unpack_rows(
    x: jax.Array, place: jax.Array, tile_heads: jax.Array, tile: int, *, interpret: Any = False
) -> jax.Array:
    """Elements [B, M, L, d]: the row of x [B, N * tile, d] that is each element's place; 0 where it has none."""
    return moving.unpacked(tile, tuning.vmem_limit(tuning.kind()), interpret, x, place, tile_heads)


def most_elements(width: int, itemsize: int) -> int:
    """How many elements of a head stand in fast memory, as `pack_rows` and `unpack_rows` need them to."""
    return (tuning.vmem_limit(tuning.kind()) - _REST) // moving.bytes_needed(1, width, itemsize)


def row_tile(kind: str, rows: int, heads: int) -> int:
    """How many rows a tile best has, for `rows` rows of `heads` key heads, of which each leaves a tile partly empty."""
    return tuning.routed_rows(kind, rows, heads)


def kernel_runs(q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct, tile: int) -> dict[str, int]:
    """How often a forward and a backward run each kernel, by name, for tiles of so many rows."""
    kind = tuning.kind()
    packed = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), q.dtype)
    runs = tpu_kernel_runs(packed, k, v, tuning.routed_blocks(kind, tile, k.shape[1]))
    return {name.replace("flash", "routed"): count for name, count in runs.items()}


def _check(q, k, v, starts, ends, tile_heads, soft_cap) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"routed_attention: {what}")

    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    need(q.ndim == 3 and k.ndim == v.ndim == 4, f"{shapes}; expected q [B, R, d], k [B, S, K, d], v [B, S, K, e]")
    (B, R, d), (S, K), e = q.shape, k.shape[1:3], v.shape[3]
    need(
        k.shape == (B, S, K, d) and v.shape[:3] == (B, S, K),
        f"{shapes} do not fit; expected q [B, R, d], k [B, S, K, d], v [B, S, K, e]",
    )
    need(min(B, R, S, K, d, e) > 0, f"{shapes}; no size may be 0")
    need(
        q.dtype == k.dtype == v.dtype and q.dtype in ("bfloat16", "float32"),
        f"q {q.dtype}, k {k.dtype}, v {v.dtype}; allowed: all bfloat16, or all float32",
    )
    for name, bound in (("starts", starts), ("ends", ends)):
        need(bound.shape == (B, R), f"{name} {bound.shape}; expected [{B}, {R}]")
        need(bound.dtype.kind in "iu", f"{name} {bound.dtype}; expected integers")
    need(tile_heads.ndim == 2 and tile_heads.shape[0] == B, f"tile_heads {tile_heads.shape}; expected [{B}, N]")
    need(tile_heads.dtype.kind in "iu", f"tile_heads {tile_heads.dtype}; expected integers")
    tiles = tile_heads.shape[1]
    need(tiles > 0 and R % tiles == 0, f"{R} rows in {tiles} tiles; rows must be a multiple of tiles")
    need(R // tiles % tuning.LANES == 0, f"tiles of {R // tiles} rows; allowed: multiples of {tuning.LANES}")
    need(soft_cap is None or soft_cap > 0, f"soft_cap={soft_cap}; allowed: None or a number > 0")
