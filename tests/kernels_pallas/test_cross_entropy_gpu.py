"""Cross-entropy's Hopper kernels with no GPU: run by jax's GPU interpreter where there is one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.cross_entropy import Sizes, cross_entropy, gpu_tiles
from tests.kernels_pallas.test_cross_entropy import defined, inputs, results, worst
from tests.kernels_pallas.test_flash_gpu import needs_interpreter


# N, D, V, chunk: rows, width and columns that no tile divides; several chunks, and a ring that goes round.
@needs_interpreter
@pytest.mark.parametrize("case", [(140, 200, 1100, 512), (128, 64, 256, 8192)], ids=lambda c: "-".join(map(str, c)))
def test_is_log_softmax(case, monkeypatch):
    """Values and both gradients, and nothing is read or written that barriers do not put in order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    monkeypatch.setattr(gpu_tiles, "_BLOCKS", 2)  # so that a block goes through several tiles, as of many rows
    N, D, V, chunk = case
    hidden, kernel, targets = inputs(N, D, V)
    targets[4] = V - 1
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    races = plgpu.InterpretGPUParams(detect_races=True)
    run = functools.partial(cross_entropy, platform="cuda", interpret=races, chunk=chunk)
    found = results(run, hidden, jnp.asarray(kernel, "float32"), targets)
    expected = defined(np.asarray(hidden, np.float64), np.asarray(jnp.asarray(kernel, "bfloat16"), np.float64), targets)
    off = worst(found, expected)
    assert max(off[:2]) < 2e-6 and max(off[2:]) < 8e-3
    assert not found[1][1:3].any()
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"dtype": "float32"}, "cuda: on GPUs it computes bfloat16, not float32"),
        ({"sizes": Sizes()}, "cuda: sizes=.* allowed: None"),
        ({"chunk": 0}, "cuda: chunk=0; allowed: 1 or more"),
        ({"platform": "rocm"}, "no kernel for platform 'rocm'; allowed: tpu, cuda"),
    ],
)
def test_what_the_kernels_cannot_do(changes, says):
    """Said before anything is compiled, with what is allowed."""
    options = {"platform": "cuda"} | changes
    shapes = ((8, 16), options.pop("dtype", "bfloat16")), ((16, 32), "float32"), ((8,), "int32")
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda *a: cross_entropy(*a, **options), *(jax.ShapeDtypeStruct(*x) for x in shapes))
