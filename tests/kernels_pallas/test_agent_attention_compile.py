"""Agent attention by the TPU's compiler, with no TPU: every generation, every feature, forward and backward."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES
from kernels_pallas import tuning
from kernels_pallas.agent_attention import Sizes, agent_attention
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
# Per generation: B, T, H, m, d, e, dtype, documents and a state, agents of each sequence, sizes.
CASES = {
    "v5e": (1, 300, 2, 16, 128, 128, "bfloat16", True, True, Sizes(128, 1, 2, 1)),
    "v5p": (1, 256, 2, 49, 64, 128, "bfloat16", True, False, Sizes(64, 2, 2, 2)),
    "v6e": (2, 40, 3, 3, 20, 17, "float32", False, True, None),
    "tpu7x": (1, 256, 1, 130, 128, 256, "bfloat16", False, False, Sizes(128, 2, 1, 1)),
}


@tiers.parametrize("chip", CASES, often=["v5e"])
def test_compiles(chip):
    """Forward and backward become one call of a kernel each, under their own names."""
    targets.prepare()
    B, T, H, m, d, e, dtype, packed, own, sizes = CASES[chip]
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = {name: of(B, T, H, w, dtype=dtype) for name, w in (("q", d), ("k", d), ("v", e))}
    arrays["agents"] = of(*([B] if own else []), H, m, d, dtype=dtype)
    if packed:
        arrays["state"] = of(B, H, m), of(B, H, m, e)
    starts = of(B, T, dtype=jnp.int32) if packed else None

    def loss(arrays, starts):
        with tuning.device_kind(chip):
            o, (log, values) = agent_attention(**arrays, starts=starts, sizes=sizes)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(values) + jnp.sum(log)

    text = jax.jit(jax.value_and_grad(loss)).lower(arrays, starts).compile().as_text()
    assert hlo.analyse(text).kernels == {"agent_attention_forward": 1, "agent_attention_backward": 1}
