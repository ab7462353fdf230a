"""Experiment trackers beside metrics.jsonl and TensorBoard: Weights & Biases, MLflow, Trackio.

Each runs in a thread of its own, behind a queue: one that is slow loses numbers, one that fails is left out, and
neither stops a run or slows it. Where to and as whom is said in each library's own way (`WANDB_MODE`,
`MLFLOW_TRACKING_URI`, `TRACKIO_DIR`, ...). A run that goes on goes on under its trackers, too.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from attnlab.errors import Damaged, UserError
from attnlab.train import files

FILE = "trackers.json"  # how the trackers call the workdir's run
WAITING = 1000  # logged steps that wait for a tracker, at most; then the oldest are dropped
PATIENCE = 30.0  # seconds that the end of a run waits for its trackers
PROJECT = "attnlab"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a tracker is told of a run.

    Attributes:
      workdir: its name is the run's.
      config: resolved, a tree.
      key: how the tracker called the run when it was begun; None: it is new.
    """

    workdir: pathlib.Path
    config: Mapping[str, Any]
    key: str | None


class Tracker(Protocol):
    """A connection to a tracker.

    Attributes:
      key: how it calls the run.
    """

    key: str

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes the numbers of a step; later calls have later steps, but where a run went on."""

    def close(self) -> None:
        """Ends the run, and waits until all is where it belongs."""


class WandB:
    """Weights & Biases."""

    def __init__(self, run: Run):
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(
            project=project, name=run.workdir.name, dir=str(run.workdir), config=dict(run.config), id=run.key,
            resume="allow", settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self.key = self._run.id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow; without `MLFLOW_TRACKING_URI` in the workdir's own `mlflow.db`, or `mlruns/` where it has no database."""

    def __init__(self, run: Run):
        import mlflow

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            database = importlib.util.find_spec("sqlalchemy") is not None
            where = run.workdir.resolve()
            mlflow.set_tracking_uri(f"sqlite:///{where}/mlflow.db" if database else (where / "mlruns").as_uri())
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        if run.key is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if known is None else known.experiment_id
            self.key = self._client.create_run(experiment, run_name=run.workdir.name).info.run_id
            for name, value in _leaves(run.config):
                self._client.log_param(self.key, _plain(name), str(value)[:500])
        else:
            self.key = run.key
            self._client.update_run(self.key, "RUNNING")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        self._client.log_batch(self.key, [self._metric(_plain(k), v, now, step) for k, v in numbers.items()])

    def close(self) -> None:
        self._client.set_terminated(self.key)


class Trackio:
    """Trackio: the same calls as Weights & Biases', on this machine."""

    def __init__(self, run: Run):
        import trackio

        self.key = run.key or f"{run.workdir.name}-{round(time.time())}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=self.key, config=dict(run.config), resume="allow",
            embed=False,
        )  # fmt: skip

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Run], Tracker]] = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def require(names: tuple[str, ...]) -> None:
    """Raises UserError where a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers has {name!r}, which is not installed; pip install 'attnlab[{name}]'")


class Trackers:
    """The trackers of a run, by name.

    Args:
      names: in `TRACKERS`.
      workdir, config: of the run.
      say: is told once of what fails.
    """

    def __init__(
        self, names: tuple[str, ...], workdir: pathlib.Path, config: Mapping[str, Any], say: Callable[[str], None]
    ):
        self._say, self._path = say, workdir / FILE
        keys = self._keys() if names else {}
        self._lanes = [_Lane(name, Run(workdir, config, keys.get(name))) for name in names]

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Hands on what is a finite number of a line of metrics.jsonl; returns at once."""
        numbers = {
            key: float(value)
            for key, value in record.items()
            if key != "step"
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
        }
        for lane in self._lanes:
            lane.put(step, numbers)
        self._report()

    def close(self) -> None:
        """Ends all, and waits for them no longer than `PATIENCE`."""
        until = time.monotonic() + PATIENCE
        for lane in self._lanes:
            lane.end()
        for lane in self._lanes:
            lane.join(until - time.monotonic())
        self._report()

    def _report(self) -> None:
        for lane in self._lanes:
            for text in lane.news():
                self._say(f"tracker {lane.name}: {text}")
        keys = {lane.name: lane.key for lane in self._lanes if lane.key is not None}
        if keys and keys.items() - self._keys().items():
            files.replace(self._path, json.dumps(self._keys() | keys) + "\n")

    def _keys(self) -> dict[str, str]:
        try:
            return {k: v for k, v in files.read_json(self._path).items() if isinstance(v, str)}
        except (FileNotFoundError, Damaged):
            return {}


class _Lane(threading.Thread):
    """One tracker's thread, which makes it, feeds it and ends it."""

    def __init__(self, name: str, run: Run):
        super().__init__(name=name, daemon=True)  # one that hangs does not keep the process
        self.key: str | None = None
        self._given = run
        self._queue: collections.deque[tuple[int, dict[str, float]]] = collections.deque()
        self._changed, self._ended, self._failed, self._dropped = threading.Condition(), False, False, 0
        self._news: list[str] = []
        self.start()

    def put(self, step: int, numbers: dict[str, float]) -> None:
        with self._changed:
            if self._failed:
                return
            if len(self._queue) == WAITING:
                self._queue.popleft()
                self._dropped += 1
                if self._dropped == 1:
                    self._news.append(f"is slower than the run; of {WAITING} steps that wait the oldest are dropped")
            self._queue.append((step, numbers))
            self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        super().join(max(timeout or 0.0, 0.0))
        if self.is_alive():
            self._news.append(f"did not end within {PATIENCE:.0f} s; {len(self._queue)} logged steps may be missing")

    def news(self) -> list[str]:
        with self._changed:
            told, self._news = self._news, []
        return told

    def run(self) -> None:
        try:
            tracker = TRACKERS[self.name](self._given)
            self.key = tracker.key
            while (item := self._next()) is not None:
                tracker.log(*item)
            tracker.close()
        except BaseException as error:  # a tracker's own way out of the process would be no reason to stop, either
            with self._changed:
                self._failed = True
                self._queue.clear()
                said = str(error).strip().splitlines()[:1] or [""]
                self._news.append(f"failed ({type(error).__name__}: {said[0][:300]}); the run goes on without it")

    def _next(self) -> tuple[int, dict[str, float]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ended)
            return self._queue.popleft() if self._queue else None


def _plain(name: str) -> str:
    """With what MLflow allows in names."""
    return re.sub(r"[^\w\-./: ]", "_", name)


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """A config's values with their dotted keys."""
    if not isinstance(tree, Mapping):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]
