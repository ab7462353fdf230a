"""The streams of the test-time regression benchmark, and the ordering of its predictors."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks import regression


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("segments", regression.SEGMENTS)
def test_a_stream_is_linear_in_each_segment_and_noisy(segments):
    keys, values, clean = regression.stream(0, segments, 256, 4)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1)
    assert np.std(values - clean) == pytest.approx(regression.NOISE, rel=0.1)
    parts = [slice(i, i + 256 // segments) for i in range(0, 256, 256 // segments)]
    for part in parts:
        w = np.linalg.lstsq(keys[part], clean[part], rcond=None)[0]
        np.testing.assert_allclose(keys[part] @ w, clean[part], atol=1e-12)
    misfit = np.linalg.lstsq(keys, clean, rcond=None)[1].sum()
    assert misfit > 1 if segments > 1 else misfit < 1e-20


@pytest.mark.parametrize("name", regression.PREDICTORS)
def test_a_prediction_sees_only_earlier_pairs(name):
    predictor = regression.PREDICTORS[name][0]
    keys, values, _ = map(np.array, regression.streams(0, 1, 2, 16, 4))
    run = jax.jit(predictor, static_argnums=(2, 3))
    before = np.asarray(run(keys, values, 4.0, 0.01))
    keys[:, 8:] *= 0.5
    values[:, 7:] *= -1
    after = np.asarray(run(keys, values, 4.0, 0.01))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])  # entry t - 1 predicts value t
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_least_squares_is_the_ridge_regression_of_what_was_seen():
    keys, values, _ = regression.streams(0, 1, 1, 12, 4)
    k, v = np.asarray(keys)[0], np.asarray(values)[0]
    w = np.linalg.solve(k[:9].T @ k[:9] + 0.1 * np.eye(4), k[:9].T @ v[:9])
    found = regression.linear_regression(keys, values, 0.0, 0.1)
    np.testing.assert_allclose(found[0, 8], k[9] @ w, atol=1e-12)


@pytest.mark.slow
def test_local_linear_attention_has_the_least_error_on_piecewise_linear_streams():
    """And on linear streams less than linear and softmax attention. Reduced: T 128, d 4, 3 seeds, tuned there."""
    rows = regression.measure(seeds=3, length=128, width=4)
    claims = regression.ordering(rows)
    assert len(claims) == 5 and all(claims.values())
    mse = {(row["segments"], row["predictor"]): row["mse"] for row in rows}
    for n in (2, 4):
        others = [error for (m, name), error in mse.items() if m == n and name != "local linear attention"]
        assert mse[n, "local linear attention"] < 0.9 * min(others)
    for name in ("linear attention", "softmax attention"):
        assert mse[1, "local linear attention"] < 0.9 * mse[1, name]


def test_ordering_is_of_the_errors():
    """Each claim turns with the errors it is about."""
    names = ("linear attention", "softmax attention", "local linear attention")
    rows = lambda *mse: [{"segments": n, "predictor": p, "mse": e} for n in (1, 2) for p, e in zip(names, mse)]
    assert list(regression.ordering(rows(0.2, 0.3, 0.1)).values()) == [True, True, True]
    assert list(regression.ordering(rows(0.2, 0.3, 0.25)).values()) == [False, False, True]
    assert list(regression.ordering(rows(0.3, 0.2, 0.25)).values()) == [True, True, False]
