"""The Hopper kernels of recurrences, local linear attention, Parallax and cross-entropy by the real ptxas: no spills,
no serialized tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import hopper
from tests import tiers
from tests.kernels_pallas.test_flash_gpu_compile import absent

SWEEPS = [f"linear_recurrence_{name}" for name in ("backward_keys", "backward_queries", "backward_values", "forward")]
KERNELS = {
    "recurrence 128/128 aps": SWEEPS,
    "recurrence 256/256 aps": SWEEPS,
    "flow 128/128 ps": ["flow_backward", "flow_forward"],
    "agent 128/128 kps": ["agent_attention_backward", "agent_attention_forward"],
    "loss 1000/20000": ["cross_entropy_slopes", "cross_entropy_value"],
    "local 128 i": [f"local_linear_{name}" for name in ("adjoint", "backward", "backward_rows", "forward")],
    "local 64 i": [f"local_linear_{name}" for name in ("adjoint", "backward", "backward_rows", "forward")],
    "parallax 128 i": [f"parallax_{name}" for name in ("backward", "backward_rows", "forward")],
}

SPILLS = {"local 128 i": 80, "agent 128/128 kps": 12, "flow 128/128 ps": 16}  # bytes


@tiers.exhaustive
@pytest.mark.skipif(absent() is not None, reason=str(absent()))
@tiers.parametrize("case", KERNELS, often=["recurrence 128/128 aps"])
def test_compiles_without_spills(case):
    """The widest heads, with everything: forward and backward; memory that two of a kernel's blocks need not share."""
    command = [sys.executable, "-m", "tests.kernels_pallas.ahead_of_time", case]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(x["kernel"] for x in found) == KERNELS[case]
    for kernel in found:
        assert not kernel["serialized"] and kernel["spills"] <= SPILLS.get(case, 0), kernel
        assert kernel["shared_memory"] <= hopper.SMEM_BYTES, kernel
