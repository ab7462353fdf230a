"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the line that people watch."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import rich.console
import rich.progress
import rich.text

from attnlab import storage
from attnlab.train import files

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class MetricLog:
    """`metrics.jsonl` and `tensorboard/` of a workdir: one object per logged step, each written at once.

    Args:
      workdir: of the run.
      step: the step that the run goes on from. Lines of later steps, left by a run that was killed, are dropped: those
        steps come again.
      say: is told of lines that are none, with which the file is kept under another name, and of one that was removed.
    """

    def __init__(self, workdir: pathlib.Path, step: int, say: Callable[[str], None]):
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            self._drop_after(step, say)
        self._say, self._file = say, self.path.open("a", buffering=1)
        self._tensorboard_place, self._began_at = str(workdir / "tensorboard"), step
        os.makedirs(self._tensorboard_place, exist_ok=True)
        self._tensorboard: SummaryWriter | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Writes one object; `step` is among its keys. A value that is not finite is written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        if os.fstat(self._file.fileno()).st_nlink == 0:
            self._say(f"{self.path} was removed; a new one begins at step {record['step']}")
            self._file = self.path.open("a", buffering=1)
        self._file.write(json.dumps(clean) + "\n")
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter  # half a second, which the first step does not wait for

            self._tensorboard = SummaryWriter(self._tensorboard_place, purge_step=self._began_at + 1, flush_secs=10)
        for key, value in clean.items():
            if key != "step" and isinstance(value, (int, float)):
                self._tensorboard.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flushes both."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(Exception):  # its thread has told of a full disk; nothing of ours is lost
                if self._tensorboard is not None:
                    self._tensorboard.close()

    def _drop_after(self, step: int, say: Callable[[str], None]) -> None:
        records, foreign = read_lines(self.path)
        if foreign:
            names = (self.path.with_name(f"{self.path.name}.damaged{i or ''}") for i in itertools.count())
            kept = next(name for name in names if not os.path.lexists(name))
            shutil.copyfile(self.path, kept)
            shown = ", ".join(map(str, foreign[:5])) + (", ..." if len(foreign) > 5 else "")
            say(f"{self.path}: {len(foreign)} line(s) are no metrics (line {shown}) and are left out; all is in {kept}")
        files.replace(self.path, "".join(text.decode() + "\n" for at, text in records if at <= step))


def read_lines(path: pathlib.Path) -> tuple[list[tuple[int, bytes]], list[int]]:
    """The lines of a metrics.jsonl with their steps, and the numbers of the lines that are none, from 1.

    A last line without an end was cut off by a kill, and is in neither.

    Raises:
      Damaged: it is no file that can be read.
    """
    *whole, last = files.read_bytes(path).split(b"\n")
    records, foreign = [], []
    for number, text in enumerate([*whole, last], 1):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, int) and not isinstance(step, bool):
            records.append((step, text))
        elif number <= len(whole):
            foreign.append(number)
    return records, foreign


def complete(path: pathlib.Path, lines: bytes) -> None:
    """Puts behind the lines of a metrics.jsonl, which need not be there, those of `lines` that are of later steps."""
    content, records = b"", []
    if path.exists():
        content, records = path.read_bytes(), read_lines(path)[0]
    if cut := content.rpartition(b"\n")[2]:  # the last line has no end
        content = content + b"\n" if records and records[-1][1] == cut else content.removesuffix(cut)
    last = max((step for step, _ in records), default=0)
    added = [text + b"\n" for text in lines.splitlines() if json.loads(text)["step"] > last]
    if added:
        files.replace(path, (content + b"".join(added)).decode())


def print_plain(console: rich.console.Console, text: str) -> None:
    """Prints text as it is: paths may hold what rich takes for markup, or for the name of an emoji."""
    console.print(rich.text.Text(text), soft_wrap=True)


class Report:
    """What a run tells people: on the console, and with the time in log.txt; nothing where there is no workdir."""

    def __init__(self, console: rich.console.Console, workdir: pathlib.Path | None):
        self.console = console
        self.console.quiet = console.quiet or workdir is None
        self._path = None if workdir is None else workdir / "log.txt"
        self._file: IO[str] | None = None

    def print(self, text: str) -> None:
        """Only prints."""
        print_plain(self.console, storage.shown(text))

    def say(self, text: str) -> None:
        """Prints and logs."""
        self.print(text)
        self.log(text)

    def log(self, text: str) -> None:
        """Only logs."""
        if self._path is not None:
            self._file = self._file or self._path.open("a", 1, "utf-8", "backslashreplace")
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {storage.shown(text)}\n")


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

    def update(self, step: int, record: dict[str, Any], note: str = "") -> None:
        """Shows a logged step, and what is to be noted of it."""
        numbers = f"loss {record['loss']:.4f}"
        if record["tokens_per_second"] is not None:
            numbers += f"  {record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"] is not None:
            numbers += f"  MFU {100 * record['mfu']:.1f}%"
        if record["goodput"] is not None:
            numbers += f"  goodput {100 * record['goodput']:.0f}%"
        numbers += f"  {note}" if note else ""
        self._bar.update(self._task, completed=step, numbers=numbers)
        done = step - self._first
        left = (time.monotonic() - self._started) / done * (self._steps - step) if done > 0 else math.nan
        eta = "" if math.isnan(left) else f"  {left // 60:.0f}:{left % 60:02.0f} left"
        line = f"step {step}/{self._steps}  {numbers}{eta}"
        if self._live:
            self._report.log(line)
        else:
            self._report.say(line)
