"""Which host holds the others up: all wait for the slowest in every step's collectives, so its own work tells, not its
step time.

What is compared is the time that a host itself needs between two steps (reading, packing and placing a batch, logging),
without what it waits for its devices. A chip that is slower than others keeps all hosts waiting alike: a profile tells.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

NOTABLE = 0.1  # of a step's time that one host keeps all others waiting


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds a step that hosts need themselves.

    Attributes:
      least, most: of all processes.
      slowest: the process with most.
      host: its name.
      behind: seconds a step more than the median of the others.
    """

    least: float
    most: float
    slowest: int
    host: str
    behind: float

    def record(self) -> dict[str, float | int]:
        """What metrics.jsonl has of it."""
        return {"host_seconds_min": self.least, "host_seconds_max": self.most, "slowest_process": self.slowest}

    def note(self, step_seconds: float | None) -> str:
        """For the line that people watch; empty where nothing is notable."""
        if not step_seconds or self.behind <= NOTABLE * step_seconds:
            return ""
        return f"process {self.slowest} on {self.host} is {self.behind:.3g} s a step behind"


class Stragglers:
    """Seconds a step since it was last asked."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, float]] = {}
        self._each: dict[int, float] = {}

    def spread(self, lives: Mapping[int, Mapping[str, Any]]) -> Spread | None:
        """Of what each process last told: `step` it had begun, `busy` seconds in steps until then, `host`.

        None until all have told of two steps.
        """
        for index, life in lives.items():
            step, busy = life["step"], life["busy"]
            before = self._before.get(index)
            if step < 1 or (before is not None and step <= before[0]):
                continue
            if before is not None:
                self._each[index] = max(busy - before[1], 0.0) / (step - before[0])
            self._before[index] = step, busy
        if len(self._each) < max(len(lives), 2):
            return None
        slowest = max(self._each, key=self._each.__getitem__)
        most = self._each[slowest]
        others = [seconds for index, seconds in self._each.items() if index != slowest]
        behind = most - statistics.median(others)
        return Spread(min(self._each.values()), most, slowest, lives[slowest]["host"], behind)
