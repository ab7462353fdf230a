"""Rows moved into tiles and back on TPU, as products with a matrix of zeros and ones.

An element `j` of a key head has a place, the number of the packed row that is its, or -1. Within a head places ascend,
so that the elements of a tile of rows lie in few chunks, side by side. XLA gathers row by row, some three times slower.
Shapes: `B` sequences, `M` key heads, `L` elements of each, `N` tiles of `R` rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat
from kernels_pallas.mosaic import product

CHUNK = 256


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def packed(rows: int, vmem: int, interpret: Any, x_BMLd, place_BML, heads_BN):
    """[B, N * R, d]: the element whose place each row is; 0 where there is none. `rows`: R."""
    return _packed(rows, vmem, interpret, x_BMLd, place_BML, heads_BN)


def _packed(rows: int, vmem: int, interpret: Any, x_BMLd, place_BML, heads_BN):
    (B, *_, d), N = x_BMLd.shape, heads_BN.shape[1]
    x, place = _whole_chunks(x_BMLd, place_BML)

    def kernel(table, x, place, out, acc):
        b, i = pl.program_id(0), pl.program_id(1)
        at = (b * N + i) * 3
        acc[...] = jnp.zeros_like(acc)

        def turn(c, carry):
            keys = pl.ds(pl.multiple_of(c * CHUNK, CHUNK), CHUNK)
            row = i * rows + lax.broadcasted_iota(jnp.int32, (rows, CHUNK), 0)
            ones = (place[0:1, keys] == row).astype(jnp.float32).astype(x.dtype)
            acc[...] += product(ones, x[keys, :], 1, 0)
            return carry

        lax.fori_loop(table[at], table[at + 1], turn, 0)
        out[...] = acc[...].astype(out.dtype)

    out = jax.ShapeDtypeStruct((B, N * rows, d), x.dtype)
    return _call(kernel, out, _row_spec(rows, d), x, place, heads_BN, rows, vmem, interpret, "rows_packed")


def _packed_forward(rows, vmem, interpret, x, place, heads):
    return _packed(rows, vmem, interpret, x, place, heads), (place, heads)


def _packed_backward(rows, vmem, interpret, residuals, dout):
    return _unpacked(rows, vmem, interpret, dout, *residuals), None, None


packed.defvjp(_packed_forward, _packed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def unpacked(rows: int, vmem: int, interpret: Any, x_BRd, place_BML, heads_BN):
    """[B, M, L, d]: the row that is each element's place; 0 where it has none. `rows`: R."""
    return _unpacked(rows, vmem, interpret, x_BRd, place_BML, heads_BN)


def _unpacked(rows: int, vmem: int, interpret: Any, x_BRd, place_BML, heads_BN):
    (B, M, L), N, d = place_BML.shape, heads_BN.shape[1], x_BRd.shape[2]
    _, place = _whole_chunks(None, place_BML)
    whole = place.shape[3]

    def kernel(table, x, place, out):
        b, i = pl.program_id(0), pl.program_id(1)
        at = (b * N + i) * 3

        @pl.when((i == 0) | (table[at + 2] != table[jnp.maximum(at - 3, 0) + 2]))
        def _():
            out[...] = jnp.zeros_like(out)

        def turn(c, carry):
            keys = pl.ds(pl.multiple_of(c * CHUNK, CHUNK), CHUNK)
            row = i * rows + lax.broadcasted_iota(jnp.int32, (CHUNK, rows), 1)
            ones = (place[:, keys].T[:, 0:1] == row).astype(jnp.float32).astype(x.dtype)
            out[keys, :] += product(ones, x[...], 1, 0).astype(out.dtype)
            return carry

        lax.fori_loop(table[at], table[at + 1], turn, 0)

    out = jax.ShapeDtypeStruct((B, M, whole, d), x_BRd.dtype)
    spec = pl.BlockSpec((None, None, whole, d), lambda b, i, table: (b, table[(b * N + i) * 3 + 2], 0, 0))
    found = _call(kernel, out, spec, x_BRd, place, heads_BN, rows, vmem, interpret, "rows_unpacked")
    return jnp.where(place_BML[..., None] >= 0, found[:, :, :L], 0)  # nothing is written of a head without tiles


def _unpacked_forward(rows, vmem, interpret, x, place, heads):
    return _unpacked(rows, vmem, interpret, x, place, heads), (place, heads)


def _unpacked_backward(rows, vmem, interpret, residuals, dout):
    place, heads = residuals
    dout = jnp.where(place[..., None] >= 0, dout, 0)
    return _packed(rows, vmem, interpret, dout, place, heads), None, None


unpacked.defvjp(_unpacked_forward, _unpacked_backward)


def bytes_needed(length: int, width: int, itemsize: int) -> int:
    """Of fast memory, for heads of so many elements."""
    return 2 * length * (-(-width // 128) * 128 * itemsize + 8 * 4)


def _row_spec(rows: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, rows, width), lambda b, i, *_: (b, i, 0))


def _whole_chunks(x_BMLd, place_BML):
    """Both with a length of whole chunks; places in 8 equal rows."""
    behind = -place_BML.shape[2] % CHUNK
    place = jnp.pad(place_BML, ((0, 0), (0, 0), (0, behind)), constant_values=-1)[:, :, None]
    place = jnp.broadcast_to(place, (*place.shape[:2], 8, place.shape[3]))
    return None if x_BMLd is None else jnp.pad(x_BMLd, ((0, 0), (0, 0), (0, behind), (0, 0))), place


def _chunks(place_BM8L: jax.Array, heads_BN: jax.Array, rows: int) -> jax.Array:
    """Which chunks of its head each tile's rows come from, and the head: int32 [B, N, 3]."""
    chunks = place_BM8L[:, :, 0].reshape(*place_BM8L.shape[:2], -1, CHUNK)
    most = jnp.iinfo(jnp.int32).max
    high = lax.cummax(chunks.max(-1), axis=2)
    low = lax.cummin(jnp.where(chunks < 0, most, chunks).min(-1), axis=2, reverse=True)
    of_tile = lambda x: jnp.take_along_axis(x, heads_BN[..., None], axis=1)  # [B, N, chunks]
    first_row = rows * jnp.arange(heads_BN.shape[1], dtype=jnp.int32)[:, None]
    first = (of_tile(high) < first_row).sum(-1, dtype=jnp.int32)
    end = (of_tile(low) < first_row + rows).sum(-1, dtype=jnp.int32)
    return jnp.stack([first, jnp.maximum(first, end), heads_BN.astype(jnp.int32)], -1)


def _call(kernel, out, out_spec, x, place, heads_BN, rows: int, vmem: int, interpret: Any, name: str) -> jax.Array:
    B, N = heads_BN.shape
    of_head = lambda b, i, table: (b, table[(b * N + i) * 3 + 2], 0, 0)
    x_spec = _row_spec(rows, x.shape[2]) if x.ndim == 3 else pl.BlockSpec((None, None, *x.shape[2:]), of_head)
    run = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N),
            in_specs=[x_spec, pl.BlockSpec((None, None, *place.shape[2:]), of_head)],
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM((rows, x.shape[-1]), jnp.float32)] * (x.ndim == 4),
        ),
        out_shape=out,
        compiler_params=compat.tpu_params(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
        name=name,
        interpret=interpret,
    )
    with jax.named_scope("routed_attention"):
        return run(_chunks(place, heads_BN, rows).reshape(-1), x, place)
