"""Cross-entropy by the TPU's compiler, with no TPU: every generation, forward, backward and the value alone."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES
from kernels_pallas import tuning
from kernels_pallas.cross_entropy import Sizes, cross_entropy
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
# Per generation: N, D, V, dtype, dtype of the embedding, tiles.
CASES = {
    "v5e": (300, 100, 700, "bfloat16", "float32", Sizes(256, 128, 128, 256)),
    "v5p": (256, 128, 512, "bfloat16", "bfloat16", Sizes(128, 256, 256, 128)),
    "v6e": (40, 256, 1000, "float32", "float32", Sizes(128, 128, 128, 128)),
    "tpu7x": (1500, 128, 384, "bfloat16", "float32", Sizes(512, 128, 128, 512)),
}


@tiers.parametrize("chip", CASES, often=["v5e"])
def test_compiles(chip):
    """Each becomes one call of a kernel, under its own name."""
    targets.prepare()
    N, D, V, dtype, kernel_dtype, sizes = CASES[chip]
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    of = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def loss(hidden, kernel, targets):
        with tuning.device_kind(chip):
            lse, logit = cross_entropy(hidden, kernel, targets, sizes=sizes)
        return jnp.sum(lse * lse) - jnp.sum(logit)

    def both(hidden, other, kernel, targets):
        return jax.value_and_grad(loss, (0, 1))(hidden, kernel, targets), loss(other, kernel, targets)

    hidden, kernel = of(N, D, dtype=dtype), of(D, V, dtype=kernel_dtype)
    text = jax.jit(both).lower(hidden, hidden, kernel, of(N, dtype="int32")).compile().as_text()
    kernels = hlo.analyse(text).kernels
    assert kernels == {f"cross_entropy_{name}": 1 for name in ("value", "forward", "backward")}
