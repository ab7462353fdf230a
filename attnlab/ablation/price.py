"""What a plan costs before it is run: runs, tokens, FLOPs, parameters and, where it can be timed here, hours."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from attnlab.ablation import announce, calibrate, schedule
from attnlab.ablation.equal import cost_of
from attnlab.ablation.plan import Cell, PlanConfig
from attnlab.errors import UserError

_STEPS = 5  # that are timed of each arm


def price(
    config: PlanConfig, cells: list[Cell], workdir: pathlib.Path, processes: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The price of a plan, for JSON; nothing is written.

    Args:
      config, cells: of the plan, before anything is solved for.
      workdir: whose plan.json, if it is there, is told of.
      processes: that would share the work.
      say: is told what is timed.

    Returns:
      `arms`: a row for each cell; `runs`, `tokens`, `train_flops`: sums; `hours`: of training steps alone, without
      compiling and evaluating, None where an arm cannot be timed here; `notes`.
    """
    there = announce.read(workdir)
    announce.require_metrics(config, cells)
    tree = announce.solve(config, cells, say) if there is None else there.tree
    solved = [Cell(**cell) for cell in tree["cells"]]
    runs = schedule.planned(config, solved)
    notes = list(tree["solved"]["notes"])
    try:
        say(f"timing {_STEPS} steps of each arm, in turns")
        seconds = calibrate.step_seconds(solved, _STEPS)
    except UserError as error:
        notes.append(str(error))
        seconds = {}
    rows = [_row(cell, [r for r in runs if r.cell.name == cell.name], seconds, tree["solved"]) for cell in solved]
    spent = [row["hours"] for row in rows]
    return {
        "question": config.question,
        "equal": config.equal.what,
        "arms": rows,
        "runs": len(runs),
        "trials": sum(run.name.startswith("tuning/") for run in runs),
        "tokens": sum(row["tokens"] for row in rows),
        "train_flops": sum(row["train_flops"] for row in rows),
        "processes": processes,
        "hours": None if None in spent else sum(spent) / processes,
        "notes": notes,
    }


def _row(cell: Cell, runs: list[schedule.Run], seconds: dict[str, float], held: dict[str, Any]) -> dict[str, Any]:
    cost, configs = cost_of(cell), [run.config() for run in runs]
    steps = sum(c.train.steps for c in configs)
    tokens = sum(c.train.steps * c.data.batch * c.data.length for c in configs)
    per_step = seconds.get(cell.name)
    return {
        "arm": cell.name,
        "set": held["set"].get(cell.name, {}),
        "residual": held["residual"][cell.name],
        "runs": len(runs),
        "steps": cell.tree["train"]["steps"],
        "parameters": cost.parameters,
        "non_embedding": cost.parameters - cost.embedding_parameters,
        "flops_per_token": cost.total_flops,
        "state_bytes": cost.state_bytes,
        "tokens": tokens,
        "train_flops": 3 * cost.total_flops * tokens,
        "step_seconds": per_step,
        "hours": None if per_step is None else per_step * steps / 3600,
    }


def table(priced: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows, for people."""
    columns = ["arm", "runs", "steps", "parameters", "FLOPs per token", "state bytes", "tokens", "training FLOPs",
               "ms per step", f"off in {priced['equal']}", "set"]  # fmt: skip
    rows = [
        [r["arm"], str(r["runs"]), f"{r['steps']:,}", f"{r['parameters']:,}", f"{r['flops_per_token']:,.0f}",
         f"{r['state_bytes']:,}", f"{r['tokens']:,}", f"{r['train_flops']:.3g}",
         "-" if r["step_seconds"] is None else f"{1000 * r['step_seconds']:.1f}", f"{r['residual']:+.2f} %",
         ", ".join(f"{k}={v}" for k, v in r["set"].items()) or "-"]
        for r in priced["arms"]
    ]  # fmt: skip
    return f"{priced['question']}", columns, rows


def summary(priced: dict[str, Any]) -> str:
    """In a line."""
    if priced["hours"] is None:
        time = "it could not be timed here"
    else:
        per = f" in {priced['processes']} processes" if priced["processes"] > 1 else ""
        time = f"about {60 * priced['hours']:.1f} minutes of training steps{per}; compiling and evaluating come to it"
    trials = f", {priced['trials']} of them to choose learning rates (more where the best is at an end)"
    return (
        f"{priced['runs']} runs{trials if priced['trials'] else ''}: {priced['tokens']:,} tokens, "
        f"{priced['train_flops']:.3g} FLOPs; {time}"
    )
