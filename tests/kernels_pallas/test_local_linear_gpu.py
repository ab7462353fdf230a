"""Local linear attention's Hopper kernels with no GPU: run by jax's GPU interpreter where there is one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops import Mask
from attnlab.ops.local_linear import local_linear
from kernels_pallas.local_linear_attention import Blocks, local_linear_attention
from tests.kernels_pallas.test_flash_gpu import needs_interpreter
from tests.kernels_pallas.test_local_linear import NAMES, exact, inputs, op, results

# Length, masks of the sequences, H K, d e, dtype. Rows and keys of several tiles, some of them full; documents that
# begin inside tiles; two query heads of a key head; both widths of the kernels.
CASES = {
    "documents": (140, ("packed",), (2, 1), (32, 16), "bfloat16"),
    "wide": (72, ("causal",), (1, 1), (96, 128), "bfloat16"),
}
RIDGE = 10  # factor, for few iterations
CUT = dict(iterations=2, tolerance=1e-5, impl="cg")
RACES = "wide"


def case(name):
    arrays, bounds = inputs(*CASES[name])
    arrays[1] = np.float32(RIDGE) * arrays[1]
    return arrays, bounds


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    """Values and gradients of q, ridge, k and v, on average at most twice as far from float64 as `cg`, which multiplies
    in float32. Nothing is read or written that barriers do not put in order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    arrays, bounds = case(name)
    expected = exact(arrays, bounds)
    xla = results(functools.partial(op, impl="cg", iterations=60), arrays, bounds, "bfloat16")
    interpret = plgpu.InterpretGPUParams(detect_races=name == RACES)
    run = functools.partial(local_linear_attention, platform="cuda", interpret=interpret, iterations=40)
    ours = results(lambda *arrays, **bounds: run(*arrays, **bounds).o, arrays, bounds, "bfloat16")
    for x, value in expected.items():
        mean = lambda found: np.sqrt(np.mean((found[x] - value) ** 2)) / np.sqrt(np.mean(value**2))
        assert mean(ours) <= 2 * mean(xla) + (2e-3 if x == "dridge" else 0), f"{x}: {mean(ours)}, {mean(xla)}"
    assert name != RACES or not gpu_callbacks.get_races().races_found


@needs_interpreter
def test_a_block_ends_with_its_last_row():
    """Rows stop at the tolerance, each at its own iteration, and a block when all of its 128 have; cut short, a solve
    says what residual is left."""
    (q, ridge, k, v), bounds = inputs(200, ("causal",), (1, 1), (16, 16), "bfloat16")
    ridge[:, 128:] *= 100
    arrays = [jnp.asarray(x, "float32" if n == "ridge" else "bfloat16") for n, x in zip(NAMES, (q, ridge, k, v))]
    run = functools.partial(local_linear_attention, platform="cuda", interpret=True, **bounds)
    found = jax.jit(lambda *a: (run(*a, iterations=20, tolerance=1e-2), run(*a, iterations=2)))(*arrays)
    done, cut = (jax.tree.map(lambda x: np.asarray(x[0, :, 0], np.float32), f) for f in found)
    for block in (slice(0, 128), slice(128, 200)):
        assert np.all(done.turns[block] == done.iterations[block].max())
    assert done.turns[0] > done.turns[199] > 0 and len(np.unique(done.iterations[:128])) > 2
    assert done.residual.max() < 1e-2 and done.iterations[0] == 1  # of a row that sees one key
    assert np.all(cut.turns == 2) and 1e-2 < cut.residual[127] < 1
    wide = [x.astype(jnp.float32) for x in arrays]
    _, facts = local_linear(wide[0], wide[2], wide[3], Mask(k_end=jnp.asarray(bounds["ends"])), wide[1], **CUT)
    np.testing.assert_allclose(cut.residual, facts.residual_BTH[0, :, 0], rtol=0.05, atol=2e-3)  # bfloat16


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"dtype": "float32"}, "cuda: on GPUs it computes bfloat16, not float32"),
        ({"width": 136}, "cuda: on GPUs head widths are at most 128, not 136"),
        ({"blocks": Blocks()}, "cuda: blocks=.* allowed: None"),
        ({"scale": 0.0}, "cuda: scale=0.0; allowed: a number > 0"),
        ({"platform": "rocm"}, "no kernel for platform 'rocm'; allowed: tpu, cuda"),
    ],
)
def test_what_the_kernels_cannot_do(changes, says):
    """Said before anything is compiled, with what is allowed."""
    options = {"platform": "cuda"} | changes
    q = jax.ShapeDtypeStruct((1, 8, 1, options.pop("width", 64)), options.pop("dtype", "bfloat16"))
    ridge = jax.ShapeDtypeStruct((1, 8, 1), jnp.float32)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda q, ridge: local_linear_attention(q, ridge, q, q, **options), q, ridge)
