"""Agent attention's kernels for Hopper with no GPU: interpreted, against the definition in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.agent_attention import gpu_agent_attention
from tests import tiers
from tests.kernels_pallas.recurrences import assert_close, assert_refused, documents_of, starts_of
from tests.kernels_pallas.test_agent_attention import definition, exact, given, inputs, results
from tests.kernels_pallas.test_flash_gpu import needs_interpreter

# T, H, m, d, e, documents, state, agents of each sequence: documents begin inside chunks of 64 and at their edges,
# rings go round, nothing fills its tile.
CASES = [
    (210, 1, 5, 24, 65, True, True, True),
    pytest.param((192, 2, 64, 128, 128, False, False, False), marks=tiers.exhaustive),
    pytest.param((7, 2, 1, 70, 16, True, False, False), marks=tiers.exhaustive),
]


def run(q, k, v, agents, log=None, values=None, *, starts=None, races=False):
    """o, the state after it, and which heads are exact."""
    state = None if log is None else (log, values)
    interpret = plgpu.InterpretGPUParams(detect_races=True) if races else True
    return gpu_agent_attention(q, k, v, agents, starts=starts, state=state, interpret=interpret)


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_equals_the_definition(case):
    """The output, the state after it and every gradient; and nothing is read or written that barriers do not put in
    order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    T, H, m, d, e, packed, state, own = case
    arrays = given(inputs(T, H, m, d, e, state, own), "bfloat16")
    documents = documents_of(T) if packed else None
    starts = None if documents is None else jnp.asarray(starts_of(documents))

    def checked(**arrays):
        o, end, heads = run(**arrays, starts=starts, races=True)
        return jnp.where(heads.all(), o, jnp.nan), end

    found, expected = results(checked, arrays), exact(arrays, documents)
    assert not gpu_callbacks.get_races().races_found
    assert_close(found, {name: expected.pop(name) for name in ("o", "log_end", "values_end")}, 0.008)  # a last place
    assert_close(found, expected, 0.015)


@needs_interpreter
def test_what_is_not_exact_is_known():
    """One sequence's logits are 2^100 apart inside of a chunk, and it says so; the other's output is exact, and so are
    both states."""
    arrays = given(inputs(70, 1, 3, 16, 16, False), "bfloat16")
    far = jnp.where(jnp.arange(70) < 20, -1.0, 1.0)[:, None, None] * 16 * jnp.sign(arrays["agents"][0, 0])
    arrays["k"] = arrays["k"].at[0].set(far.astype("bfloat16"))
    o, (log, values), heads = jax.jit(run)(**arrays)
    assert heads[:, 0].tolist() == [False, True]
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float32), jnp.float64) for name, x in arrays.items()}
        expected_o, expected = jax.tree.map(np.asarray, definition(**wide))
    assert_close({"o": np.asarray(o[1:], np.float32)}, {"o": expected_o[1:]}, 0.008)
    assert_close({"log": log, "values": values}, dict(zip(("log", "values"), expected)), 0.008)


@pytest.mark.parametrize("change, says", [
    ({"dtype": "float32"}, "on GPUs it computes bfloat16, not float32"),
    ({"width": 136}, "at most 128, not 136 and 8"),
    ({"agents": 65}, "at most 64 agents, not 65"),
])  # fmt: skip
def test_refusals(change, says):
    """Said before anything is compiled, with what is allowed."""
    agents = jax.ShapeDtypeStruct((2, change.pop("agents", 3), change.get("width", 8)), change.get("dtype", "bfloat16"))
    attend = lambda q, k, v: gpu_agent_attention(q, k, v, jnp.zeros(agents.shape, agents.dtype))
    assert_refused(attend, f"agent_attention.*{says}", **change)
