"""What `benchmarks.moh` counts, in a program as XLA compiled it."""

from __future__ import annotations

import pytest

from benchmarks import moh
from tests import tiers


@pytest.mark.slow
@tiers.parametrize("shared, active", moh.SPLITS, often=moh.SPLITS[:1])
def test_half_of_the_heads_cost_at_most_0_6_when_compiled(shared, active):
    """Attention's products, forward, 4 of 8 heads on: gather against dense."""
    found = moh.ratios(1024, shared, active, backward=False)
    assert 0.5 <= found["ratio"] <= 0.6
    assert found["ratio"] < found["layer_ratio"] < 1
    # Blocks of queries see whole blocks of keys: more than the causal half, less than all pairs.
    pairs = 4 * moh.WIDTH * 1024**2
    assert pairs / 2 < found["dense"] < 0.7 * pairs
