"""A chunk inside a kernel: what its positions take from each other and from the states around them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.linear_recurrence.plan import Plan
from kernels_pallas.mosaic import product

_NEVER = -1e9  # log2 of a weight of 0
_TILE = 16  # sublanes of bfloat16
_PARTS = 3  # bfloat16 numbers that a float32 is the sum of

Unit = Generator[None, None, None]
_DONE = object()


class Weights(NamedTuple):
    """How much passes: of pairs [C, C], of positions and of the whole chunk, the same in all lanes.

    Attributes:
      pairs: of a key for a query, queries along sublanes; in the backward transposed, keys along sublanes.
      read: [C, at least d and e], of the state before the chunk for a query.
      write: as `read`, of a key in the state after it.
      carry: [1, as many, or 1], of the state before in the state after.
    """

    pairs: jax.Array
    read: jax.Array
    write: jax.Array
    carry: jax.Array


class Masks(NamedTuple):
    """Where documents allow it: None, everywhere.

    Attributes:
      pairs: as in `Weights`.
      read, write: [C, 1].
      carry: [1, 1].
      begins: [C, 1], first position of the document of each.
    """

    pairs: jax.Array
    read: jax.Array | None = None
    write: jax.Array | None = None
    carry: jax.Array | None = None
    begins: jax.Array | None = None


def lockstep(units: Iterable[Unit]) -> None:
    """Heads phase by phase, as the compiler keeps to the program's order: one's latency is covered by the others."""
    running = list(units)
    while running:
        running = [unit for unit in running if next(unit, _DONE) is not _DONE]


def staggered(chunks: Sequence[Sequence[Unit]], phases: int, ahead: int) -> None:
    """Chunk after chunk, heads in lockstep through so many phases; the first `ahead` of a chunk come before the last of
    the chunk before: where heads share scores, too little happens in these to cover what they wait for."""

    def advance(units: Sequence[Unit], times: int) -> bool:
        """Whether the last time all ended."""
        ended = False
        for _ in range(times):
            ended = all([next(unit, _DONE) is _DONE for unit in units])
        return ended

    advance(chunks[0], ahead)
    for these, following in zip(chunks, [*chunks[1:], ()], strict=True):
        advance(these, phases - 1 - ahead)
        advance(following, ahead)
        if not advance(these, 1):
            raise ValueError(f"staggered: phases={phases}, and a chunk has more")


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def over_lanes(x: jax.Array) -> jax.Array:
    """The sum over the last axis, [C, 1]."""
    return jnp.sum(x, axis=1, keepdims=True)


def total(x: jax.Array) -> jax.Array:
    """The sum of all, [1, 1]."""
    return over_sublanes(over_lanes(x))


def over_sublanes(x: jax.Array) -> jax.Array:
    """The sum over the first axis, [1, w]."""
    return jnp.sum(x, axis=0, keepdims=True)


def meets(row: jax.Array, col: jax.Array, backward: bool) -> jax.Array:
    """For pairs [C, C] of two positions the size of the blocks at whose joint they meet; 0 where none is passed on."""
    later, earlier = (col, row) if backward else (row, col)
    apart = row ^ col
    for shift in (1, 2, 4):
        apart |= lax.shift_right_logical(apart, shift)
    return jnp.where(later > earlier, apart ^ lax.shift_right_logical(apart, 1), 0)


class Step:
    """A step of the grid: a block of positions of a group of heads.

    Attributes:
      r: the kernel's arrays by name.
      block: number of the block of positions.
      backward: whether pairs are transposed.
      meets: where channels have their own decays, `meets` of pairs.
    """

    def __init__(self, plan: Plan, r: dict[str, Any], *, heads: int, backward: bool):
        self.plan, self.r, self.heads, self.backward = plan, r, heads, backward
        step = pl.program_id(2)  # not inside `pl.when`, where the interpreter does not know it
        self.first, self.last = step == 0, step == plan.blocks - 1
        self.block = plan.blocks - 1 - step if backward else step
        self.first_head = pl.program_id(1) * heads
        C = plan.sizes.chunk
        row, col = iota((C, C), 0), iota((C, C), 1)
        self.row, self.col, self.lower = row, col, row >= col
        if plan.channels:
            self.meets = meets(row, col, backward)
        self._masks: dict[int, Masks] = {}
        self._of_all: dict[tuple[str, int], jax.Array] = {}
        self._weights: dict[tuple[int, int], Weights] = {}

    def rows(self, m: int) -> slice:
        """Positions of chunk `m` in the block."""
        return slice(m * self.plan.sizes.chunk, (m + 1) * self.plan.sizes.chunk)

    def start(self, m: int):
        """First position of chunk `m`."""
        return (self.block * self.plan.sizes.chunks + m) * self.plan.sizes.chunk

    def place(self, name: str, m: int, h: int) -> tuple[Any, ...]:
        """Where a chunk of a head is."""
        if self.plan.shared and name in ("q", "k"):
            return 0, self.rows(m)
        width = self.r[name].shape[2] // self.heads
        return 0, self.rows(m), slice(h * width, (h + 1) * width)

    def load(self, name: str, m: int, h: int, *, masked: bool = True) -> jax.Array:
        """[C, w] of a head; if `masked`, zeros behind the last position, where anything may be, NaN too."""
        x = self.r[name][self.place(name, m, h)]
        if self.plan.ragged and masked:
            x = jnp.where(iota((x.shape[0], 1), 0) < self.plan.shape[1] - self.start(m), x, 0)
        return x

    def keys(self, name: str, m: int, h: int, *, masked: bool = True) -> jax.Array:
        """[C, d]: queries or keys of a head as the products read them."""
        x = self.load(name, m, h, masked=masked)
        if self.plan.features is None:
            return x
        first, second = self._factors(x)
        return (first * second * self.r["rest"][2:3]).astype(x.dtype)

    def _factors(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[C, d] float32: of every feature, unscaled. Products with a single 1 in a column are exact."""
        pick = lambda n, name: product(x, self.r[name][...], 1, 0) + self.r["rest"][n : n + 1]
        return pick(0, "ones_first"), pick(1, "ones_second")

    def scores(self, m: int, a: jax.Array, b: jax.Array) -> jax.Array:
        """[C, C], rows of a by rows of b, of chunk `m`; taken by the first head alone where all share them."""
        if not self.plan.shared:
            return product(a, b, 1, 1)
        if ("scores", m) not in self._of_all:
            self._of_all["scores", m] = product(a, b, 1, 1)
        return self._of_all["scores", m]

    def store_keys(self, name: str, m: int, h: int, dx: jax.Array) -> None:
        """Writes the gradient of queries or keys, from that of what the products read; where heads share them, of the
        whole group, with its last head."""
        if self.plan.shared:
            if self.plan.shape[2] % self.heads:  # the last group has heads that are none, of any numbers
                dx = jnp.where(self.first_head + h < self.plan.shape[2], dx, 0)
            self._of_all[name, m] = self._of_all[name, m] + dx if h else dx
            if h == self.heads - 1:
                self.r[f"d{name}"][0, 0, self.rows(m)] = self._of_all.pop((name, m))
            return
        if self.plan.features is not None:
            x, dx = self.load(name, m, h), dx * self.r["rest"][2:3]
            first, second = self._factors(x)
            narrow = lambda factor, table: product((dx * factor).astype(x.dtype), self.r[table][...], 1, 1)
            dx = narrow(second, "ones_first") + narrow(first, "ones_second")
        self.store(f"d{name}", m, h, dx)

    def store(self, name: str, m: int, h: int, x: jax.Array) -> None:
        """The opposite of `load`."""
        self.r[name][self.place(name, m, h)] = x.astype(self.r[name].dtype)

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

    def masks(self, m: int) -> Masks:
        """Of chunk `m`."""
        if m not in self._masks:
            self._masks[m] = self._make_masks(m)
        return self._masks[m]

    def _make_masks(self, m: int) -> Masks:
        if not self.plan.documents:
            return Masks(self.row <= self.col if self.backward else self.lower)
        start, own = self.start(m), self.r["starts"][0, m]
        begins, newest = over_lanes(jnp.where(self.row == self.col, own, 0)), own[:, -1:]
        if self.backward:
            pairs = (self.row <= self.col) & (self.row + start >= own)
        else:
            pairs = self.lower & (self.col + start >= begins)
        write = iota((own.shape[1], 1), 0) + start >= newest
        return Masks(pairs, begins < start, write, newest < start, begins)

    def weights(self, m: int, h: int) -> Weights:
        """Of chunk `m` and head `h`."""
        if (m, h) not in self._weights:
            make = self._constant if self.plan.constant else self._by_position
            self._weights[m, h] = make(m, h, self.masks(m))
        return self._weights[m, h]

    def _constant(self, m: int, h: int, masks: Masks) -> Weights:
        pairs, read, write = (self.r[name][h] for name in ("pairs", "read", "write"))
        carry = read[-1:]
        if self.plan.ragged:  # the last chunk ends with the last position
            log, steps = self._log(h), self._steps(m)
            left = steps - 1 - iota(write.shape, 0)
            write = jnp.exp2(jnp.maximum(left, 0).astype(jnp.float32) * log)
            carry = jnp.exp2(jnp.full(carry.shape, steps.astype(jnp.float32) * log))
        if self.plan.documents:
            kept = lambda mask, x: jnp.where(mask, x, 0)
            pairs, read, write, carry = map(kept, masks[:4], (pairs, read, write, carry))
        return Weights(pairs, read, write, carry)

    def _by_position(self, m: int, h: int, masks: Masks) -> Weights:
        C, wide, row = self.plan.sizes.chunk, max(self.plan.shape[3:]), self.r["logs"][0, h, m]
        columns = self.columns(m, h, max(C, wide))
        passed = row - columns[:, :C] if self.backward else columns[:, :C] - row
        pairs = jnp.exp2(jnp.where(masks.pairs, passed, _NEVER))
        total, columns = row[:, -1:], columns[:, :wide]
        read, left, carry = jnp.exp2(columns), total - columns, jnp.exp2(total)
        if self.plan.documents:
            read, left = jnp.where(masks.read, read, 0), jnp.where(masks.write, left, _NEVER)
            carry = jnp.where(masks.carry, carry, 0)
        return Weights(pairs, read, jnp.exp2(left), carry)

    def columns(self, m: int, h: int, width: int) -> jax.Array:
        """Sums of the log decays, [C, width]."""
        return self.spread(self.r["logs"][0, h, m], width)

    def store_decay(self, m: int, h: int, passed: jax.Array, behind: jax.Array) -> None:
        """Writes the gradient of the log decays: what is asked for from a position on, of what was written before it.

        Args:
          passed: [C, w], what a position asks for of what is before it, less what is asked for of what it writes.
          behind: [1, 1], what is asked for behind the chunk.
        """
        C = self.plan.sizes.chunk
        each = over_lanes(passed) + jnp.where(iota((C, 1), 0) == C - 1, behind, 0)
        mask = self.lower
        if self.plan.documents:  # rows: later positions; the first of a document carries nothing over
            first, here = self.r["starts"][0, m], self.col + self.start(m)
            mask &= (here >= self.masks(m).begins) & (here != first)
        self.r["dlogs"][0, h, m] = over_sublanes(jnp.where(mask, each, 0))

    def read_row(self, m: int, h: int) -> jax.Array:
        """`read` as a row, [1, C]."""
        t = iota((1, self.plan.sizes.chunk), 1)
        weight = jnp.exp2((t + 1).astype(jnp.float32) * self._log(h) if self.plan.constant else self.r["logs"][0, h, m])
        return jnp.where(self.r["starts"][0, m] < self.start(m), weight, 0) if self.plan.documents else weight

    def write_row(self, m: int, h: int) -> jax.Array:
        """`write` as a row, [1, C]."""
        t = iota((1, self.plan.sizes.chunk), 1)
        if self.plan.constant:
            left = jnp.maximum(self._steps(m) - 1 - t, 0).astype(jnp.float32) * self._log(h)
        else:
            row = self.r["logs"][0, h, m]
            left = row[:, -1:] - row
        weight = jnp.exp2(left)
        if not self.plan.documents:
            return weight
        return jnp.where(t + self.start(m) >= self.r["starts"][0, m][:, -1:], weight, 0)

    def _log(self, h: int):
        """A head's constant decay."""
        return self.r["logs"][self.first_head + h]

    def _steps(self, m: int):
        """Positions of the chunk: the last ends with the last position."""
        return jnp.clip(self.plan.shape[1] - self.start(m), 0, self.plan.sizes.chunk)

    def spread(self, row: jax.Array, width: int) -> jax.Array:
        """A row [1, C] as columns, [C, width], exactly."""
        return self.spread_all([row], width)[0]

    def spread_all(self, rows: list[jax.Array], width: int) -> list[jax.Array]:
        """Up to 5 rows [1, C] as columns, [C, width] each, exactly.

        By the matrix unit, as the product of their bfloat16 parts, three of each, with ones: sums over lanes and
        broadcasts along them are slower.
        """
        sublane, half = iota((_TILE, rows[0].shape[1]), 0), jnp.bfloat16
        parts = jnp.zeros(sublane.shape, jnp.float32)
        for n, rest in enumerate(rows):
            for i in range(_PARTS):
                part = rest.astype(half).astype(jnp.float32)
                parts, rest = jnp.where(sublane == _PARTS * n + i, part, parts), rest - part
        at = iota((_TILE, width), 0)
        own = [(at >= _PARTS * n) & (at < _PARTS * (n + 1)) for n in range(len(rows))]
        ones = jnp.concatenate([x.astype(jnp.float32) for x in own], axis=1).astype(half)
        out = product(parts.astype(half), ones, 0, 0)
        return [out[:, n * width : (n + 1) * width] for n in range(len(rows))]

    def times_rows(self, row: jax.Array, x: jax.Array, axis: int) -> jax.Array:
        """The product of a row with a matrix over an axis of it, a row, as the matrix unit does it."""
        return product(jnp.broadcast_to(row, (_TILE, row.shape[1])).astype(x.dtype), x, 1, axis)[:1]
