"""What `attention_tiles` computes: which tiles of keys for each tile of rows, how many of both at a time.

Shapes: as in `attention_tiles`.
"""

from __future__ import annotations

import dataclasses
from itertools import product

import jax
import numpy as np

from attnlab.ops.mask_evaluation import Side, sides_of
from attnlab.ops.mask_tiles import EMPTY, FULL, PARTIAL, table_of, tile_kinds
from attnlab.ops.masks import Array, Mask, numpy_if


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows and keys of a tile; tiles of keys at a time, full ones and others, and tiles of rows in a group, which are
    chosen near these where the mask is known; pairs of tiles, of all heads of a key head, that are computed at a time,
    at most, unless one tile of rows needs more."""

    rows: int
    keys: int
    full: int
    masked: int
    group: int
    pairs: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything static that the two passes need (hashable: a nondifferentiable argument).

    scale, soft_cap: of the op. sizes: of tiles and groups. length, count: T and S.
    """

    scale: float
    soft_cap: float | None
    sizes: Sizes
    length: int
    count: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Which tiles are computed, and what says the mask in them; leading axes [m, h], which a head's own is without.

    Tiles of rows, nq, are a whole number of groups.
    order: `[..., nq]`, tiles of rows in the order in which they go. index: `[..., nq, places]`, tiles of keys of each,
    full ones first. count: `[..., nq]`, how many. whole, rest: `[..., nq]`, steps of full tiles alone, and those that
    are left: a tile of rows has its own, whatever others of its group have, and so its sums to the last bit.
    """

    order: Array
    index: Array
    count: Array
    whole: Array
    rest: Array
    sides: tuple[Side, ...]


def planned(config: Config, mask: Mask, H: int, K: int, in_order: bool = False) -> tuple[Config, Plan]:
    """The tiles that a key head computes, those that one of its query heads sees, and in which portions.

    in_order: ascending, and none is taken for full. One at a time, a tile that a row sees nothing of leaves the row's
        sums as they are, to the last bit: so which tiles are there may depend on other rows of the tile of rows.
    """
    sizes, G = config.sizes, H // K
    kinds = tile_kinds(mask, config.length, config.count, sizes.rows, sizes.keys)
    xp = numpy_if(isinstance(kinds, np.ndarray))
    if kinds.shape[1] == H > K:
        kinds = kinds.reshape(kinds.shape[0], K, G, *kinds.shape[2:])
        least, most = kinds.min(2), kinds.max(2)
        kinds = xp.where(most == EMPTY, EMPTY, xp.where(least == FULL, FULL, PARTIAL)).astype(xp.int8)
    if in_order:
        kinds = xp.minimum(kinds, PARTIAL)
    table = table_of(kinds, full_first=True)
    full, count = (table.kind == FULL).sum(-1, dtype=xp.int32), table.count
    if in_order:
        sizes = dataclasses.replace(sizes, full=0, masked=1)
    if xp is np and not in_order:
        sizes = _portions(sizes, full, count, G)
    else:
        group = min(sizes.group, sizes.pairs // (max(sizes.full, sizes.masked) * G), full.shape[-1])
        sizes = dataclasses.replace(sizes, group=max(1, group))
    full, count, order = _in_groups(full, count, sizes.group)
    whole, rest = _steps(full, count, sizes.full, sizes.masked)
    # A step reads all of its places, also where the last one's reach over the end.
    more = [(0, 0)] * 2 + [(0, order.shape[-1] - table.index.shape[2]), (0, sizes.full + sizes.masked)]
    index = xp.pad(table.index, more, mode="edge")
    sides = sides_of(mask, config.length, config.count, H, K, sizes.rows, sizes.keys)
    return dataclasses.replace(config, sizes=sizes), Plan(order, index, count, whole, rest, sides)


def _in_groups(full: Array, count: Array, group: int) -> tuple[Array, Array, Array]:
    """Both with tiles behind the last row, which make the groups whole and see nothing, and the order in which tiles of
    rows go."""
    xp = numpy_if(isinstance(count, np.ndarray))
    more = [(0, 0)] * 2 + [(0, -count.shape[-1] % group)]
    full, count = xp.pad(full, more), xp.pad(count, more)
    if xp is np and group > 1:  # those that see about as many go together
        return full, count, np.lexsort((full, count), axis=-1).astype(np.int32)
    return full, count, xp.arange(count.shape[-1], dtype=xp.int32)[None, None]  # the same for all heads


def _steps(full: Array, count: Array, n: int, m: int) -> tuple[Array, Array]:
    """Steps of n full tiles, and of m others, where n is 0: none."""
    whole = full // n if n else full * 0
    return whole, -(-(count - whole * n) // m)


def _portions(sizes: Sizes, full: np.ndarray, count: np.ndarray, G: int) -> Sizes:
    """Tiles of keys at a time, and of rows in a group, by a model of the time: a step takes as long as eight pairs of
    tiles more than those it computes, and a mask adds a third to a pair."""

    def of_groups(b):
        *padded, order = _in_groups(full, count, b)
        return [np.take_along_axis(x, np.broadcast_to(order, x.shape), -1).reshape(-1, b) for x in padded]

    def time(portions):
        b, n, m = portions
        whole, rest = (x.max(-1) for x in _steps(*grouped[b], n, m))
        return (whole * (b * n * G + 8) + rest * (b * m * G * 4 / 3 + 8)).sum()

    some = full.any()
    groups = (1, 2, 4, 8, 16, 32) if sizes.group > 1 else (1,)
    grouped = {b: of_groups(b) for b in groups if b <= full.shape[-1]}
    fulls = range(-(-sizes.full // 2), 2 * sizes.full + 1) if some else [1]
    portions = product(grouped, fulls, range(1, 2 * sizes.masked + 1))
    fits = [(b, n, m) for b, n, m in portions if b == 1 or b * max(n, m) * G <= sizes.pairs]
    group, n, m = min(fits, key=time)
    return dataclasses.replace(sizes, full=n if some else 0, masked=m, group=group)
