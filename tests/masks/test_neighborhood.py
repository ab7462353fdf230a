"""Neighbourhoods of cells, by a loop over windows written anew."""

import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import ConfigError, UserError
from attnlab.masks.neighborhood import bounds, partitioned, tiles_met
from attnlab.mixers.sequence import Sequence
from attnlab.ops.mask_algebra import permuted
from attnlab.ops.mask_tiles import tile_table
from tests.masks.laws import held_to_the_laws


def sees_along(size, window, stride, dilation, causal):
    """One dimension, cell by cell."""
    out = np.zeros((size, size), bool)
    for cell in range(size):
        line = list(range(cell % dilation, size, dilation))  # the cells of its residue
        at = line.index(cell)
        if causal:
            leader = min(at // stride * stride + stride - 1, len(line) - 1)
            out[cell, [line[j] for j in range(max(0, leader - window + 1), at + 1)]] = True
            continue
        leader = min(at // stride * stride + stride // 2, len(line) - 1)
        first = leader - window // 2
        first = min(max(first, 0), len(line) - window)
        out[cell, line[first : first + window]] = True
    return out


def sees(config, n):
    shape = config.shape or (n,)
    each = lambda value: value * len(shape) if len(value) == 1 else value
    knobs = zip(shape, *map(each, (config.window, config.stride, config.dilation, config.causal_axes)))
    out = np.ones((1, 1), bool)
    for facts in knobs:
        out = np.kron(out, sees_along(*facts))
    before = n - len(out)
    return np.pad(out, ((before, 0), (before, 0)), constant_values=True)


def test_laws():
    held_to_the_laws(
        "neighborhood",
        sees,
        {"window": (5,)},
        {"window": (4,), "stride": (3,), "dilation": (2,)},
        {"window": (5,), "stride": (2,), "causal_axes": (True,)},
        {"shape": (4, 5), "window": (3, 2), "stride": (1, 2), "dilation": (1, 2)},
        {"shape": (2, 3, 3), "window": (2, 3, 3), "causal_axes": (True, False, False)},
        {"shape": (4, 5), "window": (3, 2), "dilation": (1, 2), "order": "partition", "tile": (2, 3)},
    )


def seen_of(length, **knobs):
    builder = masks.build({"name": "neighborhood", **knobs})
    return builder.mask(Sequence.whole(1, length), causal=False).visible(length, length)[0, 0]


def test_every_cell_sees_a_whole_window():
    for size in range(2, 14):
        for window in range(2, size + 1):
            for stride in range(1, window + 1):
                lo, hi = bounds(size, window, stride, 1, False)
                assert np.all((lo >= 0) & (hi <= size) & (hi - lo == window))
                lo, hi = bounds(size, window, stride, 1, True)
                assert np.all((lo <= np.arange(size)) & (hi == np.arange(size) + 1))


def test_its_limits():
    """A stride of the window is blocked attention, a window of all cells is full, a causal line is a causal window,
    and a window of 2 d + 1 is the inward sliding window of half width d."""
    blocks = np.arange(12) // 4
    np.testing.assert_array_equal(seen_of(12, window=(4,), stride=(4,)), blocks[:, None] == blocks)
    assert seen_of(12, window=(12,)).all()
    distance = np.subtract.outer(np.arange(12), np.arange(12))
    np.testing.assert_array_equal(seen_of(12, window=(5,), causal_axes=(True,)), (0 <= distance) & (distance < 5))
    for half in range(6):
        first = np.clip(np.arange(12) - half, 0, 12 - (2 * half + 1))[:, None]
        inward = (np.arange(12) >= first) & (np.arange(12) <= first + 2 * half)
        np.testing.assert_array_equal(seen_of(12, window=(2 * half + 1,)), inward)


def test_a_tile_without_its_order_is_refused():
    with pytest.raises(ConfigError, match=r"tile = .*8.*, the default, where order is raster"):
        masks.build({"name": "neighborhood", "tile": (4,)})


def test_simulated_tiles_are_those_of_the_table():
    """In the order of boxes of cells, the mean number of tiles is what the simulator says without a mask."""
    for stride in (1, 4):
        knobs = {"name": "neighborhood", "shape": (16, 24), "window": (5, 7), "stride": (stride, min(stride, 7))}
        builder = masks.build(knobs)
        tile, n = (4, 4), 16 * 24
        order = partitioned((16, 24), tile)[None]
        mask = permuted(builder.mask(Sequence.whole(1, n), causal=False), order)
        rows = lambda x: None if x is None else np.take_along_axis(x, order, axis=1)
        axes = tuple(type(a)(a.key, rows(a.lo), rows(a.hi), a.name) for a in mask.axes)
        count = tile_table(type(mask)(axes=axes), n, n, 16, 16).count
        met, of = tiles_met(builder, (16, 24), tile, tile)
        np.testing.assert_allclose(count.mean(), met)
        assert of == n // 16


def test_an_order_that_meets_fewer_tiles():
    """Windows of 7 by 7 on a wide map: a tile of 64 rows meets fewer tiles of keys box by box; on a small one more."""
    met = {}
    for side in (32, 128):
        for order in ("raster", "partition"):
            builder = masks.build({"name": "neighborhood", "shape": (side, side), "window": (7,), "order": order})
            mask = builder.mask(Sequence.whole(1, side * side), causal=False)
            met[side, order] = tile_table(mask, side * side, side * side, 64, 64).count.mean()
    assert met[128, "partition"] < 0.7 * met[128, "raster"] and met[32, "partition"] > met[32, "raster"]


def test_impossible_windows_are_refused():
    with pytest.raises(UserError, match="window 7.*5 cells"):
        seen_of(5, window=(7,))
    with pytest.raises(UserError, match="12 cells"):
        seen_of(9, shape=(3, 4), window=(3,))
