"""The delta rule by the TPU's compiler, with no TPU: every generation, every feature, forward and backward."""

from __future__ import annotations

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES
from kernels_pallas import tuning
from kernels_pallas.delta_rule import Sizes, delta_rule
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
# Per generation: B, T, H, d, e, dtype, documents and a state, sizes.
CASES = {
    "v5e": (1, 300, 2, 128, 128, "bfloat16", True, Sizes(128, 1, 2, 1)),
    "v5p": (1, 256, 2, 64, 128, "bfloat16", True, Sizes(64, 2, 2, 2)),
    "v6e": (2, 40, 1, 20, 17, "float32", False, None),
    "tpu7x": (1, 256, 1, 128, 256, "bfloat16", False, Sizes(128, 2, 1, 1)),
}


@tiers.parametrize("chip, channels", itertools.product(CASES, [False, True]), often=[("v5e", False), ("v6e", True)])
def test_compiles(chip, channels):
    """Forward and backward become one call of a kernel each, under their own names."""
    targets.prepare()
    B, T, H, d, e, dtype, packed, sizes = CASES[chip]
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = {name: of(B, T, H, w, dtype=dtype) for name, w in (("q", d), ("k", d), ("v", e))}
    arrays |= {"log_decay": of(B, T, H, d) if channels else of(B, T, H), "beta": of(B, T, H)}
    if packed:
        arrays["state"] = of(B, H, d, e)
    starts = of(B, T, dtype=jnp.int32) if packed else None

    def loss(arrays, starts):
        with tuning.device_kind(chip):
            o, end = delta_rule(**arrays, starts=starts, sizes=sizes)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(end)

    text = jax.jit(jax.value_and_grad(loss)).lower(arrays, starts).compile().as_text()
    name = "delta_rule_channels" if channels else "delta_rule"
    assert hlo.analyse(text).kernels == {f"{name}_forward": 1, f"{name}_backward": 1}
