"""The report of an ablation: `report.html`, one file that needs no network, made of `results.json` alone."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gzip
import importlib.resources
import pathlib
import string
import time
from collections.abc import Iterator

from attnlab.ablation import charts, compare, results_file, sections
from attnlab.ablation.markup import Markup, escape, join, tag
from attnlab.ablation.results import Results
from attnlab.ablation.view import View
from attnlab.errors import UserError
from attnlab.train import files

_PLAIN = 200_000  # bytes of results.json that are embedded as they are; more are compressed
_MOST = 1_000_000  # bytes of an embedded file
_TRAINING_LOSS = "loss"


def write(workdir: pathlib.Path, results: Results) -> tuple[Results, pathlib.Path]:
    """Compares, and writes `results.json`, `results.csv` and `report.html` into a directory, which is made.

    Returns:
      The results with their comparisons, and the path of the report.

    Raises:
      UserError: the directory cannot be made or written.
    """
    results = compare.compare(results)
    if results.created is None:
        results = dataclasses.replace(results, created=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    with _written(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        results_file.write(workdir / "results.json", results)
        files.replace(workdir / "results.csv", results_file.to_csv(results))
    return results, remake(workdir)


def require_free(workdir: pathlib.Path) -> None:
    """Raises UserError where results of a plan, or files of somebody else, would be replaced by collected results."""
    path = workdir / "results.json"
    foreign = [name for name in ("report.html", "results.csv") if (workdir / name).exists() and not path.exists()]
    if foreign:
        raise UserError(f"{workdir / foreign[0]} is there, and of no report; name another directory with --out")
    if path.exists() and results_file.read(path).plan.hash is not None:
        raise UserError(
            f"{path} holds the results of a plan, which are not replaced; name another directory with --out"
        )


def remake(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` from the `results.json` of a directory, and returns its path.

    Raises:
      UserError: results.json is not there, or is none; or the directory cannot be written.
    """
    path, text = workdir / "report.html", render(results_file.read(workdir / "results.json"))
    with _written(workdir):
        files.replace(path, text)
    return path


@contextlib.contextmanager
def _written(workdir: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{workdir}: the report cannot be written: {error.strerror}; name another directory") from None


def render(results: Results) -> str:
    """The page of results that have been compared, in ASCII."""
    view = View(results)
    asset = lambda name: (importlib.resources.files("attnlab.ablation") / "page" / name).read_text("utf-8")
    page = string.Template(asset("page.html")).substitute(
        title=_ascii(escape(results.plan.question)), css=_css(asset("page.css")), js=asset("page.js"),
        body=_ascii(_body(view)),
    )  # fmt: skip
    return page


def _ascii(text: str) -> str:
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _css(text: str) -> str:
    """Arrows and the like as CSS escapes."""
    return "".join(c if ord(c) < 128 else f"\\{ord(c):x} " for c in text)


def _body(view: View) -> Markup:
    metrics = view.plan.metrics
    primary, secondary = [m for m in metrics if m.primary], [m for m in metrics if not m.primary]
    tables = [sections.main_table(view, metric, costs=i == 0) for i, metric in enumerate([*primary, *secondary])]
    known = {name for run in view.results.runs for name in run.curve}
    lines = [(m.name, view.label(m)) for m in metrics if m.name in known]
    lines += [(_TRAINING_LOSS, "training loss")] if _TRAINING_LOSS in known - {m.name for m in metrics} else []
    chapters = [
        ("Result", [*tables, sections.statistics_table(view), sections.items_table(view)]),
        ("Seeds", [_charts([f(view, m) for m in primary for f in (charts.seeds, charts.differences)])]),
        ("Curves", [_charts([charts.curves(view, *line, place) for place, line in enumerate(lines)]),
                    *(charts.targets(view, m) for m in primary if m.name in known)]),
        ("Learning rates", [_charts([charts.rates(view)])]),
        ("Cost", [_charts(_costs(view))]),
        ("Tasks", [sections.tasks(view)]),
        ("Diagnostics", [sections.diagnostics(view)]),
        ("Samples", [sections.samples(view)]),
        ("Failures and remarks", [sections.failures(view)]),
        ("What was equal", [sections.equal(view)]),
        ("How to repeat", [*([sections.config_table(view)] if view.plan.hash else []), sections.repeat(view)]),
    ]  # fmt: skip
    if not view.plan.hash:
        chapters.insert(0, ("What differs", [sections.config_table(view)]))
    parts = [sections.header(view)]
    for title, blocks in chapters:
        content = join(blocks)
        if content:
            parts.append(tag("section", tag("h2", title), content))
    return join([*parts, _downloads(view)], "\n")


def _charts(figures: list[Markup]) -> Markup:
    kept = [figure for figure in figures if figure]
    return tag("div", *kept, class_="charts") if kept else Markup()


def _costs(view: View) -> list[Markup]:
    found = []
    of = lambda field: lambda run: getattr(run.cost, field)
    for metric in view.plan.metrics:
        if metric.primary:
            found += [
                charts.pareto(view, metric, "state bytes per sequence", of("state_bytes")),
                charts.pareto(view, metric, "forward FLOPs per token", of("flops_per_token")),
                charts.pareto(view, metric, "tokens per second", of("tokens_per_second"), lower=False),
            ]
    return found


def _downloads(view: View) -> Markup:
    """The files themselves, as links that hold them."""
    results, links = view.results, []
    for name, text in (("results.json", results_file.to_json(results)), ("results.csv", results_file.to_csv(results))):
        data, kind = text.encode("utf-8", "backslashreplace"), "application/json" if "json" in name else "text/csv"
        if len(data) > _PLAIN:
            data, kind, name = gzip.compress(data, mtime=0), "application/gzip", f"{name}.gz"
        encoded = base64.b64encode(data).decode()
        if len(encoded) > _MOST:
            links.append(tag("li", f"{name.removesuffix('.gz')}: too large to be in this page; it lies beside it"))
        else:
            links.append(tag("li", tag("a", name, href=f"data:{kind};base64,{encoded}", download=name)))
    raw = tag("ul", *links, class_="downloads")
    return tag("section", tag("h2", "Raw"), raw, sections.runs(view))
