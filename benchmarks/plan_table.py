"""A plan's results as a table of Markdown: an arm a row, the best by the first metric above.

    python -m benchmarks.plan_table runs/every/results.json

Of each primary metric: its mean over seeds and their standard deviation, the mean difference from the baseline over
pairs of seeds, and what the plan's tests say of it after Holm's adjustment.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np

from attnlab.ablation import results_file
from attnlab.ablation.results import Comparison, Metric, Results


def table(results: Results) -> list[list[str]]:
    """The header and the rows."""
    metrics = [metric for metric in results.plan.metrics if metric.primary]
    of = {(c.arm, c.metric): c for c in results.comparisons}
    header = ["arm"]
    for metric in metrics:
        header += [metric.name, f"from {results.plan.baseline}", "verdict"]
    rows = []
    for arm in sorted(results.plan.arms, key=lambda arm: _place(results, arm, metrics[0])):
        row = [arm]
        for metric in metrics:
            values = _values(results, arm, metric)
            spread = f" ({values.std(ddof=1):.3f})" if len(values) > 1 else ""
            row.append(f"{values.mean():.3f}{spread}" if len(values) else "-")
            row += _against(of.get((arm, metric.name)))
        rows.append(row)
    return [header, *rows]


def _values(results: Results, arm: str, metric: Metric) -> np.ndarray:
    found = [run.figures().get(metric.name) for run in results.of(arm) if run.status == "done"]
    return np.array([value for value in found if value is not None], float)


def _place(results: Results, arm: str, metric: Metric) -> float:
    values = _values(results, arm, metric)
    if not len(values):
        return np.inf
    return values.mean() if metric.direction == "lower" else -values.mean()


def _against(comparison: Comparison | None) -> list[str]:
    if comparison is None or comparison.mean is None:
        return ["-", "-"]
    return [f"{comparison.mean:+.3f}", comparison.verdict]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=pathlib.Path, help="results.json of `attnlab ablate`")
    header, *rows = table(results_file.read(parser.parse_args().results))
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
