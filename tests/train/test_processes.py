"""Two processes of four devices each on this machine: one run, watched by both."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from attnlab.errors import UserError
from attnlab.launch import cluster
from attnlab.train.config import ClusterConfig
from tests.train import runs

pytestmark = pytest.mark.timeout(600)


class Pair:
    """Processes 0 and 1 of a run, and what they print."""

    def __init__(self, directory: pathlib.Path, source: str, **more: object):
        self.directory, self.workdir = directory, directory / "run"
        mesh = {"data__length": 16, "mesh__data": 4, "mesh__fsdp": 2}
        self.config = runs.write_config(directory / "config.py", source, **mesh, **more)
        self.processes: list[subprocess.Popen] = []

    def start(self, *overrides: str) -> Pair:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {**os.environ, "PYTHONPATH": str(runs.ROOT), "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "attnlab", "train", "--config", self.config, "--workdir", str(self.workdir),
                    f"--config.cluster.coordinator=127.0.0.1:{port}", "--config.cluster.processes=2",
                    f"--config.cluster.index={i}", "--config.cluster.timeout=10", *overrides,
                ],
                env=env, stdout=(self.directory / f"out{i}").open("w"), stderr=subprocess.STDOUT, cwd=runs.ROOT,
            )
            for i in range(2)
        ]  # fmt: skip
        return self

    def output(self, index: int) -> str:
        return (self.directory / f"out{index}").read_text()

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; the processes are killed if they do not come in time."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()

    def at_step(self, step: int, seconds: float = 200) -> Pair:
        """Waits until a step is logged."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (self.workdir / "metrics.jsonl").exists() and runs.lines(self.workdir)[-1:] and (
                runs.lines(self.workdir)[-1]["step"] >= step
            ):
                return self
            if any(p.poll() is not None for p in self.processes):
                break
            time.sleep(0.2)
        self.wait(0)
        raise AssertionError(f"step {step} never came:\n{self.output(0)[-2000:]}\n---\n{self.output(1)[-2000:]}")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("corpus") / "files")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A run of two processes that nothing disturbs."""
    pair = Pair(tmp_path_factory.mktemp("whole"), source).start()
    codes = pair.wait(300)
    assert codes == [0, 0], pair.output(0)[-2000:] + pair.output(1)[-2000:]
    return pair


def numbers(pair, keys=("step", "loss", "heldout_loss", "tokens")):
    return [{k: line[k] for k in keys if k in line} for line in runs.lines(pair.workdir)]


@pytest.mark.slow
def test_two_processes_are_one_run(whole, source, tmp_path):
    """Losses are those of one process on one device; one process writes, and what it writes is whole."""
    runs.run(runs.config(source, data__length=16), tmp_path)
    for ours, alone in zip(numbers(whole), runs.lines(tmp_path), strict=True):
        assert ours["step"] == alone["step"] and ours["tokens"] == alone["tokens"]
        assert abs(ours["loss"] - alone["loss"]) < 1e-5
    assert "step 12/12" in whole.output(0) and "step 12/12" not in whole.output(1)
    assert len((whole.workdir / "samples.txt").read_text()) > 0


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_is_named(whole, source, tmp_path):
    """SIGKILL of one ends the other within 60 s, non-zero, with the rank; the run then goes on bit for bit."""
    pair = Pair(tmp_path, source, train__steps=2000, train__eval_every=0).start()
    pair.at_step(6)
    pair.processes[1].kill()
    killed = time.monotonic()
    codes = pair.wait(60)
    assert time.monotonic() - killed < 60
    assert codes[0] not in (0, None) and codes[1] == -signal.SIGKILL
    assert "process 1 of 2" in pair.output(0)


@pytest.mark.slow
def test_killed_and_started_again_is_bit_identical(whole, source, tmp_path):
    """What a run logs after a kill and a restart is what it would have logged."""
    pair = Pair(tmp_path, source).start()
    pair.at_step(5)
    for p in pair.processes:
        p.kill()
    pair.wait(5)
    assert pair.start().wait(300) == [0, 0], pair.output(0)[-2000:]
    assert numbers(pair) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("told", [1])
def test_a_signal_to_one_saves_on_all(source, tmp_path, told):
    """SIGTERM to one process: both stop at the same step with a checkpoint, and exit with 0."""
    pair = Pair(tmp_path, source, train__steps=2000, train__eval_every=0, train__save_every=0).start()
    pair.at_step(3).processes[told].send_signal(signal.SIGTERM)
    assert pair.wait(120) == [0, 0], pair.output(0)[-2000:] + pair.output(1)[-2000:]
    assert f"SIGTERM on process {told}" in pair.output(0)
    (saved,) = [int(p.name) for p in (pair.workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == runs.lines(pair.workdir)[-1]["step"]


@pytest.mark.slow
def test_what_fails_in_one_is_told_by_the_other(source, tmp_path):
    """An error of one process ends the other, with its reason."""
    pair = Pair(tmp_path, source)
    pair.workdir.write_text("a file")
    codes = pair.start().wait(90)
    assert all(c != 0 for c in codes)
    assert "is a file, not a directory" in pair.output(0) and "process 0 of 2" in pair.output(1)


def test_absent_others_are_told(tmp_path):
    """A process whose coordinator never comes says so in the time that it was given."""
    (tmp_path / "config.py").write_text("def get_config(arg=None):\n    return {}\n")
    program = (
        "import sys\nfrom attnlab.launch import cluster\nfrom attnlab.errors import UserError\n"
        "try:\n    cluster.start(sys.argv[1], ['cluster.coordinator=127.0.0.1:9', 'cluster.processes=2', 'cluster.index=1',"
        " 'cluster.start_timeout=3'])\nexcept UserError as e:\n    print('TOLD', e)\n    import os; sys.stdout.flush(); os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "config.py")], capture_output=True, text=True, timeout=90,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
    )  # fmt: skip
    assert "did not answer at cluster.coordinator = 127.0.0.1:9 in 3 s" in done.stdout, done.stdout + done.stderr


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
