"""Where a plan stands, for whoever waits: a live table on a terminal, a line for each run that is over elsewhere."""

from __future__ import annotations

import pathlib
import statistics
import threading
import time
from typing import Any

import rich.console
import rich.live
import rich.table
from rich.text import Text

from attnlab.ablation import gather
from attnlab.ablation.announce import Announced
from attnlab.ablation.state import FINAL, Log, View

_EVERY = 2.0  # seconds


class Live:
    """Shows a plan's state while what runs inside goes on; it reads files alone, whoever writes them."""

    def __init__(self, plan: Announced, workdir: pathlib.Path, console: rich.console.Console):
        self._plan, self._workdir, self._console = plan, workdir, console
        self._log, self._end = Log(workdir), threading.Event()
        self._told = self._over(self._log.read())
        self._began, self._before = time.monotonic(), len(self._told)
        self._live = rich.live.Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Live:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._show()
        if self._live is not None:
            self._live.stop()

    def _watch(self) -> None:
        while not self._end.wait(_EVERY):
            self._show()

    def _show(self) -> None:
        view = self._log.read()
        if self._live is not None:
            self._live.update(self._table(view), refresh=True)
            return
        over = self._over(view)
        for name in sorted(over - self._told, key=lambda n: view.events[n][-1]["time"]):
            self._console.print(Text(f"{name}: {self._line(name, view)}"), soft_wrap=True)
        self._told |= over

    def _over(self, view: View) -> set[str]:
        return {name for name in view.events if view.status(name) in FINAL}

    def _line(self, name: str, view: View) -> str:
        if view.status(name) == "failed":
            return f"failed: {view.last(name, 'failed')['reason']}"
        event = view.last(name, "done")
        leading = next((c.task for c in self._plan.cells if f"/{c.name}/" in name), "")
        metric = self._plan.config.leading(leading)[0]
        value = event["metrics"].get(metric)
        shown = "none" if value is None else f"{value:.4f}"
        return f"{metric} {shown}, {event['tokens']:,} tokens, {event['seconds']:.0f} s"

    def _table(self, view: View) -> rich.table.Table:
        table = rich.table.Table(title=Text(self._title(view)), title_justify="left", box=None, pad_edge=False)
        for column in ("arm", "tuning", "done", "failed", "running", "step", "loss", "metric"):
            table.add_column(column, justify="left" if column in ("arm", "running") else "right")
        held = self._log.held()
        for cell in self._plan.cells:
            own = lambda start: [n for n in view.events if n.startswith(f"{start}/{cell.name}/")]
            done = [n for n in own("arms") if view.status(n) == "done"]
            failed = [n for n in own("arms") if view.status(n) == "failed"]
            trials = sum(view.status(n) in FINAL for n in own("tuning"))
            running = next((n for n in held if f"/{cell.name}/" in n), None)
            record = self._record(running)
            metric, _ = self._plan.config.leading(cell.task)
            values = [view.last(n, "done")["metrics"].get(metric) for n in done]
            row = (
                cell.name, str(trials or ""), f"{len(done)}/{len(self._plan.config.seeds)}", str(len(failed) or ""),
                running.rpartition(f"/{cell.name}/")[2] if running else "", str(record.get("step", "")),
                _number(record.get("loss")), _summary(metric, [v for v in values if v is not None]),
            )  # fmt: skip
            table.add_row(*map(Text, row))
        return table

    def _title(self, view: View) -> str:
        over = len(self._over(view))
        minutes = (time.monotonic() - self._began) / 60
        return f"{over} runs are over, {over - self._before} of them in the last {minutes:.1f} minutes"

    def _record(self, name: str | None) -> dict[str, Any]:
        lines = gather.records(self._workdir / name) if name else []
        return lines[-1] if lines else {}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _summary(metric: str, values: list[float]) -> str:
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{metric} {statistics.fmean(values):.4f}{spread}"
