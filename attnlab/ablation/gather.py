"""What the runs of a plan came to, from their workdirs: the results that a report is made of."""

from __future__ import annotations

import json
import pathlib
import shlex
import statistics
import time
from collections.abc import Callable
from typing import Any

from attnlab import config as config_lib
from attnlab.ablation import results as results_lib
from attnlab.ablation.announce import Announced
from attnlab.ablation.compare import seeds_due
from attnlab.ablation.equal import cost_of
from attnlab.ablation.plan import Cell, PlanConfig
from attnlab.ablation.results import Results
from attnlab.ablation.schedule import Run, Schedule, schedule
from attnlab.ablation.state import Log, View
from attnlab.ablation.statistics import stopping
from attnlab.errors import Damaged, UserError
from attnlab.train import files
from attnlab.train.metrics import read_lines

_OWN = (
    "step", "loss", "tokens", "tokens_per_second", "step_seconds", "mfu", "grad_norm", "learning_rate", "nonfinite",
    "skipped",
)  # fmt: skip


def records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl; none where there is no such file."""
    try:
        return [json.loads(text) for _, text in read_lines(path / "metrics.jsonl")[0]]
    except (FileNotFoundError, Damaged):
        return []


def final(path: pathlib.Path, run: Run, plan: PlanConfig) -> dict[str, Any]:
    """The metrics of a run's last step.

    Raises:
      UserError: there are none, or one of the plan's is not among them.
    """
    steps = run.config().train.steps
    last = next((r for r in reversed(records(path)) if r["step"] == steps), None)
    if last is None:
        raise UserError(f"{path / 'metrics.jsonl'} has no line of the last step, {steps}")
    wanted = [plan.leading(run.cell.task)[0]] if run.name.startswith("tuning/") else plan.metrics_of(run.cell.task)
    for name in wanted:
        if name not in last:
            raise UserError(f"the plan's metric {name!r} is not in {path / 'metrics.jsonl'}; it has: {', '.join(last)}")
    return last


def answered(plan: Announced, workdir: pathlib.Path) -> Callable[[int, View], bool]:
    """Whether the first n seeds answer the plan's question, by its stopping rule."""

    def ask(count: int, view: View) -> bool:
        seeds = plan.config.seeds[:count]
        now = Schedule([], False, _searches(plan, view), plan.config.seeds)
        runs = [_run(plan, arm, seed, now, view, workdir) for arm in plan.config.arms for seed in seeds]
        return not seeds_due(Results(_plan(plan, now, workdir), runs))

    return ask


def collect(plan: Announced, workdir: pathlib.Path) -> Results:
    """The results of a plan as they are now; runs that are not over are missing."""
    view = Log(workdir).read()
    now = schedule(plan.config, plan.cells, view, answered(plan, workdir))
    runs = [_run(plan, arm, seed, now, view, workdir) for arm in plan.config.arms for seed in now.seeds]
    environment = {**plan.tree["versions"], **{k: str(v) for k, v in plan.tree["git"].items()}}
    checks = {"identical_arms": []}  # such a plan is refused
    created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return Results(_plan(plan, now, workdir), runs, checks=checks, environment=environment, created=created)


def _searches(plan: Announced, view: View) -> dict[str, Any]:
    return schedule(plan.config, plan.cells, view, lambda *_: False).searches


# --- the plan ---------------------------------------------------------------------------------------------------------


def _plan(plan: Announced, now: Schedule, workdir: pathlib.Path) -> results_lib.Plan:
    config, held = plan.config, plan.tree["solved"]
    metrics = [results_lib.Metric(name, m.direction, m.primary) for name, m in config.metrics.items()]
    residual = {cell.arm: held["residual"][cell.name] for cell in reversed(plan.cells)}  # of the first task
    tuned = {}
    if config.tuning is not None:
        tuned = config_lib.to_dict(config.tuning)
        tuned["tried"] = {task or "all": list(found.rates) for task, found in now.searches.items()}
    return results_lib.Plan(
        question=config.question,
        baseline=config.first,
        arms={arm: _arm(plan, arm, now, workdir) for arm in config.arms},
        seeds=list(config.seeds),
        metrics=metrics,
        stopping=stopping(config.looks),
        hash=plan.hash,
        margins={name: m.margin for name, m in config.metrics.items() if m.margin is not None},
        equal=results_lib.Equal(config.equal.what, residual, list(held["notes"])),
        tuning=tuned,
        paired=len({cell.seed_offset for cell in plan.cells}) == 1,
        created=plan.tree["created"],
    )


def _arm(plan: Announced, arm: str, now: Schedule, workdir: pathlib.Path) -> results_lib.Arm:
    cells = {c.task: c for c in plan.cells if c.arm == arm}
    firsts = {c.task: c for c in plan.cells if c.arm == plan.config.first}
    differing, notes = {}, []
    for task, cell in cells.items():
        for key, a, b in config_lib.difference(firsts[task].tree, cell.tree):
            differing.setdefault(key, [a, b])
    chosen, curve = None, []
    for i, (task, found) in enumerate(now.searches.items()):
        where = f" on {task}" if task else ""
        if found.edge.get(arm):
            notes.append(f"edge: the best learning rate{where} is at an end of the rates that were tried")
        if i == 0 and found.complete:
            chosen, curve = found.chosen[arm], found.curves[arm]
    path = shlex.quote(str(workdir / "arms" / next(iter(cells.values())).name / f"seed{plan.config.seeds[0]}"))
    command = f"attnlab train --config {path}/config.json --workdir runs/again"
    overrides = plan.config.arms[arm]
    return results_lib.Arm(dict(overrides), differing, chosen, curve, command, notes)


# --- the runs ---------------------------------------------------------------------------------------------------------


def _run(plan: Announced, arm: str, seed: int, now: Schedule, view: View, workdir: pathlib.Path) -> results_lib.Run:
    """What an arm came to under a seed, on all tasks."""
    cells = [c for c in plan.cells if c.arm == arm]
    names = {c.task: f"arms/{c.name}/seed{seed}" for c in cells}
    states = {task: view.status(name) for task, name in names.items()}
    status = "failed" if "failed" in states.values() else "missing" if "open" in states.values() else "done"
    reasons = [
        f"{task}: {event['reason']}" if task else event["reason"]
        for task, name in names.items()
        if states[task] == "failed" and (event := view.last(name, "failed")) is not None
    ]
    done = {task: view.last(name, "done") for task, name in names.items() if states[task] == "done"}
    first, shown = cells[0], workdir / names[cells[0].task]
    figures = {task: _numbers(event["metrics"], plan.config, task) for task, event in done.items()}
    lines, about = records(shown), _about(shown)
    last = done.get(first.task)
    return results_lib.Run(
        arm=arm,
        seed=seed,
        workdir=str(shown if len(cells) == 1 else workdir / "arms" / arm),
        status=status,
        reason="; ".join(reasons) or None,
        device=None if last is None else last.get("device"),
        commit=about.get("git", {}).get("commit"),
        seconds=sum(_seconds(view, name) for name in names.values()) if done else None,
        tokens=sum(event["tokens"] for event in done.values()) if done else None,
        curve=_curve(lines, first),
        final=figures.get("", {}),
        tasks={
            task: {
                name: results_lib.Figure(value, better=plan.config.metrics_of(task)[name].direction)
                for name, value in found.items()
            }
            for task, found in figures.items()
            if task
        },  # fmt: skip
        diagnostics=_diagnostics(last["metrics"], plan.config, first.task) if last else {},
        cost=_cost(first, lines),
        impl={
            op: ", ".join(sorted(set(found.values()))) for op, found in (about.get("implementations") or {}).items()
        },  # fmt: skip
    )


def _about(path: pathlib.Path) -> dict[str, Any]:
    try:
        return files.read_json(path / "config.json")
    except (FileNotFoundError, Damaged):
        return {}


def _numbers(metrics: dict[str, Any], plan: PlanConfig, task: str) -> dict[str, float | None]:
    return {name: metrics.get(name) for name in plan.metrics_of(task)}


def _diagnostics(metrics: dict[str, Any], plan: PlanConfig, task: str) -> dict[str, float | None]:
    """What else the layers and the evaluation said at the end."""
    known = (*_OWN, *plan.metrics_of(task))
    return {k: v for k, v in metrics.items() if k not in known and not isinstance(v, str)}


def _seconds(view: View, name: str) -> float:
    """Of all the times that a run was at it; of one that was killed nobody knows."""
    return sum(e.get("seconds", 0.0) for e in view.events.get(name, ()) if e["event"] in ("done", "stopped"))


def _curve(lines: list[dict[str, Any]], cell: Cell) -> dict[str, list[Any]]:
    """Columns by step: budgets, losses and what was evaluated."""
    if not lines:
        return {}
    names = dict.fromkeys(k for line in lines for k, v in line.items() if k == "loss" or k.startswith("heldout_"))
    per_token = 3 * cost_of(cell).total_flops
    seconds, before, total = [], 0, 0.0
    for line in lines:
        total += (line.get("step_seconds") or 0.0) * (line["step"] - before)
        before = line["step"]
        seconds.append(total)
    return {
        "step": [line["step"] for line in lines],
        "tokens": [line["tokens"] for line in lines],
        "flops": [per_token * line["tokens"] for line in lines],
        "seconds": seconds,
        **{name: [line.get(name) for line in lines] for name in names},
    }


def _cost(cell: Cell, lines: list[dict[str, Any]]) -> results_lib.Cost:
    cost = cost_of(cell)
    rates = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    return results_lib.Cost(
        parameters=cost.parameters,
        non_embedding=cost.parameters - cost.embedding_parameters,
        flops_per_token=cost.total_flops,
        state_bytes=cost.state_bytes,
        tokens_per_second=statistics.median(rates) if rates else None,
    )
