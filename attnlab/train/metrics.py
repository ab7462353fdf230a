"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the line that people watch."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from typing import Any

import rich.console
import rich.progress
import rich.text
from tensorboardX import SummaryWriter


class MetricLog:
    """`metrics.jsonl` and `tensorboard/` of a workdir: one object per logged step, each written at once.

    Args:
      workdir: of the run.
      step: the step that the run goes on from. Lines of later steps, left by a run that was killed, are dropped: those
        steps come again.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self.path = workdir / "metrics.jsonl"
        self._drop_after(step)
        self._file = self.path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one object; `step` is among its keys. A value that is not finite is written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        for key, value in clean.items():
            if key != "step" and isinstance(value, (int, float)):
                self._tensorboard.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flushes both."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._tensorboard.close()

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        new = self.path.with_suffix(".jsonl.new")
        with new.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def print_plain(console: rich.console.Console, text: str) -> None:
    """Prints text as it is: paths may hold what rich takes for markup, or for the name of an emoji."""
    console.print(rich.text.Text(text), soft_wrap=True)


class Report:
    """What a run tells people: on the console, and with the time in log.txt; nothing where there is no workdir."""

    def __init__(self, console: rich.console.Console, workdir: pathlib.Path | None):
        self.console = console
        self.console.quiet = console.quiet or workdir is None
        self._file = None if workdir is None else (workdir / "log.txt").open("a", 1, "utf-8", "backslashreplace")

    def say(self, text: str) -> None:
        """Prints and logs."""
        print_plain(self.console, text)
        self.log(text)

    def log(self, text: str) -> None:
        """Only logs."""
        if self._file is not None:
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


class Progress:
    """A live line on a terminal; a plain line per logged step elsewhere, and in log.txt."""

    def __init__(self, report: Report, steps: int, step: int):
        self._report, self._steps = report, steps
        self._live = report.console.is_terminal
        columns = rich.progress
        self._bar = columns.Progress(
            columns.TextColumn("step {task.completed}/{task.total}"),
            columns.BarColumn(),
            columns.TextColumn("{task.fields[numbers]}"),
            columns.TextColumn("left"),
            columns.TimeRemainingColumn(elapsed_when_finished=True),
            console=report.console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, numbers="compiling")
        self._started, self._first = time.monotonic(), step

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def started(self, step: int) -> None:
        """The first step is done: the clock for the time left starts."""
        self._started, self._first = time.monotonic(), step

    def update(self, step: int, record: dict[str, Any]) -> None:
        """Shows a logged step."""
        numbers = f"loss {record['loss']:.4f}"
        if record["tokens_per_second"] is not None:
            numbers += f"  {record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"] is not None:
            numbers += f"  MFU {100 * record['mfu']:.1f}%"
        self._bar.update(self._task, completed=step, numbers=numbers)
        done = step - self._first
        left = (time.monotonic() - self._started) / done * (self._steps - step) if done > 0 else math.nan
        eta = "" if math.isnan(left) else f"  {left // 60:.0f}:{left % 60:02.0f} left"
        line = f"step {step}/{self._steps}  {numbers}{eta}"
        if self._live:
            self._report.log(line)
        else:
            self._report.say(line)
