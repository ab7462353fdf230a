"""What Hopper's kernels of the neural memory know of positions and groups, and how it follows from the gates.

A group (`plan`) is up to 64 positions that start from the same weights. Its rows are those of a tile of 64 positions,
which begins with it, or, at the row's end, before it. With W and S before the group, and steps taken up to a position,

    W_t = beta_t W + rho_t S - sum_i kappa_ti a_i^T delta_i        kappa = keep moved

as in `attnlab.ops.two_stage`; `keep` and `moved`, of pairs, are made in the kernels from sums of logarithms.

Shapes: B sequences, T positions, H heads, N groups; L is T or at least 64, filled up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.neural_memory import plan

ROWS = 64  # positions of a tile: rows of the tensor cores'
# Numbers of a position, float32. Sums of logarithms (log2) from its origin on, where its document or group begins:
# of what is kept of weights (KEPT), of momentum (MOVED); of what is kept up to where it reads (READ), and takes its
# gradient (EARLY). ORIGIN and CHUNK: its origin, and where its chunk begins, as rows of the tile. RHO at it, where it
# reads, where it takes its gradient; kappa and what is left of momentum (LAST_...) at the group's last position.
KEPT, MOVED, READ, EARLY, ORIGIN, CHUNK, THETA, RHO, RHO_READ, RHO_EARLY, LAST_KAPPA, LAST_MOVED = range(12)
NUMBERS = 12
# Numbers of a group, int32: where its tile begins; its first row there, and how many; where the state before it is
# saved, and the gradient of that after it; whether it starts from the initial weights; the segment whose first state is
# that before it, or -1.
TILE, FIRST, TAKEN, BEFORE, AFTER, FRESH, SAVED = range(7)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Groups of rows.

    Attributes:
      table: int32 [B, N, 7].
      bounds: int32 [B, segments + 1]: the first group of each segment, and how many there are.
      group: of each position [B, T], -1 where it is in none; row: in the group's tile.
      origin, chunk, end: of each position [B, T]: see above; where its group ends.
    """

    table: jax.Array
    bounds: jax.Array
    group: jax.Array
    row: jax.Array
    origin: jax.Array
    chunk: jax.Array
    end: jax.Array


def slots(length: int) -> int:
    """States that are saved of a row: groups that continue a document begin in different tiles, but for the last."""
    return -(-length // ROWS) + 4


def layout(position_BT: jax.Array, first_B: jax.Array, chunk: int, segment: int, *, packed: bool = True) -> Layout:
    """See `plan.groups`."""
    B, T = position_BT.shape
    starts, kinds, begin = plan.groups(position_BT, first_B, chunk, ROWS, packed=packed)
    bounds = plan.by_segment(starts, segment, -(-T // segment), of_ends=False)
    start, end = starts[:, :-1], starts[:, 1:]
    real, n = start < end, jnp.arange(start.shape[1])
    last = n == bounds[:, -1:] - 1
    continues = (kinds == plan.CONTINUES) & real
    for_last, initial, ends, zero = (slots(T) - i for i in (4, 3, 2, 1))
    before = jnp.where(continues, jnp.where(last, for_last, start // ROWS), initial)
    shifted = lambda x, fill: jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=fill)
    after = jnp.where(shifted(continues, False), shifted(before, 0), zero)
    own = jnp.minimum(start // segment, bounds.shape[1] - 2)
    opens = continues & (jnp.take_along_axis(bounds, own, axis=1) == n)
    tile = jnp.minimum(start, max(T, ROWS) - ROWS)
    table = jnp.stack(
        [tile, start - tile, end - start, before, jnp.where(last, ends, after), ~continues, jnp.where(opens, own, -1)],
        axis=-1,
    ).astype(jnp.int32)
    rows = jnp.arange(B)[:, None]
    group = jnp.cumsum(jnp.zeros((B, T), jnp.int32).at[rows, starts].add(1, mode="drop"), axis=1) - 1
    of = lambda x: jnp.take_along_axis(x, jnp.maximum(group, 0), axis=1)
    t = jnp.arange(T, dtype=jnp.int32)
    return Layout(
        table, bounds, group, t - of(tile), jnp.maximum(begin, of(start)), t - position_BT % chunk, of(end)
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rules:
    """How gates become numbers. several: whether a group has more chunks than one; the rest as in `neural_memory`."""

    several: bool
    read_after_write: bool
    decayed: bool


Elements = tuple[jax.Array, ...]  # is it the first; h, and what it adds to rho; beta; sums of logarithms


def _then(x: Elements, y: Elements) -> Elements:
    """What both do, first x."""
    _, h, added, kept, *logs = x
    first, h_, added_, kept_, *logs_ = y
    both = h_ * h, added_ * h + kept_ * added, kept_ * kept, *(a + b for a, b in zip(logs, logs_))
    return first, *both


def _joined(x: Elements, y: Elements, both: Elements) -> Elements:
    """`both`, but y alone where that is the first."""
    return x[0] | y[0], *(jnp.where(y[0], own, other) for own, other in zip(y[1:], both[1:]))


def _scan(join: Callable[[Elements, Elements], Elements], x: Elements, by: int) -> Elements:
    """Each joined with those before it (`by` 1), or behind it (-1), of which firsts are at most 63 positions away."""
    T, step = x[0].shape[1], 1
    while step < min(ROWS, T):
        cut, fill = (slice(None, -step), (step, 0)) if by > 0 else (slice(step, None), (0, step))
        x = join(tuple(jnp.pad(a[:, cut], ((0, 0), fill, (0, 0))) for a in x), x)
        step *= 2
    return x


def numbers(rules: Rules, at: Layout, log_keep: jax.Array, log_eta: jax.Array, theta: jax.Array) -> jax.Array:
    """[B, H, NUMBERS, L], of gates [B, T, H], logarithms in units of log2."""
    T = theta.shape[1]
    t = jnp.arange(T, dtype=jnp.int32)
    wide = lambda x: x[..., None]
    keep, eta = jnp.exp2(log_keep), jnp.exp2(log_eta)
    forward = lambda x, y: _joined(x, y, _then(x, y))
    backward = lambda y, x: _joined(y, x, _then(x, y))
    element = wide(t == at.origin), eta, eta, keep, log_keep, log_eta
    _, _, rho, _, kept, moved = _scan(forward, element, 1)
    # From behind each position to the group's last, if that is of the same document.
    after = lambda x, fill: jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0)), constant_values=fill)
    ends = wide(t + 1 == at.end) | after(element[0], True)
    rest = ends, *(jnp.where(ends, fill, after(x, fill)) for x, fill in ((eta, 1.0), (eta, 0.0), (keep, 1.0)))
    _, left, grown, remains = _scan(backward, rest, -1)
    reaches = wide(at.origin == jnp.take_along_axis(at.origin, at.end - 1, axis=1))
    last_kappa, last_moved = jnp.where(reaches, grown + remains, 0.0), jnp.where(reaches, left, 0.0)
    read, rho_read = kept, rho
    if not rules.read_after_write:
        before = lambda x: jnp.where(wide(t > at.origin), jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))), 0.0)
        read, rho_read = before(kept), before(rho)
    early = rho_early = jnp.zeros_like(kept)
    if rules.several:
        index, later = wide(jnp.maximum(at.chunk - 1, 0)), wide(at.chunk > at.origin)
        before = lambda x: jnp.where(later, jnp.take_along_axis(x, index, axis=1), 0.0)
        early, rho_early = before(kept), before(rho)
    if rules.decayed:
        early, rho_early = kept, rho_early * jnp.exp2(kept - early)
    rows = lambda x: jnp.broadcast_to(wide(x - (t - at.row)).astype(jnp.float32), theta.shape)
    found = [kept, moved, read, early, rows(at.origin), rows(at.chunk), theta, rho, rho_read, rho_early, last_kappa]
    x = jnp.moveaxis(jnp.stack([*found, last_moved], axis=1), 3, 1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, max(ROWS, -(-T // 4) * 4) - T)))


def of_positions(at: Layout, found: jax.Array) -> jax.Array:
    """[B, H, n, T] of [B, H, N, n, 64]; 0 of positions in no group."""
    rows = jnp.arange(found.shape[0])[:, None]
    x = jnp.moveaxis(found, 1, -1)[rows, jnp.maximum(at.group, 0), :, at.row]  # [B, T, n, H]
    return jnp.moveaxis(jnp.where((at.group >= 0)[..., None, None], x, 0), (1, 3), (3, 1))
