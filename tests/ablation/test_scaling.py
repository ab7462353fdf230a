"""Curves keep their spikes, targets are met where they are, and fits find the coefficients that made the data."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from attnlab.ablation import scaling
from attnlab.errors import UserError

TRUE = scaling.Fit(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)  # a published re-fit


def points(count, n=(1e6, 1e8), d=(2e7, 2e9), noise=0.0, fit=TRUE, seed=0):
    grid = np.array([(a, b) for a in np.geomspace(*n, count) for b in np.geomspace(*d, count)])
    error = np.exp(noise * np.random.default_rng(seed).normal(size=len(grid)))
    return scaling.Points(grid[:, 0], grid[:, 1], [fit.loss(a, b) * e for (a, b), e in zip(grid, error)])


def near(ours, theirs, rtol):
    np.testing.assert_allclose(dataclasses.astuple(ours), dataclasses.astuple(theirs), rtol=rtol)


def test_exact_data():
    """3 x 3 exact points give all five coefficients to 1e-3; two architectures with one E, all nine."""
    near(scaling.fit(points(3)), TRUE, 1e-3)
    other = dataclasses.replace(TRUE, A=300.0, alpha=0.32, B=1500.0)
    one, two = scaling.fit_jointly([points(4), points(3, fit=other)])
    near(one, TRUE, 1e-3)
    near(two, other, 1e-3)


def test_residuals_are_the_loss():
    """The log residuals and their derivatives are those of E + A N^-alpha + B D^-beta."""
    logs = points(3, noise=0.1).logs
    x = np.array([0.5, 6.0, 0.34, 7.0, 0.36])
    predicted = math.exp(0.5) + math.exp(6) * np.exp(logs[0]) ** -0.34 + math.exp(7) * np.exp(logs[1]) ** -0.36
    residuals = lambda x: scaling.residuals(x, [logs])
    np.testing.assert_allclose(residuals(x), np.log(predicted) - logs[2], rtol=1e-12, atol=1e-12)
    for i, step in enumerate(1e-6 * np.eye(5)):
        slope = (residuals(x + step) - residuals(x - step)) / 2e-6
        np.testing.assert_allclose(scaling.jacobian(x, [logs])[:, i], slope, rtol=1e-6, atol=1e-8)


def test_noise():
    """With noise of .003 the exponents stand within four of the published errors; one outlier moves them little."""
    noisy = scaling.fit(points(4, noise=0.003))
    assert abs(noisy.alpha - TRUE.alpha) < 0.02 and abs(noisy.beta - TRUE.beta) < 0.016 and abs(noisy.E - TRUE.E) < 0.1
    clean = points(4)
    losses = np.array(clean.losses)
    losses[5] *= 1.3
    near(scaling.fit(dataclasses.replace(clean, losses=losses)), TRUE, 0.05)


def test_how_far_to_trust():
    """Intervals hold the truth, the largest run is predicted, and what the grid is too small for is said."""
    noisy = points(4, noise=0.003, seed=1)
    found = scaling.scaling(noisy, draws=30)
    for name in ("alpha", "beta"):
        low, high = found.intervals[name]
        assert low < getattr(TRUE, name) < high and low < getattr(found.fit, name) < high
    rest = scaling.Points(noisy.parameters[:-1], noisy.tokens[:-1], noisy.losses[:-1])  # the last is the largest
    assert found.held_out_error == pytest.approx(scaling.fit(rest).loss(1e8, 2e9) / noisy.losses[-1] - 1, abs=1e-9)
    assert abs(found.held_out_error) < 0.03 and found.notes == []
    small = scaling.scaling(points(3, n=(1e5, 3e5), d=(1e6, 1e8), noise=0.03), draws=8)
    assert "a first look: 3 x 3" in small.notes[0] and "0.5 and 2.0 decades" in small.notes[0]
    low, high = small.intervals["alpha"]
    assert ("E is not identified" in " ".join(small.notes)) == (low <= 0.1 <= high)


def test_contest():
    """Twice the parameters for the same loss is a multiplier of two; other exponents are told apart, equal ones not."""
    worse = dataclasses.replace(TRUE, A=TRUE.A * 2**TRUE.alpha)
    found = scaling.contest(points(4, noise=1e-4), points(4, noise=1e-4, fit=worse, seed=1), draws=30)
    assert found.parameter_multiplier == pytest.approx(2, rel=0.02)
    assert found.alpha_difference[0] < 0 < found.alpha_difference[1]
    steeper = scaling.contest(
        points(4, fit=dataclasses.replace(TRUE, alpha=0.4), noise=1e-4), points(4, seed=1), draws=30
    )
    assert 0.03 < steeper.alpha_difference[0] < steeper.alpha_difference[1] < 0.08


def test_inverses():
    """The parameters and tokens for a loss give that loss; below E there are none."""
    assert TRUE.loss(TRUE.parameters_for(3.0, 1e9), 1e9) == pytest.approx(3.0)
    assert TRUE.loss(1e8, TRUE.tokens_for(3.0, 1e8)) == pytest.approx(3.0)
    assert TRUE.parameters_for(1.8, 1e9) is None and TRUE.tokens_for(1.8, 1e8) is None


@pytest.mark.parametrize(
    "columns, part",
    [
        (([1e6] * 9, list(range(1, 10)), [3.0] * 9), "parameters takes fewer than 3 values"),
        (([1e6, 2e6], [1e6, 2e6], [3.0, 2.0]), "2 points for 5 coefficients"),
        (([1e6, 2e6, 0] * 3, [1e6] * 9, [3.0] * 9), "above 0"),
        (([1e6] * 9, [1e6] * 8, [3.0] * 9), "of one length"),
    ],
)
def test_refused(columns, part):
    """Points that cannot tell the coefficients."""
    with pytest.raises(UserError, match=part):
        scaling.Points(*columns)


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 399, 400, 401, 5000])
def test_decimation(length):
    """At most as many points, in order, with both ends and every bin's spikes, NaN where there is nothing else."""
    y = np.random.default_rng(0).normal(size=length)
    y[length // 2], y[length // 3], y[: length // 10] = 1e6, -1e6, np.nan
    kept = scaling.decimate(y, 400)
    assert len(kept) <= 400 and (np.diff(kept) > 0).all() and {0, length - 1} <= set(kept)
    assert length < 401 or {length // 2, length // 3} <= set(kept)
    assert length < 401 or len(kept) > 250
    with pytest.raises(UserError, match="4 or more"):
        scaling.decimate(np.zeros(10), 3)


def test_window():
    """Means of the last values, of fewer at the start; a window of one changes nothing."""
    y = np.random.default_rng(0).normal(size=9)
    np.testing.assert_allclose(scaling.smooth(y, 3), [y[max(0, i - 2) : i + 1].mean() for i in range(9)], rtol=1e-12)
    np.testing.assert_allclose(scaling.smooth(y, 1), y, rtol=1e-12)
    with pytest.raises(UserError, match="window = 0"):
        scaling.smooth(y, 0)


def test_time_to_target():
    """Interpolated in log steps; evaluations that are not there are passed over; what is never reached is None."""
    reach = scaling.time_to_target
    assert reach([10, 1000], [4.0, 2.0], 3.0) == pytest.approx(100)
    assert reach([10, 100, 1000], [4.0, None, 2.0], 3.0) == pytest.approx(100)
    assert reach([10, 100, 1000], [4.0, math.nan, 2.0], 2.0) == pytest.approx(1000)
    assert reach([10, 1000], [0.0, 1.0], 0.5, "higher") == pytest.approx(100)
    assert reach([10, 1000], [1.0, 0.5], 3.0) == 10  # from the first
    assert reach([0, 10], [4.0, 2.0], 3.0) == 10  # no logarithm of step 0
    assert reach([10, 1000], [4.0, 3.5], 3.0) is None


def test_speedup():
    """Geometric mean of ratios; an interval only from ten pairs on; pairs that never arrive are counted."""
    few = scaling.speedup([100, 50, None], [200, 200, 300])
    assert (few.ratios, few.mean, few.ci95, few.unreached) == ([2.0, 4.0], pytest.approx(8**0.5), None, 1)
    many = scaling.speedup(np.linspace(90, 110, 10), [200.0] * 10)
    assert many.ci95[0] < many.mean < many.ci95[1] and many.mean == pytest.approx(2, rel=0.01)
    assert scaling.speedup([None], [3.0]).mean is None
