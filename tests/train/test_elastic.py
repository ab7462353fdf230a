"""A checkpoint of one mesh goes on on any other: the same state, the same next examples, the losses of one long run."""

from __future__ import annotations

import logging
import shutil

import jax
import numpy as np
import pytest

from attnlab import data as data_lib
from attnlab.errors import UserError
from attnlab.train import optimizers
from attnlab.train.checkpoints import Checkpoints, Host
from attnlab.train.program import Program
from tests import tiers
from tests.train import runs

STEPS = 6
MESHES = {
    "data=8": {"data": 8},
    "data=4": {"data": 4},
    "data=2": {"data": 2},
    "one device": {"data": 1},
    "fsdp=4": {"data": 1, "fsdp": 4},
    "fsdp=4 x tensor=2": {"data": 1, "fsdp": 4, "tensor": 2},
    "fsdp=2 x context=2 x tensor=2": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}
FEW = ["data=2", "one device", "fsdp=4 x tensor=2", "fsdp=2 x context=2 x tensor=2"]


def config(source, mesh, **overrides):
    small = {"model__layers": 1, "model__mlp_width": 64, "data__length": 16, "data__batch": 16, "train__eval_every": 0}
    often = {"train__steps": STEPS, "train__save_every": 1, "train__keep": STEPS}
    return runs.config(source, mesh=MESHES[mesh], **{**small, **often, **overrides})


class Stopped(BaseException):
    pass


def go(monkeypatch, config, workdir, to=STEPS):
    """Trains to a step, after which it ends as if killed; the batches that were read, by step."""
    read, following = {}, data_lib.Loader.__next__

    def recorded(self):
        if self.get_state()["step"] == to:
            raise Stopped
        batch = following(self)
        read[self.get_state()["step"]] = {name: array.copy() for name, array in batch.items()}
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(data_lib.Loader, "__next__", recorded)
        try:
            runs.run(config, workdir)
        except Stopped:
            pass
    return read


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A run on eight devices that nothing stops: its workdir, and the batches that it read."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        return workdir, go(patch, config(source, "data=8"), workdir)


def from_step(step, whole, workdir):
    """A copy of a run as it stood after a step."""
    shutil.copytree(whole[0], workdir)
    for saved in (workdir / "checkpoints").iterdir():
        if int(saved.name) > step:
            shutil.rmtree(saved)
    return workdir


def assert_goes_on(whole, workdir, read, after):
    """A run that was stopped after a step, and what it then read, against the one that was not."""
    expected, batches = runs.lines(whole[0]), whole[1]
    ours = runs.lines(workdir)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, expected, strict=True):
        assert a["tokens"] == b["tokens"] and abs(a["loss"] - b["loss"]) < 1e-5, (a, b)
    assert sorted(read) == list(range(after + 1, STEPS + 1))
    for step, batch in read.items():
        for name, array in batch.items():
            np.testing.assert_array_equal(array, batches[step][name])


def placed(config):
    """What the state is on the config's mesh: ShapeDtypeStructs with shardings."""
    return Program.of(config).state


@tiers.parametrize("optimizer", optimizers.CONFIGS, often=["adamw"])
def test_the_state_is_the_same_on_every_mesh(source, tmp_path, optimizer):
    """Every array of a state is restored bit for bit, placed as the mesh says; from eight devices to others, back."""
    draw = np.random.default_rng(0)
    for step, (written, read) in enumerate([("data=8", FEW), ("one device", ["data=8", "fsdp=4 x tensor=2"])]):
        like = placed(config(source, written, optimizer__name=optimizer))
        state = jax.tree.map(lambda s: jax.device_put(draw.integers(1, 100, s.shape).astype(s.dtype), s.sharding), like)
        writer = Checkpoints(tmp_path, keep=2)
        writer.save(step, state, Host(5, {}, {}))
        writer.wait()
        writer.close()
        for mesh in read:
            like = placed(config(source, mesh, optimizer__name=optimizer))
            restored, host = Checkpoints(tmp_path).restore(step, like)
            assert host == Host(5, {}, {})
            for a, b, s in zip(*map(jax.tree.leaves, (restored, state, like)), strict=True):
                assert a.sharding == s.sharding
                np.testing.assert_array_equal(a, b)


@tiers.exhaustive
@tiers.parametrize("mesh", ["fsdp=4", "fsdp=2 x context=2 x tensor=2", "one device"], often=["fsdp=4"])
def test_a_run_of_eight_devices_goes_on(whole, source, tmp_path, monkeypatch, mesh):
    """Stopped after step 3 and moved to another mesh, with no word but the mesh."""
    workdir = from_step(3, whole, tmp_path / "run")
    assert_goes_on(whole, workdir, go(monkeypatch, config(source, mesh), workdir), 3)


@tiers.exhaustive
@pytest.mark.parametrize(
    "legs",
    [
        # The last device takes a step's rows in eight micro-batches.
        [("data=8", 1, 1), ("data=4", 1, 3), ("data=2", 1, 4), ("one device", 8, STEPS)],
        [("one device", 1, 2), ("data=8", 1, 4), ("fsdp=4", 1, STEPS)],
    ],
    ids=["8 to 4 to 2 to 1", "1 to 8 to 4"],
)
def test_a_chain_of_meshes(whole, source, tmp_path, monkeypatch, legs):
    """Losing devices again and again, and getting them back."""
    before = done = 0
    for mesh, accumulate, to in legs:
        more = {"train__accumulate": accumulate, "train__on_config_change": "continue"}
        read, before, done = go(monkeypatch, config(source, mesh, **more), tmp_path, to), done, to
    assert_goes_on(whole, tmp_path, read, before)


def test_a_move_is_told_and_nothing_else_is_let_through(source, tmp_path, monkeypatch, caplog):
    """Mesh and remat are whose the devices are, and what changed is said; a change beside them is still refused."""
    workdir, small = tmp_path / "run", {"model__mlp_width": 0, "train__sample_tokens": 0}
    go(monkeypatch, config(source, "one device", **small), workdir, 3)
    small |= {"model__remat": "full"}
    with pytest.raises(UserError, match=r"another config: optimizer.learning_rate: 0.01 -> 0.02\n"):
        runs.run(config(source, "data=4", optimizer__learning_rate=0.02, **small), workdir)
    assert not caplog.records
    with caplog.at_level(logging.INFO, logger="attnlab"), pytest.raises(UserError, match="ask for 32 of 8 devices"):
        runs.run(config(source, "data=4", mesh__tensor=8, **small), workdir)
    for text in ("mesh.data: 1 -> 4", "mesh.tensor: 1 -> 8", "model.remat: 'none' -> 'full'", "differ by rounding"):
        assert text in caplog.text
    assert Checkpoints(workdir).steps() == [1, 2, 3]
