"""An import by two processes of four devices each: one workdir, and each reads its own half of the bytes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from attnlab.interchange import importing
from attnlab.train import restore
from attnlab.train.program import Program
from attnlab.train.state import flat
from tests import tiers
from tests.flags import UNOPTIMISED
from tests.interchange import checkpoints
from tests.train import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@tiers.exhaustive
def test_each_process_reads_its_own_bytes(tmp_path):
    source = runs.corpus(tmp_path / "text")
    folder = checkpoints.write(tmp_path / "from", "qwen3", files=2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(runs.ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4" + UNOPTIMISED
    wide = checkpoints.tensors("qwen3")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wide[name] = np.resize(wide[name], (264, checkpoints.D))
    for file in folder.glob("model*"):
        file.unlink()
    checkpoints.write_file(folder / "model.safetensors", wide)
    checkpoints.write_config(folder, "qwen3", vocab_size=264)
    args = [
        "import", "--from", str(folder), "--workdir", str(tmp_path / "run"), f"--config.data.source={source}",
        "--config.data.tokenizer=bytes", "--config.data.length=32", "--config.mesh.data=1",
        "--config.mesh.fsdp=8", f"--config.cluster.coordinator=127.0.0.1:{port}", "--config.cluster.processes=2",
    ]  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "attnlab", *args, f"--config.cluster.index={i}"],
            env=env, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    each = [float(re.search(r"read ([\d.]+) kB", text)[1]) for text in said]
    whole = sum(a.nbytes for a in wide.values()) / 1e3
    # What is not split, norms, both read.
    assert max(each) < 0.55 * whole and whole <= sum(each) < 1.1 * whole

    one = ["mesh.data=1", "mesh.fsdp=1"]
    trained = restore.load(tmp_path / "run", overrides=one, evaluating=False)
    plan = importing.plan(folder, None, None, ["data.tokenizer=bytes", *one])
    program = Program.of(plan.config, jax.devices()[:1], batches=False)
    alone = flat(importing.parameters(plan, program, lambda count: None))
    for name, array in flat(trained.params).items():
        np.testing.assert_array_equal(array, alone[name])
