"""Results of arms whose truth is known: normal numbers around stated means, with no run behind them.

What checks the statistics: `null_rate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from attnlab.ablation import statistics
from attnlab.ablation.compare import compare
from attnlab.ablation.results import Arm, Metric, Plan, Results, Run


def results(
    effects: Mapping[str, float], seeds: int = 5, *, sd: float = 1.0, shared: float = 1.0, mean: float = 0.0,
    margin: float | None = None, seed: int = 0, looks: Sequence[int] | None = None,
) -> Results:  # fmt: skip
    """A plan and its runs, not yet compared; the first arm is the baseline.

    Args:
      effects: by arm, how far its true mean is from `mean`; the metric is `loss`, and lower is better.
      sd: of the differences of pairs.
      shared: sd over seeds of what the arms of one seed have in common.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    common = shared * rng.normal(size=seeds)
    runs = []
    for arm, effect in effects.items():
        values = mean + effect + common + sd / math.sqrt(2) * rng.normal(size=seeds)
        runs += [Run(arm, i, f"arms/{arm}/seed{i}", "done", final={"loss": float(v)}) for i, v in enumerate(values)]
    plan = Plan(
        question="Is there a difference, where the truth is known?", baseline=next(iter(effects)),
        arms={arm: Arm() for arm in effects}, seeds=list(range(seeds)), metrics=[Metric("loss")],
        stopping=statistics.stopping(looks or [seeds]), hash="synthetic",
        margins={} if margin is None else {"loss": margin},
    )  # fmt: skip
    return Results(plan, runs)


@dataclasses.dataclass(frozen=True)
class Rates:
    """How often plans without any true difference claim one.

    Attributes:
      plans: how many were drawn.
      rejections: share of single comparisons with p below 5 %, unadjusted.
      claims: share of plans in which any arm is called better or worse.
      better: share of plans in which any arm is called better.
    """

    plans: int
    rejections: float
    claims: float
    better: float


def null_rate(plans: int = 10_000, seeds: int = 5, arms: int = 2, seed: int = 0) -> Rates:
    """Runs the statistics of a plan on identical arms, many times; a right level gives 5 %."""
    names = {"baseline": 0.0, **{f"arm{i}": 0.0 for i in range(1, arms)}}
    rejections, claims, better = 0, 0, 0
    for i in range(plans):
        found = compare(results(names, seeds, seed=seed * plans + i)).comparisons
        rejections += sum(c.p < statistics.LEVEL for c in found)
        claims += any(c.verdict in ("better", "worse") for c in found)
        better += any(c.verdict == "better" for c in found)
    return Rates(plans, rejections / plans / (arms - 1), claims / plans, better / plans)
