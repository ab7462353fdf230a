"""Flow attention's kernel for Hopper with no GPU: interpreted, against the definition in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops.flow_definition import FlowRule
from kernels_pallas.flow_attention import Rule, Sums, flow_attention
from tests.kernels_pallas.recurrences import assert_refused
from tests.kernels_pallas.test_flash_gpu import needs_interpreter
from tests.kernels_pallas.test_flow_attention import COUNT, PLAIN, STARTS, defined, inputs, typed, uses

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
    expected = np.asarray(expected)
    off = np.abs(np.asarray(found.astype(jnp.float32)) - expected).max()
    assert off <= tolerance * np.abs(expected).max(), name


@needs_interpreter
@pytest.mark.parametrize("name", [next(iter(CASES)), *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_equals_the_definition(name):
    """Outputs, flows and all sums; flows and sums of features as exact as float32, and nothing that is read or written
    is in no order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    case = CASES[name]
    rule = case.get("rule", PLAIN)
    arrays, documents = inputs(**case, dtype="bfloat16")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        o, outgoing, after = jax.tree.map(np.asarray, defined(rule, wide, documents))
    own = Rule(rule.competition, rule.allocation, rule.clip or 0.0, rule.epsilon)
    given = typed(arrays, "bfloat16")
    if state := given.pop("state", None):
        state = jnp.full(len(o), COUNT, jnp.int32), state
    races = plgpu.InterpretGPUParams(detect_races=True)
    run = functools.partial(flow_attention, rule=own, documents=documents, state=state, platform="cuda")
    found = jax.jit(functools.partial(run, interpret=races))(**given)
    assert not gpu_callbacks.get_races().races_found
    close(found[0], o, 0.008, "o")
    close(found[2].pairs, after["pairs"], 0.004, "pairs")
    if outgoing is None:
        assert found[1] is None
    else:
        close(found[1], outgoing, 1e-6, "outgoing")
    for name in (name for name in Sums._fields if uses(rule)[name] and name != "pairs"):
        close(getattr(found[2], name), after[name], 1e-6, name)


@pytest.mark.parametrize("change, says", [
    ({"dtype": "float32"}, "on GPUs it computes bfloat16, not float32"),
    ({"width": 136}, "at most 128, not 136 and 8"),
    ({"platform": "rocm"}, "'rocm'; allowed: tpu, cuda"),
])  # fmt: skip
def test_refusals(change, says):
    """Said before anything is compiled, with what is allowed."""
    assert_refused(flow_attention, f"flow_attention.*{says}", **{"platform": "cuda"} | change)
