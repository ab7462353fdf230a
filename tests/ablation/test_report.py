"""The page: its numbers are those of results.json, it needs nothing but itself, and says what it shows in words."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import html.parser
import json
import math
import re

import numpy as np
import pytest

from attnlab.ablation import charts, markup, report, results_file, svg, synthetic
from attnlab.ablation.results import Arm, Figure, Metric, Run, Sample
from attnlab.ablation.view import View
from tests.ablation import chromium, showcase


class Page(html.parser.HTMLParser):
    """Elements, tables and texts of a page; unbalanced tags are an error."""

    VOID = {"meta", "link", "input", "line"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.tables, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        node = {"tag": tag, "attributes": dict(attributes), "inside": [n["tag"] for n in self.open], "text": ""}
        self.elements.append(node)
        if tag == "table":
            self.tables.append({"caption": "", "rows": []})
        elif tag == "tr":
            self.tables[-1]["rows"].append([])
        elif tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append(node)
        if tag not in self.VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for node in self.open:
            node["text"] += data
        if self.open and self.open[-1]["tag"] == "caption":
            self.tables[-1]["caption"] += data

    def all(self, tag):
        return [node for node in self.elements if node["tag"] == tag]

    def table(self, caption):
        (found,) = [t for t in self.tables if t["caption"].startswith(caption)]
        head = [cell["text"] for cell in found["rows"][0]]
        return {row[0]["text"]: dict(zip(head, row)) for row in found["rows"][1:]}


@pytest.fixture(scope="module")
def full():
    """Results with everything: tasks, items, samples, failures, missing runs, notes."""
    results = showcase.results()
    slices = lambda run: {"pairs=4": 0.9, "pairs=16": 0.1 * run.seed}
    extra = lambda run: {
        "tasks": {"mqar": {"accuracy": Figure(0.5 + 0.01 * run.seed, 64, slices(run), 1 / 64, 1.0)}},
        "samples": [Sample("def f(", f"x): # {run.arm}")], "diagnostics": {"sink": 0.25 + run.seed},
        "items": {"heldout_loss": (run.seed + np.sin(np.arange(30) + len(run.arm))).tolist()},
    }  # fmt: skip
    runs = [dataclasses.replace(run, **extra(run)) for run in results.runs if (run.arm, run.seed) != ("lightning", 3)]
    plan = dataclasses.replace(results.plan, arms={
        name: dataclasses.replace(arm, command=f"attnlab train --config {name}", notes=["edge"] * (name == "based"))
        for name, arm in results.plan.arms.items()
    }, tuning={"points": 4})  # fmt: skip
    return dataclasses.replace(
        results, plan=plan, runs=runs, environment={"jax": "0.10"}, checks={"pairing_bitwise": True}
    )


@pytest.fixture(scope="module")
def written(full, tmp_path_factory):
    home = tmp_path_factory.mktemp("report") / "new"
    results, path = report.write(home, full)
    return results, path, Page(path.read_text("ascii"))


def exact(cell):
    return json.loads(cell["attributes"]["data-value"])


def rounds(text, value):
    """Whether the first number of a text is a value, to the digits that are shown."""
    shown = re.search(r"[-+−]?[\d,]*\.?\d+(e[-+]\d+)?", text)[0].replace(",", "").replace("−", "-")
    places = len(shown.partition("e")[0].partition(".")[2])
    scale = 10.0 ** int(shown.partition("e")[2] or 0)
    return abs(float(shown) - value) <= 0.5000001 * scale * 10.0**-places or math.isclose(
        float(shown), value, rel_tol=5.1e-4
    )


def test_numbers_are_those_of_results(written):
    """The main table, the statistics and the runs: exact values in the cells, and texts that round to them."""
    results, path, page = written
    again = results_file.read(path.parent / "results.json")
    assert again == results and results.created is not None
    main, runs = page.table("heldout_loss (primary"), again.runs
    for arm in again.plan.arms:
        row = next(row for name, row in main.items() if name == arm or name.startswith(f"{arm}name = "))
        values = [run.final["heldout_loss"] for run in runs if run.arm == arm and run.status == "done"]
        assert exact(row["heldout_loss, mean ± sd"]) == pytest.approx(np.mean(values), rel=1e-15)
        assert rounds(row["heldout_loss, mean ± sd"]["text"], np.mean(values))
        assert exact(row["state bytes"]) == again.runs[[r.arm for r in runs].index(arm)].cost.state_bytes
    statistics = [t for t in page.tables if "cannot: below" in t["caption"]][0]
    head = [cell["text"] for cell in statistics["rows"][0]]
    columns = {"mean": "mean", "sd": "sd", "t": "t", "df": "df", "p": "p", "p (Holm)": "p_holm", "p (TOST)": "tost_p",
               "80 % power at": "mde80", "margin": "margin", "r": "r", "n": "n", "verdict": "verdict"}  # fmt: skip
    assert len(statistics["rows"]) == 1 + len(again.comparisons)
    for row, c in zip(statistics["rows"][1:], again.comparisons):
        cells = dict(zip(head, row))
        for title, field in columns.items():
            value = getattr(c, field)
            if value is None:
                assert cells[title]["text"] in ("–", "cannot") and "data-value" not in cells[title]["attributes"]
            elif isinstance(value, str):
                assert cells[title]["text"] == value
            else:
                assert exact(cells[title]) == value and (
                    "< 0" in cells[title]["text"] or rounds(cells[title]["text"], value)
                )
        assert all(rounds(text, v) for text, v in zip(cells["95 % CI"]["text"].split(","), c.ci95))
        assert cells["sign flips p"]["text"] == "cannot"
    raw = page.table("Every run")
    assert exact(next(iter(raw.values()))["heldout_bits_per_byte"]) in [
        r.final.get("heldout_bits_per_byte") for r in runs
    ]


def test_verdict_lines(written):
    """One line per arm with the word, the difference, the interval, n, and what would have been seen."""
    results, _, page = written
    lines = [node["text"] for node in page.all("li") if node["inside"][-1:] == ["ul"]][:3]
    for line, c in zip(lines, [c for c in results.comparisons if c.primary]):
        assert line.startswith(f"{c.arm}: {c.verdict}") and f"n = {c.n}" in line
    assert "1 of 5 runs failed" in lines[2]
    text = Page(report.render(report.compare.compare(synthetic.results({"a": 0.0, "b": 0.0}, 5)))).all("ul")[0]["text"]
    assert re.search(
        r"b: inconclusive in loss: .+, n = 5; no difference seen; one of [\d.]+ would have been seen with 80 %", text
    )


def test_a_difference_that_only_the_adjustment_hides_is_not_called_unseen(written):
    """Where a comparison's own p is below the level and the adjusted one is not, both are told."""
    results, _, _ = written
    c = dataclasses.replace(results.comparisons[0], verdict="inconclusive", p=0.013, p_holm=0.051, level=0.05)
    text = Page(report.render(dataclasses.replace(results, comparisons=[c]))).all("ul")[0]["text"]
    assert "p = 0.013 by itself, 0.051 among the plan's comparisons" in text and "no difference seen" not in text


def test_nothing_from_outside(written):
    """No address but data: URIs and none to load; the policy allows no other; every byte is ASCII; it is small."""
    _, path, page = written
    text = path.read_bytes().decode("ascii")
    assert len(text) < 2_000_000
    for node in page.elements:
        for name, value in node["attributes"].items():
            if name in ("href", "src", "action", "srcset", "poster", "data"):
                assert value.startswith("data:"), (node["tag"], name, value[:60])
            assert not name.startswith("on")
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|eval\(|innerHTML", re.sub(r'href="data:[^"]*"', "", text)
    )
    policy = next(m["attributes"]["content"] for m in page.all("meta") if "content-security-policy" in str(m).lower())
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:")


def test_every_chart_is_told(written):
    """Title, description, both axes' names and ticks in every svg; a caption with n and a table in every figure."""
    _, path, page = written
    pictures = re.findall(r"<svg.*?</svg>", path.read_text(), re.DOTALL)
    assert len(pictures) >= 10
    for picture in pictures:
        assert re.search(r"<title>[^<]+</title><desc>[^<]+</desc>", picture) and 'role="img"' in picture
        assert len(re.findall(r'class="axis"[^>]*>[^<]+<', picture)) == 2
        assert len(re.findall(r'class="tick"[^>]*>[^<]+<', picture)) >= 4
        assert "nan" not in picture.lower() and "inf" not in picture.lower()
    figures = page.all("figure")
    assert len(figures) == len(page.all("figcaption"))
    assert all("n:" in node["text"] or "(n)" in node["text"] for node in page.all("figcaption"))
    assert "state bytes per sequence (log)" in path.read_text()
    assert len([n for n in page.all("input") if "checked" in n["attributes"]]) == 1  # one budget is shown


def test_every_part_is_there(written):
    """Each section, and in them what the results hold."""
    _, path, page = written
    titles = [node["text"] for node in page.all("h2")]
    assert titles == ["Result", "Seeds", "Curves", "Learning rates", "Cost", "Tasks", "Diagnostics", "Samples",
                      "Failures and remarks", "What was equal", "How to repeat", "Raw"]  # fmt: skip
    assert exact(page.table("Tasks, mean")["mqar: accuracy"]["oracle"]) == 1.0
    assert exact(page.table("mqar: accuracy by slice")["gated"]["pairs=16"]) == pytest.approx(0.2)
    assert exact(page.table("Not compared")["sink"]["softmax"]) == 2.25
    assert exact(page.table("Over the test set")["gated"]["items"]) == 30
    text = " ".join(node["text"] for node in page.all("main"))
    assert "no pair at seeds 3" in text and "no such run" in text and "based: edge" in text
    assert "attnlab train --config gated" in text and "x): # lightning" in text and "pairing_bitwise" in text


def test_exploratory(written):
    """Stamped where no plan announced it, where seeds are few, and where a look is not complete; not otherwise."""
    stamps = lambda results: Page(report.render(report.compare.compare(results)))
    good = synthetic.results({"a": 0.0, "b": -1.0}, 5)
    assert not any("stamp" in str(n["attributes"]) for n in stamps(good).elements)
    unplanned = dataclasses.replace(good, plan=dataclasses.replace(good.plan, hash=None))
    partial = dataclasses.replace(good, runs=good.runs[:-1])
    for results, why in ((unplanned, "no plan announced it"), (synthetic.results({"a": 0.0, "b": 0.0}, 4), "4 seeds"),
                         (partial, "a peek before its look is complete")):  # fmt: skip
        page = stamps(results)
        assert [n["text"] for n in page.all("p") if why in n["text"]] and "stamp" in str(page.all("span")[0])
    assert [n["text"] for n in stamps(unplanned).all("h2")][0] == "What differs"


def test_best_is_bold_only_if_better(written):
    """The best mean is bold where the rule calls it better than the second, else none is."""
    names = lambda results: [
        n["text"] for n in Page(report.render(report.compare.compare(results))).all("b") if "th" in n["inside"]
    ]
    assert names(synthetic.results({"a": 0.0, "b": -9.0, "c": -5.0}, 5)) == ["b"]
    assert names(synthetic.results({"a": 0.0, "b": -9.0, "c": -9.0}, 5, seed=2)) == []


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>" onload="alert(1)',
    "]]>&amp;</style></title>",
    "ümläut 漢 \u202e \ud800 " + "x" * 300,
]


def test_hostile_names():
    """Whatever arms, metrics, keys, reasons and samples are called, elements and attributes stay the same."""

    def page(names):
        arms = {
            name: Arm({}, {key: [key, value] for key, value in ((name, name),)}, command=name, notes=[name])
            for name in names
        }
        results = synthetic.results(dict.fromkeys(names, 0.0), 5)
        runs = [dataclasses.replace(
            run, final={names[0]: run.final["loss"]}, reason=names[1], workdir=names[2], device=names[3],
            tasks={names[0]: {names[1]: Figure(0.5, 1, {names[2]: 0.25})}}, diagnostics={names[3]: 1.0},
            impl={names[1]: names[2]}, samples=[Sample(names[0], names[1])], commit=names[0],
            curve={"step": [1, 2], names[0]: [2.0, 1.0]},
        ) for run in results.runs]  # fmt: skip
        metrics = [Metric(names[0], unit=names[1])]
        plan = dataclasses.replace(results.plan, arms=arms, metrics=metrics, question=names[2],
                                   tuning={names[0]: names[1]}, hash=names[3])  # fmt: skip
        text = report.render(report.compare.compare(dataclasses.replace(
            results, plan=plan, runs=runs, environment={names[0]: names[1]}, checks={names[1]: names[2]})))  # fmt: skip
        return [(n["tag"], sorted(n["attributes"])) for n in Page(text).elements], text

    plain, (tags, text) = page(["alpha", "beta", "gamma", "delta"]), page(HOSTILE)
    assert tags == plain[0]
    assert text.isascii() and "<img" not in text and text.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in text and "&#252;ml&#228;ut" in text


def test_downloads(written, tmp_path):
    """The links hold the files that lie beside the page; large ones are compressed, larger ones are not in the page."""
    results, path, page = written
    held = lambda page: {
        n["attributes"]["download"]: base64.b64decode(n["attributes"]["href"].partition(",")[2]) for n in page.all("a")
    }
    files = held(page)
    assert (gzip.decompress(files["results.json.gz"]) if "results.json.gz" in files else files["results.json"]) == (
        path.parent / "results.json"
    ).read_bytes()
    assert files["results.csv"] == (path.parent / "results.csv").read_bytes()
    rng, large = np.random.default_rng(0), results.runs[0]
    items = lambda n: {"x": rng.normal(size=n).tolist()}
    big = lambda n: dataclasses.replace(results, runs=[dataclasses.replace(large, items=items(n))], comparisons=[])
    compressed = held(Page(report.render(big(20_000))))["results.json.gz"]
    assert len(json.loads(gzip.decompress(compressed))["runs"][0]["items"]["x"]) == 20_000
    text = report.render(big(200_000))
    assert "results.json" not in held(Page(text)) and "too large to be in this page" in text and len(text) < 2_000_000


def test_long_runs_make_a_small_page():
    """Twenty-five runs of 4,000 logged steps: a page below 2 MB whose lines keep their spikes."""
    steps, rng = np.arange(1, 4_001), np.random.default_rng(0)
    results = synthetic.results({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 0.0}, 5)
    runs = []
    for run in results.runs:
        loss = 2 + rng.normal(size=len(steps)) / 10
        loss[3333] = 9.0
        runs.append(
            dataclasses.replace(run, curve={"step": steps.tolist(), "tokens": steps.tolist(), "loss": loss.tolist()})
        )
    text = report.render(report.compare.compare(dataclasses.replace(results, runs=runs)))
    assert len(text) < 2_000_000
    frame = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    picture = next(p for p in frame if "loss over steps" in p)
    lines = re.findall(r'd="M([^"]*)" class="run', picture)
    tops = [min(float(point.split()[1]) for point in line.split("L")) for line in lines]
    assert len(lines) == 25 and max(tops) < 30  # the spike is at the top of the picture


def test_fewest_results():
    """A plan of one seed, no curve, no cost, missing and failed runs: the page says so and has no empty chart."""
    results = synthetic.results({"a": 0.0, "b": 0.0}, 1)
    for runs in (results.runs, results.runs[:1], [Run("a", 0, "w", "failed", "nan"), Run("b", 0, "v", "missing")], []):
        text = report.render(report.compare.compare(dataclasses.replace(results, runs=runs)))
        assert "nan" not in re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL).lower().replace(">nan<", "")
        Page(text)


def test_what_an_arm_changes():
    """Keys go by as much of their ends as tells them apart; what the arm lacks, and the rest of many, is not told."""
    results = synthetic.results({"a": 0.0, "b": 0.0}, 1)
    sides = {"model.mixers.M.name": ["softmax", "based"], "model.mixers.S.name": ["-", "gated"],
             "model.mixers.M.window": [8, "-"], "model.mixers.S.heads": ["-", 2], "optimizer.lr": [1, 2],
             "train.steps": [3, 4]}  # fmt: skip
    arms = {**results.plan.arms, "b": dataclasses.replace(results.plan.arms["b"], config_diff=sides)}
    plan = dataclasses.replace(results.plan, arms=arms)
    text = report.render(report.compare.compare(dataclasses.replace(results, plan=plan)))
    assert ">M.name = based, S.name = gated, heads = 2, lr = 2, and 1 more<" in text


# --- numbers and axes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [(None, "–"), (math.nan, "–"), (0.0, "0"), (1234567.0, "1,235,000"), (0.0046, "0.004600"), (-2.5, "-2.500"),
     (9.9996, "10.00"), (1e-7, "1e-07"), (12345.0, "12,340"), (999.96, "1,000")],
)  # fmt: skip
def test_numbers(value, text):
    """Four significant digits."""
    assert markup.number(value) == text


def test_spread_sets_the_digits():
    """A mean is told to two digits of its sd."""
    assert markup.plus_minus(2.345678, 0.0123) == "2.346 ± 0.012"
    assert markup.plus_minus(2.345678, None) == "2.346" and markup.plus_minus(5.0, 0.0) == "5.000 ± 0"
    assert markup.signed(-0.0725, 0.0065) == "−0.0725" and markup.signed(0.5, 0.1) == "+0.50"
    assert [markup.probability(p) for p in (None, 1e-9, 0.0046, 0.05, 1.0)] == [
        "cannot",
        "< 0.0001",
        "0.0046",
        "0.05",
        "1",
    ]
    assert [markup.short(v) for v in (12.5e6, 999, 0.5, -2e9, 999.7)] == ["12.5M", "999", "0.5", "−2G", "1000"]


@pytest.mark.parametrize("values, log", [
    ([0, 1], False), ([2.3, 2.31], False), ([5, 5], False), ([0, 0], False), ([-3e9, 8e9], False),
    ([1e-7, 3e-7], False), ([1e-3, 8e-3], True), ([1, 1e9], True), ([5, 5], True), ([2.9, 3.1], True),
    ([0, 10], True), ([], True),
])  # fmt: skip
def test_axes(values, log):
    """Three to ten ticks inside, each with a text of its own; values lie in order between the ends."""
    axis = svg.Axis.over("x", values, log=log)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 12 and len({text for _, text in ticks}) == len(ticks)
    assert all(axis.low <= value <= axis.high * (1 + 1e-9) for value, _ in ticks)
    assert all(0 < axis.share(value) < 1 for value in values)
    assert [axis.share(v) for v in sorted(set(values))] == sorted({axis.share(v) for v in values})
    assert axis.label == ("x (log)" if log and values and min(values) > 0 else "x")


def test_mean_curve_is_over_the_same_runs():
    """A step that one run lacks is in no mean: a mean never changes because a run ended."""
    results = synthetic.results({"a": 0.0, "b": 0.0}, 3)
    curve = lambda seed: {"step": [1, 2, 3], "loss": [1.0 + seed, None if seed == 1 else 2.0, 3.0 * seed]}
    view = View(dataclasses.replace(results, runs=[dataclasses.replace(r, curve=curve(r.seed)) for r in results.runs]))
    x, mean, low, high = view.mean_curve("a", "loss", "step")
    assert [*x] == [1, 3] and [*mean] == [2.0, 3.0] and [*low] == [1.0, 0.0] and [*high] == [3.0, 6.0]


def test_frontier():
    """Arms that no other beats in both, against the definition, for every orientation."""
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 6, (20, 2)).tolist()]
    for x, y in ((True, True), (True, False), (False, True)):
        good = lambda p: (p[0] if x else -p[0], p[1] if y else -p[1])
        dominated = lambda q: any(good(p) != good(q) and all(a <= b for a, b in zip(good(p), good(q))) for p in points)
        assert charts.frontier(points, x, y) == [q for q in points if not dominated(q)]


# --- in a browser -----------------------------------------------------------------------------------------------------

browser = pytest.mark.skipif(chromium.FOUND is None, reason="no Chromium on the PATH")


@browser
@pytest.mark.parametrize("width", [1280, 360])
def test_in_chromium(written, tmp_path, width):
    """No message on the console, nothing wider than the window, one curve of each shown, tables that sort."""
    found, console = chromium.opened(tmp_path, written[1], width)
    assert console == []
    assert found["width"] == width and found["scroll"] <= found["client"], found
    assert found["panes"] == 1 and found["sorts"] and found["buttons"] > 10


@browser
def test_without_scripts(written, tmp_path):
    """The same charts and tables, the chosen curve included; sorting alone is missing."""
    found, console = chromium.opened(tmp_path, written[1], 360, scripts=False)
    assert all("Blocked script execution" in line for line in console)
    assert found["buttons"] == 0 and not found["sorts"] and found["scroll"] <= found["client"]
    assert found["panes"] == 1 and found["charts"] == 7 and found["tables"] >= 6


@browser
def test_hostile_names_in_chromium(tmp_path):
    """A script in a name does not run, and a long name makes nothing wider than a telephone."""
    results = synthetic.results(dict.fromkeys(HOSTILE, 0.0), 5)
    plan = dataclasses.replace(results.plan, question="<script>console.error('ran')</script>" + "x" * 200)
    _, path = report.write(tmp_path / "r", dataclasses.replace(results, plan=plan))
    found, console = chromium.opened(tmp_path, path, 360)
    assert console == [] and found["scroll"] <= found["client"], found
