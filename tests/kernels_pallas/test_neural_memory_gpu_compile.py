"""The neural memory's Hopper kernels by the real ptxas, with no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import hopper
from tests import tiers
from tests.kernels_pallas.test_flash_gpu_compile import absent

KERNELS = "again", "backward", "backward_groups", "forward"
DEEP = "deep_again", "deep_backward", "deep_forward"
# Bytes that kernels spill, in the order of their names, by the case.
SPILLS = {
    "memory 64 chunk 16": dict(zip(KERNELS, (0, 0, 660, 0))),
    "memory 64 chunk 16 norm": dict(zip(KERNELS, (280, 264, 716, 4))),
    "memory 64/64 chunk 16 norm": dict(zip(DEEP, (0, 0, 0))),
}


@pytest.mark.skipif(absent() is not None, reason=str(absent()))
@tiers.exhaustive
@pytest.mark.parametrize("case", SPILLS)
def test_compiles(case):
    """Documents and a state, several chunks a group, without and with the norm, of two layers: no spills but those
    recorded, no product that waits for the one before."""
    command = [sys.executable, "-m", "tests.kernels_pallas.ahead_of_time", case]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    names = [kernel["kernel"].removeprefix("neural_memory_") for kernel in found]
    assert sorted(names) == sorted(SPILLS[case])
    for name, kernel in zip(names, found):
        assert not kernel["serialized"], kernel
        assert kernel["spills"] <= SPILLS[case][name], kernel
        assert kernel["shared_memory"] <= hopper.SMEM_BYTES, kernel
