"""Arrays as the kernels take them: heads side by side, widths of whole registers, sums of a head in tiles."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.flow_attention.plan import D_PLAIN, D_WEIGHTED, F32, ONES, PLAIN, WEIGHTED, Plan, Rule

_LANES = 128
# Tile and row of a head's vectors, and of their gradients.
VECTORS = {"sources": (0, PLAIN), "emitted": (0, WEIGHTED), "sinks": (1, PLAIN), "absorbed": (1, WEIGHTED)}
GRADIENTS = {"absorbed": (0, D_WEIGHTED), "sinks": (0, D_PLAIN), "emitted": (1, D_WEIGHTED), "sources": (1, D_PLAIN)}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a grid step computes.

    Attributes:
      chunk: positions whose pairs are one product; on a TPU a multiple of 128.
      chunks: of a step; the backward keeps the state before each step.
      heads: of a step, at most; the largest divisor of the number of heads is taken.
    """

    chunk: int = 128
    chunks: int = 2
    heads: int = 8


class Sums(NamedTuple):
    """Over the positions of the current document, float32: `sources`, `sinks`, `emitted`, `absorbed` [B, H, d],
    `rivals` [B, H], `pairs` [B, H, d, e]; 0 where the rule needs them not."""

    sources: jax.Array
    sinks: jax.Array
    emitted: jax.Array
    absorbed: jax.Array
    rivals: jax.Array
    pairs: jax.Array


def plan_of(rule: Rule, blocks: Blocks, q: Any, v: Any, packed: bool, given: bool, save: bool = False) -> Plan:
    """For q [B, T, H, d] and v [B, T, H, e], arrays or their shapes."""
    (B, T, H, d), e = q.shape, v.shape[3]
    group = max(n for n in range(1, min(blocks.heads, H) + 1) if H % n == 0)
    wide = lambda w: -(-w // _LANES) * _LANES
    chunks = min(blocks.chunks, -(-T // blocks.chunk))
    return Plan(rule, B, T, H, group, d, wide(d), wide(e), blocks.chunk, chunks, q.dtype, packed, given, save)


def places(plan: Plan, documents_BT: jax.Array | None, count_B: jax.Array | None) -> tuple[Any, jax.Array]:
    """What tells the kernels where documents end.

    Marks [B, 3, positions]: where each position's document begins (-1: before the row), its last position, and the
    position's number in it; None where nothing is packed. For scalar memory of each chunk how many positions follow
    what came before it, and where its last document begins; where nothing is packed the positions before each row.
    """
    before = jnp.zeros((plan.batch,), jnp.int32) if count_B is None else count_B.astype(jnp.int32)
    if not plan.packed:
        return None, before
    positions = plan.steps * plan.block
    documents = jnp.pad(documents_BT, ((0, 0), (0, positions - plan.length)), mode="edge")
    index = jnp.arange(positions, dtype=jnp.int32)[None]
    new = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    begin = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    ends = jnp.pad(new[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, index, positions - 1), axis=1, reverse=True)
    own = documents == 0
    count = index - begin + 1 + jnp.where(own, before[:, None], 0)
    begin = jnp.where(own, -1, begin)
    chunks = begin.reshape(plan.batch, -1, plan.chunk)
    starts = index[0, :: plan.chunk]
    prefix = (chunks < starts[:, None]).sum(-1, dtype=jnp.int32)
    suffix = jnp.maximum(chunks[..., -1] - starts, 0)
    return jnp.stack([begin, last, count], 1), jnp.stack([prefix, suffix], -1).reshape(-1)


def wide(plan: Plan, x_BTHw: jax.Array) -> jax.Array:
    """[B, positions, H w], w of whole registers, at least one grid step long."""
    B, T, H, w = x_BTHw.shape
    fill = max(plan.block - T, 0)
    x = jnp.pad(x_BTHw, ((0, 0), (0, fill), (0, 0), (0, -w % _LANES)))
    return x.reshape(B, T + fill, -1)


def narrow(plan: Plan, x_BTw: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `wide`."""
    B, T, H, w = like.shape
    return x_BTw.reshape(B, x_BTw.shape[1], H, -1)[:, :T, :, :w]


def by_position(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, T, H] of [B, groups, group, positions]."""
    return jnp.moveaxis(x.reshape(plan.batch, plan.heads, -1)[..., : plan.length], 1, 2)


def by_head(plan: Plan, x_BTH: jax.Array) -> jax.Array:
    """The inverse of `by_position`."""
    fill = plan.steps * plan.block - plan.length
    x = jnp.pad(jnp.moveaxis(x_BTH, 1, 2), ((0, 0), (0, 0), (0, fill)))
    return x.reshape(plan.batch, -1, plan.group, x.shape[2])


def tiles(plan: Plan, sums: Sums, where: dict[str, tuple[int, int]]) -> dict[str, jax.Array]:
    """ "S" [B, H, d, e], "sums" [B, H, 2, 8, d] with vectors at `where`, "rivals" [B, groups, rows, chunk]."""
    tile = jnp.zeros((plan.batch, plan.heads, 2, 8, plan.d), F32)
    for name, (n, row) in where.items():
        tile = tile.at[:, :, n, row, : plan.width].set(getattr(sums, name).astype(F32))
    pairs = sums.pairs.astype(F32)
    pad = ((0, 0), (0, 0), (0, plan.d - pairs.shape[2]), (0, plan.e - pairs.shape[3]))
    return {"S": jnp.pad(pairs, pad), "sums": tile, "rivals": _stacked(plan, sums.rivals)}


def state_tiles(plan: Plan, sums: Sums) -> dict[str, jax.Array]:
    """As the forward takes a state: with rows of ones, and "carried" [B, groups * names, rows, chunk]."""
    found = tiles(plan, sums, VECTORS)
    found["sums"] = found["sums"].at[:, :, :, ONES].set(1)
    totals = [getattr(sums, name).sum(-1) for name in ("sources", "sinks", "emitted", "absorbed")]
    carried = jnp.stack([_stacked(plan, x) for x in (*totals, sums.rivals)], 2)
    found["carried"] = carried.reshape(plan.batch, -1, plan.rows, plan.chunk)
    return found


def from_tiles(plan: Plan, S, tile, rivals, where: dict[str, tuple[int, int]], value_width: int) -> Sums:
    """The inverse of `tiles`."""
    vectors = {name: tile[:, :, n, row, : plan.width] for name, (n, row) in where.items()}
    rivals = rivals[:, :, : plan.group, 0].reshape(plan.batch, plan.heads)
    return Sums(**vectors, rivals=rivals, pairs=S[:, :, : plan.width, :value_width])


def _stacked(plan: Plan, x_BH: jax.Array) -> jax.Array:
    """[B, groups, rows, chunk], the same along a row."""
    x = x_BH.astype(F32).reshape(plan.batch, -1, plan.group, 1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.rows - plan.group), (0, 0)))
    return jnp.broadcast_to(x, (*x.shape[:3], plan.chunk))
