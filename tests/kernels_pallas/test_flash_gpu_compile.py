"""The Hopper kernels by the real ptxas, with no GPU: no spills, products that overlap, shared memory that is there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import jaxlib
import pytest

from kernels_pallas import hopper
from tests import tiers

# Bytes that a kernel may spill. A cap keeps its slope beside weights and scores, and the last statistics are read after
# the product instead of being where the accumulator starts.
SPILLS = {
    ("64 iscgb", "flash_backward"): 80,
    ("128 iscgb", "flash_backward"): 24,
    ("256 iscgb", "flash_backward_keys"): 8,
    ("256 iscgb", "flash_backward_rows"): 24,
    ("masked 64 2g|1g scgb", "masked_backward"): 88,
    ("masked 128 2g|1g scgb", "masked_backward"): 28,
    ("masked 256 2g|1g scgb", "masked_forward"): 12,
    ("masked 256 2g|1g scgb", "masked_backward_rows"): 20,
}
_MASKED = ["masked_backward", "masked_forward"]
_MASKED_APART = ["masked_backward_keys", "masked_backward_rows", "masked_forward"]
KERNELS = {
    "64 i": ["flash_backward", "flash_forward"],
    "64 iscgb": ["flash_backward", "flash_forward"],
    "128 i": ["flash_backward", "flash_forward"],
    "128 iscgb": ["flash_backward", "flash_forward"],
    "128 isgbd": ["flash_backward_keys", "flash_backward_rows", "flash_forward"],
    "256 i": ["flash_backward_keys", "flash_backward_rows", "flash_forward"],
    "256 iscgb": ["flash_backward_keys", "flash_backward_rows", "flash_forward"],
    "128 r": ["routed_backward", "routed_forward"],
    "256 r": ["routed_backward_keys", "routed_backward_rows", "routed_forward"],
    "masked 64 1": _MASKED,
    "masked 64 g": _MASKED,
    "masked 64 2g|1g scgb": _MASKED,
    "masked 64 4g|4g sgb": _MASKED_APART,
    "masked 128 1": _MASKED,
    "masked 128 g": _MASKED,
    "masked 128 2g|1g scgb": _MASKED,
    "masked 128 4g|4g sgbd": _MASKED_APART,
    "masked 256 1": _MASKED_APART,
    "masked 256 2g|1g scgb": _MASKED_APART,
}
OFTEN = ["128 iscgb", "128 r", "masked 128 g"]


def absent() -> str | None:
    """Which package of the compiler is missing, or None."""
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            if importlib.metadata.version(package) != jaxlib.__version__:
                return f"{package} is not of jaxlib's version, {jaxlib.__version__}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed, and with it ptxas"
    return None


@tiers.exhaustive
@pytest.mark.skipif(absent() is not None, reason=str(absent()))
@tiers.parametrize(
    "cases", [OFTEN, [case for case in KERNELS if case not in OFTEN]], often=[OFTEN], ids=["often", "rest"]
)
def test_compiles_without_spills(cases):
    """Widths 64 to 256, every feature: forward and backward; the exceptions are those listed, and no more."""
    command = [sys.executable, "-m", "tests.kernels_pallas.ahead_of_time", *cases]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    by_case = {case: sorted(x["kernel"] for x in found if x["case"] == case) for case in cases}
    assert by_case == {case: KERNELS[case] for case in cases}
    for kernel in found:
        assert not kernel["serialized"], kernel
        assert kernel["spills"] <= SPILLS.get((kernel["case"], kernel["kernel"]), 0), kernel
        assert kernel["shared_memory"] <= hopper.SMEM_BYTES, kernel
