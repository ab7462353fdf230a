"""One process of a plan: takes the next run that nobody has, trains it, notes what became of it, until all are over.

`python -m attnlab.ablation.worker JSON` is what `attnlab ablate` starts; see `Part`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import pathlib
import signal
import sys
import time
import traceback
import zlib
from typing import Any

import jax

from attnlab import storage
from attnlab.ablation import announce, beginnings, gather
from attnlab.ablation.announce import Announced
from attnlab.ablation.schedule import Run, Schedule, schedule
from attnlab.ablation.state import Log
from attnlab.errors import TrainingFailed, UserError
from attnlab.launch import runtime
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.loop import train
from attnlab.train.program import Program

_TRIES = 3  # of a run whose process ends each time at the same step
_PATIENCE = 300.0  # seconds that are waited for runs of other slices that nobody works on
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclasses.dataclass(frozen=True)
class Part:
    """Whose runs a process takes.

    Attributes:
      workdir: of the plan; of one in a bucket, its staging directory.
      index, count: it takes runs whose name's CRC-32 is `index` modulo `count`.
      cores: that the process stays on; None: all.
      patience: seconds to wait for what nobody works on.
      place, term: the URL of the plan's workdir and the number of the lease under which it is written; '': it is in no
        bucket.
    """

    workdir: str
    index: int = 0
    count: int = 1
    cores: list[int] | None = None
    patience: float = _PATIENCE
    place: str = ""
    term: int = 0

    def has(self, run: Run) -> bool:
        """Whether the run is one of this part's."""
        return zlib.crc32(run.name.encode()) % self.count == self.index


def work(part: Part) -> str | None:
    """Runs what is to be run; the name of the signal that stopped it, or None where nothing is left for this part.

    Raises:
      UserError: the plan cannot be read or its directory not written.
      TrainingFailed: another ablation has taken over the directory, which is in a bucket.
    """
    workdir = pathlib.Path(part.workdir)
    plan = announce.read(workdir)
    if plan is None:
        raise UserError(f"workdir {workdir} holds no plan")
    remote = storage.mirrored(workdir)
    runtime.keep_compiled(workdir if remote is None else pathlib.Path(storage.cache_directory()))
    Program.share(len(plan.cells))
    log, idle = Log(workdir), time.monotonic()
    while True:
        view = log.read()
        now = schedule(plan.config, plan.cells, view, gather.answered(plan, workdir))
        if now.complete:
            return None
        held = log.held()
        waiting = [run for run in now.runs if view.status(run.name) == "open" and run.name not in held]
        took, stopped = _next([run for run in waiting if part.has(run)], plan, workdir, log)
        if stopped is not None:
            return stopped
        if took or held:
            idle = time.monotonic()
        if not took:
            if not waiting and not _may_grow(plan, now):
                return None
            if time.monotonic() - idle > part.patience:
                return None  # other slices' runs are left, and nobody is at them
            time.sleep(0.5)


def _may_grow(plan: Announced, now: Schedule) -> bool:
    """Whether more runs may come of what others are at."""
    return len(plan.config.looks) > 1 or not all(found.complete for found in now.searches.values())


def _next(runs: list[Run], plan: Announced, workdir: pathlib.Path, log: Log) -> tuple[bool, str | None]:
    """Takes the first run that can be had: whether there was one, and the signal that stopped it."""
    for run in runs:
        with log.claim(run.name) as mine:
            if mine:
                return True, _execute(run, plan, workdir, log)
    return False, None


def _execute(run: Run, plan: Announced, workdir: pathlib.Path, log: Log) -> str | None:
    if run.reason is not None:
        log.write("failed", run.name, reason=run.reason, tail=[])
        return None
    try:
        with storage.below(workdir, run.name) as path:
            step = max(Checkpoints(path).steps(), default=0)
            require_progress(run, step, log)
            log.write("started", run.name, step=step, cores=cores())
            began = time.perf_counter()
            result = train(run.config(), path, init_from=beginnings.of(run.cell.begins))
            seconds = time.perf_counter() - began
            metrics = gather.final(path, run, plan.config) if result.stopped is None else {}
        if result.stopped is not None:
            log.write("stopped", run.name, step=result.step, signal=result.stopped, seconds=seconds)
            return result.stopped
        log.write("done", run.name, step=result.step, tokens=result.tokens, seconds=seconds, metrics=metrics,
                  device=jax.devices()[0].device_kind)  # fmt: skip
    except Exception as error:  # of one run: the plan goes on
        if (remote := storage.mirrored(workdir)) is not None:
            remote.lease.require()  # unless nobody of this plan may write any more
        log.write("failed", run.name, reason=_reason(error), tail=_tail(run.path(workdir)))
    return None


def require_progress(run: Run, step: int, log: Log) -> None:
    """Raises UserError where the run has ended its process too often at one step: it would do so again."""
    ended = 0
    for event in log.read().events.get(run.name, ()):
        if event["event"] == "started":
            ended = ended + 1 if event["step"] == step else 0
        elif event["event"] in ("stopped", "retry"):
            ended = 0
    if ended >= _TRIES:
        raise UserError(f"its process was ended {ended} times after step {step}, by lack of memory perhaps")


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = next((line for line in text.splitlines() if "RESOURCE_EXHAUSTED" in line), text.splitlines()[0])
    if isinstance(error, MemoryError):
        line = "out of memory"
    if isinstance(error, (UserError, RuntimeError, MemoryError)) or type(error).__module__.startswith("attnlab"):
        return line[:500]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line[:400]} ({pathlib.Path(last.filename).name}, line {last.lineno})"


def _tail(path: pathlib.Path, lines: int = 5) -> list[str]:
    try:
        return (path / "log.txt").read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argument: str) -> int:
    """A process of its own for a part: 0 when nothing is left for it, 2 if it cannot go on, 128 + N at signal N."""
    part = Part(**json.loads(argument))
    logging.basicConfig(format="%(message)s")
    runtime.quiet()
    if sys.platform == "linux":  # a run whose parent is gone saves and stops
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if part.cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, part.cores)  # before XLA makes as many threads
    signal.signal(signal.SIGTERM, _end)
    runtime.configure()
    remote = storage.joined(pathlib.Path(part.workdir), part.place, part.term) if part.place else None
    try:
        with remote or contextlib.nullcontext():
            stopped = work(part)
    except (UserError, TrainingFailed) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if stopped is None else 128 + signal.Signals[stopped]


def _end(number: int, _: Any) -> None:
    """Where no run steps, which would save first: lets go of the claim."""
    raise SystemExit(128 + number)


def command(part: Part) -> list[str]:
    """What starts a process for a part."""
    return [sys.executable, "-m", "attnlab.ablation.worker", json.dumps(dataclasses.asdict(part))]


def environment() -> dict[str, Any]:
    """Of such a process: the package is found where this one found it."""
    here = str(pathlib.Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
