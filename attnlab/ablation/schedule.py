"""Which runs a plan has, in which order: first those that choose learning rates, then the reported ones, seed by seed.

The schedule is a function of the plan and of what is done, so that every process of a plan has the same one. Arms take
turns, as machines drift.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

from attnlab.ablation import tuning
from attnlab.ablation.plan import Cell, PlanConfig
from attnlab.ablation.state import FINAL, View
from attnlab.train.config import RunConfig

Answered = Callable[[int, View], bool]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a plan.

    Attributes:
      name: its directory below the plan's, `arms/ARM/seed0` or `tuning/ARM/lr0.001/seed1000`.
      cell: its arm and task.
      seed: of the plan; the run's own has the arm's offset added.
      rate: its learning rate; None: the config's.
      share: of the config's steps.
      reason: why it cannot be run.
    """

    name: str
    cell: Cell
    seed: int
    rate: float | None = None
    share: float = 1.0
    reason: str | None = None

    def config(self) -> RunConfig:
        """What it trains."""
        values: dict[str, Any] = {"seed": self.seed + self.cell.seed_offset}
        if self.rate is not None:
            values["optimizer__learning_rate"] = self.rate
        if self.name.startswith("tuning/"):
            steps = max(round(self.cell.tree["train"]["steps"] * self.share), 1)
            values |= {"train__steps": steps, "train__sample_tokens": 0, "train__keep": 1, "train__profile": None}
        return self.cell.config(**values)

    def path(self, workdir: pathlib.Path) -> pathlib.Path:
        """Its workdir."""
        return workdir / self.name


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The runs that are known of.

    Attributes:
      runs: in the order in which they are to be run.
      complete: whether these are all, and all are over.
      searches: by task, the search of learning rates.
      seeds: that are reported.
      look: after how many seeds the question was answered, where it was before the last.
    """

    runs: list[Run]
    complete: bool
    searches: dict[str, tuning.Found]
    seeds: tuple[int, ...]
    look: int | None = None


def schedule(plan: PlanConfig, cells: list[Cell], view: View, answered: Answered | None = None) -> Schedule:
    """The runs of a plan, as far as what is done says which they are.

    Args:
      plan: the plan.
      cells: with what was solved for.
      view: of what is done.
      answered: `answered(n, view)` says whether the first n seeds answer the question; asked at a plan's looks.
    """
    runs: list[Run] = []
    searches: dict[str, tuning.Found] = {}
    for task in plan.tasks:
        if plan.tuning is not None:
            searches[task], more = _search(plan, [c for c in cells if c.task == task], view)
            runs += more
    over = lambda some: all(view.status(run.name) in FINAL for run in some)
    if not all(found.complete for found in searches.values()):
        return Schedule(runs, False, searches, plan.seeds)
    reported: list[Run] = []
    for look in plan.looks:
        seeds = plan.seeds[:look]
        reported = [_reported(cell, seed, searches) for seed in seeds for cell in cells]
        if not over(reported):
            return Schedule(runs + reported, False, searches, plan.seeds)
        if look < plan.looks[-1] and answered is not None and answered(look, view):
            return Schedule(runs + reported, True, searches, seeds, look)
    return Schedule(runs + reported, True, searches, plan.seeds)


def _search(plan: PlanConfig, cells: list[Cell], view: View) -> tuple[tuning.Found, list[Run]]:
    name, metric = plan.leading(cells[0].task)
    by_arm = {cell.arm: cell for cell in cells}
    runs = lambda arm, rate: [_trial(by_arm[arm], rate, seed, plan.tuning.share) for seed in plan.tuning.seeds]

    def values(arm: str, rate: float) -> list[float] | None:
        trials = runs(arm, rate)
        if not all(view.status(run.name) in FINAL for run in trials):
            return None
        return [_value(view, run, name) for run in trials]

    found = tuning.search(plan.tuning, list(by_arm), values, lower=metric.direction == "lower")
    seeds = range(len(plan.tuning.seeds))
    return found, [runs(arm, rate)[i] for rate in found.rates for i in seeds for arm in by_arm]


def _trial(cell: Cell, rate: float, seed: int, share: float) -> Run:
    return Run(f"tuning/{cell.name}/lr{rate:g}/seed{seed}", cell, seed, rate, share)


def _value(view: View, run: Run, metric: str) -> float:
    """The metric of a run that is over; NaN where it failed."""
    done = view.last(run.name, "done")
    value = None if view.status(run.name) != "done" or done is None else done["metrics"].get(metric)
    return math.nan if value is None else float(value)


def _reported(cell: Cell, seed: int, searches: dict[str, tuning.Found]) -> Run:
    name = f"arms/{cell.name}/seed{seed}"
    if cell.task not in searches:
        return Run(name, cell, seed)
    rate = searches[cell.task].chosen[cell.arm]
    return Run(name, cell, seed, rate, reason=None if rate is not None else "every learning rate of the tuning failed")


def planned(plan: PlanConfig, cells: list[Cell]) -> list[Run]:
    """All runs of a plan if no grid is extended and no look ends it, for its price."""
    trials = [] if plan.tuning is None else [
        _trial(cell, rate, seed, plan.tuning.share)
        for rate in plan.tuning.rates for seed in plan.tuning.seeds for cell in cells
    ]  # fmt: skip
    return trials + [Run(f"arms/{cell.name}/seed{seed}", cell, seed) for seed in plan.seeds for cell in cells]
