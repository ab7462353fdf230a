"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopSignals:
    """Remembers SIGTERM, SIGINT and SIGHUP; a second SIGTERM or SIGINT acts at once.

    A terminal that closes sends SIGHUP more than once. Where it is ignored (nohup) it stays so.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        self.name = self.name or signal.Signals(number).name
        if number != signal.SIGHUP:
            signal.signal(number, self._old[number])
