"""The processes of one run watch each other: a process that is lost, hangs or fails ends the others, and is named.

Signs of life and agreements go through the key-value store of jax's coordination service, which process 0 serves. A
process alone has none of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from attnlab import output
from attnlab.train.config import ClusterConfig

_PREFIX = "attnlab"
_OURS = pathlib.Path(__file__).parents[1]
_NAMED = 8  # processes that a reason names, at most


class Processes:
    """This process among those of its run.

    Args:
      config: how long to wait for the others.
      end: called with the reason when the run cannot go on; ends this process. A test may watch instead.

    Attributes:
      heard: when this process learned that the run is to stop, by `time.monotonic`.
    """

    def __init__(self, config: ClusterConfig, end: Callable[[str], Any] | None = None):
        self.index, self.count = jax.process_index(), jax.process_count()
        self._config, self._end = config, end or _end
        self._client, address = _service() if self.count > 1 else (None, None)
        self._coordinator = f"process 0 of {self.count} at {address}, the coordinator,"
        self._poll = min(2.0, config.timeout / 10)  # seconds between signs of life
        self._step, self._meetings, self._moved = -1, 0, time.monotonic()
        self._reached = time.monotonic()  # when the coordinator last answered
        self._done = threading.Event()
        self._stop_step: int | None = None
        self.heard: float | None = None
        self._doing, self._busy, self._begun = lambda: "start_up", lambda: 0.0, (-1, 0.0)
        self._lives: dict[int, dict[str, Any]] = {}
        self._barriers = self._gathered = 0
        if self._client is not None:
            if not self.first and end is None:
                tell_at_abort(f"{self._coordinator} was lost, or ended this process (see above)")
            for task in (self._watch, self._watch_coordinator):
                threading.Thread(target=task, daemon=True).start()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def barrier(self) -> None:
        """Waits until every process is here; every process must come here as often."""
        if self._client is not None:
            self.meet()
            self._barriers += 1
            self._client.wait_at_barrier(f"{_PREFIX}/{self._barriers}", 1000 * 24 * 3600)  # the watch ends it earlier

    def gather(self, value: str) -> list[str]:
        """What each process gave, in their order; every process must come here as often."""
        if self._client is None:
            return [value]
        self._gathered += 1
        name = f"gather/{self._gathered}"
        self._put(f"{name}/{self.index}", value)
        self.barrier()
        return [self._client.blocking_key_value_get(f"{_PREFIX}/{name}/{i}", 60_000) for i in range(self.count)]

    def meet(self) -> None:
        """Tells the others that this process is where it needs them all; every process must come here as often."""
        self._meetings += 1
        self.working()

    def at_step(self, step: int) -> None:
        """Tells the others that this process begins a step."""
        self._step, self._begun = step, (step, self._busy())
        self.meet()

    def follow(self, doing: Callable[[], str], busy: Callable[[], float]) -> None:
        """From now on others hear what this process does, and its own seconds in steps so far."""
        self._doing, self._busy = doing, busy

    def lives(self) -> dict[int, dict[str, Any]]:
        """In the first process: what each told last (`host`, `step`, `busy` until then); else nothing."""
        return dict(self._lives)

    def working(self) -> None:
        """Tells the others that this process gets on with what takes long."""
        self._moved = time.monotonic()

    def agree_to_stop(self, step: int, wanted: str | None) -> str | None:
        """Whether this is the last step, and why; the same step in every process.

        A signal reaches one process at one step. It names a step that no process has begun: none can be two ahead, as
        each waits for the metrics of the step before last, which need all of them.

        Args:
          step: about to be run.
          wanted: the name of the signal that this process got, or None.
        """
        if wanted is not None and self.heard is None:
            self.heard = time.monotonic()
        if self._client is None:
            return wanted
        if self._stop_step is None:
            if wanted is not None:
                self._put("stop", json.dumps({"step": step + 3, "why": f"{wanted} on process {self.index}"}), once=True)
            found = self._get("stop")
            if found is None:
                return None
            self._stop, self.heard = json.loads(found), self.heard or time.monotonic()
            self._stop_step = self._stop["step"]
        return self._stop["why"] if step >= self._stop_step else None

    def failed(self, error: BaseException) -> None:
        """Tells the others why this process ends.

        After an error of a collective, waits for the watch to say whose fault it was.
        """
        if self._client is None:
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(self._config.timeout + 4 * self._poll)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        self._put("verdict", f"{self._name(self.index)} failed: {reason[0][:300]}", once=True)
        if self.first:
            time.sleep(2 * self._poll)  # the others read it while the coordinator is still there

    def close(self) -> None:
        """Ends the watch; the run is over."""
        self._done.set()

    # Inside.

    def _watch(self) -> None:
        beat = 0
        seen: dict[str, tuple[Any, float]] = {}
        while not self._done.wait(self._poll):
            beat += 1
            step, busy = self._begun
            life = {
                "beat": beat, "step": step, "meetings": self._meetings, "idle": time.monotonic() - self._moved,
                "host": socket.gethostname(), "busy": busy, "doing": f"{self._doing()}{_where()}",
            }  # fmt: skip
            if not self._put(f"life/{self.index}", json.dumps(life)):
                continue
            verdict = self._get("verdict")
            self._reached = time.monotonic()
            if verdict is None and self.first:
                verdict = self._judge(seen)
                if verdict is not None:
                    self._put("verdict", verdict, once=True)
                    time.sleep(2 * self._poll)  # the others read it while the coordinator is still there
            if verdict is not None and not self._done.is_set():
                self._end(verdict)
                return

    def _watch_coordinator(self) -> None:
        """A call to a coordinator that hangs, or whose host is gone, does not return: the time is kept beside it."""
        while not self._done.wait(self._poll):
            silent = time.monotonic() - self._reached
            if silent > self._config.timeout:
                self._end(f"{self._coordinator} has not answered for {silent:.0f} s")
                return

    def _judge(self, seen: dict[str, tuple[Any, float]]) -> str | None:
        """Process 0 looks at everybody's signs of life; the reason to end, if there is one."""
        now, config = time.monotonic(), self._config
        lives = {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in self._all("life/")}
        for index, life in lives.items():
            self._lives[index] = life
            if index not in seen or seen[index][0]["beat"] != life["beat"]:
                seen[index] = (life, now)
            elif now - seen[index][1] > config.timeout:
                where = f"process {index} of {self.count} on {life['host']}"
                return (
                    f"{where} gave no sign of life for {now - seen[index][1]:.0f} s; its last step was {life['step']} "
                    f"({life['doing']})"
                )
        if not config.step_timeout or len(lives) < self.count:
            return None
        least, most = (f(life["meetings"] for life in lives.values()) for f in (min, max))
        begun = all(life["step"] >= 0 for life in lives.values())
        # Before the first step all may be busy with the data; who waits for the others says that they are late.
        if (begun or least < most) and all(life["idle"] > config.step_timeout for life in lives.values()):
            late = {i: lives[i] for i in sorted(lives) if lives[i]["meetings"] == least}
            names = ", ".join(f"{i} on {life['host']} ({life['doing']})" for i, life in list(late.items())[:_NAMED])
            names += f" and {len(late) - _NAMED} more" if len(late) > _NAMED else ""
            last = min(life["step"] for life in late.values())
            where = f"the last at step {last}" if last >= 0 else "the last on its way to the first"
            return f"no step for {config.step_timeout} s; {where}: process {names}"
        return None

    def _name(self, index: int) -> str:
        return f"process {index} of {self.count} on {socket.gethostname()}"

    def _put(self, key: str, value: str, once: bool = False) -> bool:
        try:
            self._client.key_value_set(f"{_PREFIX}/{key}", value, allow_overwrite=not once)
        except jax.errors.JaxRuntimeError as error:
            return "ALREADY_EXISTS" in str(error)
        return True

    def _get(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(f"{_PREFIX}/{key}")
        except jax.errors.JaxRuntimeError:
            return None

    def _all(self, prefix: str) -> list[tuple[str, str]]:
        try:
            return self._client.key_value_dir_get(f"{_PREFIX}/{prefix}")
        except jax.errors.JaxRuntimeError:
            return []


def _where() -> str:
    """The line of ours that the main thread is at: what a run that hangs was about to do."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.is_relative_to(_OURS):
            return f" at attnlab/{path.relative_to(_OURS)}:{frame.f_lineno}, {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def tell_at_abort(reason: str) -> None:
    """Makes an abort of this process end it with the exit code 1 and a reason as its last line.

    jax ends a process whose coordinator is gone at once, by abort, from a thread of its own: no Python runs after that.
    """
    global _at_abort

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def tell(_: int) -> None:
        os.write(2, f"attnlab: {reason}\n".encode())
        os._exit(1)

    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    set_handler(signal.SIGABRT, ctypes.cast(tell, ctypes.c_void_p))
    _at_abort = tell  # it must outlive this call


_at_abort: Any = None


def _service() -> tuple[Any, str]:
    """The client of jax's coordination service, and the service's address."""
    from jax._src import distributed  # jax 0.10 and 0.11 have no public name for it; orbax takes it from here too

    return distributed.global_state.client, distributed.global_state.coordinator_address


def _end(reason: str) -> None:
    """A collective that waits for a lost process cannot be interrupted, so the process ends where it stands."""
    output.note(f"attnlab: {reason}")
    os._exit(1)
