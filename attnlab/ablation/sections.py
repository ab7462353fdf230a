"""The parts of the report that are words and tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from attnlab.ablation import charts, compare, statistics
from attnlab.ablation.markup import (
    NONE,
    Markup,
    cell,
    details,
    join,
    number,
    plus_minus,
    probability,
    short,
    signed,
    table,
    tag,
)  # fmt: skip
from attnlab.ablation.results import Comparison, Metric, Results, Run
from attnlab.ablation.view import View, spread

_GOOD, _BAD = ("better", "trivially better"), ("worse", "trivially worse")
_KEYS = 4  # config keys under an arm's name
_SAMPLES, _SAMPLE_CHARACTERS = 4, 1500
STAMP = tag("span", "exploratory", class_="stamp")


def shown(value: Any) -> str:
    """A config value."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def exploratory(c: Comparison) -> str | None:
    """Why a comparison makes no claim; None: it does."""
    if not c.planned:
        return "a peek before its look is complete" if c.look is None else "no plan announced it"
    return f"{c.n} seeds, a claim wants {compare.ENOUGH}" if c.n < compare.ENOUGH else None


def word(text: str) -> Markup:
    """A verdict in its colour."""
    return tag("strong", text, class_="good" if text in _GOOD else "bad" if text in _BAD else None)


def header(view: View) -> Markup:
    """The question, and for every arm and primary metric one line."""
    plan, results = view.plan, view.results
    primary = [c for c in results.comparisons if c.primary]
    reasons: dict[str, list[str]] = {}
    for c in primary:
        if reason := exploratory(c):
            reasons.setdefault(reason, []).append(c.arm)
    shared = {why: "" if len(arms) == len(primary) else f"{', '.join(arms)}: " for why, arms in reasons.items()}
    stamp = tag("p", STAMP, " ", "; ".join(arms + why for why, arms in shared.items())) if reasons else ""
    unique = lambda values: ", ".join(sorted({str(v) for v in values if v})) or "unknown"
    looks = plan.stopping.looks
    look = f"look {view.look.number} of {len(looks)}" if view.look.number else "before its first look"
    facts = [
        f"plan {plan.hash}" if plan.hash else "no plan",
        f"results of {results.created or 'an unknown date'}",
        f"commit {unique(run.commit for run in results.runs)}",
        f"on {unique(run.device for run in results.runs)}",
        f"{look} (after {', '.join(map(str, looks))} seeds), each at the level {plan.stopping.level:g}",
        f"values at the {plan.at} of the runs",
    ]
    lines = [tag("li", _line(view, c)) for c in primary]
    meta = tag("p", " · ".join(facts), class_="meta")
    return join([tag("h1", plan.question), stamp, tag("ul", *lines, class_="verdicts"), meta])


def _undecided(c: Comparison) -> str:
    """What an inconclusive comparison did and did not show."""
    if c.p_holm is not None and c.p is not None and c.p < c.level:
        alone, adjusted = number(c.p, 2), number(c.p_holm, 2)
        return f"; p = {alone} by itself, {adjusted} among the plan's comparisons: more seeds would tell"
    return f"; no difference seen; one of {number(c.mde80, 3)} would have been seen with 80 %"


def _line(view: View, c: Comparison) -> Markup:
    parts: list[Any] = [tag("b", c.arm), ": ", word(c.verdict), f" than {c.baseline}" if c.verdict in _GOOD + _BAD else
                        f" to {c.baseline}" if c.verdict in ("equivalent", "identical") else ""]  # fmt: skip
    parts.append(f" in {c.metric}: ")
    if c.mean is None:
        parts.append("; ".join(c.notes))
    else:
        parts.append(f"{_difference(c)}, n = {c.n}")
    if c.verdict == "inconclusive" and c.mde80 is not None:
        parts.append(_undecided(c))
    if c.failures:
        parts.append(f"; {c.failures.arm} of {c.failures.arm_runs} runs failed, of the baseline's "
                     f"{c.failures.baseline} of {c.failures.baseline_runs}")  # fmt: skip
    return join(parts)


def _difference(c: Comparison) -> str:
    wide = c.sd
    if c.ci95 is None:
        return signed(c.mean, wide)
    return f"{signed(c.mean, wide)} [{signed(c.ci95[0], wide)}, {signed(c.ci95[1], wide)}]"


# --- the main table ---------------------------------------------------------------------------------------------------

_COSTS: tuple[tuple[str, str], ...] = (
    ("parameters", "parameters"),
    ("flops_per_token", "forward FLOPs / token"),
    ("state_bytes", "state bytes"),
    ("tokens_per_second", "tokens / s"),
    ("peak_bytes", "peak bytes"),
)


def main_table(view: View, metric: Metric, *, costs: bool) -> Markup:
    """Arms by what they came to."""
    best, tuned = view.best(metric), any(node.lr_chosen is not None for node in view.plan.arms.values())
    known = [(field, title) for field, title in _COSTS
             if costs and any(getattr(run.cost, field) is not None for run in view.results.runs)]  # fmt: skip
    columns = ["arm", *["learning rate"] * tuned, "n", f"{metric.name}, mean ± sd"]
    columns += [f"difference to {view.plan.baseline} [95 % CI]", "p (Holm)" if metric.primary else "p", "verdict"]
    columns += ["found with 80 %", *(title for _, title in known)]
    rows = []
    for arm in view.arms:
        node, c = view.plan.arms[arm], view.comparison(metric.name, arm)
        mean, sd, n = spread(list(view.values(metric.name, arm).values()))
        changed = _changed(node.config_diff)
        name = join([tag("b", arm) if arm == best else arm, tag("div", changed, class_="diff") if changed else ""])
        figure = plus_minus(mean, sd)
        rate = cell(NONE if node.lr_chosen is None else f"{node.lr_chosen:g}", node.lr_chosen)
        rows.append([
            name, *[rate] * tuned, cell(f"{n} of {len(view.results.of(arm))}", n),
            cell(tag("b", figure) if arm == best else figure, mean),
            *(["", "", "baseline", ""] if c is None else _tested(c)), *(_cost(view, arm, field) for field, _ in known),
        ])  # fmt: skip
    about = "primary" if metric.primary else "secondary, p not adjusted"
    caption = f"{metric.name} ({about}; {metric.direction} is better)"
    made = table(columns, rows, caption, sortable=True)
    return made if metric.primary else tag("div", made, class_="grey")


def _changed(config_diff: dict[str, list[Any]]) -> str:
    """Names first; the rest of many is in the table of keys that differ."""
    ours = {key: value for key, (_, value) in config_diff.items() if value != "-"}
    keys = sorted(ours, key=lambda key: not key.endswith(".name"))
    told = ", ".join(f"{_end(key, keys)} = {shown(ours[key])}" for key in keys[:_KEYS])
    return f"{told}, and {len(keys) - _KEYS} more" if len(keys) > _KEYS else told


def _end(key: str, among: list[str]) -> str:
    """The shortest end of a dotted key that no other key has."""
    parts = key.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in among) == 1)


def _tested(c: Comparison) -> list[Markup]:
    p = c.p_holm if c.primary else c.p
    reason = exploratory(c)
    stamp = tag("div", tag("span", "exploratory", class_="stamp", title=reason)) if reason else ""
    verdict = cell(join([word(c.verdict), stamp]), c.verdict)
    return [cell(_difference(c), c.mean), cell(probability(p), p), verdict, cell(number(c.mde80, 3), c.mde80)]


def _cost(view: View, arm: str, field: str) -> Markup:
    mean, *_ = view.spread(arm, lambda run: getattr(run.cost, field))
    return cell(NONE if mean is None else short(mean), mean)


def statistics_table(view: View) -> Markup:
    """Every comparison with every number that it came to."""
    columns = ["arm", "metric", "test", "n", "mean", "sd", "95 % CI", "t", "df", "p", "p (Holm)", "margin", "p (TOST)",
               "80 % power at", "r", "sign flips p", "Wilcoxon p", "Welch p", "verdict", "look"]  # fmt: skip
    rows = [_statistics(c) for c in view.results.comparisons]
    few = f"cannot: below {statistics.LEAST_RANKED} pairs a rank or permutation test cannot reach 5 %"
    return details("all statistics", table(columns, rows, f"Arm minus {view.plan.baseline}; {few}", sortable=True))


def _statistics(c: Comparison) -> list[Any]:
    plain = lambda value, digits=4: cell(number(value, digits), value)
    chance = lambda value, text=None: cell(probability(value) if text is None or value is not None else text, value)
    interval = NONE if c.ci95 is None else f"[{number(c.ci95[0], 5)}, {number(c.ci95[1], 5)}]"
    exact = None if c.test == "paired t" else NONE
    return [
        c.arm, cell(c.metric), cell(c.test), cell(str(c.n), c.n), plain(c.mean, 5), plain(c.sd), cell(interval),
        plain(c.t), plain(c.df), chance(c.p), chance(c.p_holm, None if c.primary else NONE), plain(c.margin),
        chance(c.tost_p, NONE if c.margin is None else None), plain(c.mde80), plain(c.r, 3),
        chance(c.sign_flip_p, exact), chance(c.wilcoxon_p, exact), chance(c.welch_p, NONE),
        cell(word(c.verdict), c.verdict), cell(str(c.look or "peek")),
    ]  # fmt: skip


def items_table(view: View) -> Markup:
    """The same differences over the test set's items."""
    found = [c for c in view.results.comparisons if c.items]
    if not found:
        return Markup()
    rows = [
        [c.arm, cell(c.metric), cell(str(c.items.n), c.items.n), cell(number(c.items.mean, 5), c.items.mean),
         cell(f"[{number(c.items.ci95[0], 5)}, {number(c.items.ci95[1], 5)}]")] for c in found
    ]  # fmt: skip
    caption = "Over the test set's documents or examples (BCa bootstrap): on this text. Seeds say: of this method."
    return details("over documents or examples", table(["arm", "metric", "items", "mean", "95 % CI"], rows, caption))


# --- tasks, diagnostics, samples --------------------------------------------------------------------------------------


def tasks(view: View) -> Markup:
    """Arms by tasks with what guessing and knowing score, and a map of slices."""
    names = sorted({(t, m) for run in view.results.runs for t, metrics in run.tasks.items() for m in metrics})
    if not names:
        return Markup()
    rows, maps = [], []
    for task, metric in names:
        figures = [run.tasks[task][metric] for run in view.results.runs if metric in run.tasks.get(task, {})]
        row: list[Any] = [f"{task}: {metric}"]
        for arm in view.arms:
            mean, sd, n = view.spread(arm, _figure(task, metric))
            row.append(cell(plus_minus(mean, sd), mean))
        first = figures[0]
        rows.append([*row, cell(number(first.chance), first.chance), cell(number(first.oracle), first.oracle)])
        slices = list(dict.fromkeys(part for figure in figures for part in figure.slices))
        maps += [charts.heat(view, task, metric, slices)] if slices else []
    columns = ["task", *view.arms, "chance", "oracle"]
    return join([table(columns, rows, "Tasks, mean ± sd over seeds", sortable=True), *maps])


def _figure(task: str, metric: str) -> Callable[[Run], float | None]:
    return lambda run: run.tasks[task][metric].value if metric in run.tasks.get(task, {}) else None


def diagnostics(view: View) -> Markup:
    """Figures that say why, and final figures that the plan does not compare."""
    compared = {metric.name for metric in view.plan.metrics}
    other = lambda run: {k: v for k, v in run.final.items() if k not in compared} | run.diagnostics
    names = sorted({name for run in view.results.runs for name in other(run)})
    rows = []
    for name in names:
        row: list[Any] = [name]
        for arm in view.arms:
            mean, sd, _ = view.spread(arm, lambda run: other(run).get(name))
            row.append(cell(plus_minus(mean, sd), mean))
        rows.append(row)
    return table(["figure", *view.arms], rows, "Not compared: mean ± sd over seeds") if rows else Markup()


def samples(view: View) -> Markup:
    """Continuations of the same prompts by the first completed run of each arm."""
    firsts = [(arm, run) for arm in view.arms for run in view.done(arm)[:1] if run.samples]
    prompts = list(dict.fromkeys(sample.prompt for _, run in firsts for sample in run.samples))[:_SAMPLES]
    blocks = []
    for prompt in prompts:
        texts = [(arm, run.seed, s.text) for arm, run in firsts for s in run.samples if s.prompt == prompt]
        cut = lambda text: tag("pre", text[:_SAMPLE_CHARACTERS])
        columns = [tag("div", tag("h3", f"{arm}, seed {seed}"), cut(text)) for arm, seed, text in texts]
        blocks.append(join([tag("pre", prompt[-_SAMPLE_CHARACTERS:]), tag("div", *columns, class_="samples")]))
    return details("continuations of the same prompts", *blocks) if blocks else Markup()


# --- what went wrong, what was not equal, how to repeat ---------------------------------------------------------------


def failures(view: View) -> Markup:
    """Failed and missing runs, pairs that are none, and what failures do to the comparisons."""
    rows = [
        [run.arm, cell(str(run.seed), run.seed), run.status, run.reason or NONE, run.workdir]
        for run in view.results.runs if run.status != "done"
    ]  # fmt: skip
    there = {(run.arm, run.seed) for run in view.results.runs}
    absent = [(arm, seed) for arm in view.arms for seed in view.plan.seeds if (arm, seed) not in there]
    rows += [[arm, cell(str(seed), seed), "missing", "no such run", NONE] for arm, seed in absent]
    parts = [table(["arm", "seed", "status", "reason", "workdir"], rows, "Runs that are not completed")] if rows else []
    failed = [
        [c.arm, cell(c.metric), f"{f.arm} of {f.arm_runs}", f"{f.baseline} of {f.baseline_runs}",
         cell(probability(f.fisher_p), f.fisher_p), f"{f.wins} to {f.losses}", cell(probability(f.sign_p), f.sign_p)]
        for c in view.results.comparisons if (f := c.failures)
    ]  # fmt: skip
    columns = ["arm", "metric", "failed", "baseline failed", "Fisher p", "pairs won to lost", "sign test p"]
    if failed:
        parts.append(table(columns, failed, "Failures as the worst rank; the tables above are of completed pairs"))
    notes = [f"{c.arm}, {c.metric}: {note}" for c in view.results.comparisons for note in _notes(c)]
    notes += [f"{arm}: {note}" for arm in view.arms for note in view.plan.arms[arm].notes]
    parts.append(tag("ul", *(tag("li", note) for note in notes)) if notes else "")
    return join(parts) if rows or failed or notes else tag("p", "Every run was completed.")


def _notes(c: Comparison) -> list[str]:
    missing = [f"no pair at seeds {', '.join(map(str, c.missing))}"] if c.missing else []
    welch = [f"r = {number(c.r, 3)}: seeds do not pair these arms; Welch's p is {probability(c.welch_p)}"]
    return [*c.notes, *missing, *(welch if c.welch_p is not None else [])]


def equal(view: View) -> Markup:
    """What was held equal, how well, what tuning cost, the checks, and the implementations."""
    plan, parts = view.plan, []
    if plan.equal.what:
        rows = [[arm, cell(f"{value:+.3f} %", value)] for arm, value in plan.equal.residual.items()]
        parts.append(table(["arm", "residual"], rows, f"Held equal: {plan.equal.what}"))
    parts += [tag("p", note) for note in plan.equal.notes]
    facts = [[key, shown(value)] for part in (plan.tuning, view.results.checks) for key, value in part.items()]
    parts += (
        [table(["tuning and checks", ""], facts, "What tuning took, and checks of the plan itself")] if facts else []
    )
    ops = sorted({op for run in view.results.runs for op in run.impl})
    if ops:
        used = lambda arm, op: (
            ", ".join(sorted({run.impl[op] for run in view.results.of(arm) if op in run.impl})) or NONE
        )
        rows = [[op, *(used(arm, op) for arm in view.arms)] for op in ops]
        parts.append(details("implementations", table(["op", *view.arms], rows, "Implementations chosen")))
    return join(parts)


def differences(view: View) -> dict[str, list[str]]:
    """Config keys that differ, and only those, with each arm's value."""
    keys = sorted({key for arm in view.plan.arms.values() for key in arm.config_diff})
    base = {key: diff[key][0] for diff in (arm.config_diff for arm in view.plan.arms.values()) for key in diff}
    value = lambda arm, key: shown(view.plan.arms[arm].config_diff.get(key, [None, base[key]])[1])
    return {key: [value(arm, key) for arm in view.arms] for key in keys}


def config_table(view: View) -> Markup:
    """`differences` as a table."""
    rows = [[key, *values] for key, values in differences(view).items()]
    return table(["key", *view.arms], rows, "Config keys that differ") if rows else tag("p", "No config key differs.")


def repeat(view: View) -> Markup:
    """Commands and environment."""
    commands = [
        join([tag("h3", arm), tag("pre", node.command)]) for arm, node in view.plan.arms.items() if node.command
    ]
    environment = [[key, shown(value)] for key, value in view.results.environment.items()]
    parts = [details("commands", *commands)] if commands else []
    if environment:
        parts.append(details("environment", table(["what", ""], environment, "Environment")))
    return join(parts)


def runs(view: View) -> Markup:
    """Every run by every metric of the plan."""
    names, rows = [metric.name for metric in view.plan.metrics], []
    for run in view.results.runs:
        figures = run.figures()
        values = [cell(number(figures.get(name), 6), figures.get(name)) for name in names]
        seconds = cell(number(run.seconds, 3), run.seconds)
        rows.append([run.arm, cell(str(run.seed), run.seed), run.status, *values, seconds, run.workdir])
    columns = ["arm", "seed", "status", *names, "seconds", "workdir"]
    return details("runs", table(columns, rows, "Every run", sortable=True))


def plain(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of what the command line tells: the keys that differ, and the comparisons."""
    view = View(results)
    differing = [[key, *values] for key, values in differences(view).items()]
    rows = []
    for c in results.comparisons:
        numbers = [_difference(c), str(c.n), probability(c.p if c.p_holm is None else c.p_holm), number(c.mde80, 3)]
        rows.append([c.arm, *numbers, c.verdict, "; ".join(_notes(c))])
    columns = ["arm", "difference [95 % CI]", "n", "p (Holm)", "80 % power at", "verdict", "notes"]
    name = results.plan.metrics[0].name
    return [
        ("config keys that differ", ["key", *view.arms], differing),
        (f"{name}, against {results.plan.baseline}", columns, rows),
    ]
