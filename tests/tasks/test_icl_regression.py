"""In-context linear regression: examples are functions of their index, follow the stated law, and are told by Bayes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from attnlab import data as data_lib
from attnlab.errors import ConfigError, UserError
from attnlab.tasks.icl_regression import IclRegressionConfig, step_rate, step_risk
from tests import tiers


def opened(**fields):
    return data_lib.open_data(IclRegressionConfig(**{"d": 3, "examples": 6, "batch": 8, **fields}))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_an_example_depends_on_its_index_alone():
    """Not on the batch that it is in, nor on the number of hosts; nor on the process, as digests that another made hold
    (test_laws.py)."""
    task = opened()
    together = task.rows("train", [5, 9])
    assert_same(together, pickle.loads(pickle.dumps(task)).rows("train", [5, 9]))  # as it goes to a worker
    for row, index in enumerate((5, 9)):
        assert_same({k: v[row] for k, v in together.items()}, {k: v[0] for k, v in task.rows("train", [index]).items()})
    halves_are_the_whole(0)


@tiers.exhaustive
def test_workers_make_the_same():
    """The loader is that of tests/data."""
    halves_are_the_whole(1)


def halves_are_the_whole(workers):
    whole = opened().training(seed=0)
    halves = [opened().training(seed=1, rows=range(4)), opened(workers=workers).training(seed=0, rows=range(4, 8))]
    for _ in range(3):
        parts = [next(half) for half in halves]
        assert_same(next(whole), {k: np.concatenate([part[k] for part in parts]) for k in parts[0]})
    for loader in (whole, *halves):
        loader.close()


def test_resumes_at_the_next_batch_of_the_same_task():
    """By step alone; another task, seed or size of batch is refused by its key."""
    task = opened()
    first = task.training(seed=0)
    for _ in range(3):
        next(first)
    state = first.get_state()
    again = task.training(seed=0)
    again.set_state(state)
    assert_same(next(again), next(first))
    for key, value in {"noise": 0.5, "seed": 4, "batch": 4, "examples": 7}.items():
        with pytest.raises(UserError, match=f"data.{key} was"):
            opened(**{key: value}).training(seed=0).set_state(state)


@pytest.mark.parametrize("fields", [{}, {"queries": "last"}, {"rho": 0.7, "noise": 0.0}])
def test_rows_are_problems_of_their_own(fields):
    """Queries hide y, examples tell it, targets are y at queries; with no noise, d examples tell everything."""
    task = opened(**fields)
    c, rows = task.config, task.rows("train", range(64))
    queries = rows["weights"][0] == 1
    assert queries.sum() == (c.examples + 1 if c.queries == "every" else 1)
    np.testing.assert_array_equal(rows["inputs"][:, queries, -1], 0)
    if c.queries == "every":
        np.testing.assert_array_equal(rows["inputs"][:, 0::2, :-1], rows["inputs"][:, 1::2, :-1])
        np.testing.assert_array_equal(rows["targets"][:, 0::2, 0], rows["inputs"][:, 1::2, -1])
    np.testing.assert_array_equal(rows["targets"][:, ~queries], 0)
    assert task.seen()[queries].max() == c.examples
    if c.noise == 0:
        error = (task.baselines(rows)["bayes"] - rows["targets"])[:, queries & (task.seen() > c.d)]
        assert abs(error).max() < 1e-2 and abs(rows["targets"]).max() > 1


def test_baselines_have_the_risk_of_the_theory():
    """zero: 1 + noise; a step of gradient descent: the formula, least at its own rate. Bayes with d 5, 40 examples,
    noise 0.1: 0.114, computed elsewhere over 20,000 draws."""
    task = data_lib.open_data(IclRegressionConfig(queries="last", heldout=2048, batch=1024))
    heldout = task.heldout()
    count = sum(float(batch["weights"].sum()) for batch in heldout)
    risk = {name: error.sum() / count for name, error in heldout.facts()["baselines"].items()}
    assert abs(risk["zero"] - 1.1) < 0.06 and abs(risk["bayes"] - 0.114) < 0.006
    rate = step_rate(40, 5, 0.1)
    assert abs(risk["step"] - step_risk(rate, 40, 5, 0.1)) < 0.02 and round(step_risk(rate, 40, 5, 0.1), 3) == 0.24
    assert step_risk(rate, 40, 5, 0.1) < min(step_risk(rate * f, 40, 5, 0.1) for f in (0.9, 1.1))


def test_bayes_is_ridge_regression_written_out():
    """At one query, with the examples before it."""
    task = opened(noise=0.3)
    rows, at = task.rows("train", [2]), 8
    x, y = rows["inputs"][0, 1:at:2, :-1].astype(float), rows["inputs"][0, 1:at:2, -1].astype(float)
    w = np.linalg.solve(x.T @ x + 0.3 * 3 * np.eye(3), x.T @ y)
    np.testing.assert_allclose(task.baselines(rows)["bayes"][0, at, 0], w @ rows["inputs"][0, at, :-1], rtol=1e-6)


def test_held_out_examples_are_others_and_fill_up_with_weight_0():
    task = opened(heldout=11)
    batches = list(task.heldout())
    assert len(batches) == 2 and [float(b["weights"].sum()) for b in batches] == [8 * 7, 3 * 7]
    seen = {row.tobytes() for row in task.rows("train", range(500))["inputs"]}
    assert not seen & {row.tobytes() for batch in batches for row in batch["inputs"]}
    assert len(list(task.heldout(batches=1))) == 1


@pytest.mark.parametrize(
    "fields", [{"d": 0}, {"examples": 0}, {"noise": -1}, {"rho": 1}, {"queries": "x"}, {"batch": 0}, {"heldout": 0}]
)
def test_impossible_fields(fields):
    with pytest.raises(ConfigError, match=f"data.{next(iter(fields))} = .* allowed"):
        opened(**fields)
