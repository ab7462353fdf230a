"""`plan.json`: what is announced before the first run, written once and read by every process of a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from attnlab import config as config_lib
from attnlab.ablation import beginnings, calibrate, equal
from attnlab.ablation import plan as plan_lib
from attnlab.ablation.plan import Cell, PlanConfig
from attnlab.errors import ConfigError, Damaged, UserError
from attnlab.train import files, metadata
from attnlab.train.program import Program, open_data

NAME = "plan.json"


@dataclasses.dataclass(frozen=True)
class Announced:
    """A plan as it was announced.

    Attributes:
      config: what was asked for.
      cells: every arm on every task, with what was solved for.
      hash: SHA-256 of what was asked for, resolved.
      tree: all that plan.json holds.
    """

    config: PlanConfig
    cells: list[Cell]
    hash: str
    tree: dict[str, Any]


def load(spec: str, overrides: Sequence[str]) -> tuple[PlanConfig, list[Cell]]:
    """A plan and its cells from `PATH[:arg=value,...]` and overrides; all that needs no device is checked."""
    config = config_lib.load(PlanConfig, spec, overrides)
    return config, beginnings.pinned(plan_lib.cells(config))


def announce(config: PlanConfig, cells: list[Cell], workdir: pathlib.Path, say: Callable[[str], None]) -> Announced:
    """The plan of a workdir: the one that is there, which must be this one, or this one, written now.

    Raises:
      UserError: the workdir has another plan, or holds something else; what the plan asks for cannot be.
    """
    announcement = plan_lib.announced(config, cells)
    digest = plan_lib.digest(announcement)
    if (there := read(workdir)) is not None:
        return _same(there, announcement, digest, workdir)
    names = os.listdir(workdir) if workdir.is_dir() else []
    if NAME not in names and any(not name.startswith(".") for name in names):  # another slice may just have written it
        raise UserError(f"workdir {workdir} holds something else than a plan; name another")
    require_metrics(config, cells)
    tree = {**solve(config, cells, say), "hash": digest}
    _write_once(workdir, tree)
    return _same(read(workdir), announcement, digest, workdir)


def solve(config: PlanConfig, cells: list[Cell], say: Callable[[str], None]) -> dict[str, Any]:
    """What plan.json holds besides the hash."""
    seconds = None
    if "seconds" in (config.equal.what, *config.equal.tasks.values()):
        say(f"timing {calibrate.STEPS} steps of each arm, in turns")
        seconds = calibrate.step_seconds(cells)
    solved = equal.solve(config, cells, seconds)
    beginnings.require_fit([s.cell for s in solved.values()])
    announcement = plan_lib.announced(config, cells)
    del announcement["cells"]
    others = {"others": announcement.pop("others")} if "others" in announcement else {}
    held = {**equal.describe(solved), **({"step_seconds": seconds} if seconds else {})}
    return {
        "schema": plan_lib.SCHEMA,
        "plan": announcement,
        **others,
        "solved": held,
        "cells": [dataclasses.asdict(s.cell) for s in solved.values()],
        "git": metadata.git_state(),
        "versions": metadata.versions(),
        "command": sys.argv,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def read(workdir: pathlib.Path) -> Announced | None:
    """The plan of a workdir; None if it has none.

    Raises:
      UserError: plan.json is there and is not one, or one of another version.
    """
    try:
        tree = files.read_json(workdir / NAME)
    except FileNotFoundError:
        return None
    except Damaged as error:
        raise UserError(f"{error}; restore it or use another workdir") from None
    try:
        if tree["schema"] != plan_lib.SCHEMA:
            raise KeyError("schema")
        config = config_lib.build(PlanConfig, tree["plan"])
        return Announced(config, [Cell(**cell) for cell in tree["cells"]], tree["hash"], tree)
    except (KeyError, TypeError, ConfigError) as error:
        raise UserError(f"{workdir / NAME} is of another version of attnlab, or damaged: {error}") from None


def _same(there: Announced, announcement: dict[str, Any], digest: str, workdir: pathlib.Path) -> Announced:
    if there.hash == digest:
        return there
    new = json.loads(json.dumps({k: v for k, v in announcement.items() if k != "cells"}))
    old = there.tree["plan"] | ({"others": there.tree["others"]} if "others" in there.tree else {})
    changed = config_lib.difference(old, new)
    shown = "; ".join(f"{k}: {config_lib.show(a)} -> {config_lib.show(b)}" for k, a, b in changed[:6])
    raise UserError(
        f"workdir {workdir} holds another plan (hash {there.hash[:12]}, this one's is {digest[:12]}): "
        f"{shown or 'the configs of its arms differ'}\nwhat was announced is not changed; use another workdir"
    )


def _write_once(workdir: pathlib.Path, tree: dict[str, Any]) -> None:
    """Writes plan.json whole, unless another process was first."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{NAME}-", suffix=".new", dir=workdir)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(tree, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            with contextlib.suppress(FileExistsError):
                os.link(name, workdir / NAME)
        finally:
            os.unlink(name)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from None


def require_metrics(config: PlanConfig, cells: list[Cell]) -> None:
    """Raises ConfigError for a metric of evaluations that a task's evaluations do not have; opens the data."""
    for task in config.tasks:
        cell = next(c for c in cells if c.task == task)
        wanted = [name for name in config.metrics_of(task) if name.startswith("heldout_")]
        known = evaluated(cell)
        for name in wanted:
            config_lib.require_choice(f"metrics of {cell.name}", name, known)


def evaluated(cell: Cell) -> list[str]:
    """Names of the figures of a cell's evaluations, from a batch's shapes and sums of ones; nothing is computed."""
    run = cell.config()
    data = open_data(run)
    program = Program.of(run)
    micro = data.resized(run.data.batch // run.train.accumulate)
    heldout = micro.heldout(batches=1)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in next(iter(heldout)).items()}
    sums = jax.eval_shape(program.eval_step, program.model.pure_shapes, batch)
    ones = {name: np.ones(value.shape) for name, value in sums.items()}
    facts = heldout.facts()
    return sorted(program.model.objective.summarize(ones, facts).record())
