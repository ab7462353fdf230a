"""The search of learning rates, on made-up losses."""

from __future__ import annotations

import math

from attnlab.ablation.plan import Tuning
from attnlab.ablation.tuning import search

GRID = Tuning(rates=(0.01, 0.02, 0.04), seeds=(7, 8))


def losses(best, asked=None):
    """A loss with its minimum at each arm's best rate, as runs of two seeds have it."""

    def values(arm, rate):
        if asked is not None:
            asked.add((arm, rate))
        loss = abs(math.log2(rate / best[arm]))
        return [loss - 0.01, loss + 0.01]

    return values


def test_an_interior_best_ends_it():
    """The grid stays as it is, every arm has all of its points, and the curve has mean, deviation and number."""
    found = search(GRID, ["a", "b"], losses({"a": 0.02, "b": 0.019}), lower=True)
    assert found.complete and found.rates == GRID.rates
    assert found.chosen == {"a": 0.02, "b": 0.02} and found.edge == {"a": False, "b": False}
    rate, mean, deviation, n = found.curves["a"][0]
    assert (rate, n) == (0.01, 2) and math.isclose(mean, 1) and math.isclose(deviation, 0.02 / math.sqrt(2))


def test_a_grid_grows_for_all_arms():
    """Where one arm's best is at an end, every arm tries the further rate: the same number of trials for all."""
    asked = set()
    found = search(GRID, ["a", "b"], losses({"a": 0.08, "b": 0.02}, asked), lower=True)
    assert found.rates == (0.01, 0.02, 0.04, 0.08, 0.16) and found.chosen["a"] == 0.08 and not found.edge["a"]
    assert asked == {(arm, rate) for arm in "ab" for rate in found.rates}


def test_an_edge_is_told():
    """Seven rates at most: an arm whose best is still at an end is flagged, the others are not."""
    found = search(GRID, ["a", "b"], losses({"a": 100.0, "b": 0.02}), lower=True)
    assert len(found.rates) == 7 and found.edge == {"a": True, "b": False} and found.chosen["a"] == found.rates[-1]


def test_both_ends_grow():
    """Arms that want more and less get both."""
    found = search(GRID, ["a", "b"], losses({"a": 0.08, "b": 0.005}), lower=True)
    assert found.rates[0] < 0.005 < 0.08 < found.rates[-1] and not any(found.edge.values())


def test_failed_and_missing_runs():
    """A rate with a failed run is never chosen; one that is still to come leaves the search open."""
    fails = lambda arm, rate: [math.nan, 0.0] if rate == 0.02 else [rate, rate]
    found = search(GRID, ["a"], fails, lower=False)
    assert found.chosen["a"] == found.rates[-1]  # higher is better
    assert found.curves["a"][1][3] == 1
    best_but_failed = lambda arm, rate: [math.nan, -9.0] if rate == 0.02 else [abs(math.log2(rate / 0.02))] * 2
    assert search(GRID, ["a"], best_but_failed, lower=True).chosen["a"] != 0.02
    assert search(GRID, ["a"], lambda *_: [math.nan] * 2, lower=True).chosen == {"a": None}
    waiting = search(GRID, ["a"], lambda _, rate: None if rate == 0.04 else [1.0], lower=True)
    assert not waiting.complete and waiting.rates == GRID.rates
