"""A second kind of model and data under the same commands: trained, stopped, resumed, sharded, evaluated."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab import data as data_lib
from attnlab import mixers, tasks
from attnlab.errors import ConfigError
from attnlab.models.cost import model_cost
from attnlab.train import restore
from attnlab.train.config import RunConfig
from attnlab.train.program import Program
from tests import tiers
from tests.flags import environment
from tests.train import runs

CONFIG = "configs/tasks.py:task=icl_regression,mixer=softmax"


def tree(**overrides):
    config = {
        "data": {"name": "icl_regression", "d": 3, "examples": 7, "batch": 8, "heldout": 20},
        "model": {"name": "regression", "inputs": 4, "width": 16, "layers": 2,
                  "mixers": {"M": {"name": "softmax", "heads": 2}}, "mlp_width": 32},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup": 2},
        "train": {"steps": 12, "log_every": 1, "eval_every": 6, "save_every": 4},
        "mesh": {"data": 1},
    }  # fmt: skip
    for key, value in overrides.items():
        *parents, last = key.split("__")
        here = config
        for name in parents:
            here = here.setdefault(name, {})
        here[last] = value
    return config


def config(**overrides):
    return config_lib.build(RunConfig, tree(**overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, runs.run(config(), workdir)


def test_what_a_run_leaves(finished):
    """The files and names of every run; figures of its own; no samples and no bits per byte."""
    workdir, printed = finished
    lines = runs.lines(workdir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["tokens"] == 12 * 8 * 16
    evaluated = [line for line in lines if "heldout_loss" in line]
    assert [line["step"] for line in evaluated] == [6, 12]
    assert evaluated[-1].keys() >= {"heldout_gap_closed", "heldout_zero_loss", "heldout_bayes_loss"}
    assert "held-out squared error" in printed and "byte" not in printed
    assert not (workdir / "samples.txt").exists()
    described = json.loads((workdir / "config.json").read_text())
    assert described["config"]["model"]["name"] == "regression" and described["data"]["task"] == "icl_regression"
    assert config_lib.build(RunConfig, described["config"]) == config()


def test_crash_and_resume_is_bit_identical(finished, tmp_path, monkeypatch):
    """A run that dies after any batch ends with the very lines of one that never did."""

    class Killed(BaseException):
        pass

    original = data_lib.Loader.__next__
    with monkeypatch.context() as patch, pytest.raises(Killed):
        left = iter([None] * 6)

        def limited(self):
            if next(left, self) is self:
                raise Killed
            return original(self)

        patch.setattr(data_lib.Loader, "__next__", limited)
        runs.run(config(), tmp_path)
    assert "resuming" in runs.run(config(), tmp_path)
    assert runs.lines(tmp_path) == runs.lines(finished[0])


def steps(program, count=3):
    state, losses = program.init(0), []
    loader = data_lib.open_data(program.config.data).training(seed=0)
    for _ in range(count):
        state, metrics = program.train_step(state, program.put(next(loader)))
        losses.append(float(metrics["loss"]))
    loader.close()
    return losses, state.params


@tiers.exhaustive
@tiers.parametrize(
    "more",
    MORE := [
        {"mesh": {"data": 8}},
        {"mesh": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}},
        {"train__accumulate": 4},
        {"mesh": {"data": 2, "fsdp": 2}, "train__accumulate": 2},
    ],
    often=MORE[-1:],
    ids=str,
)
def test_meshes_and_micro_batches_change_nothing(more):
    """Losses and parameters of three steps, on 8 devices or in parts, are those of one."""
    (losses, params), (ours, others) = steps(Program.of(config())), steps(Program(config(**more)))
    np.testing.assert_allclose(ours, losses, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        # Adam divides by the gradients' size: where it is near 0, rounding decides the sign of an update.
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_the_loss_is_a_mean_over_what_is_asked(finished):
    """Not over positions, of which every other one only tells."""
    program = Program.of(config())
    batch = program.put(data_lib.open_data(program.config.data).rows("train", range(8)))
    sums = program.eval_step(program.first_state(0).params, batch)
    assert sums["weight"].sum() == 8 * 8
    first = runs.lines(finished[0])[0]
    np.testing.assert_allclose(first["loss"], sums["error"].sum() / (8 * 8), rtol=1e-5)


def test_eval_tells_its_own_figures(attnlab, finished):
    """`attnlab eval`: errors by examples seen beside those that need no training; other data is said."""
    workdir, _ = finished
    code, out, err = attnlab("eval", "--workdir", workdir, "--checkpoint", "12", "--json")
    found = json.loads(out)
    assert (code, found["notes"]) == (0, []), err
    last = runs.lines(workdir)[-1]
    np.testing.assert_allclose([found["loss"], found["bayes_loss"]], [last["heldout_loss"], last["heldout_bayes_loss"]])
    assert found["count"] == 20 * 8 and [row["first"] for row in found["by_examples"]] == [0, 1, 2, 4]
    code, out, _ = attnlab("eval", "--workdir", workdir, "--config.data.noise=0.5")
    assert code == 0 and "squared error by the number of examples seen" in out
    assert "note: on other data than it was trained on (data.noise 0.1 -> 0.5)" in out


def test_longer_rows_are_evaluated_and_said(finished):
    trained = restore.load(finished[0], "latest", ["data.examples=9"])
    _, notes = restore.evaluate_heldout(trained, 1)
    assert notes[-1] == "20 positions, and it was trained on rows of 16"


def test_generate_refuses_it(attnlab, finished):
    code, _, err = attnlab("generate", "--workdir", finished[0], "--prompt", "a")
    assert code == 2 and "a model of kind 'regression', which continues no text" in err


def test_cost_and_tokenizer(attnlab, tmp_path):
    code, out, _ = attnlab("cost", "--config", CONFIG, "--json")
    assert code == 0
    c = config_lib.load(RunConfig, CONFIG)
    assert json.loads(out)["train_flops_per_token"] == 3 * model_cost(c.model, c.data.length).total_flops
    code, _, err = attnlab("tokenizer", "train", "--config", CONFIG, "--out", tmp_path / "t.json")
    assert code == 2 and "data.name = 'icl_regression' has no text; allowed: text" in err


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"data__d": 4}, "yields inputs float32.16, 5.*'regression' takes inputs float32.16, 4.* do not fit"),
        ({"data": {"source": "stdlib"}}, "data.name = 'text' yields .*tokens int32"),
        ({"train__z_loss": 0.1}, "train.z_loss = 0.1 .*allowed: 0.0 where model.name = 'regression'"),
        (
            {"model__name": "regresion"},
            "model.name = 'regresion' is unknown .*'regression'.*allowed: .*classifier, .*regression",
        ),
        ({"data__name": "icl"}, "data.name = 'icl' is unknown.* allowed: .*common_words, .*text"),
        ({"data__nose": 1}, "unknown key 'data.nose'.*'noise'"),
        ({"mesh__context": 3, "model__mixers": {"M": {"name": "agent", "form": "pooled"}}}, "mesh.context = 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_config(overrides, message):
    """Before anything is opened or compiled."""
    with pytest.raises(ConfigError, match=message):
        config(**overrides)


CAUSAL = [name for name in mixers.names() if mixers.get(name).capabilities.causal]


@tiers.parametrize("mixer", CAUSAL, often=["agent", "kda", "short_conv", "titans"])
def test_every_mixer_takes_the_task(mixer):
    c = config_lib.load(RunConfig, f"configs/tasks.py:mixer={mixer},pattern=MS")
    assert [node.node_name for node in c.model.mixers.values()] == [mixer, "softmax"]


def test_the_trainer_names_no_kind():
    """Adding a kind of model or data edits nothing in train/ or launch/: what runs there mentions none."""
    kinds = {"lm", "regression", "perplexity", "text", "tokens", "tokenizers", *tasks.names()}
    for path in [*(runs.ROOT / "attnlab/train").glob("*.py"), *(runs.ROOT / "attnlab/launch").glob("*.py")]:
        tree_ = ast.parse(path.read_text())
        found = [node for node in ast.walk(tree_) if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = {f"{getattr(node, 'module', '')}.{alias.name}" for node in found for alias in node.names}
        named = {m for m in modules for package in ("models", "data", "tasks") if m.startswith(f"attnlab.{package}.")}
        assert not {part for m in named for part in m.split(".")} & kinds, (path, named)
        attributes = {node.attr for node in ast.walk(tree_) if isinstance(node, ast.Attribute)}
        assert not attributes & {"vocab", "tokenizer", "token_losses", "bits_per_byte", "z_loss"} - known(path), path


def known(path):
    """`TrainConfig` checks the options that it holds for models."""
    return {"z_loss"} if path.name == "config.py" else set()


@tiers.exhaustive
def test_compiles_for_a_pod(attnlab):
    """`attnlab compile` needs to know nothing of it."""
    pytest.importorskip("libtpu")
    args = ["--config", CONFIG, "--topology", "v5e:2x2", "--config.mesh.fsdp=2", "--json"]
    done = runs.attnlab("compile", *args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory"]["fits"]


@tiers.exhaustive
def test_sigkill_and_sigterm_lose_nothing(tmp_path):
    """Killed and stopped on the way, the metrics are those of a run left alone."""
    path, told = tmp_path / "config.py", tree(train__steps=120, train__save_every=10)
    path.write_text(f"def get_config(arg=None):\n    return {told!r}\n")
    start = lambda workdir: subprocess.Popen(
        [sys.executable, "-m", "attnlab", "train", "--config", str(path), "--workdir", str(workdir)],
        cwd=runs.ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    alone, hit = tmp_path / "alone", tmp_path / "hit"
    assert start(alone).wait(timeout=300) == 0
    for number, at in ((signal.SIGKILL, 15), (signal.SIGTERM, 50)):
        process = start(hit)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            metrics = hit / "metrics.jsonl"
            if metrics.exists() and f'"step": {at},' in metrics.read_text():
                break
            time.sleep(0.02)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
    assert start(hit).wait(timeout=300) == 0
    assert runs.lines(hit) == runs.lines(alone)


@tiers.exhaustive
def test_a_finished_run_goes_on_elsewhere(finished, tmp_path):
    """Another mesh, more steps: the checkpoint is restored onto it."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    more = config(mesh={"data": 2, "fsdp": 2}, train__steps=14, train__on_config_change="continue")
    assert "resuming" in runs.run(more, workdir)
    assert [line["step"] for line in runs.lines(workdir)] == list(range(1, 15))
