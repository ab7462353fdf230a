"""Comparisons of a plan's arms with its baseline, from the runs alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from attnlab.ablation import statistics
from attnlab.ablation.results import Comparison, Items, Metric, Plan, Results, Run

DECIDED = ("better", "worse", "trivially better", "trivially worse", "equivalent", "identical")
ENOUGH = 5  # seeds below which no claim is made


@dataclasses.dataclass(frozen=True)
class Look:
    """What the plan's stopping rule lets one see of the runs that are there.

    Attributes:
      number: of the last look that is complete, from 1; None: none is, and what is told is a peek.
      seeds: those that count.
    """

    number: int | None
    seeds: list[int]


def look(results: Results) -> Look:
    """The last look of which every arm's runs have ended."""
    plan = results.plan
    ended = {(run.arm, run.seed) for run in results.runs if run.status != "missing"}
    for number, count in reversed(list(enumerate(plan.stopping.looks, 1))):
        if all((arm, seed) in ended for arm in plan.arms for seed in plan.seeds[:count]):
            return Look(number, plan.seeds[:count])
    return Look(None, plan.seeds)


def compare(results: Results) -> Results:
    """The same results with `comparisons` made anew: every arm with the baseline, by every metric of the plan.

    Holm's adjustment is over the primary metrics' comparisons; one that cannot be tested counts as p = 1.
    """
    plan, seen = results.plan, look(results)
    made = [
        _Pair(plan, metric, arm, seen, {run.seed: run for run in results.runs if run.arm == arm},
              {run.seed: run for run in results.runs if run.arm == plan.baseline}).compare()
        for metric in plan.metrics for arm in plan.arms if arm != plan.baseline
    ]  # fmt: skip
    primary = [i for i, (c, _) in enumerate(made) if c.primary]
    adjusted = dict(zip(primary, statistics.holm([1.0 if made[i][0].p is None else made[i][0].p for i in primary])))
    comparisons = []
    for i, (c, difference) in enumerate(made):
        p_holm = adjusted[i] if c.primary and c.p is not None else None
        word = "inconclusive"
        if difference is not None:
            rule = {"direction": plan.metric(c.metric).direction, "margin": c.margin, "level": c.level}
            word = statistics.verdict(difference, p_holm if c.primary else c.p, **rule)
        comparisons.append(dataclasses.replace(c, p_holm=p_holm, verdict=word))
    return dataclasses.replace(results, comparisons=comparisons)


def seeds_due(results: Results) -> list[int]:
    """Seeds that the stopping rule still asks for; none where the plan is through, or decided at the last look.

    It stops early where every primary comparison is decided, equivalence included. Comparisons are made anew.
    """
    plan, seen = results.plan, look(results)
    reached = seen.number or 0
    if reached == len(plan.stopping.looks):
        return []
    primary = [c for c in compare(results).comparisons if c.primary]
    if reached and primary and all(c.verdict in DECIDED for c in primary):
        return []
    done = len(seen.seeds) if reached else 0
    return plan.seeds[done : plan.stopping.looks[reached]]


class _Pair:
    """One arm and the baseline, by one metric."""

    def __init__(
        self, plan: Plan, metric: Metric, arm: str, seen: Look, runs: Mapping[int, Run], others: Mapping[int, Run]
    ):
        self._plan, self._metric, self._arm, self._look = plan, metric, arm, seen
        self._runs, self._others = runs, others
        # By seed; None: the run failed, or the figure is not finite.
        self._values, self._before = self._ended(runs), self._ended(others)
        self._notes: list[str] = []

    def _ended(self, runs: Mapping[int, Run]) -> dict[int, float | None]:
        found: dict[int, float | None] = {}
        for seed in self._look.seeds:
            run = runs.get(seed)
            if run is not None and run.status == "failed":
                found[seed] = None
            elif run is not None and run.status == "done" and self._metric.name in (figures := run.figures()):
                found[seed] = figures[self._metric.name]
        return found

    def compare(self) -> tuple[Comparison, statistics.Difference | None]:
        """The comparison, whose `p_holm` and `verdict` are still to be filled, and what it is of."""
        plan, metric = self._plan, self._metric
        both = [s for s in self._look.seeds if s in self._values and s in self._before]
        pairs = [s for s in both if self._values[s] is not None and self._before[s] is not None]
        if plan.paired:
            pairs = self._of_one_device(pairs)
            a, b = [self._values[s] for s in pairs], [self._before[s] for s in pairs]
        else:
            a, b = ([v for v in values.values() if v is not None] for values in (self._values, self._before))
        difference = None
        if a and b:
            difference = statistics.paired(a, b) if plan.paired else statistics.unpaired(a, b)
        self._remark(difference)
        tests = {
            "ci95": None,
            "t": None,
            "df": None,
            "p": None,
            "mean": None,
            "sd": None,
            "tost_p": None,
            "mde80": None,
        }
        margin, level, d = plan.margins.get(metric.name), plan.stopping.level, difference
        if d is not None:
            tests = {key: getattr(d, key) for key in ("t", "df", "p", "mean", "sd")}
            tests |= {"ci95": d.interval(), "tost_p": None if margin is None else d.tost(margin)}
            tests |= {"mde80": d.detectable(level=level)}
        return Comparison(
            metric=metric.name, arm=self._arm, baseline=plan.baseline, primary=metric.primary,
            planned=plan.hash is not None and self._look.number is not None, look=self._look.number, level=level,
            test="paired t" if plan.paired else "Welch", n=d.n if d else 0, pairs=pairs if plan.paired else [],
            missing=[s for s in self._look.seeds if s not in both], p_holm=None, margin=margin,
            **tests, **_of_pairs(a if plan.paired else [], b if plan.paired else []),
            failures=statistics.failures(list(self._values.values()), list(self._before.values()),
                                         [(self._values[s], self._before[s]) for s in both], metric.direction),
            items=self._items(pairs) if plan.paired else None, verdict="inconclusive", notes=self._notes,
        ), difference  # fmt: skip

    def _of_one_device(self, pairs: list[int]) -> list[int]:
        devices = {s: (self._runs[s].device, self._others[s].device) for s in pairs}
        apart = [s for s in pairs if devices[s][0] != devices[s][1]]
        if apart:
            kinds = " and ".join(map(str, devices[apart[0]]))
            self._notes.append(f"seeds {', '.join(map(str, apart))} are no pairs: they ran on {kinds}")
        return [s for s in pairs if s not in apart]

    def _remark(self, difference: statistics.Difference | None) -> None:
        if difference is None:
            self._notes.append("no runs can be compared")
        elif difference.se is None:
            self._notes.append("one run says nothing of its spread: no test can be made")
        elif not difference.testable and not difference.same:
            self._notes.append("the difference is the same at every seed: seeds change nothing, and are no repeats")

    def _items(self, pairs: list[int]) -> Items | None:
        """Over the test set's documents or examples, where every pair has as many."""
        name = self._metric.name
        columns = [(self._runs[s].items.get(name), self._others[s].items.get(name)) for s in pairs]
        lengths = {None if values is None else len(values) for both in columns for values in both}
        if len(lengths) != 1 or None in lengths or min(lengths) < statistics.LEAST_BOOTSTRAP:
            return None
        if any(value is None for both in columns for values in both for value in values):
            return None
        d = np.mean([np.subtract(a, b) for a, b in columns], axis=0)
        return Items(len(d), float(d.mean()), statistics.over_examples(d))


def _of_pairs(a: list[float], b: list[float]) -> dict[str, float | None]:
    """What is told of pairs besides the t test; nothing where there are none."""
    if not a:
        return dict.fromkeys(("r", "sign_flip_p", "wilcoxon_p", "welch_p"))
    r, d = statistics.correlation(a, b), np.subtract(a, b)
    welch = statistics.unpaired(a, b).p if r is not None and r < 0 else None
    return {"r": r, "sign_flip_p": statistics.sign_flip(d), "wilcoxon_p": statistics.wilcoxon(d), "welch_p": welch}


def head_to_head(results: Results, metric: str, arm: str, baseline: str) -> Comparison:
    """An arm against any other, with the adjustment and the levels of the plan."""
    plan = dataclasses.replace(results.plan, baseline=baseline)
    found = compare(dataclasses.replace(results, plan=plan, comparisons=[])).comparisons
    return next(c for c in found if (c.metric, c.arm) == (metric, arm))
