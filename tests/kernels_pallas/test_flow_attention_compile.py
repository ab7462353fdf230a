"""Flow attention's kernels by the TPU's compiler, with no TPU: every generation and every option."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES
from kernels_pallas import tuning
from kernels_pallas.flow_attention import Blocks, Rule, Sums, flow_attention
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
# Per generation: B, T, H, d, e, the dtype, whether packed, whether with a state, and the rule.
CASES = {
    "v5e": ((1, 300, 2, 128, 128), "bfloat16", True, False, Rule()),
    "v5p": ((2, 7, 3, 40, 96), "bfloat16", False, True, Rule(competition=False)),
    "v6e": ((1, 256, 2, 64, 64), "float32", True, True, Rule()),
    "tpu7x": ((1, 300, 2, 128, 256), "bfloat16", False, False, Rule(allocation=False)),
}


@tiers.parametrize("chip", CASES, often=["v5e"])
def test_compiles(chip):
    """Forward and backward become one call of a kernel each, under their own names."""
    (B, T, H, d, e), dtype, packed, given, rule = CASES[chip]
    targets.prepare()
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = [*[of(B, T, H, d, dtype=dtype)] * 2, of(B, T, H, e, dtype=dtype)]
    if given:
        arrays.append(Sums(*[of(B, H, d)] * 4, of(B, H), of(B, H, d, e)))
    documents, count = of(B, T, dtype=jnp.int32), of(B, dtype=jnp.int32)

    def loss(arrays, documents, count):
        q, k, v, *sums = arrays
        with tuning.device_kind(chip):
            o, outgoing, after = flow_attention(
                q, k, v, rule, documents=documents if packed else None, state=(count, sums[0]) if sums else None,
                blocks=Blocks(128, 1),
            )  # fmt: skip
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves((o, outgoing, after)))

    text = jax.jit(jax.value_and_grad(loss)).lower(arrays, documents, count).compile().as_text()
    assert hlo.analyse(text).kernels == {"flow_forward": 1, "flow_backward": 1}
