"""Blocks by a table that is given."""

import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import ConfigError, UserError
from tests.masks.laws import held_to_the_laws


@pytest.fixture
def path(tmp_path):
    table = np.random.default_rng(0).random((12, 12)) < 0.4
    np.save(tmp_path / "blocks.npy", table)
    return str(tmp_path / "blocks.npy")


def sees(config, n):
    block = np.arange(n) // config.block
    return np.load(config.path)[block[:, None], block]


def test_laws(path):
    held_to_the_laws("static_blocks", sees, {"path": path, "block": 3}, {"path": path, "block": 5})


def test_refusals(path, tmp_path):
    """A file that is none, is no table, or is too small for the row; each by its name."""
    with pytest.raises(ConfigError, match=r"path = 'x.txt'.*\.npy"):
        masks.build({"name": "static_blocks", "path": "x.txt"})
    with pytest.raises(ConfigError, match="none.npy' cannot be read"):
        masks.build({"name": "static_blocks", "path": str(tmp_path / "none.npy")})
    np.save(tmp_path / "wrong.npy", np.ones((2, 3), bool))
    with pytest.raises(ConfigError, match=r"bool \(2, 3\); allowed: bool \[n, n\]"):
        masks.build({"name": "static_blocks", "path": str(tmp_path / "wrong.npy")})
    with pytest.raises(UserError, match="13 blocks of 2 positions.* has 12"):
        masks.build({"name": "static_blocks", "path": path, "block": 2}).table(13)
