"""Runs whose parameters begin as those of another run."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from attnlab import cli
from attnlab.errors import UserError
from attnlab.train import beginning, loop, restore
from attnlab.train import source as source_lib
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.program import Program
from attnlab.train.state import Model, flat
from tests.train import runs

GATED = {"name": "gated", "heads": 2}
LION = {"name": "lion", "learning_rate": 1e-3, "schedule": "constant", "warmup": 0}


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """The workdir of the run that others begin as, and its parameters by path."""
    path = tmp_path_factory.mktemp("trained") / "v"
    runs.run(runs.config(source, train__steps=3, train__eval_every=3, train__sample_tokens=0), path)
    return path, arrays(restore.load(path, "latest").params)


def arrays(tree):
    return {name: np.asarray(leaf) for name, leaf in flat(tree).items()}


def begun(source, **overrides):
    """The config of the run that begins: another seed and optimizer, other steps."""
    few = {"train__steps": 2, "train__eval_every": 0, "train__save_every": 0}
    return runs.config(source, **{"seed": 5, "optimizer": LION, **few, **overrides})


def plan(path, model):
    """What of the run in `path` becomes what of a model, and that run's own model."""
    with source_lib.opened(path, None, print) as found:
        return beginning.fit(found, model), found.model


def layers(model, leaves):
    """Values of a model's arrays layer by layer, by their names."""
    found = {}
    for leaf, entries in model.entries.items():
        stacked = entries[0].name != leaf
        found |= {entry.name: leaves[leaf][i] if stacked else leaves[leaf] for i, entry in enumerate(entries)}
    return found


def test_it_begins_with_the_other_runs_loss(source, trained, tmp_path):
    """By the command line, split over two devices: V's parameters and held-out loss exactly, all else anew."""
    v, params = trained
    config = runs.write_config(
        tmp_path / "c.py", source, seed=5, mesh__fsdp=2, train__steps=1, train__eval_every=0, optimizer=LION
    )
    assert cli.main(["train", "--config", config, "--workdir", str(tmp_path / "w"), "--init-from", str(v)]) == 0
    first = restore.load(tmp_path / "w", "0", ["mesh.fsdp=1"])
    found = arrays(first.params)
    assert found.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    theirs = restore.evaluate_heldout(restore.load(v, "latest"))[0]
    assert restore.evaluate_heldout(first)[0].loss == theirs.loss
    state, host = Checkpoints(tmp_path / "w").restore(0, first.program.state)
    assert (int(state.step), host.tokens) == (0, 0) and not any(map(np.any, jax.tree.leaves(state.opt_state)))
    assert host.data == first.data.training(seed=5, rows=list(range(8))).get_state()
    record = json.loads((tmp_path / "w" / beginning.RECORD).read_text())
    assert (record["source"], record["step"], record["kept"], record["dropped"]) == (str(v), 3, [], [])
    assert record["taken"] == {name: [name] for name in params}
    assert "begins as" in (tmp_path / "w" / "log.txt").read_text()
    assert any(
        np.any(value != params[name]) for name, value in arrays(restore.load(tmp_path / "w", "1").params).items()
    )


def test_another_mixer_in_one_layer(source, trained):
    """Layer by layer: what is there by name and shape is V's, the rest the model's own; both are listed."""
    v, params = trained
    config = begun(source, model__pattern="MG", model__mixers={"M": {"name": "softmax", "heads": 2}, "G": GATED})
    program = Program(config)
    begin, theirs = plan(v, program.model)
    with source_lib.opened(v, None, print) as found:
        values = beginning.fit(found, program.model).params(program, 7, print)
    values, own = (layers(program.model, arrays(tree)) for tree in (values, program.model.init(7)))
    there = layers(theirs, params)
    new = {name for name in values if ".layers.1.mixers.0." in name and ".gate." in name}
    assert new and values.keys() - there.keys() == new and begin.dropped == []
    assert begin.kept == ["transformer.periods.blocks.1.sublayers.0.branch.gate.linear.kernel"]
    for name, value in values.items():
        np.testing.assert_array_equal(value, own[name] if name in new else there[name], err_msg=name)


def test_a_mixer_that_lacks_something(source, trained):
    """What another mixer has no place for is dropped, and of another shape both dropped and kept."""
    v, _ = trained
    model = Model.of(begun(source, model__mixers={"M": {"name": "short_conv"}}).model)
    begin, theirs = plan(v, model)
    branch = "transformer.periods.blocks.0.sublayers.0.branch."
    ours = {leaf for leaf in model.entries if leaf.startswith(branch)}
    assert set(begin.kept) >= ours - theirs.entries.keys()
    assert begin.dropped and all(leaf.startswith(branch) for leaf in (*begin.dropped, *begin.kept))
    assert set(begin.dropped) >= {leaf for leaf in theirs.entries if leaf.startswith(branch)} - ours
    back = dataclasses.replace(begin.source, place="w", step=0, model=model)
    assert beginning.fit(back, theirs).kept == begin.dropped and beginning.fit(back, theirs).dropped == begin.kept


def test_more_layers_keep_their_own_values(source, trained):
    """A deeper stack takes V's layers as its first ones."""
    v, params = trained
    program = Program(begun(source, model__layers=3))
    with source_lib.opened(v, None, print) as found:
        begin = beginning.fit(found, program.model)
        values = arrays(begin.params(program, 7, print))
    assert begin.kept and all(name.endswith("[2]") for name in begin.kept)
    own = arrays(program.model.init(7))
    for name, value in values.items():
        stacked = name.startswith("transformer.")
        np.testing.assert_array_equal(value[:2] if stacked else value, params[name], err_msg=name)
        if stacked:
            np.testing.assert_array_equal(value[2], own[name][2], err_msg=name)


@pytest.mark.parametrize("overrides, message", [
    ({"model__width": 32}, r"embedding is \[260, 16\] in it and \[260, 32\] in this model"),
    ({"model__layers": 1}, r"transformer\.layers\.1\.\S+ is \[.*\] in it and not there in this model"),
    ({"model__mixers": {"M": {"name": "softmax", "heads": 2, "kv_heads": 1}}},
     r"layers\.0\.mixers\.0\.branch\.\S+ is"),
    ({"model": {"name": "regression", "inputs": 5, "width": 16, "layers": 2,
                "mixers": {"M": {"name": "softmax", "heads": 2}}},
      "data": {"name": "icl_regression", "d": 4, "examples": 4, "batch": 4}}, r"in this model"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(source, trained, tmp_path, monkeypatch, overrides, message):
    """Before anything is compiled, and no workdir is left."""
    monkeypatch.setattr(Program, "init", None)
    monkeypatch.setattr(Program, "train_step", None)
    v, _ = trained
    with pytest.raises(UserError, match=f"init_from = {v} does not fit.*{message}"):
        loop.train(begun(source, **overrides), tmp_path / "w", init_from=v)
    assert not (tmp_path / "w").exists()


def test_what_is_not_there_is_refused(source, trained, tmp_path):
    """No workdir, one without a checkpoint, and one whose checkpoint is damaged."""
    v, _ = trained
    with pytest.raises(UserError, match="init_from = .*nowhere holds no run .*allowed: the workdir of a run"):
        loop.train(begun(source), tmp_path / "w", init_from=tmp_path / "nowhere")
    copy = shutil.copytree(v, tmp_path / "copy")
    host = copy / "checkpoints" / "3" / "host" / "metadata"
    host.write_bytes(host.read_bytes()[:-1])
    with pytest.raises(UserError, match="none of the checkpoints 3 in .* is whole"):
        loop.train(begun(source), tmp_path / "w", init_from=copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="init_from = .*copy has no checkpoint yet; allowed: a run that has reached"):
        loop.train(begun(source), tmp_path / "w", init_from=copy)
    assert not (tmp_path / "w").exists()


def test_going_on_needs_no_other_run(source, trained, tmp_path, monkeypatch):
    """Broken off at its start, it goes on without V to the bits of an unbroken one; a run is never begun as another."""
    v, _ = trained
    config, w = begun(source, mesh__fsdp=2), tmp_path / "w"
    loop.train(config, tmp_path / "unbroken", init_from=v)
    copy = shutil.copytree(v, tmp_path / "copy")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Run, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        loop.train(config, w, init_from=copy)
    shutil.rmtree(copy)
    with pytest.raises(
        UserError, match=f"began as {copy}, not as init_from = {v}; allowed: no init_from, which goes on"
    ):
        loop.train(config, w, init_from=v)
    loop.train(config, w, init_from=copy)  # the same command
    assert runs.lines(w) == runs.lines(tmp_path / "unbroken")
    loop.train(config, w)
    found, wanted = (arrays(restore.load(path, "2").params) for path in (w, tmp_path / "unbroken"))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    shutil.rmtree(w / "checkpoints")
    with pytest.raises(UserError, match=f"has no checkpoint, and its run was to begin as {copy}"):
        loop.train(config, w)
    with pytest.raises(UserError, match="began with its own first values, not as init_from"):
        loop.train(runs.config(source, train__steps=3, train__eval_every=3, train__sample_tokens=0), v, init_from=w)
