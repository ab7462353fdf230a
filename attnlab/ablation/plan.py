"""A plan: which arms are compared with which baseline, on what, with which seeds, at equal what, and by which rule.

A plan file is a config file whose `get_config` returns the tree of a `PlanConfig`. Everything in it is checked before
anything runs, and `plan.json` with its hash is written before the first run: what a report says beyond is exploratory.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from attnlab import config as config_lib
from attnlab.ablation import statistics, sweep
from attnlab.errors import ConfigError
from attnlab.train.config import RunConfig

SCHEMA = 1
_NAME = re.compile(r"[A-Za-z0-9][\w.=,+-]{0,99}")
_NAME_ALLOWED = "up to 100 letters, digits and _ . = , + -, a letter or digit first"
# Of metrics.jsonl; they need no evaluation.
_TIMING = ("tokens_per_second", "step_seconds", "mfu", "goodput", "peak_bytes")
EQUAL = ("steps", "tokens", "parameters", "flops", "state_bytes", "seconds")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of metrics.jsonl that arms are compared by, as it is after the last step.

    Attributes:
      direction: which is better, lower or higher.
      primary: whether the verdict is about it; others are reported without one.
      margin: a smaller difference does not matter; none: no such margin is known.
    """

    direction: str = "lower"
    primary: bool = False
    margin: float | None = None

    def __post_init__(self) -> None:
        config_lib.require_choice("direction", self.direction, ["lower", "higher"])
        config_lib.require(self.margin is None or self.margin > 0, "margin", self.margin, "above 0, or none")


@dataclasses.dataclass(frozen=True)
class Equal:
    """What is held equal to the baseline besides the data, the batch, the length and the steps.

    Attributes:
      what: steps, tokens, parameters (without the embedding), flops (of the whole training), state_bytes (of a sequence
        of `length` positions) or seconds (on this machine's device).
      knob: the key that is solved for: an integer, or train.steps. none: train.steps for tokens and seconds,
        model.mlp_width otherwise.
      knobs: by arm, the key where it is another one.
      multiple: values of the knob are multiples of it; train.steps may be any number.
      tolerance: per cent by which an arm may miss the baseline's.
      length: positions at which state_bytes is counted; none: data.length.
      tasks: by task, what is held equal there where it is something else; its knob is then the usual one.
    """

    what: str = "steps"
    knob: str | None = None
    knobs: dict = dataclasses.field(default_factory=dict)
    multiple: int = 8
    tolerance: float = 1.0
    length: int | None = None
    tasks: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        config_lib.require_choice("what", self.what, EQUAL)
        for task, what in self.tasks.items():
            config_lib.require_choice(f"tasks.{task}", what, EQUAL)
        config_lib.require(self.multiple >= 1, "multiple", self.multiple, "1 or more")
        config_lib.require(0 < self.tolerance < 100, "tolerance", self.tolerance, "above 0, below 100 (per cent)")
        config_lib.require(self.length is None or self.length >= 1, "length", self.length, "1 or more, or none")
        timed = self.what in ("tokens", "seconds")
        needed = "train.steps, or none" if timed else "none" if self.what == "steps" else "a key of the config, or none"
        good = self.knob is None or self.what not in ("steps", "tokens", "seconds") or (timed and self.knob == _STEPS)
        config_lib.require(good, "knob", self.knob, f"{needed} where what = {self.what!r}")

    def on(self, task: str) -> Equal:
        """What is held equal on a task."""
        what = self.tasks.get(task, self.what)
        return self if what == self.what else dataclasses.replace(self, what=what, knob=None, knobs={}, tasks={})

    def knob_of(self, arm: str) -> str:
        """The key that is solved for in an arm."""
        usual = _STEPS if self.what in ("tokens", "seconds") else "model.mlp_width"
        return self.knobs.get(arm, self.knob or usual)


_STEPS = "train.steps"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The search of each arm's learning rate: the same rates, seeds and steps for all.

    Attributes:
      rates: a geometric grid, tried by every arm; extended by one where an arm's best is at an end.
      seeds: of the tuning runs; none of them is reported.
      share: of the steps that tuning runs do.
      most: rates that are tried at most.
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (1000,)
    share: float = 1.0
    most: int = 7

    def __post_init__(self) -> None:
        need, rates = config_lib.require, self.rates
        rising = len(rates) >= 3 and rates[0] > 0 and all(a < b for a, b in zip(rates, rates[1:]))
        need(rising, "rates", rates, "three learning rates or more, rising, above 0")
        steps = [b / a for a, b in zip(rates, rates[1:])]
        need(max(steps) < 1.01 * min(steps), "rates", rates, "a geometric grid: each a constant times the one before")
        need(len(self.seeds) >= 1 and len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "different numbers")
        need(0.25 <= self.share <= 1, "share", self.share, "1/4 to 1 of the steps")
        need(len(rates) <= self.most <= 15, "most", self.most, f"{len(rates)} (the rates given) to 15")


def _arms(tree: Any, path: str) -> dict[str, dict[str, Any]]:
    """Overrides by arm: a mapping, or a sweep, whose points are named after what differs."""
    if isinstance(tree, (list, tuple)):
        good = all(isinstance(point, Mapping) for point in tree)
        config_lib.require(good, path, tree, "a list of points {dotted key: value}, or arms by name")
        tree = sweep.named(list(tree))
    config_lib.require(isinstance(tree, Mapping) and len(tree) > 0, path, tree, "overrides by the arm's name")
    for name, point in tree.items():
        config_lib.require(_NAME.fullmatch(name) is not None, f"name in {path}", name, _NAME_ALLOWED)
        config_lib.require(isinstance(point, Mapping), f"{path}.{name}", point, "a point {dotted key: value}")
    return {name: dict(point) for name, point in tree.items()}


def _tasks(tree: Any, path: str) -> dict[str, dict[str, Any]]:
    """Overrides by task; `base` among them names another config."""
    return {"": {}} if tree is None or tree == {"": {}} else _arms(tree, path)


def _metrics(tree: Any, path: str) -> dict[str, Metric]:
    config_lib.require(isinstance(tree, Mapping) and len(tree) > 0, path, tree, "figures of metrics.jsonl by name")
    metrics = {name: config_lib.build(Metric, {} if node is None else node, f"{path}.{name}")
               for name, node in tree.items()}  # fmt: skip
    config_lib.require(any(m.primary for m in metrics.values()), path, list(metrics), "one that is primary, or more")
    return metrics


def _optional(cls: type) -> Any:
    return lambda tree, path: None if tree is None else config_lib.build(cls, tree, path)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What a plan file says.

    Attributes:
      question: in a sentence.
      base: the config that arms are laid over: `PATH[:arg=value,...]`, or a tree.
      arms: name to overrides `{dotted key: value}`, or a sweep; `seed_offset` among them is added to an arm's seeds,
        which are then not paired with the others'; `init_from` takes the place of the plan's.
      baseline: the arm that the others are compared with; none: the first.
      tasks: name to overrides, laid over the base before an arm's; `base` among them is a task's own base. none: there
        is one. Of several, metrics are named TASK/METRIC.
      seeds: of the runs that are reported; pairs are runs of one seed.
      metrics: figure of metrics.jsonl to `Metric`.
      looks: numbers of seeds after which the comparisons are made, the last of all seeds: no more are run once every
        primary one is decided. None of them: once, at the end. `statistics.stopping` says which are allowed.
      init_from: workdir of a run as whose parameters all runs begin, as `attnlab train --init-from` takes them; its
        checkpoint, the newest one when the plan is announced, is part of the plan. none: runs begin anew.
      equal, tuning: see their classes.
    """

    question: str
    arms: Any = config_lib.node(_arms)
    metrics: Any = config_lib.node(_metrics)
    base: Any = None
    tasks: Any = config_lib.node(_tasks, default_factory=lambda: {"": {}})
    baseline: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    equal: Equal = Equal()
    tuning: Any = config_lib.node(_optional(Tuning), default=None)
    looks: tuple[int, ...] = ()
    init_from: str | None = None

    def __post_init__(self) -> None:
        need, seeds = config_lib.require, self.seeds
        need(bool(self.question.strip()), "question", self.question, "a sentence")
        need(len(self.arms) >= 2, "arms", list(self.arms), "two or more")
        config_lib.require_choice("baseline", self.first, list(self.arms))
        good = len(seeds) >= 2 and len(set(seeds)) == len(seeds) and all(s >= 0 for s in seeds)
        need(good, "seeds", seeds, "two or more different numbers, 0 or more")
        if self.tuning is not None:
            shared = sorted(set(self.tuning.seeds) & set(self._all_seeds()))
            need(not shared, "tuning.seeds", self.tuning.seeds, f"seeds that are not reported; reported: {shared}")
        if not self.looks:
            object.__setattr__(self, "looks", (len(seeds),))
        statistics.stopping(self.looks)
        need(self.looks[-1] == len(seeds), "looks", self.looks, f"the last at all {len(seeds)} seeds")
        for name in self.metrics:
            if "" not in self.tasks:
                task = name.partition("/")[0]
                need(task in self.tasks and "/" in name, "metrics", name, f"TASK/METRIC of {', '.join(self.tasks)}")
        for name in self.equal.knobs:
            config_lib.require_choice("equal.knobs", name, list(self.arms))
        for name in self.equal.tasks:
            config_lib.require_choice("equal.tasks", name, list(self.tasks))

    @property
    def first(self) -> str:
        """The baseline."""
        return next(iter(self.arms)) if self.baseline is None else self.baseline

    def _all_seeds(self) -> list[int]:
        return [seed + point.get("seed_offset", 0) for point in self.arms.values() for seed in self.seeds]

    def metrics_of(self, task: str) -> dict[str, Metric]:
        """Metrics of a task, by their name in metrics.jsonl."""
        start = f"{task}/" if task else ""
        return {name[len(start) :]: m for name, m in self.metrics.items() if name.startswith(start)}

    def leading(self, task: str) -> tuple[str, Metric]:
        """The metric that a task's learning rates are chosen by: its first primary one, or its first."""
        found = self.metrics_of(task)
        return next(((name, m) for name, m in found.items() if m.primary), next(iter(found.items())))


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm on a task.

    Attributes:
      arm, task: names; the task of a plan that has one is ''.
      tree: the whole config of its runs but for the seed.
      seed_offset: added to seeds.
      begins: place, step and digest of the checkpoint as which its runs begin; None: they begin anew.
      teacher: alike, of what they learn of (`train.distill`).
    """

    arm: str
    task: str
    tree: dict[str, Any]
    seed_offset: int = 0
    begins: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """`arm`, or `arm/task`."""
        return f"{self.arm}/{self.task}" if self.task else self.arm

    def config(self, **values: Any) -> RunConfig:
        """Of a run; `values` by dotted keys with `__` for the dot."""
        tree = copy.deepcopy(self.tree)
        for key, value in values.items():
            config_lib.put(tree, key.replace("__", "."), value)
        return config_lib.build(RunConfig, tree)

    def with_values(self, values: Mapping[str, Any]) -> Cell:
        """The cell with keys set, checked."""
        tree = copy.deepcopy(self.tree)
        for key, value in values.items():
            config_lib.put(tree, key, value)
        return dataclasses.replace(self, tree=config_lib.to_dict(config_lib.build(RunConfig, tree)))


def cells(plan: PlanConfig) -> list[Cell]:
    """Every arm on every task, arms varying fastest, configs checked.

    Raises:
      ConfigError: a config that cannot be, named by its arm; two arms that are one; a metric that is never evaluated.
    """
    made: list[Cell] = []
    for task, overrides in plan.tasks.items():
        overrides = dict(overrides)
        base = _base(overrides.pop("base", plan.base))
        for arm, point in plan.arms.items():
            point = dict(point)
            offset = point.pop("seed_offset", 0)
            good = isinstance(offset, int) and not isinstance(offset, bool) and offset >= 0
            config_lib.require(good, f"arms.{arm}.seed_offset", offset, "an integer, 0 or more")
            begins = point.pop("init_from", plan.init_from)
            config_lib.require(
                begins is None or isinstance(begins, str), f"arms.{arm}.init_from", begins, "a workdir, or none"
            )
            begins = {"place": begins} if begins else None
            cell = _resolved(Cell(arm, task, base, offset, begins), {**overrides, **point})
            same = next((c.arm for c in made if c.task == task and _same(c, cell)), None)
            if same is not None:
                raise ConfigError(
                    f"arms {same!r} and {arm!r} have the same config; leave one out, or set what is to differ"
                )
            made.append(cell)
        _require_metrics(plan, task, made[-1])
    return made


def _base(base: Any) -> dict[str, Any]:
    if isinstance(base, str):
        try:
            return config_lib.read_file(base)
        except ConfigError as error:
            raise ConfigError(str(error).replace("--config:", "base:", 1)) from None
    config_lib.require(isinstance(base, Mapping), "base", base, "PATH[:arg=value,...] of a config, or a tree of keys")
    return copy.deepcopy(dict(base))


def _resolved(cell: Cell, values: Mapping[str, Any]) -> Cell:
    if "seed" in values:
        raise ConfigError(f"arm {cell.arm!r} sets seed = {config_lib.show(values['seed'])}; seeds are the plan's")
    try:
        return cell.with_values({**values, "seed": 0})
    except ConfigError as error:
        where = f" on task {cell.task!r}" if cell.task else ""
        raise ConfigError(f"arm {cell.arm!r}{where}: {error}") from None


def _same(a: Cell, b: Cell) -> bool:
    return (a.tree, a.seed_offset, a.begins) == (b.tree, b.seed_offset, b.begins)


def _require_metrics(plan: PlanConfig, task: str, cell: Cell) -> None:
    config_lib.require(bool(plan.metrics_of(task)), "metrics", list(plan.metrics), f"one of task {task!r}, or more")
    for name in plan.metrics_of(task):
        evaluated = name not in (*_TIMING, "loss")
        if evaluated and not cell.tree["train"]["eval_every"]:
            raise ConfigError(f"metrics.{name} is of evaluations, and train.eval_every = 0 makes none")


def announced(plan: PlanConfig, made: list[Cell]) -> dict[str, Any]:
    """What is announced before anything runs: the plan with each cell's config, before anything is solved for."""
    tree = config_lib.to_dict(plan)
    del tree["base"]
    tree["baseline"] = plan.first
    if plan.init_from is None:  # what plans were before there was such a key, they are
        del tree["init_from"]
    others = {
        cell.name: {"begins": cell.begins, "teacher": cell.teacher} for cell in made if cell.begins or cell.teacher
    }
    return {**tree, "cells": {cell.name: cell.tree for cell in made}, **({"others": others} if others else {})}


def digest(announcement: Mapping[str, Any]) -> str:
    """The plan's hash: SHA-256 of what is announced."""
    text = json.dumps(announcement, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
