"""Columns and bands, exact or by blocks."""

import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import ConfigError
from tests.masks.laws import held_to_the_laws


def sees(config, n):
    """Pair by pair; by blocks, what any two positions of the two blocks say of each other."""
    size, slashed = config.block or 1, lambda t, s: any(a <= t - s < b for a, b in config.slashes)
    out = np.zeros((n, n), bool)
    for t, s in np.ndindex(n, n):
        rows, keys = ([x // size * size + i for i in range(size)] for x in (t, s))
        out[t, s] = s in config.columns or any(slashed(i, j) for i in rows for j in keys)
    return out


@pytest.mark.parametrize(
    "knobs",
    [
        {"columns": (6, 0), "slashes": ((0, 3),)},
        {"columns": (), "slashes": ((9, 11), (0, 2))},
        {"columns": (1,), "slashes": ((5, 9), (2, 5), (3, 4))},
        {"columns": (0, 2, 3), "slashes": ()},
        {"columns": (5, 17), "slashes": ((0, 1), (7, 8), (13, 14)), "block": 4},
        {"columns": (2, 12), "slashes": ((9, 11),), "block": 3},
    ],
    ids=["one", "two", "joined", "columns", "blocks", "one by blocks"],
)
def test_laws(knobs):
    held_to_the_laws("vertical_slash", sees, knobs)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"slashes": ((0, 2), (5, 6))}, r"slashes = \(\(0, 2\), \(5, 6\)\).*one band.*block is above 0"),
        ({"columns": (), "slashes": ((0, 2), (5, 6), (8, 9))}, "slashes = .*two where columns has none"),
        ({"columns": (), "slashes": ()}, r"slashes = \(\)"),
        ({"slashes": ((3, 3),)}, "first < end"),
        ({"slashes": ((1, 2, 3),)}, "pairs"),
        ({"columns": (-1,)}, r"columns = \(-1,\)"),
        ({"columns": (4, 4)}, r"columns = \(4, 4\)"),
    ],
)
def test_refusals(knobs, message):
    with pytest.raises(ConfigError, match=message):
        masks.build({"name": "vertical_slash", **knobs})
