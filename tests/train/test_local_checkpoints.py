"""Checkpoints on the hosts' own disks."""

from __future__ import annotations

import dataclasses
import json
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.errors import ConfigError, UserError
from attnlab.train import config as run_config
from attnlab.train.checkpoints import Checkpoints, Host
from attnlab.train.config import ClusterConfig
from attnlab.train.local_checkpoints import LocalCheckpoints, newest_of_both
from attnlab.train.pieces import Layout
from attnlab.train.processes import Processes
from attnlab.train.state import TrainState
from tests import tiers
from tests.train import runs
from tests.train.pair import SMALL, Pair

# The command line, in a process that dies before a step, is late for some, or hangs before one.
TROUBLED = """
import json, os, signal, sys, time
from attnlab.train.processes import Processes
begin, plan = Processes.at_step, json.loads(os.environ.get("TROUBLE", "{}"))
def at_step(self, step):
    if self.index == 1:
        if step == plan.get("dies"):
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3 if step in plan.get("late", []) else 3600 if step == plan.get("hangs") else 0)
    begin(self, step)
Processes.at_step = at_step
from attnlab.cli import main
sys.exit(main(sys.argv[2:]))
"""


# Two hosts without a trainer: save, and the second dies and takes its disk along; or go on from what is left.
HOSTS = """
import os, pathlib, signal, sys, time
from attnlab.launch import cluster
cluster.connect([a.removeprefix("--config.") for a in sys.argv if a.startswith("--config.cluster.")])
import jax, numpy as np
from attnlab.train.checkpoints import Host
from attnlab.train.config import ClusterConfig
from attnlab.train.local_checkpoints import LocalCheckpoints
from attnlab.train.pieces import Layout
from attnlab.train.processes import Processes
from tests.train.test_local_checkpoints import like, mesh, state

processes, of = Processes(ClusterConfig(timeout=5)), mesh()
path = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
path.mkdir(exist_ok=True)
disk = path.parent / f"disk{processes.index}"
local = LocalCheckpoints(disk, path, Layout(of, like(state(of, 0))), processes)
if os.environ["DIES"]:
    for step in (6, 8):
        local.save(step, state(of, step), Host(10 * step, {"at": step}, {"a": 1}))
    local.wait()
    processes.barrier()
    if processes.index == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
step, found, host = local.newest(0, print)
assert (step, host) == (8, Host(80, {"at": 8}, {"a": 1}, None)), (step, host)
for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(state(of, 8)), strict=True):
    assert ours.dtype == wanted.dtype and ours.sharding == wanted.sharding and len(ours.addressable_shards) == 4
    for a, b in zip(ours.addressable_shards, wanted.addressable_shards):
        np.testing.assert_array_equal(a.data, b.data)
processes.close()
cluster.leave(0)
"""


def mesh():
    devices = np.array(jax.devices()).reshape(2, 4)
    return jax.sharding.Mesh(devices, ("data", "fsdp"))


def state(of, seed, split=True):
    spec = PartitionSpec("fsdp") if split else PartitionSpec()
    put = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(of, spec), lambda at: x[at])
    zero = put(np.int32(seed)[None], PartitionSpec())
    w = put(np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32), spec)
    b = put((seed + np.arange(16)).astype(jnp.bfloat16), PartitionSpec(("data", "fsdp")))  # of each a piece alone
    return TrainState(zero, {"w": w, "b": b}, {}, zero, zero, zero)


def like(of):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), of)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


@pytest.fixture
def opened(tmp_path):
    """Opens the local checkpoints of a workdir as the next attempt would."""

    def open_(of=mesh, like_=None, **more):
        layout = Layout(of(), like_ or like(state(of(), 0, **more)))
        return LocalCheckpoints(tmp_path / "disk", tmp_path, layout, Processes(ClusterConfig(find="none")))

    return open_


def test_what_was_saved_is_restored(opened, tmp_path):
    """Bit for bit, the newest of both tiers; damaged ones are set aside; of another layout they are told and left; what
    an earlier attempt saved after the step that is gone on from is not there any more after the next save."""
    checkpoints, of, said = Checkpoints(tmp_path), mesh(), []
    find = lambda local: newest_of_both(checkpoints, local, like(state(of, 0)), said.append)
    local = opened()
    assert find(local) is None
    for step in (2, 4, 6):
        local.save(step, state(of, step), Host(10 * step, {"at": step}, {"a": 1}))
    local.wait()
    place = next((tmp_path / "disk").glob("*/process0"))
    assert sorted(p.name for p in place.iterdir()) == ["4", "6"]
    step, restored, host = find(opened())
    assert step == 6 and same(restored, state(of, 6)) and host == Host(60, {"at": 6}, {"a": 1}, None)
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state(of, 0))))

    file = place / "6" / "own"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    assert find(again := opened())[0] == 4 and "damaged (the content of own is not what was written)" in said[-2]
    assert (place.parent / "damaged-6-process0" / "own").exists()
    other = opened(split=False)
    assert other.newest(0, said.append) is None and "of another mesh, model or optimizer, and is left" in said[-1]

    checkpoints.save(5, state(of, 5), Host(50, {}, {}))
    checkpoints.wait()
    checkpoints.close()
    step, restored, _ = find(again)
    assert step == 5 and same(restored, state(of, 5))
    again.resumed(3)
    again.save(8, state(of, 8), Host(80, {}, {}))
    again.wait()
    assert [p.name for p in place.iterdir()] == ["8"]
    again.remove()
    assert not place.exists()


def test_a_save_that_fails_is_told(opened, monkeypatch):
    """By the step after it, with what the disk said."""
    local, of = opened(), mesh()
    monkeypatch.setattr("attnlab.train.digests.write", lambda path: (_ for _ in ()).throw(OSError(28, "full")))
    local.save(2, state(of, 2), Host(0, {}, {}))
    with pytest.raises(UserError, match="local checkpoint 2 could not be written to .*: No space left on device"):
        local.wait()


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


class Placed:
    """A sharding over devices of several processes, of which only the parts are known."""

    def __init__(self, devices, parts):
        self.devices, self.parts = devices, parts

    def devices_indices_map(self, shape):
        size = shape[0] // self.parts
        return {d: (slice(i % self.parts * size, (i % self.parts + 1) * size),) for i, d in enumerate(self.devices)}

    def shard_shape(self, shape):
        return (shape[0] // self.parts,)


def layout_of(processes, parts):
    devices = [Device(i, i // 2) for i in range(2 * processes)]
    of = type("Mesh", (), {"devices": np.array(devices)})()
    x = type("Array", (), {"shape": (24,), "dtype": np.dtype("float32"), "sharding": Placed(devices, parts)})()
    return Layout(of, {"x": x})


@pytest.mark.parametrize(
    "processes, parts, passed",
    [(4, 8, 2), (4, 4, 0), (4, 2, 0), (3, 6, 2), (1, 2, 0)],
    ids=["split over all", "two copies", "a copy each", "three", "one process"],
)
def test_what_one_loses_another_holds(processes, parts, passed):
    """Whatever the mesh, all pieces of any one process are with the others: in their own or in what was passed to them.
    With two copies of the state nothing is passed; what a process needs it gets once, from one that has it."""
    layout = layout_of(processes, parts)
    assert [len(p) for p in layout.passed] == [passed] * processes
    local = LocalCheckpoints.__new__(LocalCheckpoints)
    local._layout = layout
    for lost in range(processes):
        plan, missing = local._sources([[] if p == lost else [p] for p in range(processes)])
        assert missing == ([lost] if processes == 1 else [])
        given = [
            piece.key for (sender, to), pieces in plan.items() for piece in pieces if to == lost and sender != lost
        ]
        if processes > 1:
            assert sorted(given) == sorted(p.key for p in layout.held[lost])
            assert {(s, r) for s, r in plan if s != r} == {(s, lost) for s, r in plan if r == lost}
    if passed:  # two neighbours lost at once are more than one copy covers
        assert local._sources([[], []] + [[p] for p in range(2, processes)])[1] == [0]


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ConfigError, match="train.local_checkpoint_dir"):
        run_config.TrainConfig(local_checkpoint_every=5)
    (tmp_path / "file").touch()
    layout = Layout(mesh(), like(state(mesh(), 0)))
    with pytest.raises(UserError, match="train.local_checkpoint_dir = .*file cannot be used"):
        LocalCheckpoints(tmp_path / "file", tmp_path, layout, Processes(ClusterConfig(find="none")))
    uneven = type("Mesh", (), {"devices": np.array([Device(0, 0), Device(1, 0), Device(2, 1)])})()
    with pytest.raises(ConfigError, match="2 of process 0, 1 of process 1"):
        Layout(uneven, {})


def without_its_disk(tmp_path, source, monkeypatch, steps):
    """Two processes with arrays split over them, of which one died before step 10, and its disk with it; and where the
    others are."""
    every = {"train__save_every": 6, "train__local_checkpoint_every": 2, "train__steps": steps}
    pair = Pair(tmp_path, source, TROUBLED, **{"mesh__data": 1, "mesh__fsdp": 8, "train__sample_tokens": 0, **every})
    disk = f"--config.train.local_checkpoint_dir={tmp_path}/disk{{}}"
    monkeypatch.setenv("TROUBLE", json.dumps({"dies": 10}))
    codes = pair.start(disk).wait(200)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    assert "attnlab: process 1 of 2" in pair.output(0).splitlines()[-1]
    (tmp_path / "disk1").rename(tmp_path / "gone")
    assert sorted(p.name for p in tmp_path.glob("disk0/*/process0/*")) == ["6", "8"]
    return pair, disk


def went_on(pair, alone, steps):
    """Its lines are those of a run that was never stopped."""
    said = pair.output(0)
    assert "local checkpoint 8 is the newest; process 1 takes pieces from 0" in said
    assert f"resuming {pair.workdir} at step 8" in said
    lines = runs.lines(pair.workdir)
    assert [line["step"] for line in lines[:steps]] == list(range(1, steps + 1))
    assert all(abs(a["loss"] - b["loss"]) < 1e-5 for a, b in zip(lines, alone))


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The lines of a run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    runs.run(runs.config(source, **{**SMALL, "train__sample_tokens": 0}), workdir)
    return runs.lines(workdir)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dead_host_and_its_disk(tmp_path, source, monkeypatch):
    """SIGKILL of one of two ends the other with its name. Its disk is empty then: it takes what it alone held of the
    newest local checkpoint from the other, bit for bit."""
    monkeypatch.setenv("DIES", "1")
    pair = Pair(tmp_path, source, HOSTS)
    codes = pair.start().wait(120)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), pair.output(0)
    assert "attnlab: process 1 of 2" in pair.output(0).splitlines()[-1]
    (tmp_path / "disk1").rename(tmp_path / "gone")
    monkeypatch.setenv("DIES", "")
    pair.start().ends(0, 120)
    assert "local checkpoint 8 is the newest; process 1 takes pieces from 0" in pair.output(0)


@tiers.exhaustive
@pytest.mark.timeout(600)
def test_a_host_that_lost_its_disk(tmp_path, source, alone, monkeypatch):
    """One of two dies after local checkpoint 8, which ends the other with its name, and its disk is empty: it takes its
    pieces from the other, and the next losses are those of a run that was never stopped."""
    pair, disk = without_its_disk(tmp_path, source, monkeypatch, 12)
    monkeypatch.setenv("TROUBLE", "{}")
    pair.start(disk).ends()
    went_on(pair, alone, 12)


@tiers.exhaustive
@pytest.mark.timeout(600)
def test_a_host_that_is_late_and_hangs(tmp_path, source, alone, monkeypatch):
    """When it goes on it is late, and named; then it hangs, and both end with its name and where it is."""
    pair, disk = without_its_disk(tmp_path, source, monkeypatch, 60)
    monkeypatch.setenv("TROUBLE", json.dumps({"late": list(range(9, 25)), "hangs": 25}))
    pair.start(disk, "--config.cluster.step_timeout=20")
    began = time.monotonic()
    assert 0 not in pair.wait(200) and time.monotonic() - began < 120
    went_on(pair, alone, 24)
    said = pair.output(0)
    late = json.loads((pair.workdir / "metrics.jsonl").read_text().splitlines()[22])
    assert late["slowest_process"] == 1 and late["host_seconds_max"] > 0.2 > late["host_seconds_min"]
    assert "process 1 on" in said and "s a step behind" in said
    for index in range(2):
        last = pair.output(index).splitlines()[-1]
        assert "no step for 20 s; the last at step 24: process 1 on" in last and "at attnlab/train/loop.py:" in last
