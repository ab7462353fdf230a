"""Flow attention's kernels for Hopper with no GPU: interpreted, against the definition in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops.flow_definition import FlowRule
from kernels_pallas.flow_attention import Rule, flow_attention
from tests import tiers
from tests.kernels_pallas.recurrences import assert_refused
from tests.kernels_pallas.test_flash_gpu import needs_interpreter
from tests.kernels_pallas.test_flow_attention import COUNT, PLAIN, STARTS, exact, inputs, results, typed, uses

EVERY = FlowRule(epsilon=1e-2)
CASES = {
    "documents, state, widths that fill no tile": dict(length=130, starts=STARTS[2:3], given=True, rule=EVERY,
                                                       widths=(24, 65)),
    "no second flow": dict(length=70, rule=FlowRule(False, False, None, 1e-2)),
    "competition": dict(length=7, rule=FlowRule(allocation=False), given=True),
    "allocation": dict(length=40, rule=FlowRule(competition=False), starts=((9, 33),)),
    "keys of two tiles": dict(length=200, widths=(70, 128)),
}  # fmt: skip
SLOW = list(CASES)[1:]


def close(found, expected, tolerance, name):
    """As a share of the largest, rounding to bfloat16 included where the tolerance is of that."""
    off = np.abs(found - expected).max()
    assert off <= tolerance * np.abs(expected).max(), f"{name}: {off / np.abs(expected).max()}"


@needs_interpreter
@pytest.mark.parametrize("name", [next(iter(CASES)), *(pytest.param(n, marks=tiers.exhaustive) for n in SLOW)])
def test_equals_the_definition(name):
    """Outputs, flows, all sums and every gradient; flows and sums of features as exact as float32, and nothing that is
    read or written is in no order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    case = CASES[name]
    rule = case.get("rule", PLAIN)
    own = Rule(rule.competition, rule.allocation, rule.clip or 0.0, rule.epsilon)
    arrays, documents = inputs(**case, dtype="bfloat16")

    def run(arrays, documents):
        state = (jnp.full(len(arrays["q"]), COUNT, jnp.int32), arrays["state"]) if "state" in arrays else None
        o, outgoing, after = flow_attention(
            *(arrays[name] for name in "qkv"), own, documents=documents, state=state, platform="cuda",
            interpret=plgpu.InterpretGPUParams(detect_races=True),
        )  # fmt: skip
        return o, outgoing, {name: x if uses(rule)[name] else None for name, x in after._asdict().items()}

    found = results(run, typed(arrays, "bfloat16"), documents, rule)
    assert not gpu_callbacks.get_races().races_found
    expected = exact(arrays, documents, rule)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if "gradients" in name:  # of parts that cancel, rounded to bfloat16
            assert np.sqrt(((a - b) ** 2).mean() / (b**2).mean()) < 0.015, name
            continue
        exactly = {"['o']": 0.008, "['after']['pairs']": 0.004, "['outgoing']": 1e-6}
        close(a, b, exactly.get(name, 1e-6), name)


@pytest.mark.parametrize("change, says", [
    ({"dtype": "float32"}, "on GPUs it computes bfloat16, not float32"),
    ({"width": 136}, "at most 128, not 136 and 8"),
    ({"platform": "rocm"}, "'rocm'; allowed: tpu, cuda"),
])  # fmt: skip
def test_refusals(change, says):
    """Said before anything is compiled, with what is allowed."""
    assert_refused(flow_attention, f"flow_attention.*{says}", **{"platform": "cuda"} | change)
