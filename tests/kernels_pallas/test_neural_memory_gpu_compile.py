"""The neural memory's Hopper kernels by the real ptxas, with no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import hopper
from tests.kernels_pallas.test_flash_gpu_compile import absent

KERNELS = [
    "neural_memory_again",
    "neural_memory_backward",
    "neural_memory_backward_groups",
    "neural_memory_forward",
]
CASE = "memory 64 chunk 16"
SPILLS = {"neural_memory_backward_groups": 660}  # bytes


@pytest.mark.skipif(absent() is not None, reason=str(absent()))
def test_compiles():
    """Documents and a state, several chunks a group: no spills but those recorded, no product that waits for the one
    before."""
    command = [sys.executable, "-m", "tests.kernels_pallas.ahead_of_time", CASE]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(x["kernel"] for x in found) == KERNELS
    for kernel in found:
        assert not kernel["serialized"] and kernel["spills"] <= SPILLS.get(kernel["kernel"], 0), kernel
        assert kernel["shared_memory"] <= hopper.SMEM_BYTES, kernel
