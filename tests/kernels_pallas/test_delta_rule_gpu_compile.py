"""The delta rule's Hopper kernels by the real ptxas, with no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import hopper
from tests.kernels_pallas.test_flash_gpu_compile import absent

CASES = ["delta 64", "delta 128 ps", "delta 128/256 ps"]
# Registers of a thread, the most by the ptxas of jax 0.10.2 and of 0.12.0.
REGISTERS = {
    "delta_rule_pairs": 190,
    "delta_rule_forward": 245,
    "delta_rule_backward_states": 210,
    "delta_rule_backward_chunks": 200,
}


@pytest.mark.skipif(absent() is not None, reason=str(absent()))
def test_compiles_without_spills():
    """No spills, no product that waits for the one before, memory and registers within what is recorded. The forward
    is there twice: what only the backward needs is not stored without one."""
    command = [sys.executable, "-m", "tests.kernels_pallas.ahead_of_time", *CASES]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for case in CASES:
        names = sorted(x["kernel"] for x in found if x["case"] == case)
        assert names == sorted([*REGISTERS, "delta_rule_forward"])
    for kernel in found:
        assert not kernel["serialized"] and not kernel["spills"], kernel
        assert kernel["registers"] <= REGISTERS[kernel["kernel"]], kernel
        assert kernel["shared_memory"] <= hopper.SMEM_BYTES, kernel
