"""Power-of-two blocks."""

import numpy as np

from attnlab import masks
from tests.masks.laws import held_to_the_laws


def sees(config, n):
    out = np.zeros((n, n), bool)
    for t in range(n):
        for s in range(n):
            distance = t // config.block - s // config.block
            near = 0 <= distance < config.local or distance in (1, 2, 4, 8, 16, 32)
            out[t, s] = near or (distance >= 0 and s // config.block < config.sinks)
    return out


def test_laws():
    held_to_the_laws("power_blocks", sees, {"block": 3}, {"block": 1, "local": 3, "sinks": 0}, {"block": 4, "sinks": 2})


def test_small_matrix_by_hand():
    rows = (
        "x......... xx........ xxx....... xxxx...... x.xxx..... xx.xxx.... x.x.xxx... x..x.xxx.. x...x.xxx. xx...x.xxx"
    )
    table = masks.build({"name": "power_blocks", "block": 1}).table(10)
    # Block 1 lies at distance 8 of block 9, 5 at 4: as the definition has it, and the sink is block 0.
    expected = np.array([[c == "x" for c in row] for row in rows.split()])
    np.testing.assert_array_equal(table, expected)


def test_layers_reach_every_block():
    """After L layers every block has heard of all before it that lie nearer than 2^L blocks."""
    table = masks.build({"name": "power_blocks", "block": 1, "sinks": 0}).table(64).astype(int)
    reach, distance = np.eye(64, dtype=int), np.subtract.outer(np.arange(64), np.arange(64))
    for layers in range(1, 7):
        reach = np.minimum(reach @ table, 1)
        assert np.all(reach[(distance >= 0) & (distance < 2**layers)])
    assert table.sum(-1).max() == 1 + 6  # itself, and 1, 2, 4, 8, 16, 32
