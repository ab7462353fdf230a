"""`attnlab ablate`: announces a plan, runs it in one process or several, shows where it stands, writes its results."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console

from attnlab import storage
from attnlab.ablation import announce, gather, report, worker
from attnlab.ablation.announce import Announced
from attnlab.ablation.plan import Cell, PlanConfig
from attnlab.ablation.progress import Live
from attnlab.ablation.state import Log
from attnlab.ablation.worker import Part
from attnlab.errors import TrainingFailed, UserError

FAILED = 3  # exit code where an arm failed
_MOST = 8  # processes, unless more are asked for
_RESTARTS = 10  # of processes that end by a signal, in all
_POLL = 0.5
_DEPTH = 5  # of tuning/ARM/TASK/lrX/seedK
_CONTENTS = storage.Contents(logs=("state.jsonl",), directories=("logs",), apart=("claims", "arms", "tuning"))


@dataclasses.dataclass(frozen=True)
class Options:
    """How a plan is run.

    Attributes:
      processes: on this machine; None: one for each core of a CPU, up to eight, and one for accelerators.
      slice_index, slices: which share of the runs this machine takes, and of how many.
      retry_failed: whether runs that failed are tried again.
    """

    processes: int | None = None
    slice_index: int = 0
    slices: int = 1
    retry_failed: bool = False


@contextlib.contextmanager
def opened(place: pathlib.Path | storage.Url, options: Options) -> Iterator[pathlib.Path]:
    """Gives the directory in which to run a plan: the path itself, or the staging directory of one in a bucket.

    What is in the bucket of the plan's runs is here, but for checkpoints; this process holds the lease of it all.

    Raises:
      UserError: another ablation holds it, the bucket cannot be used, or slices are asked for, which share files.
    """
    if isinstance(place, storage.Url) and options.slices > 1:
        raise UserError(
            f"--slice {options.slice_index}/{options.slices}: slices share files, and {place} is of one machine at a "
            "time; allowed: 0/1, or a directory that all machines see"
        )
    with storage.opened(place, writes=True, depth=_DEPTH, contents=_CONTENTS) as workdir:
        yield workdir


def run_plan(
    config: PlanConfig, cells: list[Cell], workdir: pathlib.Path, options: Options, console: rich.console.Console
) -> int:
    """Runs a plan, or goes on with it, and writes results.json, results.csv and the report.

    Args:
      workdir: as `opened` gives it.

    Returns:
      0; `FAILED` if a run failed; 128 and the number of the signal that stopped it.

    Raises:
      UserError: the plan cannot be, or the workdir holds another one.
      TrainingFailed: the processes kept dying, or another ablation has taken over the workdir.
    """
    count = processes(options, len(cells) * len(config.seeds))
    console.print(f"checking the plan: {config.question}", soft_wrap=True, markup=False)
    plan = announce.announce(config, cells, workdir, lambda text: console.print(text, soft_wrap=True, markup=False))
    if options.retry_failed:
        _retry(Log(workdir))
    part, remote = Part(str(workdir), options.slice_index, options.slices), storage.mirrored(workdir)
    if remote is not None:
        remote.push()
        part = dataclasses.replace(part, place=str(remote.url), term=remote.term)
    there = storage.shown(str(workdir / announce.NAME))
    console.print(f"plan {plan.hash[:12]} is in {there}", soft_wrap=True, markup=False)
    with Live(plan, workdir, console):
        stopped = _run(part, count)
    if stopped is not None:
        console.print(f"{stopped}: what was running is saved; the same command goes on", markup=False)
        return 128 + signal.Signals[stopped]
    return finish(plan, workdir, console, others=options.slices > 1)


def finish(plan: Announced, workdir: pathlib.Path, console: rich.console.Console, *, others: bool = False) -> int:
    """Writes the results of a plan whose runs are over; where they are not, `others` are at them, or it has failed."""
    results = gather.collect(plan, workdir)
    missing = [run for run in results.runs if run.status == "missing"]
    if missing:
        shown = ", ".join(f"{run.arm}/seed{run.seed}" for run in missing[:5]) + ", ..." * (len(missing) > 5)
        left = f"{len(missing)} reported runs are not over: {shown}"
        if not others:
            raise TrainingFailed(f"{left}; the same command goes on")
        console.print(
            f"this slice is done; {left}; the slice that is last writes the report", soft_wrap=True, markup=False
        )
        return 0
    _, page = report.write(workdir, results)
    if (remote := storage.mirrored(workdir)) is not None:
        remote.push()
    failed = [run for run in results.runs if run.status == "failed"]
    for run in failed:
        console.print(f"failed: {run.arm}/seed{run.seed}: {run.reason}", soft_wrap=True, markup=False)
    page = storage.shown(str(page))
    console.print(f"the report is {page}; results.json and results.csv are beside it", soft_wrap=True, markup=False)
    return FAILED if failed else 0


def _retry(log: Log) -> None:
    view = log.read()
    for name in view.events:
        if view.status(name) == "failed":
            log.write("retry", name)


def processes(options: Options, runs: int) -> int:
    """How many processes a plan of so many runs gets here.

    Raises:
      UserError: several are asked for, and they would share an accelerator.
    """
    on_cpu = jax.default_backend() == "cpu"
    if options.processes is None:
        return min(worker.cores(), runs, _MOST) if on_cpu else 1
    if options.processes > 1 and not on_cpu:
        raise UserError(
            f"--processes {options.processes}: several processes cannot share a {jax.default_backend()}; allowed: 1 "
            "(other machines take other slices), or JAX_PLATFORMS=cpu"
        )
    return options.processes


def _run(part: Part, count: int) -> str | None:
    """Works on a part with so many processes; the signal that stopped it."""
    if count == 1:
        return worker.work(part)
    with _Team(part, count) as team:
        return team.wait()


class _Team:
    """Processes that work on one part, each on its own share of the cores; one that a signal ends is replaced."""

    def __init__(self, part: Part, count: int):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        self._parts = [
            dataclasses.replace(part, cores=None if cores is None else _share(cores, i, count)) for i in range(count)
        ]
        self._running: dict[int, subprocess.Popen] = {}
        self._left, self._told = _RESTARTS, False
        self._logs = pathlib.Path(part.workdir) / "logs"
        self._remote = storage.mirrored(pathlib.Path(part.workdir))
        self._signal: str | None = None

    def __enter__(self) -> _Team:
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._remember)
        for i in range(len(self._parts)):
            self._start(i)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        for process in self._running.values():
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def wait(self) -> str | None:
        """Until no process has anything left to do, or a signal; raises where one cannot go on."""
        while self._running:
            time.sleep(_POLL)
            if self._signal is not None:
                self._stop()
                return self._signal
            if self._remote is not None:
                self._remote.require()
            for i, process in list(self._running.items()):
                if (code := process.poll()) is not None:
                    del self._running[i]
                    self._ended(i, code)
        return None

    def _ended(self, i: int, code: int) -> None:
        if code == 0:
            return
        if code == 2:
            said = self._log(i).read_text(errors="replace").strip().splitlines()
            raise UserError(f"a process of the plan cannot go on: {said[-1] if said else 'it said nothing'}")
        if self._left == 0:
            raise TrainingFailed(f"processes of the plan ended {_RESTARTS} times, the last with the exit code {code}")
        self._left -= 1
        self._start(i)  # what it was at is noted where it is taken up again

    def _start(self, i: int) -> None:
        self._logs.mkdir(exist_ok=True)
        with self._log(i).open("ab") as log:
            self._running[i] = subprocess.Popen(
                worker.command(self._parts[i]), env=worker.environment(), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _log(self, i: int) -> pathlib.Path:
        return self._logs / f"{socket.gethostname()}-{i}.txt"

    def _stop(self) -> None:
        """Has all save and stop; once, as a second signal ends a run at once."""
        if self._told:
            return
        self._told = True
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def _remember(self, number: int, _: Any) -> None:
        self._signal = self._signal or signal.Signals(number).name


def _share(cores: list[int], i: int, count: int) -> list[int]:
    """Core numbers of the i-th of `count` processes; all have as many, as results may depend on it."""
    each = max(len(cores) // count, 1)
    return [cores[(i * each + k) % len(cores)] for k in range(each)]
