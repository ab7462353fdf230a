"""Packed rows: the (position, head) pairs that are wanted, those of a key head side by side, in whole blocks.

Shapes: E heads to choose from of H, M key heads among theirs, r rows in blocks i of R rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads to choose from; hashable.

    Attributes:
      chosen: E heads of H, ascending.
      group: for each of them the place of its key head in `key_heads`.
      key_heads: M, ascending.
      count: H.
      sharing: how many heads share a key head.
    """

    chosen: tuple[int, ...]
    group: tuple[int, ...]
    key_heads: tuple[int, ...]
    count: int
    sharing: int

    @classmethod
    def of(cls, chosen: tuple[int, ...], count: int, key_heads: int) -> Heads:
        """Of `count` heads over `key_heads`."""
        used = tuple(sorted({h * key_heads // count for h in chosen}))
        return cls(chosen, tuple(used.index(h * key_heads // count) for h in chosen), used, count, count // key_heads)

    def most_blocks(self, length: int, active: int, rows: int) -> int:
        """Blocks of so many rows that hold whatever `length` positions choose, the last of a key head partly empty."""
        M = len(self.key_heads)
        sizes = [min(self.group.count(m), active) for m in range(M)]
        return min((length * active + M * (rows - 1)) // rows, sum(-(-length * size // rows) for size in sizes))


@dataclasses.dataclass(frozen=True)
class GatheredSpec:
    """The static facts by which an implementation is chosen; lengths and batch are those of a device.

    Attributes:
      heads: those to choose from.
      active: most heads that a position wants.
      devices: over which the queries are split.
    """

    batch: int
    queries: int
    keys: int
    heads: Heads
    active: int
    width: int
    value_width: int
    dtype: str
    causal: bool
    window: int | None
    soft_cap: bool
    sinks: bool
    devices: int = 1
    pattern: bool = False  # the mask is more than an interval of keys
    biases: bool = False  # there are none

    def __str__(self) -> str:
        E, M = len(self.heads.chosen), len(self.heads.key_heads)
        width = str(self.width) if self.width == self.value_width else f"{self.width}/{self.value_width}"
        features = [name for name in ("causal", "pattern", "soft_cap", "sinks") if getattr(self, name)]
        features += [f"window={self.window}"] * (self.window is not None)
        features += [f"devices={self.devices}"] * (self.devices > 1)
        shape = f"B{self.batch} T{self.queries} S{self.keys} {self.active} of H{E} K{M} d{width}"
        return " ".join([shape, self.dtype, *features])

    @classmethod
    def of(cls, exchange, q, k, v, mask, wanted, sinks, *, keys, chosen, active, scale, soft_cap) -> GatheredSpec:
        """Of the arrays of `attnlab.ops.gathered_attention.chosen_attention`."""
        heads, devices = Heads.of(chosen, q.shape[2], k.shape[2]), 1 if exchange is None else exchange.count
        return cls(
            *q.shape[:2], keys, heads, active, q.shape[3], v.shape[3], str(q.dtype),
            mask.causal, mask.window, soft_cap is not None, sinks is not None, devices, not mask.plain(),
        )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Which row each wanted pair has.

    pair_Br: t * H + h of each row, -1 where the row is empty. group_Bi: key head (its place) of each block, ascending
    within a segment. row_BTE: the row of each wanted pair, anything elsewhere.
    """

    pair_Br: jax.Array
    group_Bi: jax.Array
    row_BTE: jax.Array


@dataclasses.dataclass(frozen=True)
class Segments:
    """N runs of L positions from position `first` on, each with I blocks of R rows of its own."""

    first: int
    N: int
    L: int
    I: int
    R: int


def make_table(heads: Heads, wanted_BTE: jax.Array, segments: list[Segments]) -> Table:
    """The table of wanted pairs, whose rows are in the order of the segments."""
    B, _, E = wanted_BTE.shape
    M, group = len(heads.key_heads), np.asarray(heads.group)
    member_EM = group[:, None] == np.arange(M)
    earlier_EE = (group[:, None] == group) & (np.arange(E) < np.arange(E)[:, None])
    pairs, groups, places, before = [], [], [], 0
    for s in segments:
        N, L, I, R = s.N, s.L, s.I, s.R
        wanted = wanted_BTE[:, s.first : s.first + N * L].reshape(B, N, L, E).astype(jnp.int32)
        of_token = jnp.sum(wanted[..., None] * member_EM, axis=-2, dtype=jnp.int32)
        upto = jnp.cumsum(of_token, axis=2, dtype=jnp.int32)
        blocks = -(-upto[:, :, -1] // R)
        end = jnp.cumsum(blocks, axis=-1, dtype=jnp.int32)
        # Rows of a key head are in the order of their positions, then of their heads.
        rank = (upto - of_token)[..., group] + jnp.sum(wanted[..., None, :] * earlier_EE, axis=-1)
        row = ((end - blocks) * R)[:, :, None, group] + rank
        groups.append(jnp.minimum(jnp.sum(end[..., None, :] <= jnp.arange(I)[:, None], axis=-1), M - 1).reshape(B, -1))
        token = s.first + jnp.arange(N * L, dtype=jnp.int32).reshape(N, L, 1)
        pair = jnp.broadcast_to(token * heads.count + np.asarray(heads.chosen, np.int32), wanted.shape)
        empty = jnp.full((B, N, I * R), -1, jnp.int32)
        at = jnp.where(wanted > 0, row, I * R).reshape(B, N, -1)
        put = jax.vmap(jax.vmap(lambda x, i, p: x.at[i].set(p, mode="drop")))
        pairs.append(put(empty, at, pair.reshape(B, N, -1)).reshape(B, -1))
        row += before + I * R * jnp.arange(N)[:, None, None]
        places.append(row.reshape(B, N * L, E))
        before += N * I * R
    return Table(*(jnp.concatenate(x, axis=1) for x in (pairs, groups, places)))


def of_rows(x_BTHe: jax.Array, table: Table) -> jax.Array:
    """[B, r, e]: what each row's pair has of all H heads; anything where the row is empty."""
    pair = jnp.maximum(table.pair_Br, 0)
    return jnp.take_along_axis(x_BTHe.reshape(x_BTHe.shape[0], -1, x_BTHe.shape[3]), pair[..., None], axis=1)


def of_chosen_rows(x_BTEe: jax.Array, heads: Heads, table: Table) -> jax.Array:
    """[B, r, e]: what each row's pair has of the heads to choose from; anything where the row is empty."""
    B, T, E, _ = x_BTEe.shape
    place = np.zeros(heads.count, np.int32)
    place[list(heads.chosen)] = np.arange(E)
    pair = jnp.maximum(table.pair_Br, 0)
    pair = pair // heads.count * E + jnp.asarray(place)[pair % heads.count]
    return jnp.take_along_axis(x_BTEe.reshape(B, T * E, -1), pair[..., None], axis=1)


def of_tokens(x_BT: jax.Array, heads: Heads, table: Table) -> jax.Array:
    """[B, r]: what each row's position has; 0 where the row is empty."""
    token = jnp.maximum(table.pair_Br, 0) // heads.count
    return jnp.where(table.pair_Br < 0, 0, jnp.take_along_axis(x_BT, token, axis=1))


def of_pairs(x_Bre: jax.Array, table: Table, wanted_BTE: jax.Array) -> jax.Array:
    """[B, T, E, e]: what a wanted pair's row holds, 0 for the others."""
    B, T, E = wanted_BTE.shape
    row = jnp.where(wanted_BTE, table.row_BTE, 0).reshape(B, -1)
    x = jnp.take_along_axis(x_Bre, row[..., None], axis=1).reshape(B, T, E, -1)
    return jnp.where(wanted_BTE[..., None], x, 0)
