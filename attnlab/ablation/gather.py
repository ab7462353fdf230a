"""What the runs of a plan came to, from their workdirs: the results that a report is made of."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import time
from collections.abc import Callable
from typing import Any

from attnlab import config as config_lib
from attnlab import storage
from attnlab.ablation import collect as collect_lib
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
from attnlab.train.metrics import read_lines


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
        runs = [_run(plan, arm, seed, view, workdir) for arm in plan.config.arms for seed in seeds]
        return not seeds_due(Results(_plan(plan, now, workdir), runs))

    return ask


def collect(plan: Announced, workdir: pathlib.Path) -> Results:
    """The results of a plan as they are now; runs that are not over are missing."""
    view = Log(workdir).read()
    now = schedule(plan.config, plan.cells, view, answered(plan, workdir))
    runs = [_run(plan, arm, seed, view, workdir) for arm in plan.config.arms for seed in now.seeds]
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
        equal=results_lib.Equal(config.equal.on(next(iter(config.tasks))).what, residual, _equal_notes(plan)),
        tuning=tuned,
        paired=len({cell.seed_offset for cell in plan.cells}) == 1,
        created=plan.tree["created"],
    )


def _equal_notes(plan: Announced) -> list[str]:
    """What shrank, and what was held equal on the tasks after the first, with the largest residual there."""
    held, notes = plan.tree["solved"], list(plan.tree["solved"]["notes"])
    for task in list(plan.config.tasks)[1:]:
        off = max((held["residual"][c.name] for c in plan.cells if c.task == task), key=abs)
        notes.append(f"on {task}: {plan.config.equal.on(task).what}, at most {off:+.2f} % off")
    return notes


def _arm(plan: Announced, arm: str, now: Schedule, workdir: pathlib.Path) -> results_lib.Arm:
    cells = {c.task: c for c in plan.cells if c.arm == arm}
    firsts = {c.task: c for c in plan.cells if c.arm == plan.config.first}
    differing, notes = {}, []
    for task, cell in cells.items():
        differing = collect_lib.difference(firsts[task].config(), cell.config()) | differing
    chosen, curve = None, []
    for i, (task, found) in enumerate(now.searches.items()):
        where = f" on {task}" if task else ""
        if found.edge.get(arm):
            notes.append(f"edge: the best learning rate{where} is at an end of the rates that were tried")
        if i == 0 and found.complete:
            chosen, curve = found.chosen[arm], found.curves[arm]
    first = next(iter(cells.values()))
    for word, other in (("begins as", first.begins), ("learns of", first.teacher)):
        if other is not None:
            notes.append(f"{word} {other['place']} at step {other['step']} (digest {other['digest'][:12]})")
    path = workdir / "arms" / first.name / f"seed{plan.config.seeds[0]}"
    command = f"attnlab train --config {shlex.quote(storage.shown(str(path)))}/config.json --workdir runs/again"
    if first.begins is not None:
        command += f" --init-from {shlex.quote(first.begins['place'])}"
    overrides = plan.config.arms[arm]
    return results_lib.Arm(dict(overrides), differing, chosen, curve, command, notes)


# --- the runs ---------------------------------------------------------------------------------------------------------


def _run(plan: Announced, arm: str, seed: int, view: View, workdir: pathlib.Path) -> results_lib.Run:
    """What an arm came to under a seed, on all tasks; curves and costs are of the first one."""
    cells = [c for c in plan.cells if c.arm == arm]
    parts = [_part(plan.config, cell, f"arms/{cell.name}/seed{seed}", view, workdir) for cell in cells]
    first = parts[0]
    statuses = [part.status for part in parts]
    known = lambda values: [v for v in values if v is not None]
    return dataclasses.replace(
        first,
        seed=seed,
        workdir=first.workdir if len(parts) == 1 else storage.shown(str(workdir / "arms" / arm)),
        status=next((s for s in ("failed", "missing") if s in statuses), "done"),
        reason="; ".join(_said(cell.task, part.reason) for cell, part in zip(cells, parts) if part.reason) or None,
        seconds=sum(known(part.seconds for part in parts)) or None,
        tokens=sum(known(part.tokens for part in parts)) or None,
        final={} if first is not parts[-1] else first.final,
        tasks={task: figures for part in parts for task, figures in part.tasks.items()},
    )


def _said(task: str, reason: str) -> str:
    return f"{task}: {reason}" if task else reason


def _part(plan: PlanConfig, cell: Cell, name: str, view: View, workdir: pathlib.Path) -> results_lib.Run:
    """One workdir of an arm; its status is what the plan's log says of it."""
    path, status = workdir / name, view.status(name)
    try:
        run = collect_lib.run(cell.arm, collect_lib.read(path), cost_of(cell))
    except UserError:  # it has not begun, or failed before it had
        run = results_lib.Run(cell.arm, 0, storage.shown(str(path)), "missing")
    if status != "done":
        event = view.last(name, "failed") if status == "failed" else None
        reason = event["reason"] if event is not None else run.reason
        return dataclasses.replace(
            run, status="missing" if event is None else "failed", reason=reason, final={}, tasks={}
        )
    event = view.last(name, "done")
    values = {metric: event["metrics"].get(metric) for metric in plan.metrics_of(cell.task)}
    run = dataclasses.replace(run, status="done", reason=None, tokens=event["tokens"], device=event["device"])
    if not cell.task:
        return dataclasses.replace(run, final=run.final | values)
    told = {metric: figure for figures in run.tasks.values() for metric, figure in figures.items()}
    figures = {}
    for metric, value in values.items():
        better = plan.metrics_of(cell.task)[metric].direction
        like = told.get(metric.removeprefix(collect_lib.HELDOUT), results_lib.Figure(None))
        figures[metric] = dataclasses.replace(like, value=value, better=better)
    return dataclasses.replace(run, tasks={cell.task: figures})
