"""Parallax's Hopper kernels with no GPU: run by jax's GPU interpreter where there is one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.parallax_attention import definition, parallax_attention
from kernels_pallas.tuning import Blocks
from tests.kernels_pallas.test_flash_gpu import needs_interpreter
from tests.kernels_pallas.test_parallax import exact, inputs, plain, results

# Mask, length, B H K, d e. A document that begins inside tiles, rows that see nothing, two query heads of a key head;
# one that begins at a tile's edge, rows and keys of several tiles, some of them full, rings that go round, and races.
CASES = {
    "inside": ("packed", 72, (1, 2, 1), (32, 16)),
    "at an edge": ("causal", 200, (1, 1, 1), (96, 128)),
}
EDGE = 64


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    """Values and gradients of q, probe, k and v, at most twice as far from float64 as XLA's form in the same dtype.
    Nothing is read or written that barriers do not put in order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    arrays, bounds = inputs(*CASES[name], "bfloat16")
    races = name == "at an edge"
    if races:
        bounds["starts"] = np.where(bounds["ends"] > EDGE, EDGE, 0)
    expected = exact(arrays, bounds)
    interpret = plgpu.InterpretGPUParams(detect_races=races)
    kernel = functools.partial(parallax_attention, platform="cuda", interpret=interpret)
    ours, xla = (results(fn, arrays, bounds, "bfloat16") for fn in (kernel, plain))
    for x, value in expected.items():
        off, xla_off = (np.abs(found[x] - value) for found in (ours, xla))
        slack = float(jnp.finfo("bfloat16").eps) / 4 * np.max(np.abs(value))
        mean = lambda x: np.sqrt(np.mean(x**2))
        assert mean(off) <= 2 * mean(xla_off) + slack, f"{x}: {mean(off)}, XLA {mean(xla_off)}"
        assert off.max() <= 3 * xla_off.max() + 4 * slack, f"{x}: {off.max()}, XLA {xla_off.max()}"
    assert not races or not gpu_callbacks.get_races().races_found


@needs_interpreter
def test_what_keys_have_in_common_does_not_round_off():
    """A channel of keys that is 0, or 64: the same function, and in bfloat16 as near to it. All rows see all keys."""
    arrays, _ = inputs("causal", 128, (1, 1, 1), (64, 64), "bfloat16")
    q, probe, k, v = (x.copy() for x in arrays)
    far, q[..., 0] = k.copy(), 0
    k[..., 0], far[..., 0] = 0, 64
    true = definition(q, probe, k, v)
    kernel = jax.jit(functools.partial(parallax_attention, platform="cuda", interpret=True))
    run = lambda k: np.asarray(kernel(*(jnp.asarray(x, "bfloat16") for x in (q, probe, k, v))), np.float64)
    off = lambda k: np.sqrt(np.mean(np.square(run(k) - true)))
    assert off(far) <= 1.5 * off(k) < 0.02


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"dtype": "float32"}, "parallax_attention on cuda: on GPUs it computes bfloat16, not float32"),
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
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda q: parallax_attention(q, q, q, q, **options), q)
