"""Two processes of four devices each on this machine: one run, watched by both."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from attnlab import data as data_lib
from attnlab.errors import UserError
from attnlab.launch import cluster
from attnlab.train import loop
from attnlab.train.config import ClusterConfig
from attnlab.train.processes import Processes
from attnlab.train.stragglers import Stragglers
from tests import tiers
from tests.train import runs
from tests.train.pair import MESH, SMALL, TIMEOUT, Pair

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A run of two processes that nothing disturbs, and evaluates and samples."""
    return Pair(tmp_path_factory.mktemp("whole"), source, train__eval_every=6, train__sample_tokens=8).start().ends()


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The same run of one process on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    runs.run(runs.config(source, **SMALL), workdir)
    return workdir


def numbers(workdir, keys=("step", "loss", "tokens")):
    return [{k: line[k] for k in keys} for line in runs.lines(workdir)]


def assert_same_run(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"] and abs(a["loss"] - b["loss"]) < 1e-5, (a, b)


def up_to(step, workdir, copy):
    """A copy of a finished run as it stood after a step."""
    shutil.copytree(workdir, copy)
    for saved in (copy / "checkpoints").iterdir():
        if int(saved.name) > step:
            shutil.rmtree(saved)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:step]))
    return copy


def shares(source, index, first, last, parts=2):
    """The rows that the index-th of so many parts of each step's batch are."""
    config = runs.config(source, **SMALL)
    with data_lib.train_loader(config.data, data_lib.load_tokenizer("bytes"), seed=config.seed) as loader:
        row, batch = loader._batches.row_index, config.data.batch
        part = range(index * batch // parts, (index + 1) * batch // parts)
        return {tuple(row((step - 1) * batch + i) for i in part) for step in range(first, last + 1)}


@tiers.exhaustive
@pytest.mark.slow
def test_two_processes_are_one_run(whole, alone):
    """Losses are those of one process on one device; one process writes, and what it writes is whole."""
    assert_same_run(numbers(whole.workdir), numbers(alone))
    assert "step 12/12" in whole.output(0) and "step 12/12" not in whole.output(1)
    assert "continuation" in (whole.workdir / "samples.txt").read_text()


@tiers.exhaustive
@pytest.mark.slow
def test_each_host_reads_its_share(whole, source):
    """Of every batch, of training and held-out data, each process reads one half, and the prompts of samples whole."""
    for index in range(2):
        read, ahead, prompts = whole.read(index), 20, {(0, 1)}
        assert shares(source, index, 1, 12) <= read
        heldout = {tuple(range(8 * b + 4 * index, 8 * b + 4 * index + 4)) for b in range(2)}
        assert heldout | prompts <= read <= heldout | prompts | shares(source, index, 1, 12 + ahead)


@tiers.exhaustive
@pytest.mark.slow
def test_what_two_processes_saved_one_goes_on_with(whole, source, tmp_path):
    """Other host counts, down: from step 8 of the two to the end by one process, on its own mesh."""
    workdir = up_to(8, whole.workdir, tmp_path / "run")
    mesh = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2}
    runs.run(runs.config(source, **{**SMALL, "train__eval_every": 6, **mesh}), workdir)
    assert_same_run(numbers(workdir), numbers(whole.workdir))


@tiers.exhaustive
@pytest.mark.slow
def test_two_processes_begin_as_another_run_and_learn_of_it(source, alone, tmp_path):
    """Parameters of a run of one process, split over two, and its logits: losses are those of one process."""
    more = {"model__mixers": {"M": {"name": "gated", "heads": 2}}, "train__steps": 3, "train__save_every": 0, "seed": 5,
            "train__distill": {"teacher": str(alone), "cross_entropy": 0.5}}  # fmt: skip
    pair = Pair(tmp_path, source, **more).start(f"--init-from={alone}").ends()
    loop.train(runs.config(source, **{**SMALL, **more}), tmp_path / "one", init_from=alone)
    parts = "distill_kl", "distill_cross_entropy"
    for a, b in zip(*(numbers(path, ("loss", *parts)) for path in (pair.workdir, tmp_path / "one")), strict=True):
        assert all(abs(a[key] - b[key]) < 1e-5 for key in a) and a["distill_kl"] > 0
    for name in ("init_from.json", "distill.json"):
        assert (pair.workdir / name).read_text() == (tmp_path / "one" / name).read_text()


@pytest.mark.slow
@tiers.parametrize(
    "told, mesh, parts",
    [(0, MESH, 2), (1, {"mesh__data": 1, "mesh__fsdp": 1, "mesh__context": 4, "mesh__tensor": 2}, 1)],
    often=[(0, MESH, 2)],
    ids=["0, each with half of the rows", "1, both with all rows"],
)
def test_a_signal_to_one_saves_on_all(alone, source, tmp_path, told, mesh, parts):
    """SIGTERM to one process: both stop at the same step with a checkpoint, and exit with 0.

    Other host counts, up: it began as a run of one process, and the examples and losses are that run's; also where the
    mesh splits positions and heads, not rows, over the processes.
    """
    up_to(4, alone, tmp_path / "run")
    pair = Pair(tmp_path, source, train__steps=2000, train__save_every=0, train__on_config_change="continue", **mesh)
    pair.start().at_step(8).processes[told].send_signal(signal.SIGTERM)
    pair.ends(0, 120)
    assert f"SIGTERM on process {told}" in pair.output(0)
    saved = max(int(p.name) for p in (pair.workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == runs.lines(pair.workdir)[-1]["step"]
    assert f"saved step {saved}; resume with" in pair.output(0)
    both = min(saved, 12)
    assert_same_run(numbers(pair.workdir)[:both], numbers(alone)[:both])
    for index in range(2):
        read, part = pair.read(index), index if parts == 2 else 0
        assert shares(source, part, 5, saved, parts) <= read and not shares(source, part, 1, 4, parts) & read


@tiers.exhaustive
@pytest.mark.slow
@tiers.parametrize("lost", [0, 1], often=[0])
def test_a_lost_process_ends_the_other_and_is_named(whole, source, tmp_path, lost):
    """SIGKILL of one ends the other within 60 s, non-zero, with the rank; resumed, the run is bit for bit the same."""
    pair = Pair(tmp_path, source, train__eval_every=6).start()
    pair.at_step(5)
    pair.processes[lost].kill()
    killed = time.monotonic()
    codes = pair.wait(60)
    assert time.monotonic() - killed < 60
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] not in (0, None)
    assert f"attnlab: process {lost} of 2" in pair.output(1 - lost).splitlines()[-1]
    if lost:
        pair.start().ends()
        assert numbers(pair.workdir) == numbers(whole.workdir)


@tiers.exhaustive
@pytest.mark.slow
@tiers.parametrize("hung", [0, 1], often=[0])
def test_a_process_that_hangs_ends_the_other_and_is_named(source, tmp_path, hung):
    """SIGSTOP of one ends the other in the time of cluster.timeout and a little, and itself once it runs again."""
    pair = Pair(tmp_path, source, train__steps=20000, train__save_every=0).start().at_step(3)
    pair.processes[hung].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert pair.processes[1 - hung].wait(60) not in (0, None)
    assert time.monotonic() - stopped < 2.5 * TIMEOUT
    assert f"attnlab: process {hung} of 2" in pair.output(1 - hung).splitlines()[-1]
    pair.processes[hung].send_signal(signal.SIGCONT)
    assert pair.wait(30)[hung] not in (0, None)


@pytest.mark.slow
def test_what_fails_in_one_is_told_by_the_other(source, tmp_path):
    """An error of one process ends the other, with its reason."""
    pair = Pair(tmp_path, source)
    pair.workdir.write_text("a file")
    codes = pair.start().wait(90)
    assert all(c != 0 for c in codes)
    assert "is a file, not a directory" in pair.output(0) and "process 0 of 2" in pair.output(1)


class Store:
    """The key-value store between processes, in one process; `answers` False: calls hang, as with a lost host."""

    def __init__(self):
        self.values, self.answers = {}, threading.Event()
        self.answers.set()

    def key_value_set(self, key, value, allow_overwrite=False):
        self.answers.wait()
        if key in self.values and not allow_overwrite:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_try_get(self, key):
        self.answers.wait()
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]

    def key_value_dir_get(self, prefix):
        self.answers.wait()
        return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]


@pytest.fixture
def three(monkeypatch):
    """Three watches over one store, a hundred times as fast as real ones; what each ends with, by index."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr("attnlab.train.processes._service", lambda: (store, "10.0.0.1:1234"))
    store, ended, watches = Store(), {}, []
    config = ClusterConfig(timeout=30, step_timeout=60)
    object.__setattr__(config, "timeout", 0.3)
    object.__setattr__(config, "step_timeout", 1)
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        watches.append(Processes(config, lambda reason, index=index: ended.setdefault(index, reason)))
    yield store, watches, ended
    store.answers.set()
    for watch in watches:
        watch.close()


def wait_for(ended, count, seconds=20):
    end = time.monotonic() + seconds
    while len(ended) < count and time.monotonic() < end:
        time.sleep(0.02)
    return ended


def test_the_watch_names_the_silent_one(three):
    """A process without a sign of life is named, with its last step, by all others."""
    store, watches, ended = three
    watches[2].at_step(7)
    time.sleep(0.2)
    watches[2].close()
    assert set(wait_for(ended, 2).values()) == {ended[0]} and set(ended) == {0, 1}
    assert "process 2 of 3" in ended[0] and "no sign of life" in ended[0] and "last step was 7" in ended[0]


def test_the_watch_names_the_late_one(three):
    """All alive and none gets on: those behind are named, with what they do. While one gets on, nobody is."""
    store, watches, ended = three
    for watch in watches:
        watch.at_step(4)
    for _ in range(12):
        time.sleep(0.1)
        watches[0].at_step(5)
    assert not ended
    watches[1].at_step(5)
    watches[2].follow(lambda: "data_wait", lambda: 0.0)
    said = wait_for(ended, 3)[1]
    assert "no step for 1 s; the last at step 4: process 2 on" in said and said.endswith("(data_wait)")


def test_the_watch_names_the_one_that_never_began(three):
    """Before the first step all may work as long as they need, until others wait for one of them."""
    store, watches, ended = three
    time.sleep(1.5)
    assert not ended
    for watch in watches[:2]:
        watch.at_step(1)
    watches[2].working()
    assert "no step for 1 s; the last on its way to the first: process 2 on" in wait_for(ended, 3)[0]


def test_who_holds_the_others_up(three):
    """What hosts need themselves is compared, since they were last asked; a tenth of a step behind is worth a word."""
    store, watches, ended = three
    stragglers, took, busy = Stragglers(), (0.01, 0.02, 0.5), [0.0, 0.0, 0.0]
    assert stragglers.spread({}) is None
    for index, watch in enumerate(watches):
        watch.follow(lambda: "step", lambda index=index: busy[index])
    for step, spread in ((2, None), (6, "seen")):
        busy[:] = [5 + (step - 2) * each for each in took]
        for watch in watches:
            watch.at_step(step)
        time.sleep(0.15)
        found = stragglers.spread(watches[0].lives())
        assert (found is None) == (spread is None)
    record = {"host_seconds_min": 0.01, "host_seconds_max": 0.5, "slowest_process": 2}
    assert found.record() == pytest.approx(record) and not watches[1].lives()
    assert found.note(1.0) == f"process 2 on {socket.gethostname()} is 0.485 s a step behind"
    assert found.note(4.9) == found.note(None) == ""


def test_long_work_in_a_step_is_no_hang(three):
    """An evaluation may take longer than a step is given, as long as it gets on."""
    store, watches, ended = three
    for watch in watches:
        watch.at_step(4)
    for _ in range(15):
        time.sleep(0.1)
        watches[1].working()
    assert not ended
    assert "the last at step 4: process 0 on" in wait_for(ended, 3)[2]


def test_the_watch_names_the_coordinator(three):
    """A coordinator that does not answer is what all others end with, though their calls to it never return."""
    store, watches, ended = three
    store.answers.clear()
    assert "process 0 of 3 at 10.0.0.1:1234, the coordinator, has not answered" in wait_for(ended, 3)[1]


def test_a_failure_is_told_to_all(three):
    """The first reason is everybody's, whatever fails afterwards."""
    store, watches, ended = three
    watches[1].failed(UserError("the disk is full\nand more"))
    watches[2].failed(UserError("cancelled"))
    assert set(wait_for(ended, 3)) == {0, 1, 2}
    assert all("process 1 of 3" in reason and "failed: the disk is full" in reason for reason in ended.values())


def test_all_stop_at_the_same_step(three):
    """A signal to one stops all at a step that none has begun."""
    store, watches, ended = three
    assert [watch.agree_to_stop(4, None) for watch in watches] == [None] * 3
    assert watches[1].agree_to_stop(5, "SIGTERM") is None
    stops = [[watch.agree_to_stop(step, None) for step in (6, 7, 8)] for watch in watches]
    assert stops == [[None, None, "SIGTERM on process 1"]] * 3


@pytest.mark.slow
def test_absent_others_are_told(tmp_path):
    """A process whose coordinator never comes says so in the time given; and a coordinator whose others do not."""
    (tmp_path / "config.py").write_text("def get_config(arg=None):\n    return {}\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    waiting = [
        subprocess.Popen(
            [
                sys.executable, "-m", "attnlab", "train", "--config", tmp_path / "config.py",
                "--workdir", tmp_path / "run", f"--config.cluster.coordinator=127.0.0.1:{at}",
                "--config.cluster.processes=2", f"--config.cluster.index={index}", "--config.cluster.start_timeout=2",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=runs.ROOT,
        )
        for index, at in ((0, port), (1, 9))
    ]  # fmt: skip
    first, second = (process.communicate(timeout=90)[0].strip().splitlines()[-1] for process in waiting)
    assert [process.returncode for process in waiting] == [1, 2]
    assert first.startswith("attnlab: not all processes of this run were there in 2 s")
    assert "process 0 did not answer at cluster.coordinator = 127.0.0.1:9 in 2 s" in second


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOBSET_NAME": "a"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_surroundings(environment, several):
    """Where several processes are started together, they are looked for; elsewhere not."""
    assert cluster._in_cluster(environment) is several


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"coordinator": "a:1"}, "coordinator, processes and index together"),
        ({"coordinator": "a", "processes": 2, "index": 0}, "host:port"),
        ({"coordinator": "a:1", "processes": 2, "index": 2}, "0 to 1"),
        ({"find": "somewhere"}, "auto, none"),
        ({"timeout": 1}, "5 or more"),
    ],
)
def test_mistakes_are_told(fields, says):
    """A wrong cluster is refused with what is allowed."""
    with pytest.raises(UserError, match=says):
        ClusterConfig(**fields)
