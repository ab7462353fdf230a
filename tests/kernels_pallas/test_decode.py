"""Attention over a cache, interpreted: against the definition in float64, and what the cache may hold beside."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from benchmarks.tpu_schedule import TOPOLOGIES
from kernels_pallas.decode import decode_attention, definition
from tests import tiers
from tests.kernels_pallas import pairwise

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
AXES = {
    "shape": [(1, 1, 8, 2), (3, 4, 6, 3), (2, 5, 4, 1)],  # B, T, H, K
    "slots": [300, 128, 9],
    "widths": [(64, 40), (128, 128), (192, 128)],
    "splits": [1, 3],
    "dtype": ["float32", "bfloat16"],
    "window": [None, 70],
    "sinks": [False, True],
    "cap": [None, 3.0],
}
OFTEN = [dict(zip(AXES, values)) for values in (  # every value of every axis
    ((2, 5, 4, 1), 300, (64, 40), 3, "float32", None, True, 3.0),
    ((3, 4, 6, 3), 300, (128, 128), 1, "float32", 70, True, None),
    ((1, 1, 8, 2), 9, (192, 128), 1, "float32", None, True, None),
    ((1, 1, 8, 2), 128, (64, 40), 3, "bfloat16", 70, False, 3.0),
)]  # fmt: skip
CASES = pairwise.cases(AXES)
CASES += [case for case in OFTEN if case not in CASES]


def inputs(shape, slots, widths, dtype, window, sinks, seed=0):
    """Arrays in float32 that the dtype can say, and intervals of lengths that differ by row; some see nothing."""
    (B, T, H, K), (d, e), rng = shape, widths, np.random.default_rng(seed)
    normal = lambda *s: rng.normal(size=s).astype(jnp.dtype(dtype)).astype(np.float32)
    arrays = {"q": normal(B, T, H, d), "k": normal(B, K, slots, d), "v": normal(B, K, slots, e)}
    if sinks:
        arrays["sinks"] = normal(H)
    ends = rng.integers(T, slots + 1, (B, 1)) - T + np.arange(1, T + 1)
    starts = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
    if starts.size > 1:
        starts[-1, 0] = ends[-1, 0]
    return arrays, {"starts": starts, "ends": ends}


def exact(arrays, bounds, cap=None):
    with jax.enable_x64(True):
        wide = {name: x.astype(np.float64) for name, x in arrays.items()}
        return jax.jit(functools.partial(definition, soft_cap=cap))(**wide, **bounds)


@tiers.parametrize("case", CASES, often=OFTEN, ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
def test_equals_the_definition(case):
    """Slots that no query sees are NaN, and change nothing."""
    cap, splits = case["cap"], case["splits"]
    arrays, bounds = inputs(**{name: x for name, x in case.items() if name not in ("cap", "splits")})
    o, lse = exact(arrays, bounds, cap)
    slot = np.arange(case["slots"])
    hidden = ~((slot >= bounds["starts"][..., None]) & (slot < bounds["ends"][..., None])).any(1)
    for name in ("k", "v"):
        arrays[name] = np.where(hidden[:, None, :, None], np.nan, arrays[name])
    dtype = jnp.dtype(case["dtype"])
    given = {name: x if name == "sinks" else x.astype(dtype) for name, x in arrays.items()}
    ends = {name: x.astype(np.int32) for name, x in bounds.items()}
    run = functools.partial(decode_attention, soft_cap=cap, splits=splits, block=128, interpret=True)
    found_o, found_lse = jax.jit(run)(**given, **ends)
    tolerance = 3e-6 if case["dtype"] == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(found_o).astype(np.float32), o, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(found_lse, lse, atol=tolerance, rtol=tolerance)


def test_no_races(capfd):
    """Under the simulation of a TPU with two cores: nothing unwritten is read, and nothing while another writes it."""
    arrays, _ = inputs((1, 1, 2, 1), 300, (64, 64), "float32", None, False)
    ends = np.asarray([[200]], np.int32)
    simulated = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    run = functools.partial(decode_attention, block=128, splits=2, interpret=simulated)
    found, expected = jax.jit(run)(**arrays, ends=ends), exact(arrays, {"ends": ends})
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@needs_libtpu
@tiers.parametrize("chip", TOPOLOGIES, often=["v5e"])
def test_compiles(chip):
    """For every TPU generation, caches whose size is no multiple of a block included."""
    targets.prepare()
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    B, T, H, K, S, d = {"v5e": (2, 1, 8, 2, 1000, 128), "v5p": (1, 4, 4, 4, 512, 64)}.get(chip, (4, 1, 8, 1, 4095, 128))
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = {"q": of(B, T, H, d), "k": of(B, K, S, d), "v": of(B, K, S, d), "ends": of(B, T, dtype=jnp.int32)}
    compiled = jax.jit(functools.partial(decode_attention, platform="tpu")).lower(**arrays).compile()
    assert hlo.analyse(compiled.as_text()).kernels == {"decode_attention": 1}


@pytest.mark.parametrize("change, says", [
    ({"k": (1, 2, 9, 8)}, "do not fit"), ({"q": (1, 1, 3, 4)}, "multiple of K"), ({"q": (1, 200, 4, 4)}, "at most 128"),
    ({"sinks": (3,)}, "one per head"), ({"ends": (2,)}, "ends"), ({"block": 100}, "block=100"),
    ({"platform": "abacus"}, "'abacus'"), ({"dtype": "float16"}, "all bfloat16, or all float32"),
])  # fmt: skip
def test_refusals(change, says):
    """Each names the value and what is allowed."""
    shapes = {"q": (1, 1, 4, 4), "k": (1, 2, 9, 4), "v": (1, 2, 9, 4)} | change
    dtype = shapes.pop("dtype", "float32")
    of = lambda name: jnp.int32 if name == "ends" else dtype
    args = {n: jnp.zeros(x, of(n)) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=says):
        decode_attention(**args, **({} if "platform" in args else {"interpret": True}))
