"""A run from start to end: what it leaves, and that stopping and going on changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from attnlab import data as data_lib
from attnlab.errors import TrainingFailed, UserError
from attnlab.mixers.roles import Role, param
from attnlab.mixers.softmax import Softmax
from attnlab.train import loop, optimizers, restore
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.program import Program
from tests import tiers
from tests.flags import environment
from tests.train import runs


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """An uninterrupted run: workdir and output."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, runs.run(runs.config(source), workdir)


def test_what_a_run_leaves(finished):
    """Every step once, evaluations at their step, metadata, samples, a log, the newest two checkpoints and the best."""
    workdir, printed = finished
    lines = runs.lines(workdir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [6, 12]
    assert lines[-1]["tokens"] == sum(8 * 32 for _ in range(12))
    described = json.loads((workdir / "config.json").read_text())
    assert described["config"]["model"]["mixers"]["M"]["name"] == "softmax"
    assert described["implementations"]["attention"] and described["versions"]["jax"]
    assert described["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8}
    assert "continuation" in (workdir / "samples.txt").read_text()
    assert "step 12/12" in (workdir / "log.txt").read_text() and "step 12/12" in printed
    assert any((workdir / "tensorboard").iterdir())
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "8"]


def test_bits_per_byte_are_of_the_text_that_was_scored(finished, source):
    """While training and afterwards: of the part of the held-out text that the evaluated batches hold."""
    workdir, _ = finished
    heldout = data_lib.heldout_loader(runs.config(source).data, data_lib.load_tokenizer("bytes"), batches=2)
    tokens = sum(int((batch["segments"] > 0).sum()) for batch in heldout)
    assert 0 < heldout.bytes < min(tokens, heldout.summary()["heldout_bytes"])
    line = runs.lines(workdir)[-1]
    bits = line["heldout_loss"] * tokens / math.log(2) / heldout.bytes
    assert math.isclose(line["heldout_bits_per_byte"], bits, rel_tol=1e-9)
    evaluation, notes = restore.evaluate_heldout(restore.load(workdir, "latest"), batches=2)
    assert not notes
    assert (evaluation.bytes, evaluation.tokens) == (heldout.bytes, tokens)


def test_second_call_says_complete(finished, source):
    """The same command on a finished run does nothing and says so."""
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert "complete: step 12 of 12" in runs.run(runs.config(source), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before


class Killed(BaseException):
    pass


def crash_after(monkeypatch, batches):
    """The loader raises what nothing catches, as a kill would end the loop."""
    original = data_lib.Loader.__next__
    left = [batches]

    def limited(self):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return original(self)

    monkeypatch.setattr(data_lib.Loader, "__next__", limited)


@tiers.parametrize("first, second", [(2, 6), (5, 1), (9, 2)], often=[(2, 6)])
def test_crash_and_resume_is_bit_identical(finished, source, tmp_path, monkeypatch, first, second):
    """A run that dies twice ends with the very lines of one that never did."""
    for batches in (first, second):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            crash_after(patch, batches)
            runs.run(runs.config(source), tmp_path)
    runs.run(runs.config(source), tmp_path)
    assert runs.lines(tmp_path) == runs.lines(finished[0])


@pytest.mark.slow
def test_half_written_line_is_dropped(finished, source, tmp_path, monkeypatch):
    """A line cut off by a kill, and lines after the checkpoint, come again."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        crash_after(patch, 7)
        runs.run(runs.config(source), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    runs.run(runs.config(source), tmp_path)
    assert runs.lines(tmp_path) == runs.lines(finished[0])


def files_of_checkpoint(workdir, step):
    return [p for p in sorted((workdir / "checkpoints" / str(step)).rglob("*")) if p.is_file() and p.stat().st_size > 1]


def test_truncated_checkpoint_is_reported_and_stepped_over(finished, source, tmp_path, monkeypatch):
    """Whichever large file of the newest checkpoint is cut, the run goes on from the one before and ends the same."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        crash_after(patch, 10)
        runs.run(runs.config(source), tmp_path)
    assert (tmp_path / "checkpoints" / "8").is_dir() and (tmp_path / "checkpoints" / "4").is_dir()
    largest = max(files_of_checkpoint(tmp_path, 8), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    printed = runs.run(runs.config(source), tmp_path)
    assert "checkpoint 8 is damaged" in printed and "going back to checkpoint 4" in printed
    assert (tmp_path / "damaged_checkpoints" / "8").is_dir()
    assert runs.lines(tmp_path) == runs.lines(finished[0])


def losses_at_evaluations(monkeypatch, losses):
    """Evaluations report these losses, one after the other."""
    left = iter(losses)
    evaluated = loop.evaluate

    def rigged(*args):
        result = evaluated(*args)
        return dataclasses.replace(result, nll_T=next(left) * result.tokens_T)

    monkeypatch.setattr(loop, "evaluate", rigged)


@pytest.mark.slow
def test_the_best_checkpoint_outlives_newer_ones_and_a_resume(source, tmp_path, monkeypatch):
    """The lowest held-out loss decides what `best` is, however often the run is continued."""
    each = {"train__eval_every": 1, "train__save_every": 1, "train__keep": 1, "train__sample_tokens": 0}
    with monkeypatch.context() as patch:
        losses_at_evaluations(patch, [3.0, 1.0, 2.0, 2.5])
        runs.run(runs.config(source, train__steps=4, **each), tmp_path)
    with monkeypatch.context() as patch:
        losses_at_evaluations(patch, [2.2, 2.1])
        runs.run(runs.config(source, train__steps=6, train__on_config_change="continue", **each), tmp_path)
    assert Checkpoints(tmp_path).steps() == [2, 6]
    assert restore.load(tmp_path).step == 2 and restore.load(tmp_path, "latest").step == 6


def test_other_code_moves_no_checkpoint(source, tmp_path, monkeypatch):
    """A checkpoint that is whole but does not fit the model's code is an error, not damage."""
    runs.run(runs.config(source, train__steps=4), tmp_path)
    original = Softmax.__init__

    def with_one_more(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.extra = param(jnp.zeros(3), axes=("embed",), role=Role.BIAS)

    monkeypatch.setattr(Softmax, "__init__", with_one_more)
    Program.forget()
    config = runs.config(source, train__steps=6, train__on_config_change="continue")
    for _ in range(2):
        with pytest.raises(UserError, match="checkpoint 4 .* cannot be restored, though its files are whole"):
            runs.run(config, tmp_path)
    assert Checkpoints(tmp_path).steps() == [4]
    Program.forget()


def test_reading_disturbs_no_writer(finished, tmp_path):
    """Evaluating a run that is saving leaves its unfinished checkpoint alone."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    unfinished = workdir / "checkpoints" / "16.orbax-checkpoint-tmp"
    unfinished.mkdir()
    restore.load(workdir)
    assert unfinished.is_dir()


@tiers.parametrize("sent", [["SIGTERM"], ["SIGHUP", "SIGHUP"]], often=[["SIGTERM"]])
def test_signal_during_evaluation_is_heeded_with_a_save(source, tmp_path, monkeypatch, sent):
    """A signal that comes while evaluating acts at the next step, and what is said to be saved is.

    A terminal that closes sends SIGHUP more than once.
    """
    evaluated = loop.evaluate

    def interrupted(*args):
        for name in sent:
            os.kill(os.getpid(), signal.Signals[name])
        return evaluated(*args)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    printed = runs.run(runs.config(source, train__save_every=0, train__eval_every=3), tmp_path)
    assert f"{sent[0]}: saved step 4" in printed
    assert Checkpoints(tmp_path).steps() == [4]


@tiers.parametrize("name", optimizers.CONFIGS, often=["adamw"])
def test_every_optimizer_trains(source, tmp_path, name):
    """Each optimizer's state is placed, saved, restored and goes on."""
    short = {"optimizer__name": name, "train__eval_every": 0, "train__on_config_change": "continue"}
    runs.run(runs.config(source, train__steps=3, **short), tmp_path)
    runs.run(runs.config(source, train__steps=6, **short), tmp_path)
    losses = [line["loss"] for line in runs.lines(tmp_path)]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_changed_config_stops_and_says_what_changed(finished, source):
    """Another config in the same workdir is refused with the key and both values; free keys are not."""
    workdir, _ = finished
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.01 -> 0.02"):
        runs.run(runs.config(source, optimizer__learning_rate=0.02), workdir)
    assert "complete" in runs.run(runs.config(source, train__log_every=3, train__keep=5), workdir)


@pytest.mark.slow
def test_longer_run_continues_when_told(source, tmp_path):
    """`on_config_change=continue` takes a finished run further."""
    runs.run(runs.config(source, train__steps=4), tmp_path)
    with pytest.raises(UserError, match="train.steps: 4 -> 6"):
        runs.run(runs.config(source, train__steps=6), tmp_path)
    runs.run(runs.config(source, train__steps=6, train__on_config_change="continue"), tmp_path)
    assert [line["step"] for line in runs.lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_other_data_is_refused(finished, source, tmp_path):
    """A run does not go on with the position of other data."""
    runs.run(runs.config(source, train__steps=4), tmp_path)
    changed = runs.config(source, train__steps=6, train__on_config_change="continue", data__heldout=0.5)
    with pytest.raises(UserError, match="heldout"):
        runs.run(changed, tmp_path)


def test_non_finite_gradients_stop_the_run_with_the_step(source, tmp_path):
    """A learning rate that destroys the model ends the run, naming the step."""
    config = runs.config(
        source, optimizer__name="lion", optimizer__learning_rate=1e30, optimizer__warmup=0, optimizer__clip=None,
        train__max_nonfinite=3, train__eval_every=0,
    )  # fmt: skip
    with pytest.raises(TrainingFailed, match=r"step \d+: gradients were not finite for 3 steps in a row"):
        runs.run(config, tmp_path)


def test_profile(source, tmp_path):
    """`train.profile=2:3` writes a profile of these steps."""
    runs.run(runs.config(source, train__steps=4, train__profile="2:3", train__eval_every=0), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def start(source, workdir, tmp_path, **overrides):
    config = runs.write_config(tmp_path / "config.py", source, **overrides)
    command = [sys.executable, "-m", "attnlab", "train", "--config", config, "--workdir", str(workdir)]
    return subprocess.Popen(
        command, cwd=runs.ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@contextlib.contextmanager
def killed_at_last(process):
    """A test that fails leaves no process behind."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_for_step(workdir, step, process, timeout=120):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came: {process.communicate(timeout=5)[0]}")


@tiers.exhaustive
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_save_and_exit_with_zero(source, tmp_path, number):
    """SIGTERM, SIGINT and SIGHUP save, say how to resume, and end with 0."""
    workdir = tmp_path / "run"
    process = start(source, workdir, tmp_path, train__steps=100_000, train__save_every=0, train__eval_every=0,
                    train__sample_tokens=0)  # fmt: skip
    with killed_at_last(process):
        wait_for_step(workdir, 5, process)
        process.send_signal(number)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 0, out
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert f"saved step {saved}; resume with" in out
    assert runs.lines(workdir)[-1]["step"] == saved >= 5


@tiers.exhaustive
def test_killed_five_times(source, tmp_path):
    """SIGKILL at five random moments: the metrics are those of a run left alone, no step missing or doubled."""
    steps = {"train__steps": 200, "train__save_every": 25, "train__eval_every": 50}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert start(source, alone, tmp_path, **steps).wait(timeout=300) == 0
    rng = random.Random(0)
    for _ in range(5):
        process = start(source, killed, tmp_path, **steps)
        time.sleep(rng.uniform(1.5, 7))
        process.kill()
        process.communicate(timeout=30)
    process = start(source, killed, tmp_path, **steps)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    assert [line["step"] for line in runs.lines(killed)] == list(range(1, 201))
    assert runs.lines(killed) == runs.lines(alone)
