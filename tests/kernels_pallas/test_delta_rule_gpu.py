"""The delta rule's Hopper kernels with no GPU: run by jax's GPU interpreter where there is one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.delta_rule import Sizes, delta_rule
from tests.kernels_pallas.recurrences import assert_close, documents_of, results, rounded, starts_of
from tests.kernels_pallas.test_delta_rule import exact, inputs
from tests.kernels_pallas.test_flash_gpu import needs_interpreter

# T, H, d, e, documents, state: documents begin inside chunks of 64 and at their edges, rings go round.
CASES = [
    (200, 1, 24, 130, True, True),
    (128, 1, 128, 64, False, False),
    (7, 2, 5, 17, True, True),
]


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_equals_the_definition(case):
    """Values and every gradient, and nothing is read or written that barriers do not put in order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    T, H, d, e, packed, state = case
    arrays = rounded(inputs(T, H, d, e, state), "bfloat16")
    documents = documents_of(T) if packed else None
    starts = jnp.asarray(starts_of(documents)) if packed else None
    races = plgpu.InterpretGPUParams(detect_races=True)
    found = results(functools.partial(delta_rule, starts=starts, platform="cuda", interpret=races), arrays)
    assert_close(found, exact(arrays, documents), 0.015)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"dtype": "float32"}, "cuda: on GPUs it computes bfloat16, not float32"),
        ({"width": 136}, "cuda: on GPUs keys are at most 128 wide, not 136"),
        ({"sizes": Sizes()}, "cuda: sizes=.* allowed: None"),
        ({"platform": "rocm"}, "no kernel for platform 'rocm'; allowed: tpu, cuda"),
    ],
)
def test_what_the_kernels_cannot_do(changes, says):
    """Said before anything is compiled, with what is allowed."""
    q = jax.ShapeDtypeStruct((1, 8, 1, changes.get("width", 64)), changes.get("dtype", "bfloat16"))
    number = jax.ShapeDtypeStruct((1, 8, 1), jnp.float32)
    options = {"platform": "cuda"} | {name: x for name, x in changes.items() if name in ("sizes", "platform")}
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda q, number: delta_rule(q, q, q, number, number, **options), q, number)
