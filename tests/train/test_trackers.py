"""Trackers: what they are told, and that none stops a run or slows it."""

from __future__ import annotations

import importlib.util
import json
import threading
import time

import pytest

from attnlab.errors import ConfigError, UserError
from attnlab.train import trackers
from attnlab.train.trackers import Trackers
from tests.train import runs

CONFIG = {"seed": 3, "train": {"steps": 2}}


class Kept:
    """Keeps what it is told; made anew for a run that goes on."""

    made: list = []

    def __init__(self, run):
        self.key, self.run, self.told, self.ended = run.key or f"first of {run.workdir.name}", run, [], False
        Kept.made.append(self)

    def log(self, step, numbers):
        self.told.append((step, numbers))

    def close(self):
        self.ended = True


class Slow(Kept):
    def log(self, step, numbers):
        time.sleep(60)


class FailsAtOnce(Kept):
    def __init__(self, run):
        raise OSError("no network\nand more of it")


class FailsLater(Kept):
    def log(self, step, numbers):
        raise SystemExit(1)


@pytest.fixture
def fakes(monkeypatch):
    """Under names of modules that are there."""
    Kept.made.clear()
    for name, kind in (("wave", Kept), ("json", Slow), ("ast", FailsAtOnce), ("csv", FailsLater)):
        monkeypatch.setitem(trackers.TRACKERS, name, kind)


def test_a_run_and_its_going_on(tmp_path, fakes):
    """Every logged line's numbers, in order, under the key of the first attempt; one that fails changes nothing."""
    source = runs.corpus(tmp_path / "corpus")
    make = lambda steps: runs.config(source, train__steps=steps, train__eval_every=0, train__trackers=("ast", "wave"))
    said = runs.run(make(3), tmp_path / "w")
    assert said.count("tracker ast: failed (OSError: no network); the run goes on without it") == 1
    with pytest.raises(UserError):  # steps changed: what may change are the trackers
        runs.run(make(5), tmp_path / "w")
    runs.run(runs.config(source, train__steps=3, train__eval_every=0), tmp_path / "w")
    first = Kept.made[0]
    lines = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in first.told] == [line["step"] for line in lines] == [1, 2, 3] and first.ended
    for (_, told), line in zip(first.told, lines):
        assert told == {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
    again = Trackers(("wave",), tmp_path / "w", CONFIG, print)
    again.close()
    assert Kept.made[-1].key == "first of w" and Kept.made[-1].run.key == "first of w"


def test_slow_and_failing_ones(tmp_path, fakes, monkeypatch):
    """A tracker that hangs costs a run its patience at the end and no more; what is dropped and what fails is said."""
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    said: list[str] = []
    begun = time.perf_counter()
    held = Trackers(("json", "csv", "wave"), tmp_path, CONFIG, said.append)
    for step in range(3 * trackers.WAITING):
        held.log(step, {"step": step, "loss": 1.0, "mfu": None, "nan": float("nan"), "flag": True})
    held.close()
    assert time.perf_counter() - begun < 10
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "json")  # the process can end
    text = "\n".join(said)
    assert text.count("tracker json: is slower than the run") == 1
    assert "tracker json: did not end within 0 s; 1000 logged steps may be missing" in text
    assert text.count("tracker csv: failed (SystemExit: 1)") == 1
    kept = next(made for made in Kept.made if type(made) is Kept)
    assert kept.ended and kept.told[-1] == (3 * trackers.WAITING - 1, {"loss": 1.0})
    assert [step for step, _ in kept.told] == sorted(step for step, _ in kept.told)


def test_what_waits(tmp_path, monkeypatch):
    """Of more steps than may wait for a tracker the newest reach it."""
    begin = threading.Event()

    class Late(Kept):
        def __init__(self, run):
            begin.wait(20)
            super().__init__(run)

    Kept.made.clear()
    monkeypatch.setitem(trackers.TRACKERS, "wave", Late)
    held = Trackers(("wave",), tmp_path, CONFIG, print)
    for step in range(trackers.WAITING + 500):
        held.log(step, {"loss": 1.0})
    begin.set()
    held.close()
    assert [step for step, _ in Kept.made[0].told] == list(range(500, trackers.WAITING + 500))


def test_names(tmp_path):
    """A tracker that is none, or not installed, is refused before anything is compiled."""
    with pytest.raises(ConfigError, match="train.trackers = 'tensorbored'"):
        runs.config("stdlib", train__trackers=("tensorbored",))
    absent = [name for name in trackers.TRACKERS if importlib.util.find_spec(name) is None]
    for name in absent[:1]:
        with pytest.raises(UserError, match=rf"pip install 'attnlab\[{name}\]'"):
            runs.run(runs.config(runs.corpus(tmp_path / "c"), train__trackers=(name,)), tmp_path / "w")
        assert not (tmp_path / "w").exists()


def read_wandb(workdir):
    return [path for path in (workdir / "wandb").glob("offline-run-*/*.wandb") if path.stat().st_size]


def read_mlflow(workdir):
    import mlflow

    key = json.loads((workdir / trackers.FILE).read_text())["mlflow"]
    history = mlflow.MlflowClient().get_metric_history(key, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]
    return mlflow.MlflowClient().get_run(key).info.status == "FINISHED"


def read_trackio(workdir):
    return list((workdir / "trackio").glob("*.db"))


@pytest.mark.parametrize("name, read", [("wandb", read_wandb), ("mlflow", read_mlflow), ("trackio", read_trackio)])
def test_the_libraries_offline(name, read, tmp_path, monkeypatch):
    """Each library as it is, with no network, takes a run's numbers twice: at first, and when the run goes on."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said: list[str] = []
    for step, loss in ((1, 0.5), (2, 0.25)):
        held = Trackers((name,), tmp_path, CONFIG, said.append)
        held.log(step, {"step": step, "loss": loss, "heldout_accuracy/set=new": 1.0})
        held.close()
    assert said == [] and read(tmp_path)
