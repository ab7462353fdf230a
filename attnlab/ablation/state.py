"""Where a plan stands: an append-only log of what happened to its runs, and claims that keep two processes off one run.

Many processes, on one host or on several that share the directory, read and write both. A claim is a file made with
O_EXCL whose time its holder renews; one that was not renewed for `STALE` seconds, or whose process on this host is
gone, is another's to take. What a killed process had done of its run is in the run's own checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from attnlab.errors import UserError

BEAT, STALE = 5.0, 60.0  # seconds
FINAL = ("done", "failed")


@dataclasses.dataclass(frozen=True)
class View:
    """What the log says.

    Attributes:
      events: by run, in order.
    """

    events: dict[str, list[dict[str, Any]]]

    def status(self, run: str) -> str:
        """done, failed, or open."""
        last = next((e for e in reversed(self.events.get(run, ())) if e["event"] in (*FINAL, "retry")), None)
        return last["event"] if last is not None and last["event"] in FINAL else "open"

    def last(self, run: str, event: str) -> dict[str, Any] | None:
        """The newest event of a kind."""
        return next((e for e in reversed(self.events.get(run, ())) if e["event"] == event), None)

    def count(self, run: str, event: str) -> int:
        """How often it happened since the run was last asked to be tried again."""
        since = 0
        for entry in self.events.get(run, ()):
            since = 0 if entry["event"] == "retry" else since + (entry["event"] == event)
        return since


class Log:
    """`state.jsonl` and `claims/` of a plan's workdir."""

    def __init__(self, workdir: pathlib.Path):
        self.path, self._claims = workdir / "state.jsonl", workdir / "claims"

    def write(self, event: str, run: str, **more: Any) -> None:
        """Appends one event."""
        entry = {"event": event, "run": run, **_who(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more}
        with self._locked(), self.path.open("ab+") as file:
            if file.tell() and _last_byte(file) != b"\n":  # a kill cut the line before off
                file.write(b"\n")
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> View:
        """All events; a line that a kill cut off is none."""
        events: dict[str, list[dict[str, Any]]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    events.setdefault(entry["run"], []).append(entry)
        return View(events)

    @contextlib.contextmanager
    def claim(self, run: str) -> Iterator[bool]:
        """Holds a run, its claim renewed, while what is inside runs; False where another holds it, or it is over."""
        path = self._file(run)
        with self._locked():
            got = self.read().status(run) == "open" and self._take(path)
        if not got:
            yield False
            return
        done = threading.Event()
        beat = threading.Thread(target=_renew, args=(path, done), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            done.set()
            beat.join()
            with self._locked():
                path.unlink(missing_ok=True)

    def held(self) -> dict[str, dict[str, Any]]:
        """Runs that a process works on, and who."""
        found: dict[str, dict[str, Any]] = {}
        if not self._claims.is_dir():
            return found
        now = self._now()
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self._claims.glob("*.json")):
                if (who := _alive(path, now)) is not None:
                    found[who["run"]] = who
        return found

    def _file(self, run: str) -> pathlib.Path:
        return self._claims / f"{run.replace('/', '~')}.json"

    def _take(self, path: pathlib.Path) -> bool:
        if path.exists() and _alive(path, self._now()) is None:
            path.unlink(missing_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump({"run": path.stem.replace("~", "/"), **_who()}, file)
        return True

    def _now(self) -> float:
        """The time as the filesystem of the claims has it, whose clock stamps them."""
        probe = self._claims / f".now-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._claims.mkdir(parents=True, exist_ok=True)
            lock = (self._claims / ".lock").open("a")
        except OSError as error:
            raise UserError(f"workdir {self.path.parent} cannot be written: {error.strerror}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _who() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _birth(os.getpid())}


def _birth(pid: int) -> str | None:
    """When a process of this host was started, in its kernel's ticks; None: it is gone. Numbers of processes recur."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if stat[0] in ("Z", "X") else stat[19]
    except OSError:
        pass
    if pathlib.Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)  # a system without /proc
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _alive(path: pathlib.Path, now: float) -> dict[str, Any] | None:
    """Who holds a claim; None where nobody does any more."""
    try:
        age = now - path.stat().st_mtime
        who = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # it is being written, or its writer was killed then
        return {"run": path.stem.replace("~", "/")} if age < STALE else None
    if age > STALE or (who["host"] == socket.gethostname() and _birth(who["pid"]) != who["started"]):
        return None
    return who


def _renew(path: pathlib.Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
