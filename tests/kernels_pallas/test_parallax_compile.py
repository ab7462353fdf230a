"""Parallax's kernels by the TPU's compiler, with no TPU: every generation."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES
from kernels_pallas import tuning
from kernels_pallas.parallax_attention import parallax_attention
from kernels_pallas.tuning import BackwardBlocks, Blocks, ForwardBlocks
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
SMALL = Blocks(ForwardBlocks(128, 128, 128, 128), BackwardBlocks(128, 128, 128, 128))
# Per generation: B, T, S, H, K, d, e, dtype, bounds, and in how many parts keys come.
CASES = {
    "v5e": ((1, 300, 300, 2, 1, 128, 128), "bfloat16", ("ends",), 1),
    "v5p": ((3, 7, 500, 3, 3, 96, 40), "float32", ("starts", "ends"), 1),
    "v6e": ((2, 130, 256, 4, 2, 64, 64), "bfloat16", ("starts",), 2),
    "tpu7x": ((1, 130, 256, 2, 2, 192, 128), "bfloat16", (), 1),
}


@tiers.parametrize("chip", CASES, often=["v6e"])
def test_compiles(chip, monkeypatch):
    """Forward and backward become calls of the kernels, once for each part of the keys, under their own names."""
    (B, T, S, H, K, d, e), dtype, names, parts = CASES[chip]
    if parts > 1:  # as if fast memory held no more keys
        monkeypatch.setattr(tuning, "resident_keys", lambda kind, each, keys, tile, rest: keys // parts)
    targets.prepare()
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = of(B, T, H, d), of(B, T, H, d), of(B, S, K, d), of(B, S, K, e)
    bounds = {name: of(B, T, dtype=jnp.int32) for name in names}

    def loss(arrays, bounds):
        with tuning.device_kind(chip):
            return jnp.sum(parallax_attention(*arrays, **bounds, blocks=SMALL).astype(jnp.float32))

    text = jax.jit(jax.value_and_grad(loss)).lower(arrays, bounds).compile().as_text()
    assert hlo.analyse(text).kernels == {"parallax_forward": parts, "parallax_backward": parts}
