"""Where a run's time goes: every second is of one kind, over all its attempts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from attnlab.errors import UserError
from attnlab.train import goodput
from attnlab.train.processes import Processes
from tests import tiers
from tests.flags import environment
from tests.train import runs


def line(began, at, done, **seconds):
    return json.dumps({"began": began, "time": at, "step": done, "seconds": seconds}) + "\n"


def test_account(tmp_path):
    """Steps done again are lost, time between attempts and after a last line is idle; all is the wall clock."""
    (tmp_path / goodput.FILE).write_text(
        line(100.0, 104.0, 0, start_up=4.0)
        + line(100.0, 114.0, 10, start_up=4.0, step=8.0, save=2.0)
        + '{"began": 100.0, "ti\n[]\n'  # cut off by a kill
        + line(100.0, 124.0, 20, start_up=4.0, step=17.0, save=2.0, data_wait=1.0)
        + line(150.0, 156.0, 10, start_up=3.0, restore=3.0)
        + line(150.0, 176.0, 30, start_up=3.0, restore=3.0, step=15.0, evaluation=4.0)
    )
    found = goodput.account(tmp_path)
    assert found["wall"] == 76.0 and found["attempts"][0]["last_step"] == 20
    assert found["seconds"] == {
        "start_up": 7.0, "restore": 3.0, "compile": 0.0, "data_wait": 1.0, "step": 8.0 + 15.0, "evaluation": 4.0,
        "save": 2.0, "lost_steps": 9.0, "idle": 26.0 + 1.0,
    }  # fmt: skip
    assert sum(found["seconds"].values()) == found["wall"] and found["goodput"] == 23 / 76
    assert sum(len(rows) for _, _, rows in goodput.tables(found)) == 10 + 2


def test_lost_between_lines(tmp_path):
    """Of a step without a line its share of the seconds between two lines is taken."""
    text = line(0.0, 1.0, 0) + line(0.0, 9.0, 8, step=8.0) + line(10.0, 11.0, 6)
    (tmp_path / goodput.FILE).write_text(text)
    assert goodput.account(tmp_path)["seconds"]["lost_steps"] == 2.0


def test_nothing_to_tell(tmp_path):
    with pytest.raises(UserError, match="has no goodput.jsonl with a line in it"):
        goodput.account(tmp_path)


def test_clock(tmp_path, monkeypatch):
    """Kinds follow each other, compiling is taken out of the kind that it happens in, and the sum is the time."""
    clock = goodput.Clock(tmp_path, began=time.time() - 5)
    clock.resumed(0)
    clock.enter("step")
    with clock.during("data_wait"):
        time.sleep(0.05)
    spent = time.perf_counter()
    jax.jit(lambda x: jnp.sin(x) * 17.25)(jnp.ones(7)).block_until_ready()
    spent = time.perf_counter() - spent
    share = clock.share()
    clock.write(3, now=True)
    seconds = clock.seconds
    assert seconds["data_wait"] >= 0.05 and seconds["start_up"] >= 5
    assert 0 < seconds["compile"] <= spent and seconds["step"] + seconds["compile"] >= spent
    found = goodput.account(tmp_path)
    assert abs(found["wall"] - sum(found["seconds"].values())) < 0.01 and abs(found["seconds"]["idle"]) < 0.01
    assert 0 <= share < 0.5 and abs(share - found["goodput"]) < 0.05


def test_share_over_attempts(tmp_path):
    """What earlier attempts did counts, less what is done again, of the time since the first began."""
    now = time.time()
    earlier = line(now - 100, now - 99, 0) + line(now - 100, now - 50, 40, step=40.0)
    (tmp_path / goodput.FILE).write_text(earlier)
    clock = goodput.Clock(tmp_path, began=now - 10)
    clock.resumed(30)
    assert abs(clock.share() - 0.3) < 0.02


def test_nested_compiling_counts_once(monkeypatch):
    """What is traced while something else is being traced is within that."""
    monkeypatch.setattr(goodput, "_compiled", [])
    now = time.perf_counter()
    goodput._note("/jax/core/compile/a", 0.5)
    goodput._note("/jax/core/compile/b", 2.0)
    goodput._note("/jax/other", 9.0)
    assert abs(goodput._compiled_since(now - 10) - 2.0) < 0.01
    assert abs(goodput._compiled_since(now - 1) - 1.0) < 0.01


def test_three_restarts(tmp_path, monkeypatch):
    """Of a run that fails three times the kinds sum to the time on the wall within 1 %; idle is when none was there."""
    config = runs.config(runs.corpus(tmp_path / "corpus"), train__steps=16, train__save_every=3, train__eval_every=0)
    at_step, fails, down, gone = Processes.at_step, [], [], []

    def failing(self, step):
        if step in fails:
            gone.append(time.time())
            raise KeyboardInterrupt
        at_step(self, step)

    monkeypatch.setattr(Processes, "at_step", failing)
    monkeypatch.setattr(goodput, "EVERY", 0.0)
    began = time.time()
    for step in (5, 8, 14):
        fails[:] = [step]
        with pytest.raises(KeyboardInterrupt):
            runs.run(config, tmp_path / "w")
        time.sleep(0.4)
        down.append(time.time() - gone[-1])
    fails.clear()
    runs.run(config, tmp_path / "w")
    wall = time.time() - began
    found = goodput.account(tmp_path / "w")
    assert abs(sum(found["seconds"].values()) - wall) < 0.01 * wall
    # A step that fails has no line, nor has the one whose metrics it was to fetch: on a busy machine that is more.
    without_lines = 6 * (found["seconds"]["step"] + found["seconds"]["lost_steps"]) / 16
    assert -0.01 < found["seconds"]["idle"] - sum(down) < 0.02 * wall + without_lines
    assert min(found["seconds"].values()) >= 0
    assert [a["first_step"] for a in found["attempts"]] == [0, 3, 6, 12] and found["seconds"]["lost_steps"] > 0
    for attempt in found["attempts"]:
        assert attempt["seconds"]["start_up"] < attempt["to_first_step"] < sum(attempt["seconds"].values())


@tiers.exhaustive
def test_a_killed_run(tmp_path, monkeypatch, attnlab):
    """Of a run that was killed and went on: its steps again are lost, and its time alone is idle; all kinds add up.
    What was compiled is in the workdir."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    source = runs.corpus(tmp_path / "corpus")
    each = {"train__save_every": 20, "train__eval_every": 20, "train__sample_tokens": 0}
    each |= {"model__layers": 12}  # what compiles within half a second is not kept
    config = runs.write_config(tmp_path / "c.py", source, train__steps=60, **each)
    command = ["train", "--config", config, "--workdir", str(tmp_path / "w")]
    log = tmp_path / "w" / "metrics.jsonl"
    settings = {"cwd": runs.ROOT, "env": environment(), "stdout": subprocess.DEVNULL}
    child = subprocess.Popen([sys.executable, "-m", "attnlab", *command], **settings)
    until = time.monotonic() + 200
    while time.monotonic() < until and not (log.exists() and '"step": 2' in log.read_text()):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    compiled = lambda: {path.name for path in (tmp_path / "w" / "compiled").rglob("*train_step*-cache")}
    before = compiled()
    assert before and runs.attnlab(*command, env=environment()).returncode == 0 and compiled() == before
    found = json.loads(attnlab("goodput", "--workdir", tmp_path / "w", "--json")[1])
    first, second = found["attempts"]
    assert second["last_step"] == 60 and second["first_step"] <= first["last_step"] + 1
    assert second["seconds"]["start_up"] > 0.5 and second["seconds"]["compile"] > 0.1
    assert second["seconds"]["evaluation"] > 0 and second["seconds"]["save"] > 0
    assert abs(sum(found["seconds"].values()) - found["wall"]) < 0.1 and min(found["seconds"].values()) > -0.05
    last = json.loads(log.read_text().splitlines()[-1])
    assert 0 < last["goodput"] < 1 and "goodput " in attnlab("goodput", "--workdir", tmp_path / "w")[1]
