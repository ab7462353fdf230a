"""The delta rule's Hopper kernels by the real ptxas, with no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import hopper
from tests import tiers
from tests.kernels_pallas.test_flash_gpu_compile import absent

FORWARD = ["delta_rule_forward", "delta_rule_pairs"]
KERNELS = {
    "delta 64 f": FORWARD,
    "delta 128 ps": ["delta_rule_backward_chunks", "delta_rule_backward_states", *FORWARD],
}
# Registers of a thread, the most by the ptxas of jax 0.10.2 and of 0.12.0.
REGISTERS = {
    "delta_rule_pairs": 190,
    "delta_rule_forward": 255,
    "delta_rule_backward_states": 205,
    "delta_rule_backward_chunks": 241,
}


@tiers.exhaustive
@pytest.mark.skipif(absent() is not None, reason=str(absent()))
def test_compiles_without_spills():
    """No spills, no product that waits for the one before, memory and registers within what is recorded."""
    command = [sys.executable, "-m", "tests.kernels_pallas.ahead_of_time", *KERNELS]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {case: sorted(x["kernel"] for x in found if x["case"] == case) for case in KERNELS} == KERNELS
    for kernel in found:
        assert not kernel["serialized"] and not kernel["spills"], kernel
        assert kernel["registers"] <= REGISTERS[kernel["kernel"]], kernel
        assert kernel["shared_memory"] <= hopper.SMEM_BYTES, kernel
