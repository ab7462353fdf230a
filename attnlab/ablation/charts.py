"""The charts of the report, each beside the numbers that it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attnlab.ablation import scaling, statistics
from attnlab.ablation.markup import NONE, Markup, cell, details, number, short, table, tag
from attnlab.ablation.results import Comparison, Metric, Run
from attnlab.ablation.svg import Axis, Frame, figure, key, shorten
from attnlab.ablation.view import AXIS_NAMES, View, spread

_POINTS = 60_000  # of all lines of a chart together
_ROWS = 40  # of a table of a curve


def _limits(values: Sequence[float]) -> list[float]:
    return list(values) or [0.0, 1.0]


def seeds(view: View, metric: Metric) -> Markup:
    """Every seed of every arm, with a line from arm to arm where seeds are pairs."""
    by_arm = {arm: view.values(metric.name, arm) for arm in view.arms}
    x = Axis.of_names("arm", [shorten(arm) if len(view.arms) < 5 else str(i + 1) for i, arm in enumerate(view.arms)])
    frame = Frame(x, Axis.over(view.label(metric), [v for values in by_arm.values() for v in values.values()]))
    lines, marks = [], []
    for seed in view.plan.seeds:
        points = [(i, by_arm[arm][seed]) for i, arm in enumerate(view.arms) if seed in by_arm[arm]]
        if view.plan.paired:
            lines.append(frame.path(points, "pair"))
        marks += [
            frame.mark(i, y, i, f"{view.arms[int(i)]}, seed {seed}: {metric.name} {number(y, 6)}") for i, y in points
        ]
    counts = ", ".join(f"{arm} {len(values)}" for arm, values in by_arm.items())
    title = f"{metric.name} of every seed"
    names = [(i, arm if len(view.arms) < 5 else f"{i + 1} {arm}") for i, arm in view.key()]
    picture = frame.draw(title, f"Lower is {'better' if metric.direction == 'lower' else 'worse'}.", *lines, *marks)
    paired = "; lines join runs of one seed" if view.plan.paired else ""
    return figure(title, picture, f"n: {counts}{paired}.", key(names), _seed_table(view, metric, by_arm))


def _seed_table(view: View, metric: Metric, by_arm: dict[str, dict[int, float]]) -> Markup:
    rows = [
        [arm, *(cell(number(v, 6), v) for v in (by_arm[arm].get(seed) for seed in view.plan.seeds))]
        for arm in view.arms
    ]  # fmt: skip
    columns = ["arm", *(f"seed {seed}" for seed in view.plan.seeds)]
    return details("as a table", table(columns, rows, f"{metric.name} by arm and seed"))


def differences(view: View, metric: Metric) -> Markup:
    """Each arm's difference to the baseline with its interval, its pairs, and what is too small to matter."""
    found = [c for c in view.results.comparisons if c.metric == metric.name and c.mean is not None]
    if not found:
        return Markup()
    pairs = {c.arm: _pair_differences(view, c) for c in found}
    margin = view.plan.margins.get(metric.name)
    values = [v for c in found for v in (c.mean, *(c.ci95 or []), *pairs[c.arm].values())]
    x = Axis.over(
        f"{view.label(metric)}: arm − {view.plan.baseline}", [0.0, *values, *([-margin, margin] if margin else [])]
    )
    names = Axis.of_names("arm", [shorten(c.arm) for c in found][::-1])
    frame = Frame(x, names, height=max(140, 74 + 34 * len(found)), left=92)
    layers = [frame.stripe(-margin, margin, "margin")] if margin else []
    layers.append(frame.rule(0))
    for row, c in enumerate(reversed(found)):
        style = view.style(c.arm)
        for seed, value in pairs[c.arm].items():
            layers.append(frame.mark(value, row - 0.22, style, f"{c.arm}, seed {seed}: {number(value, 6)}", "dot"))
        if c.ci95:
            layers.append(frame.path([(c.ci95[0], row + 0.12), (c.ci95[1], row + 0.12)], f"interval c{style % 8}"))
        layers.append(frame.mark(c.mean, row + 0.12, style, f"{c.arm}: mean difference {number(c.mean, 6)}"))
    title = f"Difference to {view.plan.baseline} in {metric.name}"
    shaded = f"; shaded: ±{margin:g}, too small to matter" if margin else ""
    counts = ", ".join(f"{c.arm} {c.n}" for c in found)
    caption = f"Mean and 95 % interval ({found[0].test}), small: pairs; n: {counts}{shaded}."
    side = "left" if metric.direction == "lower" else "right"
    return figure(title, frame.draw(title, f"Better is to the {side} of 0.", *layers), caption)


def _pair_differences(view: View, c: Comparison) -> dict[int, float]:
    ours, theirs = view.values(c.metric, c.arm), view.values(c.metric, c.baseline)
    return {seed: ours[seed] - theirs[seed] for seed in c.pairs}


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(view: View, metric: str, label: str, place: int) -> Markup:
    """A metric over each budget; one at a time is shown, chosen without a script.

    Args:
      place: of the chart among those of curves.
    """
    axes = [axis for axis in view.axes() if any(len(view.curve(run, metric, axis)[0]) for run in view.results.runs)]
    if not axes:
        return Markup()
    title, group = f"{metric} over training", f"over{place}"
    chosen = [
        tag("input", type="radio", name=group, id=f"{group}-{axis}", checked="" if i == 0 else None, class_=f"pick{i}")
        for i, axis in enumerate(axes)
    ]
    labels = [tag("label", AXIS_NAMES[axis], for_=f"{group}-{axis}") for axis in axes]
    panes = [tag("div", _curve(view, metric, label, axis, len(axes)), class_="pane") for axis in axes]
    switch = tag("div", *chosen, tag("span", "over ", *labels, class_="labels"), *panes, class_="switch")
    runs = ", ".join(f"{arm} {len(view.done(arm))}" for arm in view.arms)
    unfinished = any(run.curve for run in view.results.runs if run.status != "done")
    more = "; runs that were not completed are thin lines and in no mean" if unfinished else ""
    caption = f"Thick: mean over seeds; band: least to largest; thin: runs, not smoothed; n: {runs}{more}."
    return figure(title, switch, caption, key(view.key()), _curve_table(view, metric))


def _curve(view: View, metric: str, label: str, axis: str, panes: int) -> Markup:
    runs = [(run, *view.curve(run, metric, axis)) for run in view.results.runs]
    runs = [(run, x, y) for run, x, y in runs if len(x)]
    most = max(x.max() for _, x, _ in runs)
    # The first losses would leave no room for the rest.
    late = np.concatenate([y[x >= 0.05 * most] for _, x, y in runs])
    early = 0 < len(late) < sum(len(x) for _, x, _ in runs)
    frame = Frame(
        Axis.over(AXIS_NAMES[axis], [0.0, most]),
        Axis.over(label, late if early else np.concatenate([y for *_, y in runs])),
    )
    points = int(np.clip(_POINTS / panes / (len(runs) + 3 * len(view.arms)) / 3, 40, 400))
    bands, lines, means = [], [], []
    for run, x, y in runs:
        kept = scaling.decimate(y, points)
        lines.append(frame.path(zip(x[kept], y[kept]), f"run c{view.style(run.arm) % 8}"))
    for arm in view.arms:
        x, mean, low, high = view.mean_curve(arm, metric, axis)
        if not len(x):
            continue
        kept, style = np.union1d(scaling.decimate(low, points), scaling.decimate(high, points)), view.style(arm)
        around = [*zip(x[kept], high[kept]), *zip(x[kept][::-1], low[kept][::-1])]
        bands.append(frame.path(around, f"band c{style % 8}", closed=True))
        means.append(frame.path(zip(x[kept], mean[kept]), f"mean c{style % 8}"))
        means.append(frame.mark(x[-1], mean[-1], style, f"{arm}: mean {number(mean[-1], 6)} at {short(x[-1])}"))
    note = " What lies outside the range of the last 95 % of the x axis is drawn at the edge." if early else ""
    return frame.draw(f"{metric} over {AXIS_NAMES[axis]}", f"Curves of {len(runs)} runs.{note}", *bands, *lines, *means)


def _curve_table(view: View, metric: str) -> Markup:
    found = {arm: view.mean_curve(arm, metric, "step") for arm in view.arms}
    steps = np.unique(np.concatenate([x for x, *_ in found.values()]))
    if not len(steps):
        return Markup()
    shown = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _ROWS)).round().astype(int))]
    rows = []
    for step in shown:
        row: list[Any] = [f"{step:,.0f}"]
        for x, mean, low, high in found.values():
            (at,) = np.nonzero(x == step)
            text = f"{number(mean[at[0]])} ({number(low[at[0]])} to {number(high[at[0]])})" if len(at) else NONE
            row.append(cell(text, float(mean[at[0]]) if len(at) else None))
        rows.append(row)
    part = f"; {len(shown)} of {len(steps)} steps" if len(shown) < len(steps) else ""
    return details(
        "as a table", table(["step", *view.arms], rows, f"{metric}: mean (least to largest) over seeds{part}")
    )


def targets(view: View, metric: Metric) -> Markup:
    """How much sooner each arm reaches the baseline's mean final value."""
    base = spread(list(view.values(metric.name, view.plan.baseline).values()))[0]
    curves = {run.seed: run.curve for run in view.done(view.plan.baseline) if metric.name in run.curve}
    if base is None or not curves or not view.plan.paired:
        return Markup()
    time = lambda curve: scaling.time_to_target(curve["step"], curve[metric.name], base, metric.direction)
    rows = []
    for arm in view.arms:
        mine = {run.seed: run.curve for run in view.done(arm) if metric.name in run.curve}
        pairs = [seed for seed in view.plan.seeds if seed in mine and seed in curves]
        if arm == view.plan.baseline or not pairs:
            continue
        found = scaling.speedup([time(mine[seed]) for seed in pairs], [time(curves[seed]) for seed in pairs])
        ratios = " ".join(number(ratio, 3) for ratio in found.ratios) or NONE
        between = f" [{number(found.ci95[0], 3)}, {number(found.ci95[1], 3)}]" if found.ci95 else ""
        rows.append([arm, cell(number(found.mean, 3) + between, found.mean), ratios, str(found.unreached)])
    columns = ["arm", "geometric mean", "of each pair", "pairs in which one never reaches it"]
    why = f"an interval wants {statistics.LEAST_BOOTSTRAP} pairs"
    caption = f"Steps of {view.plan.baseline} / steps of the arm to {metric.name} = {number(base, 6)} ({why})"
    return details("steps to the baseline's final mean", table(columns, rows, caption)) if rows else Markup()


# --- other charts -----------------------------------------------------------------------------------------------------


def rates(view: View) -> Markup:
    """The tuning runs of every arm: how the first primary metric depends on the learning rate."""
    tuned = {arm: node for arm, node in view.plan.arms.items() if node.lr_curve}
    if not tuned:
        return Markup()
    points = {arm: [p for p in node.lr_curve if None not in p[:2]] for arm, node in tuned.items()}
    metric = next((m for m in view.plan.metrics if m.primary), view.plan.metrics[0])
    frame = Frame(
        Axis.over("learning rate", _limits([p[0] for found in points.values() for p in found]), log=True),
        Axis.over(view.label(metric), _limits([p[1] for found in points.values() for p in found])),
    )
    lines, marks, rows = [], [], []
    for arm, found in points.items():
        style, chosen = view.style(arm), tuned[arm].lr_chosen
        lines.append(frame.path([(p[0], p[1]) for p in sorted(found)], f"mean c{style % 8}"))
        marks += [
            frame.mark(
                p[0], p[1], style, f"{arm} at {p[0]:g}: {number(p[1], 6)}", "mark big" if p[0] == chosen else "mark"
            )
            for p in found
        ]
    for arm, node in tuned.items():
        for rate, mean, sd, n in node.lr_curve:
            taken = "chosen" if rate == node.lr_chosen else ""
            rows.append([arm, cell(f"{rate:g}", rate), cell(_pm(mean, sd), mean), f"{n:g}" if n else NONE, taken])
    title = "Sensitivity to the learning rate"
    counts = ", ".join(f"{arm} {len(found)}" for arm, found in points.items())
    picture = frame.draw(title, "One line per arm; the chosen rate is the larger marker.", *lines, *marks)
    caption = f"Tuning seeds, not those that are reported; rates tried (n): {counts}. Larger marker: chosen."
    columns = ["arm", "learning rate", "mean ± sd", "n", ""]
    return figure(title, picture, caption, key([(view.style(arm), arm) for arm in tuned]),
                  details("as a table", table(columns, rows, title)))  # fmt: skip


def _pm(mean: float | None, sd: float | None) -> str:
    return number(mean) if sd is None else f"{number(mean)} ± {number(sd, 2)}"


def pareto(view: View, metric: Metric, name: str, cost: Callable[[Run], float | None], *, lower: bool = True) -> Markup:
    """A metric against a cost: dots are seeds, larger markers means; the line joins arms that no other beats in both.

    Args:
      name: of the cost, with its unit.
      lower: whether less of the cost is better.
    """
    dots = [
        (arm, cost(run), run.figures().get(metric.name)) for arm in view.arms for run in view.done(arm)
    ]  # fmt: skip
    dots = [(arm, x, y) for arm, x, y in dots if x is not None and y is not None and x > 0]
    means = {}
    for arm in view.arms:
        mine = [(x, y) for other, x, y in dots if other == arm]
        if mine:
            means[arm] = tuple(float(v) for v in np.mean(mine, axis=0))
    if len(means) < 2 or len({x for x, _ in means.values()}) < 2:
        return Markup()
    xs = [x for _, x, _ in dots]
    frame = Frame(Axis.over(name, xs, log=max(xs) / min(xs) > 3), Axis.over(view.label(metric), [y for *_, y in dots]))
    layers = [frame.path(sorted(frontier(list(means.values()), lower, metric.direction == "lower")), "frontier")]
    layers += [frame.mark(x, y, view.style(arm), f"{arm}: {short(x)}, {number(y, 6)}", "dot") for arm, x, y in dots]
    layers += [
        frame.mark(x, y, view.style(arm), f"{arm}: mean {number(y, 6)} at {short(x)}", "mark big")
        for arm, (x, y) in means.items()
    ]
    title = f"{metric.name} against {name}"
    counts = ", ".join(f"{arm} {sum(other == arm for other, *_ in dots)}" for arm in means)
    rows = [[arm, cell(short(x), x), cell(number(y, 6), y)] for arm, (x, y) in means.items()]
    return figure(title, frame.draw(title, "The line joins arms that none beats in both.", *layers),
                  f"Small: seeds, large: means, line: frontier of the means; n: {counts}.",
                  key([(view.style(arm), arm) for arm in means]),
                  details("as a table", table(["arm", name, f"mean {metric.name}"], rows, title)))  # fmt: skip


def frontier(points: list[tuple[float, float]], lower_x: bool, lower_y: bool) -> list[tuple[float, float]]:
    """Points that no other is at least as good as in both and better in one."""
    a, b = (1 if lower_x else -1), (1 if lower_y else -1)
    beats = lambda p, q: a * p[0] <= a * q[0] and b * p[1] <= b * q[1] and p != q
    return [q for q in points if not any(beats(p, q) for p in points)]


def heat(view: View, task: str, metric: str, slices: Sequence[str]) -> Markup:
    """Arms by slices of a task's metric, shaded from the least to the largest."""
    value = lambda arm, part: view.spread(arm, lambda run: _slice(run, task, metric, part))
    found = {(arm, part): value(arm, part) for arm in view.arms for part in slices}
    means = [mean for mean, *_ in found.values() if mean is not None]
    low, span = (min(means), max(means) - min(means)) if means else (0.0, 0.0)
    rows = []
    for arm in view.arms:
        row: list[Any] = [arm]
        for part in slices:
            mean, sd, _ = found[arm, part]
            shade = 0.05 + 0.5 * (mean - low) / span if mean is not None and span else 0.0
            row.append(cell(_pm(mean, sd), mean, style=f"background:rgba(0,130,200,{shade:.2f})"))
        rows.append(row)
    return table(["arm", *slices], rows, f"{task}: {metric} by slice, mean ± sd over seeds; darker is more")


def _slice(run: Run, task: str, metric: str, part: str) -> float | None:
    figure = run.tasks.get(task, {}).get(metric)
    return None if figure is None else figure.slices.get(part)
