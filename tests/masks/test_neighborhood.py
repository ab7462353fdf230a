"""Neighbourhoods of cells, by a loop over windows written anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import ConfigError, UserError
from attnlab.masks.neighborhood import bounds, partitioned, tiles_met
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import attention
from attnlab.ops.dispatch import interpreted
from attnlab.ops.mask_algebra import reordered
from attnlab.ops.mask_tiles import tile_table
from tests.masks.laws import held_to_the_laws
from tests.ops import reference


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
        first = max(min(first, len(line) - window), 0)  # a line that is shorter than a window is seen whole
        out[cell, line[first : first + window]] = True
    return out


def sees(config, n, causal):
    """Of a document: boxes of its cells, and positions beside them."""
    shape = config.shape or (n,)
    each = lambda value: value * len(shape) if len(value) == 1 else value
    knobs = zip(shape, *map(each, (config.window, config.stride, config.dilation, config.causal_axes)))
    out = np.ones((1, 1), bool)
    for facts in knobs:
        out = np.kron(out, sees_along(*facts))
    out = out[:n, :n]  # a shorter document has the first cells
    beside = n - len(out)
    if not causal:
        return np.pad(out, ((beside, 0), (beside, 0)), constant_values=True)
    behind = np.tril(np.ones((n, n), bool))
    behind[: len(out)] = np.pad(out, ((0, 0), (0, beside)))
    return behind


def test_laws():
    """Lines of any length, and documents with cells of their own, some with too few and some with positions beside
    them; in causal mixing streams cut anywhere, and those that are cut between steps of the first dimension."""
    held_to_the_laws(
        "neighborhood",
        sees,
        {"window": (4,), "dilation": (3,), "causal_axes": (True,)},
        {"window": (5,), "shape": (17,), "stride": (2,), "causal_axes": (True,)},
        {"shape": (3, 5), "window": (2, 3), "stride": (2, 1), "causal_axes": (True,)},
        {"shape": (4, 3), "window": (3, 2), "stride": (2, 1), "causal_axes": (True, False)},
        {"shape": (3, 2, 3), "window": (2,), "causal_axes": (True, False, True), "order": "partition", "tile": (2,)},
        {"window": (5,)},
        {"window": (4,), "stride": (3,), "dilation": (2,)},
        {"window": (5,), "stride": (2,), "causal_axes": (True,)},
        {"shape": (4, 5), "window": (3, 2), "stride": (1, 2), "dilation": (1, 2)},
        {"shape": (2, 3, 3), "window": (2, 3, 3), "causal_axes": (True, False, False)},
        {"shape": (4, 5), "window": (3, 2), "dilation": (1, 2), "order": "partition", "tile": (2, 3)},
        {"shape": (2, 4), "window": (2, 3), "order": "partition", "tile": (2, 3)},
        directed=True,
    )


def seen_of(length, **knobs):
    builder = masks.build({"name": "neighborhood", **knobs})
    return builder.mask(Sequence.whole(1, length), causal=False).visible(length, length)[0, 0]


@pytest.mark.parametrize("impl", ["flash", "tiles"])
def test_kernels_of_packed_rows(impl):
    """Images with positions before them, and padding: each implementation is the definition, values and gradients."""
    T = 256
    segments = jnp.asarray([[1] * 100 + [2] * 150 + [0] * 6])
    seq = Sequence(jnp.zeros_like(segments), segments).derived()
    builder = masks.build({"name": "neighborhood", "shape": (8, 12), "window": (3, 5), "stride": (2, 1)})
    mask = builder.mask(seq, causal=False)
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.normal(size=(1, T, 2, 64)).astype(np.float32) for _ in range(4))
    with interpreted():
        o, pull = jax.jit(lambda *a: jax.vjp(lambda *a: attention(*a, mask, impl=impl), *a))(q, k, v)
    for ours, theirs in zip((o, *pull(do)), reference.attention(q, k, v, mask, do), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_every_cell_sees_a_whole_window():
    for size in range(2, 14):
        for window in range(2, size + 1):
            for stride in range(1, window + 1):
                lo, hi = bounds(np.arange(size), size, window, stride, 1, False)
                assert np.all((lo >= 0) & (hi <= size) & (hi - lo == window))
                lo, hi = bounds(np.arange(size), size, window, stride, 1, True)
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
        mask = reordered(builder.mask(Sequence.whole(1, n), causal=False), partitioned((16, 24), tile))
        count = tile_table(mask, n, n, 16, 16).count
        met, of = tiles_met(builder, tile, tile)
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
    for knobs, message in (
        ({"window": (3, 3)}, r"window = .*3, 3.*one value where shape is none"),
        ({"shape": (4, 4), "window": (3, 3, 3)}, r"window = .*one value, or 2"),
        ({"shape": (4, 4), "window": (3,), "dilation": (1, 2)}, r"window = .*cells of shape = \(4, 4\)"),
        ({"window": (3,), "stride": (4,)}, r"stride = .*at most window"),
        ({"window": (3,), "order": "partition"}, r"order = 'partition'.*raster where shape is none"),
    ):
        with pytest.raises(ConfigError, match=message):
            masks.build({"name": "neighborhood", **knobs})
    with pytest.raises(ConfigError, match="window = .*7.*the 5 positions"):
        seen_of(5, window=(7,))
    with pytest.raises(ConfigError, match=r"shape = .*3, 4.*9 positions"):
        seen_of(9, shape=(3, 4), window=(3,))


def test_what_a_row_says_of_its_image_is_the_shape():
    """`Sequence.grid` and `shape` agree, or it is refused: costs are counted by the shape alone."""
    seq = dataclasses.replace(Sequence.whole(1, 12), grid=(3, 4))
    masks.build({"name": "neighborhood", "shape": (3, 4), "window": (3,)}).require(seq, causal=False)
    for shape in (None, (4, 3)):
        with pytest.raises(UserError, match=r"shape = .*\(3, 4\)"):
            masks.build({"name": "neighborhood", "shape": shape, "window": (3,)}).require(seq, causal=False)


def test_a_dilated_line_is_lines_of_their_own():
    """Sorted by residue, a neighbourhood dilated by d is the undilated one of d packed documents."""
    for dilation, causal in ((2, False), (3, False), (3, True)):
        knobs = {"window": (4,), "causal_axes": (causal,)}
        residue = np.arange(22) % dilation
        order = np.argsort(residue, kind="stable")
        seq = Sequence(jnp.zeros((1, 22), jnp.int32), jnp.asarray(residue[order] + 1)[None]).derived()
        lines = masks.build({"name": "neighborhood", **knobs}).mask(seq, causal=causal).visible(22, 22)[0, 0]
        np.testing.assert_array_equal(seen_of(22, dilation=(dilation,), **knobs)[order][:, order], lines)
