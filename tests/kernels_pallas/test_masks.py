"""Tiles of a mask against the mask written out."""

import jax
import numpy as np
import pytest

from kernels_pallas import masks

T, S, ROWS, KEYS = 48, 70, 8, 10
t = np.arange(T)
CASES = {
    "causal": (None, t[None] + 1),
    "window": (t[None] - 5, t[None] + 4),
    "from somewhere": (t[None] + 3, None),
    "beyond both ends": (t[None] - 100, np.minimum(t[None] + 60, 1000)),
    "two documents and padding": (np.where(t < 20, 0, 20)[None] + (t > 40)[None] * 99, np.where(t < 20, 20, 40)[None]),
    "anything": tuple(np.sort(np.random.default_rng(0).integers(-5, S + 9, (2, 3, T)), 0)),
    "one tile, half of the rows": (None, np.where(t % ROWS < ROWS // 2, 0, 6)[None]),
    "nothing": (np.full((1, T), 7), np.full((1, T), 7)),
}

HALVED = ("causal", "window", "two documents and padding", "anything")


@jax.jit  # intervals may be traced
def tiles(starts, ends):
    bounds = masks.intervals(starts, ends, T, S)
    ranges = masks.tile_ranges(*bounds, ROWS, KEYS)
    halved = masks.halved(ranges, bounds, ROWS, KEYS)
    any_row = masks.seen_keys(*bounds, S, low=starts is not None, high=ends is not None)
    return masks.visible(starts, ends, T, S), bounds, ranges, masks.tile_kinds(ranges, S // KEYS), any_row, halved


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_those_of_the_mask_written_out(name):
    """No visible pair is outside; starts hide nothing from `full` on, ends nothing before `full_end`; halves."""
    starts, ends = (None if x is None else np.broadcast_to(x, (3, T)).astype(np.int32) for x in CASES[name])
    visible, bounds, ranges, kinds, any_row, halved = map(jax.device_get, tiles(starts, ends))
    seen = np.ones((3, T, S), bool)
    seen &= True if starts is None else np.arange(S) >= starts[..., None]
    seen &= True if ends is None else np.arange(S) < ends[..., None]
    np.testing.assert_array_equal(visible, seen)
    np.testing.assert_array_equal(any_row, seen.any(1))
    for b, n in np.ndindex(*halved.shape):
        first, last = ranges[b, n, 0], ranges[b, n, 3] - 1
        half = seen[b, n * ROWS : n * ROWS + ROWS // 2, max(last, 0) * KEYS :]
        assert halved[b, n] == (first < last and not half.any())
    assert halved.any() == (name in HALVED)
    some = seen.any(-1)
    for b, n, j in np.ndindex(*kinds.shape):
        rows = slice(n * ROWS, (n + 1) * ROWS)
        tile = seen[b, rows, j * KEYS : (j + 1) * KEYS]
        first, full, full_end, end = ranges[b, n]
        assert (kinds[b, n, j] == masks.EMPTY) == (not first <= j < end)
        if kinds[b, n, j] == masks.EMPTY:
            assert not tile.any()
        assert (kinds[b, n, j] == masks.FULL) == (first <= j < end and full <= j < full_end)
        key = np.arange(j * KEYS, (j + 1) * KEYS)
        if kinds[b, n, j] == masks.FULL:
            assert tile[some[b, rows]].all()
        elif first <= j < end:
            begun = key >= bounds[0][b, rows, None]
            not_ended = key < bounds[1][b, rows, None]
            assert j < full or begun[some[b, rows]].all()
            assert j >= full_end or not_ended[some[b, rows]].all()


def test_tiles_are_few():
    """Of a causal mask half, of a window its own, none where rows see nothing."""
    n = 64 * 8
    t = np.arange(n)[None]

    @jax.jit
    def kinds(starts, ends):
        return masks.tile_kinds(masks.tile_ranges(*masks.intervals(starts, ends, n, n), 64, 64), 8)

    causal = np.asarray(kinds(None, t + 1)[0])
    np.testing.assert_array_equal(causal, np.tril(np.full((8, 8), masks.FULL), -1) + np.eye(8) * masks.PARTIAL)
    assert (np.asarray(kinds(t - 63, t + 1)) > 0).sum() == 15
    assert not np.any(kinds(t, t))
