"""What an ablation came to: the schema of `results.json`, which the report reads and nothing else.

Whoever runs a plan fills `Plan` and `Run`; `attnlab.ablation.compare.compare` fills the comparisons.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from attnlab import config as config_lib
from attnlab.errors import UserError

SCHEMA = 1
Number = float | None  # None: there is none, or it is not finite
AXES = ("step", "tokens", "flops", "seconds")  # columns of `Run.curve` that are budgets, not metrics


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure that arms are compared by.

    Attributes:
      name: as in `Run.final`, or TASK/METRIC or TASK/METRIC/SLICE of `Run.tasks`.
      direction: which end of it is good.
      primary: whether the plan's question is about it: Holm's adjustment is over all primary comparisons.
      unit: for axes, e.g. `nats per token`; empty: a plain number.
    """

    name: str
    direction: Literal["lower", "higher"] = "lower"
    primary: bool = True
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One configuration.

    Attributes:
      overrides: dotted config keys that the plan sets.
      config_diff: dotted keys of the resolved config that differ from the baseline's: its value, this arm's value.
      lr_chosen: the tuned learning rate; None: it was not tuned.
      lr_curve: one [learning rate, mean, sd, n] per rate that was tried, of the tuning runs; sd is None at n = 1.
      command: what repeats its first run.
      notes: what a reader must know of it, e.g. that the best rate is at the edge of the grid.
    """

    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    config_diff: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    lr_chosen: Number = None
    lr_curve: list[list[Number]] = dataclasses.field(default_factory=list)
    command: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Equal:
    """What the arms were given the same of.

    Attributes:
      what: `steps`, `tokens`, `parameters`, `flops`, `state_bytes` or `seconds`; None: nobody solved for anything.
      residual: by arm, how far it is from the baseline in it, in per cent.
      notes: what else a reader must know, e.g. an MLP that shrank by more than a third.
    """

    what: str | None = None
    residual: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Stopping:
    """When results are looked at; `attnlab.ablation.statistics.stopping` makes those that are allowed.

    Attributes:
      looks: numbers of seeds, ascending; the last is all of them.
      level: of each look's test.
    """

    looks: list[int]
    level: float = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked, before the first run.

    Attributes:
      hash: of plan.json; None: there was no plan, and all of it is exploratory.
      question: in a sentence.
      baseline: the arm that the others are compared with.
      arms: by name, in the order in which they are shown.
      seeds: in the order in which they are run.
      metrics: the primary ones, and others that were announced.
      margins: by metric, the smallest difference that matters, in the metric's unit.
      equal, stopping: see their classes.
      tuning: what was tuned over and what it cost, for people.
      at: whether `Run.final` is the last evaluation's or the best one's.
      paired: whether runs of one seed are pairs (same data order, held-out batches, shared initial values, device).
      created: when the plan was written, ISO 8601.
    """

    question: str
    baseline: str
    arms: dict[str, Arm]
    seeds: list[int]
    metrics: list[Metric]
    stopping: Stopping
    hash: str | None = None
    margins: dict[str, float] = dataclasses.field(default_factory=dict)
    equal: Equal = Equal()
    tuning: dict[str, Any] = dataclasses.field(default_factory=dict)
    at: Literal["end", "best"] = "end"
    paired: bool = True
    created: str | None = None

    def metric(self, name: str) -> Metric:
        """The metric of a name."""
        return next(metric for metric in self.metrics if metric.name == name)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A task's metric.

    Attributes:
      value: over the whole test set.
      n: what it is a mean over.
      slices: by name (`pairs=16`).
      chance, oracle: what guessing and knowing everything score; None: unknown.
      better: which end of it is good.
    """

    value: Number
    n: int | None = None
    slices: dict[str, Number] = dataclasses.field(default_factory=dict)
    chance: Number = None
    oracle: Number = None
    better: Literal["lower", "higher"] = "higher"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run's model costs; `attnlab cost` says how each is counted. `flops_per_token` is of the forward pass."""

    parameters: int | None = None
    non_embedding: int | None = None
    flops_per_token: Number = None
    state_bytes: int | None = None
    tokens_per_second: Number = None
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A continuation."""

    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm under one seed.

    Attributes:
      arm, seed, workdir: which.
      status: `failed` is a run that ended wrongly (not finite, out of memory); `missing` one that has not ended.
      reason: why it is not done.
      device: the kind; runs of several are not paired.
      commit: of the code.
      seconds, tokens: of its training.
      curve: columns of one length: `step`, where they are known `tokens`, `flops`, `seconds`, and any metrics.
      final: what the arms are compared by. A name with None is a figure that is not finite, which counts as a failure.
      tasks: by task, by metric.
      items: by metric, one value per document or example of the last evaluation, in the order of the test set.
      diagnostics: figures that say why, not how well.
      cost, impl: what it cost, and the implementation of each op.
      samples: continuations of the same prompts in every arm.
    """

    arm: str
    seed: int
    workdir: str
    status: Literal["done", "failed", "missing"]
    reason: str | None = None
    device: str | None = None
    commit: str | None = None
    seconds: Number = None
    tokens: int | None = None
    curve: dict[str, list[Number]] = dataclasses.field(default_factory=dict)
    final: dict[str, Number] = dataclasses.field(default_factory=dict)
    tasks: dict[str, dict[str, Figure]] = dataclasses.field(default_factory=dict)
    items: dict[str, list[Number]] = dataclasses.field(default_factory=dict)
    diagnostics: dict[str, Number] = dataclasses.field(default_factory=dict)
    cost: Cost = Cost()
    impl: dict[str, str] = dataclasses.field(default_factory=dict)
    samples: list[Sample] = dataclasses.field(default_factory=list)

    def figures(self) -> dict[str, Number]:
        """Every figure by its full name: those of `final`, then TASK/METRIC and TASK/METRIC/SLICE."""
        found = dict(self.final)
        for task, metrics in self.tasks.items():
            for name, figure in metrics.items():
                found[f"{task}/{name}"] = figure.value
                found |= {f"{task}/{name}/{key}": value for key, value in figure.slices.items()}
        return found


@dataclasses.dataclass(frozen=True)
class Failures:
    """Runs that failed, and the comparison in which they are worse than any that did not.

    Attributes:
      arm, arm_runs, baseline, baseline_runs: how many failed, and of how many that ended.
      fisher_p: Fisher's exact test of equal rates, two-sided.
      wins, losses: pairs in which the arm, or the baseline, is better, a failure being worst; ties are in neither.
      sign_p: the sign test of these, two-sided; None: there is no pair.
    """

    arm: int
    arm_runs: int
    baseline: int
    baseline_runs: int
    fisher_p: float
    wins: int
    losses: int
    sign_p: Number


@dataclasses.dataclass(frozen=True)
class Items:
    """The same difference over documents or examples: of this test set, where seeds speak of the method.

    Attributes:
      n: how many.
      mean: of the differences, each a mean over the pairs of runs.
      ci95: BCa bootstrap.
    """

    n: int
    mean: float
    ci95: list[Number]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against the baseline by one metric; differences are arm minus baseline.

    Attributes:
      metric, arm, baseline: what.
      primary: whether Holm's adjustment counts it.
      planned: whether the plan announced it, and the look is complete; otherwise it is exploratory.
      look: the number of the look, from 1; None: no look is complete.
      level: of the test at this look.
      test: `paired t` or `Welch`.
      n: pairs, or the smaller number of runs where they are not paired.
      pairs: their seeds.
      missing: seeds of which a run is not there.
      mean, sd: of the differences; unpaired: of means, and the root of the sum of both variances.
      ci95, t, df, p: of the test; None: it cannot be made.
      p_holm: adjusted; None where it is not primary.
      margin, tost_p: what matters, and the test that the difference is within it.
      mde80: the smallest true difference that such a test finds with probability 0.8.
      r: correlation of the arms over seeds; None: n < 3, or an arm does not vary.
      sign_flip_p, wilcoxon_p: exact tests; None: at this n they cannot reach 5 %.
      welch_p: beside a paired test whose r is below 0.
      failures, items: see their classes; None: nothing failed, or no items are there.
      verdict: see `attnlab.ablation.statistics.verdict`.
      notes: what a reader must know.
    """

    metric: str
    arm: str
    baseline: str
    primary: bool
    planned: bool
    look: int | None
    level: float
    test: str
    n: int
    pairs: list[int]
    missing: list[int]
    mean: Number
    sd: Number
    ci95: list[Number] | None
    t: Number
    df: Number
    p: Number
    p_holm: Number
    margin: Number
    tost_p: Number
    mde80: Number
    r: Number
    sign_flip_p: Number
    wilcoxon_p: Number
    welch_p: Number
    failures: Failures | None
    items: Items | None
    verdict: str
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Results:
    """All of it.

    Attributes:
      plan, runs: what a runner fills.
      comparisons: what `compare` fills.
      checks: by name, of the plan's own machinery: `identical_arms`, `pairing_bitwise`.
      environment: versions of packages and the like, by name.
      created: when these results were written, ISO 8601.
    """

    plan: Plan
    runs: list[Run]
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    checks: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    created: str | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _require_whole(self)

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm, in the order of the plan's seeds."""
        order = {seed: i for i, seed in enumerate(self.plan.seeds)}
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: order[run.seed])


def _require_whole(results: Results) -> None:
    """Raises UserError where parts of the results speak of things that others do not have."""
    plan = results.plan
    need(results.schema == SCHEMA, "schema", results.schema, str(SCHEMA))
    need(plan.baseline in plan.arms, "plan.baseline", plan.baseline, ", ".join(plan.arms))
    names = [metric.name for metric in plan.metrics]
    need(len(set(names)) == len(names) > 0, "plan.metrics", names, "one or more, each once")
    need(len(set(plan.seeds)) == len(plan.seeds) > 0, "plan.seeds", plan.seeds, "one or more, each once")
    looks = plan.stopping.looks
    need(looks[-1:] == [len(plan.seeds)], "plan.stopping.looks", looks, f"a last look at all {len(plan.seeds)} seeds")
    for name, margin in plan.margins.items():
        need(name in names, "plan.margins", name, f"metrics of the plan: {', '.join(names)}")
        need(0 < margin < math.inf, f"plan.margins.{name}", margin, "a finite number above 0")
    arms, seeds, seen = ", ".join(plan.arms), ", ".join(map(str, plan.seeds)), set()
    for i, run in enumerate(results.runs):
        if run.arm not in plan.arms or run.seed not in plan.seeds or (run.arm, run.seed) in seen:
            need(run.arm in plan.arms, f"runs[{i}].arm", run.arm, arms)
            need(run.seed in plan.seeds, f"runs[{i}].seed", run.seed, seeds)
            need(False, f"runs[{i}]", (run.arm, run.seed), "one run of an arm and a seed")
        seen.add((run.arm, run.seed))
        lengths = {name: len(column) for name, column in run.curve.items()}
        whole = len(set(lengths.values())) <= 1 and ("step" in lengths or not lengths)
        need(whole, f"runs[{i}].curve", lengths, "columns of one length, `step` among them")


def need(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises a UserError that names key, value and what is allowed, unless `condition` holds."""
    if not condition:
        raise UserError(f"results: {key} = {config_lib.show(value)} is not possible; allowed: {allowed}")
