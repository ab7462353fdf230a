"""The search of learning rates: one grid for all arms, on seeds that are not reported, until every optimum is interior.

A grid is extended for all arms where it is for one, so that all have the same number of trials.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from attnlab.ablation.plan import Tuning

Values = Callable[[str, float], list[float] | None]


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a search stands.

    Attributes:
      rates: those that are to be tried, rising.
      complete: whether all of them were, and no more is.
      chosen: by arm, the best; None where all have failed.
      edge: by arm, whether its best is at an end of the grid.
      curves: by arm, `[rate, mean, deviation, n]` of those that were tried; failed runs count in no number, and where
        all of a rate's failed n is 0.
    """

    rates: tuple[float, ...]
    complete: bool
    chosen: dict[str, float | None] = dataclasses.field(default_factory=dict)
    edge: dict[str, bool] = dataclasses.field(default_factory=dict)
    curves: dict[str, list[list[float | None]]] = dataclasses.field(default_factory=dict)


def search(tuning: Tuning, arms: Sequence[str], values: Values, *, lower: bool) -> Found:
    """Replays the search on what is known; the same results give the same search, in any process.

    Args:
      tuning: the grid.
      arms: that are tuned together.
      values: `values(arm, rate)` is the metric of the tuning seeds' runs, NaN of one that failed; None while one of
        them is still to come.
      lower: whether less is better.
    """
    rates = tuning.rates
    while True:
        known = {arm: [values(arm, rate) for rate in rates] for arm in arms}
        if any(v is None for row in known.values() for v in row):
            return Found(rates, complete=False)
        best = {arm: _best(row, lower) for arm, row in known.items()}
        up = any(i == len(rates) - 1 for i in best.values())
        down = any(i == 0 for i in best.values())
        longer = _extended(rates, up, down, tuning.most)
        if longer == rates:
            break
        rates = longer
    return Found(
        rates,
        complete=True,
        chosen={arm: None if i is None else rates[i] for arm, i in best.items()},
        edge={arm: i in (0, len(rates) - 1) for arm, i in best.items()},
        curves={arm: [_point(rate, v) for rate, v in zip(rates, row, strict=True)] for arm, row in known.items()},
    )


def _best(row: list[list[float]], lower: bool) -> int | None:
    """The rate with the best mean; one with a run that failed is none."""
    means = {i: statistics.fmean(v) for i, v in enumerate(row) if all(map(math.isfinite, v))}
    return (min if lower else max)(means, key=means.get) if means else None


def _extended(rates: tuple[float, ...], up: bool, down: bool, most: int) -> tuple[float, ...]:
    factor = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
    rounded = lambda rate: float(f"{rate:.6g}")
    if up and len(rates) < most:
        rates = (*rates, rounded(rates[-1] * factor))
    if down and len(rates) < most:
        rates = (rounded(rates[0] / factor), *rates)
    return rates


def _point(rate: float, row: list[float]) -> list[float | None]:
    good = [v for v in row if math.isfinite(v)]
    mean = statistics.fmean(good) if good else None
    return [rate, mean, statistics.stdev(good) if len(good) > 1 else None, len(good)]
