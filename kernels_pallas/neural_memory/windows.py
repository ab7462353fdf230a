"""Rows of a segment in float32, where a group's may begin at any: packed ones could be read in whole tiles alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.neural_memory.call import Call
from kernels_pallas.neural_memory.group import F32


def of_heads(call: Call, ref: Any, h: int) -> jax.Array:
    """Rows of a head in a block."""
    d = call.widths[0]
    return ref[0, :, h * d : (h + 1) * d] if call.flat() else ref[0, h]


def put_heads(call: Call, ref: Any, h: int, rows: jax.Array) -> None:
    """Writes a block's rows of a head."""
    d = call.widths[0]
    if call.flat():
        ref[0, :, h * d : (h + 1) * d] = rows.astype(ref.dtype)
    else:
        ref[0, h] = rows.astype(ref.dtype)


def copied(semaphore: Any, pairs: list[tuple[Any, Any]]) -> None:
    """Copies each source to its target, between main and fast memory, and waits for all.

    jax's `sync_copy` allocates a semaphore for each, which jax 0.12 lowers only where a TPU is at hand.
    """
    copies = [pltpu.make_async_copy(source, target, semaphore) for source, target in pairs]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


def rows_block(call: Call, heads: int, rows: int, index: Any) -> pl.BlockSpec:
    """A block of so many rows, `index(i)` of them, of q, k, v and what is like them (`laid_out`)."""
    d = call.widths[0]
    if call.flat():
        return pl.BlockSpec((1, rows, heads * d), lambda b, h, i: (b, index(i), h))
    return pl.BlockSpec((1, heads, rows, d), lambda b, h, i: (b, h, index(i), 0))


def gates_block(lanes: int, rows: int, index: Any) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, rows, lanes), lambda b, h, i: (b, h, index(i), 0))


def row_scalars(n: int) -> pl.BlockSpec:
    """A row's integers [B, 1, n]."""
    return pl.BlockSpec((1, 1, n), lambda b, h, i: (b, 0, 0), memory_space=pltpu.SMEM)


def laid_out(call: Call, x_BTHd: jax.Array) -> jax.Array:
    """[B, length, H d], or [B, H, length, d]; zeros behind."""
    x = jnp.pad(x_BTHd, ((0, 0), (0, call.length - x_BTHd.shape[1]), (0, 0), (0, 0)))
    return x.reshape(*x.shape[:2], -1) if call.flat() else x.swapaxes(1, 2)


def shape_of(call: Call, dtype: Any) -> jax.ShapeDtypeStruct:
    """Of what `laid_out` gives."""
    B, T, H, d = call.batch, call.length, call.heads, call.widths[0]
    return jax.ShapeDtypeStruct((B, T, H * d) if call.flat() else (B, H, T, d), dtype)


def as_given(call: Call, x: jax.Array, length: int) -> jax.Array:
    """The inverse of `laid_out`."""
    x = x.reshape(*x.shape[:2], call.heads, -1) if call.flat() else x.swapaxes(1, 2)
    return x[:, :length]


def group_gates(call: Call, window: Any, offset: jax.Array, taken: jax.Array, first: jax.Array):
    """Gates [R, 3 hb] of a group, 0 behind its last position; where each document begins in it [R, 1]; whether there.

    `first`: the group's first position; the last column of the window has those of documents.
    """
    R = call.rows
    row = jax.lax.broadcasted_iota(jnp.int32, (R, 1), 0)
    gates = jnp.where(row < taken, window[pl.ds(offset, R), :], 0)
    begin = jnp.where(row < taken, gates[:, -1:] - first.astype(F32), 0)
    return gates[:, :-1], begin, begin == row.astype(F32)
