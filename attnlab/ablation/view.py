"""What the report shows of results, by arm."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from attnlab.ablation import compare as compare_lib
from attnlab.ablation.results import AXES, Comparison, Metric, Results, Run

AXIS_NAMES = {"step": "steps", "tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds"}


class View:
    """Results, and what follows from them for every arm.

    Attributes:
      arms: names, in the plan's order; an arm's place is its style.
    """

    def __init__(self, results: Results):
        self.results, self.plan, self.arms = results, results.plan, list(results.plan.arms)
        self.look = compare_lib.look(results)

    def style(self, arm: str) -> int:
        """Of its markers and lines."""
        return self.arms.index(arm)

    def key(self) -> list[tuple[int, str]]:
        """(style, name) of all arms."""
        return list(enumerate(self.arms))

    def done(self, arm: str) -> list[Run]:
        """Runs of an arm that were completed."""
        return [run for run in self.results.of(arm) if run.status == "done"]

    def values(self, metric: str, arm: str) -> dict[int, float]:
        """A metric of an arm by seed, of completed runs in which it is finite."""
        found = {run.seed: run.figures().get(metric) for run in self.done(arm)}
        return {seed: value for seed, value in found.items() if value is not None}

    def spread(self, arm: str, figure: Callable[[Run], float | None]) -> tuple[float | None, float | None, int]:
        """Mean, sd and number of a figure over an arm's completed runs that have it; sd is None below two."""
        found = [value for run in self.done(arm) if (value := figure(run)) is not None and math.isfinite(value)]
        return spread(found)

    def comparison(self, metric: str, arm: str) -> Comparison | None:
        """Of an arm with the baseline; None: it is the baseline."""
        return next((c for c in self.results.comparisons if (c.metric, c.arm) == (metric, arm)), None)

    def label(self, metric: Metric) -> str:
        """A metric's name with its unit, as axes have it."""
        return f"{metric.name} ({metric.unit})" if metric.unit else metric.name

    def best(self, metric: Metric) -> str | None:
        """The arm whose mean is best, if it is better than the second by the plan's own rule; else None."""
        means = {arm: spread(list(self.values(metric.name, arm).values()))[0] for arm in self.arms}
        sign = 1 if metric.direction == "lower" else -1
        order = sorted((arm for arm in self.arms if means[arm] is not None), key=lambda arm: sign * means[arm])
        if len(order) < 2:
            return None
        verdict = compare_lib.head_to_head(self.results, metric.name, order[0], order[1]).verdict
        return order[0] if verdict == "better" else None

    def axes(self) -> list[str]:
        """Budgets that the curves of all runs with a curve know."""
        curves = [run.curve for run in self.results.runs if run.curve]
        return [axis for axis in AXES if curves and all(axis in curve for curve in curves)]

    def curve(self, run: Run, metric: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """x and y of a run's curve, where both are there."""
        nothing = np.empty(0)
        if metric not in run.curve:
            return nothing, nothing
        x, y = (np.array(run.curve[name], np.float64) for name in (axis, metric))
        there = np.isfinite(x) & np.isfinite(y)
        return x[there], y[there]

    def mean_curve(self, arm: str, metric: str, axis: str) -> tuple[np.ndarray, ...]:
        """x, mean, least, largest over an arm's completed runs, at the steps that all of them have."""
        by_step: dict[float, list[tuple[float, float]]] = {}
        runs = [run for run in self.done(arm) if len(self.curve(run, metric, "step")[0])]
        for run in runs:
            columns = (run.curve[name] for name in ("step", axis, metric))
            for step, x, y in zip(*columns):
                if step is not None and x is not None and y is not None:
                    by_step.setdefault(step, []).append((x, y))
        shared = [points for _, points in sorted(by_step.items()) if len(points) == len(runs)]
        if not shared:
            return (np.empty(0),) * 4
        points = np.array(shared)
        y = points[:, :, 1]
        return points[:, :, 0].mean(1), y.mean(1), y.min(1), y.max(1)


def spread(values: list[float]) -> tuple[float | None, float | None, int]:
    """Mean, sd (None below two) and number."""
    if not values:
        return None, None, 0
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values)
