"""Two processes of one run on this machine, of four devices each."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from tests.flags import UNOPTIMISED
from tests.train import runs

MESH = {"mesh__data": 4, "mesh__fsdp": 2}
SMALL = {
    "model__layers": 1, "data__length": 16, "train__eval_every": 0, "train__steps": 12, "train__keep": 3,
    "train__sample_tokens": 0, "optimizer__schedule": "constant",
}  # fmt: skip
TIMEOUT = 8  # of a sign of life

# The command line, in a process that writes down which rows of the data it reads.
RECORDED = """
import json, sys
from attnlab.data.packing import PackedRows
pack = PackedRows.pack
def recorded(self, indices):
    batch = pack(self, indices)
    print(json.dumps([int(i) for i in indices]), file=open(sys.argv[1], "a"))
    return batch
PackedRows.pack = recorded
from attnlab.cli import main
sys.exit(main(sys.argv[2:]))
"""


class Pair:
    """Processes 0 and 1 of a run, and what they print."""

    def __init__(self, directory: pathlib.Path, source: str, code: str = RECORDED, **more: object):
        self.directory, self.workdir, self.code = directory, directory / "run", code
        self.config = runs.write_config(directory / "config.py", source, **{**SMALL, **MESH, **more})
        self.processes: list[subprocess.Popen] = []

    def start(self, *overrides: str) -> Pair:
        """Starts both; `{}` in an override is the index of the process."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {**os.environ, "PYTHONPATH": str(runs.ROOT), "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4" + UNOPTIMISED
        env["TF_CPP_MIN_LOG_LEVEL"] = "2"
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable, "-c", self.code, str(self.directory / f"rows{i}"),
                    "train", "--config", self.config, "--workdir", str(self.workdir),
                    f"--config.cluster.coordinator=127.0.0.1:{port}", "--config.cluster.processes=2",
                    f"--config.cluster.index={i}", f"--config.cluster.timeout={TIMEOUT}",
                    *(text.replace("{}", str(i)) for text in overrides),
                ],
                env=env, stdout=(self.directory / f"out{i}").open("w"), stderr=subprocess.STDOUT, cwd=runs.ROOT,
            )
            for i in range(2)
        ]  # fmt: skip
        return self

    def output(self, index: int) -> str:
        return (self.directory / f"out{index}").read_text()

    def read(self, index: int) -> set[tuple[int, ...]]:
        """The rows of each batch that a process read."""
        return {tuple(json.loads(line)) for line in (self.directory / f"rows{index}").read_text().splitlines()}

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; the processes are killed if they do not come in time."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for p in self.processes:
            p.kill()
            p.wait()

    def ends(self, code: int = 0, seconds: float = 300) -> Pair:
        """Waits until both end, with this code."""
        assert self.wait(seconds) == [code, code], f"{self.output(0)[-2000:]}\n---\n{self.output(1)[-2000:]}"
        return self

    def at_step(self, step: int, seconds: float = 200) -> Pair:
        """Waits until a step is logged."""
        end, metrics = time.monotonic() + seconds, self.workdir / "metrics.jsonl"
        while time.monotonic() < end and all(p.poll() is None for p in self.processes):
            if metrics.exists() and any(line["step"] >= step for line in runs.lines(self.workdir)[-1:]):
                return self
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"step {step} never came:\n{self.output(0)[-2000:]}\n---\n{self.output(1)[-2000:]}")
