"""The rotary kernels, interpreted: values and gradients against the formulas in float64; and by the TPU's compiler."""

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
from attnlab.launch.schedules import TOPOLOGIES
from attnlab.ops.rope import ROPE, Turning
from attnlab.ops.rope_scaling import Yarn
from kernels_pallas import tuning
from kernels_pallas.rotary import plan, rotary
from tests import tiers
from tests.kernels_pallas.recurrences import assert_close, bytes_of_blocks, calls

BASE = 50.0


def turned(x, positions, width, scale=None, scaling=None, **options):
    """The kernel, asked as RoPE asks it."""
    both = Turning(BASE, width, scaling).cosines_and_sines(positions, jnp.float32)
    return rotary(x, *both, scale=scale, **options)


def inputs(shape, norm, dtype):
    """x, positions that begin anew, and the scale."""
    B, T, _, d = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.standard_normal(shape), dtype)
    arrays = {"x": x, "scale": jnp.asarray(rng.standard_normal(d), jnp.float32)} if norm else {"x": x}
    return arrays, jnp.asarray(np.arange(B * T).reshape(B, T) % 23, jnp.int32)


def results(run, arrays, positions):
    def loss(arrays):
        y = run(positions=positions, **arrays)
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        return jnp.sum(wide * jnp.cos(jnp.arange(y.size).reshape(y.shape)).astype(wide.dtype)), wide

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return {"y": np.asarray(y)} | {f"d{n}": np.asarray(g.astype(jnp.promote_types(g.dtype, jnp.float32)))
                                   for n, g in gradients.items()}  # fmt: skip


def exact(arrays, positions, turning):
    run = lambda x, positions, scale=None: ROPE.table["definition"].run(
        x, positions, scale, turning=turning, epsilon=0.1
    )
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for n, x in arrays.items()}
        return results(run, wide, positions)


STRETCHED = Yarn(4.0, original_length=16)  # has a factor on what is turned

# Shape, channels turned, whether there is a norm, dtype, positions of a step, other frequencies.
CASES = [
    ((2, 40, 3, 128), 128, True, "float32", 16, STRETCHED),
    ((1, 37, 2, 256), 100, True, "float32", 32, None),
    ((2, 40, 1, 128), 64, False, "float32", 16, STRETCHED),
    ((1, 48, 2, 128), 128, True, "bfloat16", None, None),
]


@pytest.mark.parametrize("shape, width, norm, dtype, rows, scaling", CASES)
def test_equals_the_definition(shape, width, norm, dtype, rows, scaling, monkeypatch):
    """Several steps, the last not whole; all channels turned and the first ones alone."""
    if rows:
        monkeypatch.setattr(plan, "_ROWS", (rows,))
    arrays, positions = inputs(shape, norm, dtype)
    run = functools.partial(turned, width=width, scaling=scaling, epsilon=0.1, interpret=True)
    wanted = exact(arrays, positions, Turning(BASE, width, scaling))
    assert_close(results(run, arrays, positions), wanted, 2e-6 if dtype == "float32" else 0.01)


@tiers.exhaustive
def test_no_races(monkeypatch, capfd):
    """On a simulated TPU whose two cores share the steps, with NaN behind the ends of arrays: the same."""
    monkeypatch.setattr(plan, "_ROWS", (16,))
    arrays, positions = inputs((2, 40, 2, 128), True, "float32")
    kernel = functools.partial(turned, width=128)
    simulate = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    simulated, plain = (results(functools.partial(kernel, interpret=x), arrays, positions) for x in (simulate, True))
    assert_close(simulated, plain, 1e-6)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_declared_bytes_are_those_of_the_blocks():
    arrays, positions = inputs((1, 1024, 16, 128), True, "bfloat16")
    loss = lambda arrays: jnp.sum(turned(positions=positions, width=128, **arrays).astype(jnp.float32))
    found = calls(jax.grad(loss), arrays)
    assert set(found) == {"rotary_forward", "rotary_backward"}
    for params in found.values():
        assert params["cost_estimate"].bytes_accessed == pytest.approx(bytes_of_blocks(params), rel=0.05)


@pytest.mark.parametrize("change, says", [
    ({"x": (1, 9, 128)}, r"expected \[B, T, H, d\]"), ({"x": (1, 9, 2, 64)}, "64 wide; allowed: a multiple of 128"),
    ({"dtype": "float16"}, "not float16"), ({"cos": (1, 8, 64)}, r"cos \(1, 8, 64\); expected \[1, 9, r\]"),
    ({"sin": (1, 9, 65)}, r"sin \(1, 9, 65\); expected \[1, 9, r\], r 1 to 64"),
    ({"sin": (1, 9, 32)}, "expected one shape"), ({"scale": (64,)}, r"scale \(64,\); expected \[128\]"),
])  # fmt: skip
def test_refusals(change, says):
    """Each names the value and what is allowed."""
    given = {"x": (1, 9, 2, 128), "cos": (1, 9, 64), "sin": (1, 9, 64), "dtype": "float32", "scale": (128,)} | change
    x, cos, sin, scale = (jnp.zeros(given[name], given["dtype"] if name == "x" else "float32")
                          for name in ("x", "cos", "sin", "scale"))  # fmt: skip
    with pytest.raises(ValueError, match=says):
        rotary(x, cos, sin, scale=scale, interpret=True)


@tiers.often("v6e-shape2-64-False-bfloat16", "v5p-shape1-100-True-float32")
@pytest.mark.filterwarnings("ignore:Error reading persistent")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip, shape, width, norm, dtype", [
    ("v5e", (1, 300, 2, 128), 128, True, "bfloat16"), ("v5p", (1, 40, 3, 256), 100, True, "float32"),
    ("v6e", (2, 256, 2, 128), 64, False, "bfloat16"), ("tpu7x", (1, 300, 2, 128), 128, True, "bfloat16"),
])  # fmt: skip
def test_compiles(chip, shape, width, norm, dtype):
    """Each direction becomes one call of a kernel, under its own name."""
    targets.prepare()
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    of = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = {"x": of(*shape, dtype=dtype)} | ({"scale": of(shape[3], dtype="float32")} if norm else {})

    def loss(arrays, positions):
        with tuning.device_kind(chip):
            y = turned(positions=positions, width=width, **arrays)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    text = jax.jit(jax.value_and_grad(loss)).lower(arrays, of(*shape[:2], dtype="int32")).compile().as_text()
    assert hlo.analyse(text).kernels == {"rotary_forward": 1, "rotary_backward" if norm else "rotary_back": 1}
