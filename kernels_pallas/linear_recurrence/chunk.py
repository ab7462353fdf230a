"""A chunk inside a kernel: what its positions take from each other and from the states around them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.tpu_plan import product
from kernels_pallas.linear_recurrence.plan import Plan

_NEVER = -1e9  # log2 of a weight of 0
_TILE = 16  # sublanes of bfloat16
_PARTS = 3  # bfloat16 numbers that a float32 is the sum of

Unit = Generator[None, None, None]


def lockstep(units: Iterable[Unit]) -> None:
    """Heads phase by phase, as the compiler keeps to the program's order: one's latency is covered by the others."""
    for _ in zip(*units):
        pass


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def over_lanes(x: jax.Array) -> jax.Array:
    """The sum over the last axis, [C, 1]."""
    return jnp.sum(x, axis=1, keepdims=True)


def over_sublanes(x: jax.Array) -> jax.Array:
    """The sum over the first axis, [1, w]."""
    return jnp.sum(x, axis=0, keepdims=True)


class Step:
    """A step of the grid: a block of positions of a group of heads.

    Attributes:
      r: the kernel's arrays by name.
      block: number of the block of positions.
      wide: d or e, whichever is more.
      backward: whether pairs are transposed.
    """

    def __init__(self, plan: Plan, r: dict[str, Any], *, heads: int, backward: bool):
        self.plan, self.r, self.heads, self.backward = plan, r, heads, backward
        step = pl.program_id(2)  # not inside `pl.when`, where the interpreter does not know it
        self.first, self.last = step == 0, step == plan.blocks - 1
        self.block = plan.blocks - 1 - step if backward else step
        self.first_head = pl.program_id(1) * heads
        self.wide, C = max(plan.shape[3:]), plan.sizes.chunk
        row, col = iota((C, C), 0), iota((C, C), 1)
        self.row, self.col, self.lower = row, col, row >= col
        self._begins: dict[int, jax.Array] = {}

    def rows(self, m: int) -> slice:
        """Positions of chunk `m` in the block."""
        return slice(m * self.plan.sizes.chunk, (m + 1) * self.plan.sizes.chunk)

    def start(self, m: int):
        """First position of chunk `m`."""
        return (self.block * self.plan.sizes.chunks + m) * self.plan.sizes.chunk

    def load(self, name: str, m: int, h: int, *, masked: bool = True) -> jax.Array:
        """[C, w] of a head; if `masked`, zeros behind the last position, where anything may be, NaN too."""
        ref = self.r[name]
        width = ref.shape[2] // self.heads
        x = ref[0, self.rows(m), h * width : (h + 1) * width]
        if self.plan.ragged and masked:
            x = jnp.where(iota((x.shape[0], 1), 0) < self.plan.shape[1] - self.start(m), x, 0)
        return x

    def store(self, name: str, m: int, h: int, x: jax.Array) -> None:
        """The opposite."""
        ref = self.r[name]
        width = ref.shape[2] // self.heads
        ref[0, self.rows(m), h * width : (h + 1) * width] = x.astype(ref.dtype)

    def fill_tables(self) -> None:
        """Weights of constant decays, once for a sequence."""
        C = self.plan.sizes.chunk
        for h in range(self.heads if self.plan.constant else 0):
            log = self.r["logs"][self.first_head + h]
            apart = self.col - self.row if self.backward else self.row - self.col
            powers = jnp.exp2(jnp.maximum(apart, 0).astype(jnp.float32) * log)
            self.r["pairs"][h] = jnp.where(apart >= 0, powers, 0)
            t = iota(self.r["read"].shape[1:], 0)
            self.r["read"][h] = jnp.exp2((t + 1).astype(jnp.float32) * log)
            self.r["write"][h] = jnp.exp2((C - 1 - t).astype(jnp.float32) * log)

    # How much passes. What a chunk needs is made where it is used: registers are few.

    def pairs(self, m: int, h: int) -> jax.Array:
        """[C, C], of a key for a query, queries along sublanes; in the backward keys along sublanes."""
        mask = self.row <= self.col if self.backward else self.lower
        if self.plan.documents:
            allowed = (self.row, self.own) if self.backward else (self.col, self.begins)
            mask &= allowed[0] + self.start(m) >= allowed[1](m)
        if self.plan.constant:
            return jnp.where(mask, self.r["pairs"][h], 0) if self.plan.documents else self.r["pairs"][h]
        row = self.r["logs"][0, h, m]
        column = self.spread(row, row.shape[1])
        return jnp.exp2(jnp.where(mask, row - column if self.backward else column - row, _NEVER))

    def read(self, m: int, h: int) -> jax.Array:
        """[C, `wide`], of the state before the chunk for a query, the same in all lanes."""
        if not self.plan.constant:
            return self.spread(self.read_row(m, h), self.wide)
        weight = self.r["read"][h]
        return jnp.where(self.begins(m, self.wide) < self.start(m), weight, 0) if self.plan.documents else weight

    def write(self, m: int, h: int) -> jax.Array:
        """[C, `wide`], of a key in the state after the chunk, the same in all lanes."""
        if not self.plan.constant or self.plan.ragged:
            return self.spread(self.write_row(m, h), self.wide)
        weight = self.r["write"][h]
        if not self.plan.documents:
            return weight
        return jnp.where(iota(weight.shape, 0) + self.start(m) >= self.own(m)[:, -1:], weight, 0)

    def carry(self, m: int, h: int) -> jax.Array:
        """[1, `wide`], of the state before in the state after, the same in all lanes."""
        if not self.plan.constant:
            weight = jnp.broadcast_to(jnp.exp2(self.r["logs"][0, h, m][:, -1:]), (1, self.wide))
        elif self.plan.ragged:
            weight = jnp.exp2(jnp.full((1, self.wide), self._steps(m).astype(jnp.float32) * self._log(h)))
        else:
            weight = self.r["read"][h, -1:]
        return jnp.where(self.own(m)[:, -1:] < self.start(m), weight, 0) if self.plan.documents else weight

    def read_row(self, m: int, h: int) -> jax.Array:
        """`read` as a row, [1, C]."""
        t = iota((1, self.plan.sizes.chunk), 1)
        weight = jnp.exp2((t + 1).astype(jnp.float32) * self._log(h) if self.plan.constant else self.r["logs"][0, h, m])
        return jnp.where(self.own(m) < self.start(m), weight, 0) if self.plan.documents else weight

    def write_row(self, m: int, h: int) -> jax.Array:
        """`write` as a row, [1, C]."""
        t = iota((1, self.plan.sizes.chunk), 1)
        if self.plan.constant:
            left = jnp.maximum(self._steps(m) - 1 - t, 0).astype(jnp.float32) * self._log(h)
        else:
            row = self.r["logs"][0, h, m]
            left = row[:, -1:] - row
        weight = jnp.exp2(left)
        own = t + self.start(m) >= self.own(m)[:, -1:] if self.plan.documents else None
        return weight if own is None else jnp.where(own, weight, 0)

    def _log(self, h: int):
        """A head's constant decay."""
        return self.r["logs"][self.first_head + h]

    def _steps(self, m: int):
        """Positions of the chunk: the last ends with the last position."""
        return jnp.clip(self.plan.shape[1] - self.start(m), 0, self.plan.sizes.chunk)

    def own(self, m: int) -> jax.Array:
        """[1, C], first position of the document of each position."""
        return self.r["starts"][0, m]

    def begins(self, m: int, width: int | None = None) -> jax.Array:
        """`own` as columns, [C, C] or over so many lanes; the same for all heads."""
        if m not in self._begins:
            whole = self.spread(self.own(m).astype(jnp.float32), max(self.plan.sizes.chunk, self.wide))
            self._begins[m] = whole.astype(jnp.int32)
        return self._begins[m][:, : width or self.plan.sizes.chunk]

    def spread(self, row: jax.Array, width: int) -> jax.Array:
        """A row [1, C] as columns, [C, width], exactly.

        By the matrix unit, as the product of its three bfloat16 parts with ones: sums over lanes and broadcasts along
        them are slower.
        """
        sublane, half = iota((_TILE, row.shape[1]), 0), jnp.bfloat16
        parts = jnp.zeros(sublane.shape, jnp.float32)
        for n in range(_PARTS):
            part = row.astype(half).astype(jnp.float32)
            parts, row = jnp.where(sublane == n, part, parts), row - part
        ones = (iota((_TILE, width), 0) < _PARTS).astype(jnp.float32)
        return product(parts.astype(half), ones.astype(half), 0, 0)

    def times_rows(self, row: jax.Array, x: jax.Array, axis: int) -> jax.Array:
        """The product of a row with a matrix over an axis of it, a row, as the matrix unit does it."""
        return product(jnp.broadcast_to(row, (_TILE, row.shape[1])).astype(x.dtype), x, 1, axis)[:1]
