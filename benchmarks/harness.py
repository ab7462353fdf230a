"""Fair timing of two programs on one machine: each side a process of its own, rounds that alternate between them.

A side's threads, allocator and compiled programs never touch the other's. Linux tells how busy everything else on the
machine was during a measurement, so a figure taken on a loaded machine says so.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import rich.console
import rich.table

QUIET = 0.05  # share of the machine's CPU time that others may take in a measurement that counts as undisturbed


@dataclasses.dataclass(frozen=True)
class Timing:
    """One measurement.

    Attributes:
      seconds: wall clock.
      others: share of the machine's CPU time meanwhile taken by anything but the measured side; None: not known.
    """

    seconds: float
    others: float | None


class Side:
    """A worker process that answers requests, one JSON line each."""

    def __init__(self, module: str, arguments: Sequence[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def ask(self, **request: Any) -> Any:
        """The worker's answer; SystemExit if it died (it printed why)."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a worker ended early: {' '.join(self._process.args[1:])}")
        return json.loads(answer)

    def time(self, **request: Any) -> Timing:
        """Asks for work, which `answer` times in the worker."""
        before, cores = _busy_seconds(), os.cpu_count() or 1
        answer = self.ask(**request)
        others = None
        if before is not None:
            others = max(0.0, _busy_seconds() - before - answer["cpu_seconds"]) / (answer["seconds"] * cores)
        return Timing(answer["seconds"], others)


def answer(handlers: dict[str, Callable[..., Any]]) -> None:
    """Runs a worker: request `{"do": name, **arguments}` calls the handler, until standard input ends.

    `handlers["work"]` is timed; the others' return values are the answers.
    """
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not be taken for an answer
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        wall, cpu = time.perf_counter(), time.process_time()
        result = handlers[name](**request)
        if name == "work":
            result = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(result), file=out, flush=True)


def _busy_seconds() -> float | None:
    """CPU time spent on this machine since it started, by anyone, time taken by other virtual machines included."""
    try:
        with open("/proc/stat") as f:
            user, nice, system, _, _, irq, softirq, steal = map(int, f.readline().split()[1:9])
    except OSError:
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def alternate(
    work: dict[Any, Callable[[], Timing]], *, rounds: int, until: float
) -> tuple[dict[Any, list[Timing]], bool]:
    """Measures every entry of `work` once a round, in turn, until `rounds` rounds were undisturbed or time is up.

    Args:
      work: what to measure.
      rounds: undisturbed rounds wanted; at least three rounds are made whatever happens.
      until: time.monotonic() after which no round starts.

    Returns:
      Timings of the undisturbed rounds and True; or of all rounds and False if not even three were undisturbed.
    """
    made: list[dict[Any, Timing]] = []
    quiet: list[dict[Any, Timing]] = []
    while len(made) < 3 or (len(quiet) < rounds and time.monotonic() < until):
        timings = {}
        for name, measure in work.items():
            time.sleep(0.1)  # lets the other side's threads go to sleep
            timings[name] = measure()
        made.append(timings)
        if all(t.others is None or t.others < QUIET for t in timings.values()):
            quiet.append(timings)
    used = quiet if len(quiet) >= 3 else made
    return {name: [t[name] for t in used] for name in work}, used is quiet


def rate(timings: Sequence[Timing], count: int) -> dict[str, float]:
    """Units per second: median, lowest, highest, of `count` units a measurement; and the others' highest share."""
    rates = [count / t.seconds for t in timings]
    shares = [t.others for t in timings if t.others is not None]
    return {
        "median": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "rounds": len(rates),
        "others_cpu": max(shares, default=None),
    }


def paired_ratio(ours: Sequence[Timing], peers: Sequence[Timing]) -> dict[str, float]:
    """How many times faster `ours` is, round by round: median, lowest, highest."""
    ratios = [p.seconds / o.seconds for o, p in zip(ours, peers, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass  # torch is only needed where it is compared with
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions,
    }


def print_rates(title: str, unit: str, rows: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]) -> None:
    """Table of rows (name, ours, peer's, ratio)."""
    table = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in (f"attnlab {unit}", "low to high", f"torch {unit}", "low to high", "ratio", "low to high"):
        table.add_column(name, justify="right")
    for name, ours, peer, ratio in rows:
        cells = []
        for r, digits in ((ours, 0), (peer, 0), (ratio, 2)):
            cells += [f"{r['median']:,.{digits}f}", f"{r['lowest']:,.{digits}f} to {r['highest']:,.{digits}f}"]
        table.add_row(name, *cells)
    rich.console.Console(highlight=False, width=120).print(table)


def print_table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Rows of text; the first column to the left, the others to the right."""
    table = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def print_machine(facts: dict[str, Any], undisturbed: bool) -> None:
    """What the figures were measured on, and whether they can be trusted."""
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    if not undisturbed:
        print("warning: other programs were running; these figures, ratios too, say little")


def require_torch() -> None:
    """Ends the program with one line that says how to get PyTorch, if it is not there."""
    try:
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("this benchmark compares with PyTorch, which is not installed: pip install torch") from None
