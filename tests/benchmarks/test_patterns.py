"""The table of patterns: a cell is trained or says why not, and the index is a mean of z-scores."""

from __future__ import annotations

import pytest

from benchmarks import patterns
from tests import tiers


@tiers.exhaustive
def test_cells_are_trained_or_say_why_not():
    found = patterns.cell("gated", "retrieve", 2)
    assert 0 <= found["accuracy"] <= 1 and found["chance"] == 1 / 128
    assert "lets a position see none after it" in patterns.cell("rat", "match2", 2)["reason"]


def test_index_is_the_mean_of_z_scores():
    """Over the patterns that a mixer has, among the mixers that have them."""
    accuracy = lambda *values: {
        p: {"accuracy": v} if v is not None else {"reason": ""} for p, v in zip(patterns.PATTERNS, values)
    }
    found = patterns.indices(
        {"a": accuracy(0.9, 0.5, None, None), "b": accuracy(0.7, None, None, 0.2), "c": accuracy(0.5, 0.7, None, None)}
    )
    root = 0.5**0.5
    assert found == {"a": pytest.approx((1 - root) / 2), "b": pytest.approx(0), "c": pytest.approx((-1 + root) / 2)}
