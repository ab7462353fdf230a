"""What both sweeps are told, and how their rows of numbers are laid out and multiplied.

A number per position is a row along lanes: of one head in a tile of 8 rows that a product takes, of all heads of a grid
step stacked, so that arithmetic on them costs next to nothing. A product reads rows as two bfloat16 halves each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic
from kernels_pallas.mosaic import Slots

F32 = jnp.float32
NN, NT, TN = (1, 0), (1, 1), (0, 0)  # axes that a product is over
# Rows of a head's two tiles of vectors: [sources, emitted, ones, -, -] times queries, [sinks, absorbed, ones, -, -]
# times keys. The backward keeps gradients in the last two: of [absorbed, sinks] and of [emitted, sources].
PLAIN, WEIGHTED, ONES, D_WEIGHTED, D_PLAIN = range(5)
# Running sums of numbers: of a key's features, a query's, both weighted, and of the competition's exponentials.
_LANES = 128
CARRIED = ("keys", "queries", "weighted keys", "weighted queries", "rivals")


@dataclasses.dataclass(frozen=True)
class Rule:
    """As in `flow_attention`."""

    competition: bool = True
    allocation: bool = True
    clip: float = 5.0
    epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static.

    Attributes:
      heads: of all; `group` of them in a grid step, in lockstep.
      width: of keys before they were padded to `d` lanes.
      chunk, chunks: positions in a chunk, and chunks in a grid step.
      steps: grid steps of a sequence of `length` positions.
      packed: whether documents end within a row.
      given: whether there is a state before the first position.
      save: whether the forward keeps what the backward needs.
    """

    rule: Rule
    batch: int
    length: int
    heads: int
    group: int
    width: int
    d: int
    e: int
    chunk: int
    chunks: int
    dtype: Any
    packed: bool
    given: bool
    save: bool = False

    @property
    def block(self) -> int:
        """Positions of a grid step."""
        return self.chunk * self.chunks

    @property
    def steps(self) -> int:
        return -(-self.length // self.block)

    @property
    def ragged(self) -> bool:
        return self.length % self.block > 0

    @property
    def rows(self) -> int:
        """Rows of a stack of the group's heads: whole registers."""
        return -(-self.group // 8) * 8

    @property
    def saved(self) -> tuple[str, ...]:
        """Numbers per position that the backward reads."""
        names = {"inflow": True, "outflow": self.rule.allocation, "received": self.rule.allocation,
                 "outgoing": self.rule.competition, "rivals": self.rule.competition}  # fmt: skip
        return tuple(name for name, used in names.items() if used)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def product(a, b, axes=NN):
    """As `mosaic.product`."""
    return mosaic.product(a, b, *axes)


def _halves(rows, dtype) -> list[jax.Array]:
    high = rows.astype(dtype).astype(F32)
    return [high, rows - high]


def rows_product(rows, b, axes=NN):
    """float32 rows [8 n, .] times b of the narrow dtype."""
    if b.dtype == F32:
        return product(rows, b, axes)
    both = product(jnp.concatenate(_halves(rows, b.dtype), 0).astype(b.dtype), b, axes)
    return both[: rows.shape[0]] + both[rows.shape[0] :]


def product_and_rows(a, rows, b, axes=NN):
    """`a` and float32 rows [8, .] times the same b."""
    parts = [rows] if b.dtype == F32 else _halves(rows, b.dtype)
    out = product(jnp.concatenate([a, jnp.concatenate(parts, 0).astype(b.dtype)], 0), b, axes)
    n = a.shape[0]
    return out[:n], out[n : n + 8] if len(parts) == 1 else out[n : n + 8] + out[n + 8 :]


def left(rows, dtype):
    """float32 rows [8, C] for `product(left, right, TN)`, their sum of outer products."""
    if dtype == F32:
        return rows
    high, low = _halves(rows, dtype)
    return jnp.concatenate([high, low, high, jnp.zeros_like(high)], 0).astype(dtype)


def right(rows, dtype):
    """As `left`."""
    if dtype == F32:
        return rows
    high, low = _halves(rows, dtype)
    return jnp.concatenate([high, high, low, jnp.zeros_like(high)], 0).astype(dtype)


def row_sums(x):
    """Over lanes, [8 or 16, rows of x], each row the same: by the matrix unit."""
    return product(jnp.ones((8 if x.dtype == F32 else 16, x.shape[1]), x.dtype), x, NT)


def lane_sums(plan: Plan, parts: Sequence[jax.Array]):
    """Sums over lanes of each head's [C, .], stacked: [rows, C]; by the cross-lane unit."""
    head = iota((plan.chunk, _LANES), 1)
    out = jnp.zeros(head.shape, F32)
    for h, part in enumerate(parts):
        out = jnp.where(head == h, part.sum(1, keepdims=True), out)
    return out.T[: plan.rows]


def stack(plan: Plan, parts: Sequence[jax.Array], i: int = 0):
    """Row `i` of each head's tile, [rows, C]."""
    head = iota((plan.rows, parts[0].shape[1]), 0)
    out = jnp.broadcast_to(parts[0][i : i + 1], head.shape)
    for h, part in enumerate(parts[1:], 1):
        out = jnp.where(head == h, part[i : i + 1], out)
    return out


def tile(h: int, entries: dict[int, Any], like) -> jax.Array:
    """[8, C]: in row `i` head `h` of the stack `entries[i]`, or the same number at all positions."""
    row = iota((8, like.shape[1]), 0)
    out = jnp.zeros((8, like.shape[1]), F32)
    for i, x in entries.items():
        out = jnp.where(row == i, x if isinstance(x, float) else x[h : h + 1], out)
    return out


def repeated(x, h: int):
    """Head `h` of a stack in all 8 rows of a tile."""
    return jnp.broadcast_to(x[h : h + 1], (8, x.shape[1]))


@dataclasses.dataclass
class Place:
    """Where a chunk's positions stand. None: everywhere, or everything.

    Attributes:
      count: [1, C], N: the position's number in its document.
      valid: [1, C] bool, within the sequence; `valid_column` [C, 1].
      follows: [1, C], 1 where the document began before the chunk; `follows_column` [C, 1] bool.
      written: [1, C], 1 where the document is the chunk's last; `written_column` [C, 1] bool.
      carry: 1 if the whole chunk follows, else 0.
      first: 1 if the chunk's first position follows, else 0.
    """

    count: jax.Array
    valid: jax.Array | None = None
    valid_column: jax.Array | None = None
    follows: jax.Array | None = None
    follows_column: jax.Array | None = None
    written: jax.Array | None = None
    written_column: jax.Array | None = None
    carry: jax.Array | None = None
    first: jax.Array | None = None


def place(plan: Plan, r: dict[str, Any], scalars, b, step, m: int) -> Place:
    """The place of chunk `m` of a grid step; of packed rows the tables of pairs are filled for it."""
    C = plan.chunk
    index = step * plan.chunks + m
    start, lane, row = index * C, iota((1, C), 1), iota((C, 1), 0)
    out = Place(jnp.zeros((), F32))
    if plan.ragged:
        out.valid, out.valid_column = lane + start < plan.length, row + start < plan.length
    if not plan.packed:
        out.count = (lane + (start + 1 + scalars[b])).astype(F32)
        return out
    at = (b * plan.steps * plan.chunks + index) * 2
    prefix, suffix = scalars[at], scalars[at + 1]
    out.follows, out.follows_column = (lane < prefix).astype(F32), row < prefix
    out.written, out.written_column = (lane >= suffix).astype(F32), row >= suffix
    out.carry, out.first = (prefix == C).astype(F32), (prefix > 0).astype(F32)
    begin, last, count = (r["marks"][0, i : i + 1, m * C : (m + 1) * C] for i in range(3))
    out.count = count.astype(F32)
    fill_tables(plan, r, iota((C, C), 0) + start <= last, iota((C, C), 0) + start >= begin)
    return out


def fill_tables(plan: Plan, r: dict[str, Any], not_after=True, not_before=True) -> None:
    """Pairs of one document, [i, j]: j <= i ("low") and i <= j ("up")."""
    i, j = iota((plan.chunk, plan.chunk), 0), iota((plan.chunk, plan.chunk), 1)
    r["low"][...] = jnp.where((j <= i) & not_after, 1.0, 0.0)
    r["up"][...] = jnp.where((i <= j) & not_before, 1.0, 0.0)


def times(x, weight):
    """`x * weight`; None: 1."""
    return x if weight is None else x * weight


def kept(where, x, other=0.0):
    """`x` where `where` holds; None: everywhere. Selects, as what is hidden may be NaN."""
    return x if where is None else jnp.where(where, x, jnp.asarray(other, x.dtype))


def features(plan: Plan, r: dict[str, Any], p: Place, name: str, m: int) -> list[jax.Array]:
    """Each head's part of a chunk of [1, positions, heads * width], 0 behind the end."""
    C, width = plan.chunk, r[name].shape[2] // plan.group
    at = slice(m * C, (m + 1) * C)
    return [kept(p.valid_column, r[name][0, at, h * width : (h + 1) * width]) for h in range(plan.group)]


class Blocks(Slots):
    """A kernel's arrays, and the bytes that their blocks move.

    A block is [1, ...] of a step (`by_step`), or of a sequence and group of heads.
    """

    def __init__(self, plan: Plan, reverse: bool):
        super().__init__()
        self.plan, self.reverse, self.bytes = plan, reverse, 0

    def spec(self, kind: str, block: tuple[int, ...], itemsize: int) -> pl.BlockSpec:
        """Of a block: `wide` [B, T, H w], `marks` [B, ., T], `rows` [B, groups, ., T], `step` [B, steps, groups, ..],
        `state` [B, groups, ..]."""
        last, reverse = self.plan.steps - 1, self.reverse
        at = lambda n: last - n if reverse else n
        zeros = (0,) * (len(block) - 3)
        places: dict[str, Callable[..., tuple]] = {
            "wide": lambda b, h, n, *_: (b, at(n), h),
            "marks": lambda b, h, n, *_: (b, 0, at(n)),
            "rows": lambda b, h, n, *_: (b, h, 0, at(n)),
            "step": lambda b, h, n, *_: (b, at(n), h, *zeros),
            "state": lambda b, h, n, *_: (b, h, *zeros, 0),
        }
        size = itemsize
        for n in block:
            size *= n
        times = self.plan.batch * (self.plan.heads // self.plan.group)
        self.bytes += size * times * (1 if kind == "state" else self.plan.steps)
        return pl.BlockSpec(block, places[kind])

    def read(self, name: str, kind: str, array: jax.Array, block: tuple[int, ...]) -> None:
        """An input."""
        self.input(name, array, self.spec(kind, block, array.dtype.itemsize))

    def write(self, name: str, kind: str, shape: tuple[int, ...], dtype: Any, block: tuple[int, ...]) -> None:
        """An output."""
        self.output(name, shape, dtype, self.spec(kind, block, jnp.dtype(dtype).itemsize))

    def run(
        self, kernel: Callable[..., None], scalars: jax.Array, *, name: str, flops: float, vmem: int, interpret: Any
    ) -> dict[str, jax.Array]:
        """Outputs by name of `kernel(plan, refs by name, scalars)`."""
        plan, names = self.plan, self.names()
        exps = 3 * plan.batch * plan.heads * plan.length
        return self.call(
            lambda table, *refs: kernel(plan, dict(zip(names, refs, strict=True)), table),
            scalars,
            grid=(plan.batch, plan.heads // plan.group, plan.steps),
            semantics=("parallel", "parallel", "arbitrary"),
            name=name,
            scope="flow_attention",
            vmem=vmem,
            interpret=interpret,
            cost=pl.CostEstimate(flops=round(flops), transcendentals=exps, bytes_accessed=self.bytes),
        )
