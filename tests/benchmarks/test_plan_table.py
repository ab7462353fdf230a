"""The table of a plan's results: what it prints is what the results hold."""

from __future__ import annotations

import pathlib

import numpy as np

from attnlab.ablation import results_file
from benchmarks import plan_table

KEPT = pathlib.Path(__file__).parents[2] / "docs" / "claims" / "few_heads.json"


def test_rows_are_the_arms_best_first():
    """Means and deviations over the seeds that ended, the difference from the baseline and its verdict; best first."""
    results = results_file.read(KEPT)
    header, *rows = plan_table.table(results)
    (metric,) = {c.metric for c in results.comparisons if c.primary}
    assert header == ["arm", metric, f"from {results.plan.baseline}", "verdict"]
    means = {}
    for arm, shown, *_ in rows:
        values = np.array([run.figures()[metric] for run in results.of(arm)])
        assert shown == f"{values.mean():.3f} ({values.std(ddof=1):.3f})"
        means[arm] = values.mean()
    assert set(means) == set(results.plan.arms)
    assert list(means.values()) == sorted(means.values(), reverse=True)
    found = {row[0]: row[2:] for row in rows}
    assert found.pop(results.plan.baseline) == ["-", "-"]
    assert found == {c.arm: [f"{c.mean:+.3f}", c.verdict] for c in results.comparisons if c.metric == metric}
