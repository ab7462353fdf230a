"""The neural memory by the TPU's compiler, with no TPU, on every generation."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES
from kernels_pallas import tuning
from kernels_pallas.neural_memory import neural_memory
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
# Per generation: heads, widths, dtype, length; whether rows begin inside documents.
CASES = {
    "v5e": (2, (64, 128, 64), "bfloat16", 100, False),
    "v5p": (1, (128, 128), "float32", 64, True),
    "v6e": (1, (128, 256, 128), "bfloat16", 64, True),
    "tpu7x": (3, (96, 96), "bfloat16", 70, False),
}


@tiers.parametrize("chip", CASES, often=["v6e"])
def test_compiles(chip):
    """Forward and backward become calls of the kernels, once, under their own names."""
    H, widths, dtype, T, carried = CASES[chip]
    targets.prepare()
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    layers = lambda rows: tuple(of(rows, H, i, o) for i, o in zip(widths, widths[1:]))
    arrays = {
        "rows": [of(2, T, H, widths[0], dtype=dtype)] * 3, "gates": [of(2, T, H)] * 3,
        "weights": layers(1), "momentum": layers(1), "carried": (layers(2), layers(2)) if carried else None,
    }  # fmt: skip
    positions = of(2, T, dtype=jnp.int32)

    def loss(arrays, positions):
        rows, gates, states = (
            arrays["rows"],
            arrays["gates"],
            {n: arrays[n] for n in ("weights", "momentum", "carried")},
        )
        with tuning.device_kind(chip):
            y, end, *_ = neural_memory(
                *rows, *gates, **states, chunk=16, residual_norm=len(widths) > 2, rates=(1.0,) * (len(widths) - 1),
                positions=positions, group=2,
            )  # fmt: skip
        return jnp.sum(y.astype(jnp.float32)) + sum(map(jnp.sum, end))

    text = jax.jit(jax.grad(loss)).lower(arrays, positions).compile().as_text()
    assert hlo.analyse(text).kernels == {"neural_memory_forward": 1, "neural_memory_backward": 1}
