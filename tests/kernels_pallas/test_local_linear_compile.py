"""Local linear attention's kernels by the TPU's compiler, with no TPU: every generation."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES
from kernels_pallas import tuning
from kernels_pallas.local_linear_attention import Blocks, local_linear_attention
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
# Per generation: B, T, S, H, K, d, e, dtype and bounds.
CASES = {
    "v5e": ((1, 300, 300, 2, 1, 128, 128), "bfloat16", ("ends",)),
    "v5p": ((3, 7, 500, 3, 3, 96, 40), "bfloat16", ("starts", "ends")),
    "v6e": ((2, 130, 256, 4, 2, 64, 64), "float32", ("starts",)),
    "tpu7x": ((1, 130, 256, 2, 2, 192, 128), "bfloat16", ()),
}


@tiers.parametrize("chip", CASES, often=["v5e"])
def test_compiles(chip):
    """Forward and backward become calls of the kernels, under their own names."""
    (B, T, S, H, K, d, e), dtype, names = CASES[chip]
    targets.prepare()
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = of(B, T, H, d), of(B, T, H, dtype="float32"), of(B, S, K, d), of(B, S, K, e)
    bounds = {name: of(B, T, dtype=jnp.int32) for name in names}

    def loss(arrays, bounds):
        with tuning.device_kind(chip):
            o = local_linear_attention(*arrays, **bounds, blocks=Blocks(128, 128, 128, 128)).o
        return jnp.sum(o.astype(jnp.float32))

    text = jax.jit(jax.value_and_grad(loss)).lower(arrays, bounds).compile().as_text()
    assert hlo.analyse(text).kernels == {"local_linear_forward": 1, "local_linear_backward": 1}
