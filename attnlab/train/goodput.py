"""Where a run's time goes: every second of it, over all its attempts, is of one kind.

An attempt (a call of `attnlab train`) appends to `goodput.jsonl` what it has spent so far, of each kind. What a later
attempt did again, and the time between attempts, follow from the lines of both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from attnlab.errors import UserError
from attnlab.train import files

FILE = "goodput.jsonl"
# What an attempt tells of itself: until the first step; reading a checkpoint; tracing and compiling; waiting for data;
# training; evaluating; saving, as far as steps wait for it.
KINDS = ("start_up", "restore", "compile", "data_wait", "step", "evaluation", "save")
LOST, IDLE = "lost_steps", "idle"  # steps that a later attempt did again; nobody was there
EVERY = 10.0  # seconds between lines, at least: that much of a killed attempt counts as idle


class Clock:
    """The seconds of one attempt by kind. A kind lasts until the next; what compiles in it is not its own.

    Args:
      path: the workdir; None: nothing is written.
      began: when the attempt began, in seconds since 1970; None: now.
    """

    def __init__(self, path: pathlib.Path | None, began: float | None = None):
        now = time.time()
        self.began = now if began is None else min(began, now)
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.seconds["start_up"] = now - self.began
        self._path = None if path is None else path / FILE
        self._kind, self._since, self._written = "start_up", time.perf_counter(), -EVERY
        self._first, self._useful = self.began, 0.0
        self._waited, self._to_first = 0.0, None

    @property
    def kind(self) -> str:
        """What time is of now."""
        return self._kind

    def busy(self) -> float:
        """Seconds in steps and waiting for data so far, without those that the host waited for its devices."""
        self.enter(self._kind)
        return self.seconds["step"] + self.seconds["data_wait"] - self._waited

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """What runs inside is the devices' work, within whatever kind it is of; what compiles in it is not."""
        self.enter(self._kind)
        before = self.seconds[self._kind]
        try:
            yield
        finally:
            self.enter(self._kind)
            self._waited += self.seconds[self._kind] - before

    def first_step_done(self, step: int) -> None:
        """The attempt's first step is computed; of when the next line tells."""
        self._to_first = round(time.time() - self.began, 3)
        self.write(step, now=True)

    def resumed(self, step: int) -> None:
        """The attempt goes on from this step: what earlier ones did after it is lost."""
        if self._path is None:
            return
        attempts = _attempts(self._path)
        self.write(step, now=True)
        self._first = min([self.began, *(a.began for a in attempts)])
        here = Attempt(self.began, [(self.began, step, {})])
        kept = (a.seconds.get("step", 0.0) - _lost(a, b) for a, b in zip(attempts, [*attempts[1:], here]))
        self._useful = sum(kept)

    def enter(self, kind: str) -> str:
        """From now on time is of this kind; returns what it was of."""
        now = time.perf_counter()
        compiled = min(_compiled_since(self._since), now - self._since)
        self.seconds["compile"] += compiled
        self.seconds[self._kind] += now - self._since - compiled
        before, self._kind, self._since = self._kind, kind, now
        return before

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """What runs inside is of this kind, what comes after of the one before."""
        before = self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def share(self) -> float:
        """Of all time since the run first began, over all attempts, what went into steps that were not lost."""
        self.enter(self._kind)
        whole = time.time() - self._first
        return (self._useful + self.seconds["step"]) / whole if whole > 0 else 0.0

    def write(self, step: int, *, now: bool = False) -> None:
        """Appends a line, not too often unless `now`."""
        if self._path is None or not (now or time.perf_counter() - self._written >= EVERY):
            return
        self.enter(self._kind)
        seconds = {kind: round(spent, 3) for kind, spent in self.seconds.items()}
        line = {"began": round(self.began, 3), "time": round(time.time(), 3), "step": step, "seconds": seconds}
        if self._to_first is not None:
            line["to_first_step"] = self._to_first
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._written = time.perf_counter()


@dataclasses.dataclass
class Attempt:
    """One attempt's lines, in order: (time, step, seconds by kind since it began). The first is of where it goes on.

    `to_first_step`: seconds until its first step was computed; None if that never came.
    """

    began: float
    lines: list[tuple[float, int, dict[str, float]]]
    to_first_step: float | None = None

    @property
    def end(self) -> float:
        return self.lines[-1][0]

    @property
    def seconds(self) -> dict[str, float]:
        return self.lines[-1][2]

    def stepped(self, step: int) -> float:
        """Seconds that it had spent in steps when it was at a step, between lines by proportion."""
        before = (self.lines[0][1], 0.0)
        for _, at, seconds in self.lines:
            spent = seconds.get("step", 0.0)
            if at >= step:
                steps = at - before[0]
                return before[1] + (spent - before[1]) * ((step - before[0]) / steps if steps > 0 else 1.0)
            before = at, spent
        return before[1]


def account(workdir: pathlib.Path) -> dict[str, Any]:
    """What became of a run's time.

    Returns:
      seconds: by kind, `KINDS`, `lost_steps` and `idle`; together they are `wall`.
      wall: from the first attempt's beginning to the last line of the last.
      goodput: the share of `step`.
      attempts: of each `began` (seconds since 1970), `first_step`, `last_step`, `seconds` by kind, and `to_first_step`,
        seconds until its first step was computed, None if that never came.

    Raises:
      UserError: the directory holds no goodput.jsonl with a line in it.
      Damaged: the file cannot be read.
    """
    attempts = _attempts(workdir / FILE)
    if not attempts:
        raise UserError(f"workdir {workdir} has no {FILE} with a line in it; allowed: the workdir of a run")
    total = dict.fromkeys((*KINDS, LOST, IDLE), 0.0)
    told = []
    for attempt, after in zip(attempts, [*attempts[1:], None]):
        own = {kind: attempt.seconds.get(kind, 0.0) for kind in KINDS}
        own[LOST] = _lost(attempt, after)
        own["step"] -= own[LOST]
        for kind, spent in own.items():
            total[kind] += spent
        total[IDLE] += (attempt.end - attempt.began) - sum(own.values())
        if after is not None:
            total[IDLE] += after.began - attempt.end
        first, last = attempt.lines[0][1], attempt.lines[-1][1]
        about = {"began": attempt.began, "first_step": first, "last_step": last}
        told.append(about | {"to_first_step": attempt.to_first_step, "seconds": own})
    wall = attempts[-1].end - attempts[0].began
    return {"goodput": total["step"] / wall if wall > 0 else 0.0, "wall": wall, "seconds": total, "attempts": told}


def tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of what `account` found: by kind, and by attempt."""
    wall = found["wall"]
    share = lambda seconds: f"{100 * seconds / wall:.1f} %" if wall > 0 else "-"
    kinds = [[kind, f"{seconds:,.1f}", share(seconds)] for kind, seconds in found["seconds"].items()]
    when = lambda began: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))
    attempts = [
        [
            when(a["began"]), f"{a['first_step']:,}", f"{a['last_step']:,}",
            "-" if a["to_first_step"] is None else f"{a['to_first_step']:,.1f}",
            *(f"{s:,.1f}" for s in a["seconds"].values()),
        ]
        for a in found["attempts"]
    ]  # fmt: skip
    title = f"goodput {100 * found['goodput']:.1f} %: of {wall:,.1f} s, what went into steps that counted"
    columns = ["attempt", "from step", "to step", "first step after", *KINDS, LOST]
    return [
        (title, ["kind", "seconds", "share"], [*kinds, ["all", f"{wall:,.1f}", share(wall)]]),
        ("seconds of each attempt", columns, attempts),
    ]


def _lost(attempt: Attempt, after: Attempt | None) -> float:
    """Seconds of an attempt's steps that the next one did again."""
    if after is None:
        return 0.0
    return max(attempt.seconds.get("step", 0.0) - attempt.stepped(after.lines[0][1]), 0.0)


def _attempts(path: pathlib.Path) -> list[Attempt]:
    """What a file tells; lines that are none, as a kill leaves them, are passed over."""
    attempts: list[Attempt] = []
    try:
        texts = files.read_bytes(path).splitlines()
    except FileNotFoundError:
        return []
    for text in texts:
        try:
            line = json.loads(text)
            began, at = float(line["began"]), (float(line["time"]), int(line["step"]), dict(line["seconds"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if not attempts or attempts[-1].began != began:
            attempts.append(Attempt(began, []))
        attempts[-1].lines.append(at)
        attempts[-1].to_first_step = line.get("to_first_step")
    return attempts


# What jax traced and compiled in the main thread: (begin, end) of time.perf_counter, disjoint, in order.
_compiled: list[tuple[float, float]] = []


def _note(event: str, seconds: float, **_: Any) -> None:
    if not event.startswith("/jax/core/compile/") or threading.current_thread() is not threading.main_thread():
        return
    end = time.perf_counter()
    while _compiled and _compiled[-1][0] >= end - seconds:  # within this one
        _compiled.pop()
    _compiled.append((max(end - seconds, _compiled[-1][1] if _compiled else 0.0), end))


def _compiled_since(begin: float) -> float:
    """Seconds of compiling since then; what ended before is forgotten."""
    while _compiled and _compiled[0][1] <= begin:
        _compiled.pop(0)
    return sum(end - max(start, begin) for start, end in _compiled)


jax.monitoring.register_event_duration_secs_listener(_note)


def process_began() -> float:
    """When this process was started, in seconds since 1970; now, where the system does not tell."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.time() - max(age, 0.0)
