"""Results of workdirs that are there already, whoever ran them: `attnlab report W...`.

Runs whose resolved configs differ in the seed alone are one arm. Nothing announced these comparisons: all of it is
exploratory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from attnlab import config as config_lib
from attnlab import storage
from attnlab.ablation import statistics
from attnlab.ablation.results import Arm, Cost, Figure, Metric, Plan, Results, Run, Sample
from attnlab.data.base import DEFAULT as TEXT
from attnlab.errors import ConfigError, Damaged, UserError
from attnlab.models.cost import ModelCost, model_cost
from attnlab.train import files, metrics
from attnlab.train.config import RunConfig, free_keys

SEEDS = ("seed", "data.seed")
_TIMED = ("tokens_per_second", "step_seconds", "mfu", "goodput", "peak_bytes")
_COLUMNS = ("tokens", *_TIMED)
_HIGHER = ("accuracy", "exact", "gap_closed", "r2")  # endings of figures of which more is better
_REFERENCES = ("chance_", "oracle_")  # beginnings of figures that no model changes
HELDOUT = "heldout_"


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run that is there.

    Attributes:
      path: of the workdir.
      info: its config.json.
      config: built from it.
      records: its metrics.jsonl, by ascending step, the last line of each step.
    """

    path: pathlib.Path
    info: dict[str, Any]
    config: RunConfig
    records: list[dict[str, Any]]

    @property
    def flat(self) -> dict[str, Any]:
        """The resolved config by dotted key, without what changes no number that the run computes."""
        free = free_keys(self.config)
        return {k: v for k, v in config_lib.flatten(config_lib.to_dict(self.config)).items() if k not in free}

    @property
    def grouped(self) -> dict[str, Any]:
        """`flat` without seeds: equal in all runs of an arm."""
        return {key: value for key, value in self.flat.items() if key not in SEEDS}

    def identity(self) -> dict[str, Any]:
        """What two runs must share to be a pair: their data, what they are evaluated on, the kind of device."""
        read, flat = self.info.get("data") or {}, self.flat
        devices = self.info.get("devices") or {}
        digest = {f"data: {key}": value for key, value in read.items() if key != "source"}
        config = {key: value for key, value in flat.items() if key.startswith("data.") and key != "data.source"}
        evaluation = {key: flat[key] for key in ("train.eval_batches", "train.accumulate")}
        return digest | config | evaluation | {"device": f"{devices.get('platform')} {devices.get('kind')}"}


def read(path: pathlib.Path) -> Workdir:
    """Reads a workdir.

    Raises:
      UserError: there is no run in it, its config is of another version of attnlab, or it is damaged.
    """
    try:
        info = files.read_json(path / "config.json")
    except FileNotFoundError:
        what = (
            "holds no run (no config.json)" if path.is_dir() else "is no directory" if path.exists() else "is not there"
        )
        raise UserError(f"{path} {what}; name workdirs of `attnlab train`") from None
    try:
        config = config_lib.build(RunConfig, info.get("config"))
    except ConfigError as error:
        raise UserError(f"the config.json of {path} is of another version of attnlab: {error}") from None
    try:
        lines, foreign = metrics.read_lines(path / "metrics.jsonl")
    except FileNotFoundError:
        lines, foreign = [], []
    if foreign:
        raise Damaged(f"{path / 'metrics.jsonl'} is damaged: line {foreign[0]} is no metrics")
    by_step = {step: json.loads(text) for step, text in lines}
    return Workdir(path, info, config, [by_step[step] for step in sorted(by_step)])


def runs_below(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """The paths that are workdirs, and of the others, the workdirs directly or two levels below them, sorted."""
    found: list[pathlib.Path] = []
    for path in paths:
        if (path / "config.json").is_file() or not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p.parent for pattern in ("*", "*/*") for p in path.glob(f"{pattern}/config.json"))
        if not inside:
            raise UserError(f"{path} holds no run, nor do directories in it; name workdirs of `attnlab train`")
        found += inside
    resolved = [path.resolve() for path in found]
    twice = next((p for i, p in enumerate(found) if resolved[i] in resolved[:i]), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice; name each workdir once")
    return found


def collect(
    paths: Sequence[pathlib.Path], *, baseline: str | None = None, metric: str | None = None, paired: bool = True
) -> Results:
    """Results of workdirs, not yet compared.

    Args:
      paths: of workdirs, or of directories of workdirs.
      baseline: an arm, or a workdir of its; None: the arm of the first workdir.
      metric: what the arms are compared by; None: `heldout_loss`.
      paired: whether runs of one seed are pairs.

    Raises:
      UserError: fewer than two arms, two runs of one config and seed, an unknown baseline or metric, or runs that are
        no pairs: of other data, another evaluation set or another kind of device.
    """
    workdirs = [read(path) for path in runs_below(paths)]
    arms = _arms(workdirs)
    first = _baseline(arms, baseline)
    arms = {first: arms.pop(first), **arms}
    if paired:
        _require_pairs(arms)
    runs = []
    for arm, group in arms.items():
        c = group[0].config
        cost = model_cost(c.model, c.data.length, c.data.batch // c.train.accumulate)
        runs += [run(arm, workdir, cost) for workdir in group]
    chosen = _metrics(runs, metric)
    seeds = sorted({run.seed for run in runs})
    plan = Plan(
        question=f"Which of {len(arms)} arms is better in {chosen[0].name}?", baseline=first,
        arms=_described(arms), seeds=seeds,
        metrics=chosen, stopping=statistics.stopping([len(seeds)]), paired=paired,
    )  # fmt: skip
    environment = {"versions": workdirs[0].info.get("versions"), "devices": workdirs[0].info.get("devices")}
    return Results(plan, runs, environment=environment)


# --- arms -------------------------------------------------------------------------------------------------------------


def _arms(workdirs: list[Workdir]) -> dict[str, list[Workdir]]:
    """Workdirs by arm: of one config but for the seed. An arm is named after what differs."""
    groups: dict[str, list[Workdir]] = {}
    for workdir in workdirs:
        groups.setdefault(json.dumps(workdir.grouped, sort_keys=True), []).append(workdir)
    if len(groups) < 2:
        raise UserError(
            f"{len(workdirs)} workdirs are of one config, but for seeds: there is nothing to compare\n"
            "name workdirs of two or more configs"
        )
    for group in groups.values():
        seeds: dict[int, Workdir] = {}
        for workdir in group:
            other = seeds.setdefault(workdir.config.seed, workdir)
            if other is not workdir:
                both = f"{other.path} and {workdir.path}"
                raise UserError(f"{both} are of one config and seed ({workdir.config.seed}); name one of them")
        group.sort(key=lambda workdir: workdir.config.seed)
    trees = [group[0].grouped for group in groups.values()]
    return dict(zip(_names(trees, [group[0] for group in groups.values()]), groups.values()))


def _names(trees: list[dict[str, Any]], firsts: list[Workdir]) -> list[str]:
    """Short names that tell arms apart: values of keys that differ where few do, else the workdirs' names."""
    keys = [key for key in sorted({k for tree in trees for k in tree}) if len({_text(t.get(key)) for t in trees}) > 1]
    named = sorted((key for key in keys if key.endswith(".name")), key=lambda key: key.count(".")) or keys
    for chosen in (named, keys):
        if len(chosen) > 3:
            continue
        values = lambda tree: [_word(key, tree[key], alone=len(chosen) == 1) for key in chosen if key in tree]
        names = [" ".join(values(tree)) or "-" for tree in trees]
        if len(set(names)) == len(names):
            return names
    paths = [pathlib.PurePath(storage.shown(str(workdir.path))) for workdir in firsts]
    for name in (lambda path: path.name, lambda path: f"{path.parent.name}/{path.name}", str):
        names = [name(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths are given once")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _word(key: str, value: Any, *, alone: bool) -> str:
    text = value if isinstance(value, str) else _text(value)
    if key.endswith(".name"):
        return text
    return f"{key.rpartition('.')[2] if alone else key}={text}"


def _baseline(arms: dict[str, list[Workdir]], wanted: str | None) -> str:
    if wanted is None:
        return next(iter(arms))
    if wanted in arms:
        return wanted
    path = pathlib.Path(wanted).resolve()
    for name, group in arms.items():
        if path in [workdir.path.resolve() for workdir in group]:
            return name
        if wanted.rstrip("/") in [storage.shown(str(workdir.path)) for workdir in group]:
            return name
    hint = config_lib.suggest(wanted, list(arms))
    raise UserError(f"--baseline {wanted!r} is no arm{hint}; allowed: {', '.join(arms)}, or one of the workdirs")


def _described(arms: dict[str, list[Workdir]]) -> dict[str, Arm]:
    """The plan's arms; a key that tells any of them from the first is told of all that differ in it."""
    base = next(iter(arms.values()))[0]
    keys = sorted({key for group in arms.values() for key in difference(base.config, group[0].config)})
    described = {}
    for name, group in arms.items():
        values = {key: [base.grouped.get(key, "-"), group[0].grouped.get(key, "-")] for key in keys}
        command = group[0].info.get("command")
        command = " ".join(map(str, command)) if isinstance(command, list) else None
        described[name] = Arm({}, {key: both for key, both in values.items() if both[0] != both[1]}, command=command)
    return described


def difference(before: RunConfig, after: RunConfig) -> dict[str, list[Any]]:
    """Dotted keys whose values differ: both, `-` where a side has none.

    What only one of them has, since another mixer is there, is left out where it is at its default.
    """
    defaults = {*_at_default(before), *_at_default(after)}
    found = config_lib.difference(config_lib.to_dict(before), config_lib.to_dict(after))
    return {key: [a, b] for key, a, b in found if not ("-" in (a, b) and key in defaults)}


def _at_default(config: Any, path: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        key, value = f"{path}{field.name}", getattr(config, field.name)
        for name, inside in {key: value, **{f"{key}.{k}": v for k, v in getattr(value, "items", dict)()}}.items():
            if dataclasses.is_dataclass(inside):
                yield from _at_default(inside, f"{name}.")
        if field.default is not dataclasses.MISSING and value == field.default:
            yield key


def _require_pairs(arms: dict[str, list[Workdir]]) -> None:
    """Raises UserError unless runs of one seed share what makes them a pair."""
    by_seed: dict[int, Workdir] = {}
    first, *others = arms
    theirs = sorted({workdir.config.seed for workdir in arms[first]})
    for arm in others:
        ours = sorted({workdir.config.seed for workdir in arms[arm]})
        if not set(ours) & set(theirs):
            raise UserError(
                f"{arm} (seeds {ours}) and {first} (seeds {theirs}) have no seed in common\n"
                "compare them as independent runs with --unpaired"
            )
    for group in arms.values():
        for workdir in group:
            other = by_seed.setdefault(workdir.config.seed, workdir)
            one, two = other.identity(), workdir.identity()
            keys = [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)]
            if keys:
                shown = "; ".join(
                    f"{k}: {config_lib.show(one.get(k))} -> {config_lib.show(two.get(k))}" for k in keys[:4]
                )
                raise UserError(
                    f"{other.path} and {workdir.path} (seed {workdir.config.seed}) are no pair: {shown}\n"
                    "compare them all the same, as independent runs, with --unpaired"
                )


# --- runs -------------------------------------------------------------------------------------------------------------


def run(arm: str, workdir: Workdir, cost: ModelCost) -> Run:
    """What a workdir holds, as a run of an arm; `cost` is its model's at the length of its data."""
    info, records, steps = workdir.info, workdir.records, workdir.config.train.steps
    end = records[-1] if records else {}
    done = end.get("step", 0)
    status, reason = _status(records, done, steps)
    evaluated = [record for record in records if any(key.startswith(HELDOUT) for key in record)]
    last = evaluated[-1] if evaluated and evaluated[-1]["step"] == done else {}
    final = {k: v for k, v in last.items() if k.startswith(HELDOUT) and "/" not in k and _numeric(v)}
    if status == "done":
        final["loss"] = end.get("loss")
    own, told = ("step", "loss", "nonfinite", "learning_rate", *_COLUMNS), (HELDOUT, *_REFERENCES)
    diagnostics = {k: v for k, v in end.items() if k not in own and not k.startswith(told) and _numeric(v)}
    curve = _curve(records, 3 * cost.total_flops)
    rates = sorted(r["tokens_per_second"] for r in records if r.get("tokens_per_second"))
    return Run(
        arm, workdir.config.seed, storage.shown(str(workdir.path)), status, reason,
        device=(info.get("devices") or {}).get("kind"), commit=(info.get("git") or {}).get("commit"),
        seconds=curve["seconds"][-1] if "seconds" in curve else None, tokens=end.get("tokens"), curve=curve,
        final=final, diagnostics=diagnostics, impl=_implementations(info),
        tasks=_tasks(workdir.config.data.node_name, last, records[0] if records else {}),
        samples=_samples(workdir.path / "samples.txt"),
        cost=Cost(cost.parameters, cost.parameters - cost.embedding_parameters, cost.total_flops, cost.state_bytes,
                  rates[len(rates) // 2] if rates else None, end.get("peak_bytes")),
    )  # fmt: skip


def _status(records: list[dict[str, Any]], done: int, steps: int) -> tuple[str, str | None]:
    """How a run ended, and why it is not done, from what it logged."""
    last = records[-1] if records else {}
    if records and last.get("loss") is None:
        return "failed", f"the loss is not finite at step {done}"
    if done >= steps:
        return "done", None
    if last.get("nonfinite"):
        return "failed", f"gradients were not finite, and the run ended at step {done} of {steps}"
    return "missing", f"step {done} of {steps}"


def _tasks(name: str, last: dict[str, Any], first: dict[str, Any]) -> dict[str, dict[str, Figure]]:
    """Held-out figures of generated data with their slices, and what guessing and knowing score; none of text."""
    if name == TEXT:
        return {}
    figures: dict[str, Figure] = {}
    for key, value in last.items():
        metric, _, part = key.removeprefix(HELDOUT).partition("/")
        if key.startswith(HELDOUT) and _numeric(value):
            chance, oracle = (first.get(f"{who}{metric}") for who in _REFERENCES)
            figure = figures.setdefault(metric, Figure(None, None, {}, chance, oracle, direction(metric)))
            if part:
                figure.slices[part] = value
            else:
                figures[metric] = dataclasses.replace(figure, value=value)
    return {name: figures} if figures else {}


def direction(metric: str) -> Literal["lower", "higher"]:
    """Which end of a figure is good, by its name."""
    return "higher" if any(part.endswith(_HIGHER) for part in metric.split("/")[:2]) else "lower"


def _numeric(value: Any) -> bool:
    return value is None or isinstance(value, (int, float)) and not isinstance(value, bool)


def _curve(records: list[dict[str, Any]], flops_per_token: float) -> dict[str, list[float | None]]:
    """Columns by step: budgets, loss and held-out figures. Seconds are of training steps, evaluation left out."""
    if not records:
        return {}
    names = sorted({key for record in records for key in record if key.startswith(HELDOUT) or key == "loss"})
    curve: dict[str, list[float | None]] = {"step": [record["step"] for record in records]}
    curve["tokens"] = [record.get("tokens") for record in records]
    if all(curve["tokens"]):
        curve["flops"] = [tokens * flops_per_token for tokens in curve["tokens"]]
    else:
        del curve["tokens"]
    seconds, before, total = [], 0, 0.0
    known = next((r["step_seconds"] for r in records if r.get("step_seconds")), None)
    for record in records:
        total += (record["step"] - before) * (record.get("step_seconds") or known or math.nan)
        before = record["step"]
        seconds.append(total)
    if known is not None:
        curve["seconds"] = seconds
    return curve | {name: [v if _numeric(v := r.get(name)) else None for r in records] for name in names}


def _implementations(info: dict[str, Any]) -> dict[str, str]:
    """By op; several shapes of one op that chose differently are told together."""
    found = {}
    for op, chosen in (info.get("implementations") or {}).items():
        found[op] = ", ".join(sorted(set(chosen.values()))) if isinstance(chosen, dict) else str(chosen)
    return found


def _samples(path: pathlib.Path) -> list[Sample]:
    """Those of the last step in samples.txt; none where there is no such file."""
    try:
        text = files.read_bytes(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    found: dict[str, list[Sample]] = {}
    for block in text.split("=== step ")[1:]:
        step, _, rest = block.partition(" · prompt ===\n")
        prompt, middle, continuation = rest.partition("\n=== continuation ===\n")
        if middle:
            found.setdefault(step, []).append(Sample(prompt, continuation.rstrip("\n")))
    return list(found.values())[-1] if found else []


def _metrics(runs: list[Run], wanted: str | None) -> list[Metric]:
    """The one that is asked for."""
    done = [run for run in runs if run.status == "done"]
    if not done:
        raise UserError(f"none of {len(runs)} runs is complete: {runs[0].workdir} is at {runs[0].reason}")
    known = sorted({name for run in done for name in run.figures()})
    name = wanted or "heldout_loss"
    if name not in known:
        asked = f"--metric {name!r}" if wanted else "heldout_loss (no --metric is given)"
        raise UserError(f"{asked} is not in these runs{config_lib.suggest(name, known)}; allowed: {', '.join(known)}")
    return [Metric(name, direction(name))]
