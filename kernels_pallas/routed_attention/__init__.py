"""Softmax attention of packed rows: each tile of rows reads one key head, and no tile is spent on what is not there.

The kernels are those of `kernels_pallas.flash_attention`, for TPU and for Hopper; a tile's key head comes from a table.
"""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import tuning
from kernels_pallas.flash_attention import PLATFORMS, gpu, tpu_kernel_runs
from kernels_pallas.flash_attention.call import Call, platform_of
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
    platform: str | None = None,
    interpret: Any = False,
    blocks: Any = None,
    deterministic: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`o[r] = sum_s p[r, s] v[s]`, `p = softmax_s(scale * q[r] . k[s])` over the keys that packed row `r` sees.

    Args:
      q: rows [B, R, d], bfloat16 or float32; k: keys [B, S, K, d]; v: values [B, S, K, e], of the same dtype.
      starts, ends: int [B, R]. Row `r` sees the keys `starts[r] <= s < ends[r]` of its tile's key head. A row that is
        there to fill a tile sees nothing; a tile of such rows costs no product.
      tile_heads: int [B, N], the key head that each of the N tiles of R / N rows reads; tiles of a head stand side by
        side. `row_tile` says how long tiles are best.
      soft_cap, scale, platform, interpret, deterministic: as in `flash_attention`.
      blocks: tile sizes; on TPU their `rows` are R / N, by default those of `tuning.routed_blocks`. For "cuda" as in
        `flash_attention`; R / N is a multiple of what they take at once, by default 128.

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
    platform = platform_of("routed_attention", platform, interpret, PLATFORMS)
    if platform == "tpu":
        blocks = _tpu_blocks(blocks, kind, R // N, k.shape[1])
    scale = d**-0.5 if scale is None else float(scale)
    soft_cap = None if soft_cap is None else float(soft_cap)
    call = Call(platform, kind, scale, soft_cap, interpret, blocks, deterministic, True, True)
    o, lse = attention(call, q[:, :, None], k, v, starts, ends, None, None, None, tile_heads)
    return o[:, :, 0], lse[:, :, 0]


def _tpu_blocks(blocks: Any, kind: str, tile: int, keys: int) -> tuning.Blocks:
    if blocks is None:
        return tuning.routed_blocks(kind, tile, keys)
    for name in ("forward", "backward"):
        rows = getattr(getattr(blocks, name, None), "rows", None)
        if rows != tile:
            raise ValueError(f"routed_attention: blocks.{name} has tiles of {rows} rows; allowed: {tile}, R / N")
    return blocks


def pack_rows(
    x: jax.Array,
    place: jax.Array,
    tile_heads: jax.Array,
    tile: int,
    *,
    platform: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Packed rows [B, N * tile, d]: the element of x whose place each is; 0 where there is none.

    Args:
      x: elements of heads [B, M, L, d], finite; bfloat16 or float32.
      place: int32 [B, M, L], the row of each element, or -1. Those of a head ascend, and are in tiles of its own.
      tile_heads: int32 [B, N], the head of each tile of rows; tiles of a head stand side by side.
      tile: rows of a tile.
      platform, interpret: as in `flash_attention`; there is a kernel for "tpu" alone, elsewhere XLA's gather serves.

    Differentiable (reverse mode) in x: `unpack_rows` is its transpose, and it that of `unpack_rows`.

    Raises:
      ValueError: no kernel for the platform.
    """
    platform_of("pack_rows", platform, interpret, ("tpu",))
    return moving.packed(tile, tuning.vmem_limit(tuning.kind()), interpret, x, place, tile_heads)


def unpack_rows(
    x: jax.Array,
    place: jax.Array,
    tile_heads: jax.Array,
    tile: int,
    *,
    platform: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Elements [B, M, L, d]: the row of x [B, N * tile, d] that is each element's place; 0 where it has none.

    As in `pack_rows` in all else.
    """
    platform_of("unpack_rows", platform, interpret, ("tpu",))
    return moving.unpacked(tile, tuning.vmem_limit(tuning.kind()), interpret, x, place, tile_heads)


def most_elements(width: int, itemsize: int) -> int:
    """How many elements of a head stand in fast memory, as `pack_rows` and `unpack_rows` need them to."""
    return (tuning.vmem_limit(tuning.kind()) - _REST) // moving.bytes_needed(1, width, itemsize)


def row_tile(kind: str, rows: int, heads: int, width: int, *, platform: str = "tpu") -> int:
    """How many rows a tile best has, for `rows` rows of `heads` key heads, of which each leaves a tile partly empty.

    Args:
      kind: of the devices, as of `tuning.kind`.
      width: the larger of those of keys and values.
      platform: as in `flash_attention`. On "cuda" the least is best: a longer tile is several blocks of threads all the
        same, and leaves more rows empty.
    """
    if platform == "cuda":
        return gpu.packed_rows(gpu.default_blocks(width, width), width, width)
    return tuning.routed_rows(kind, rows, heads)


def kernel_runs(q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct, tile: int) -> dict[str, int]:
    """How often a forward and a backward run each kernel on TPU, by name, for tiles of so many rows."""
    kind = tuning.kind()
    packed = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), q.dtype)
    runs = tpu_kernel_runs(packed, k, v, tuning.routed_blocks(kind, tile, k.shape[1]))
    return {_own_name(name): count for name, count in runs.items()}


def gpu_kernel_widths(d: int, e: int) -> dict[str, int]:
    """As of `flash_attention`, for a pair of a row and a key of its head."""
    return {_own_name(name): width for name, width in gpu.kernel_widths(d, e).items()}


def _own_name(name: str) -> str:
    return name.replace("flash", "routed")


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
