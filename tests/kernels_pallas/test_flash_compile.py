"""Flash attention by the TPU's compiler, with no TPU: every generation, every feature, and what is scheduled."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES, Case, Shape, compile_flash
from kernels_pallas import tuning
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.tuning import BackwardBlocks, Blocks, ForwardBlocks
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
SMALL = Blocks(ForwardBlocks(128, 256, 128, 128, True), BackwardBlocks(256, 128, 128, 128))
SUMS = Blocks(ForwardBlocks(256, 128, 128, 128, False), BackwardBlocks(128, 256, 128, 128))
# Per generation: B, T, S, H, K, d, e, and features.
CASES = {
    "v5e": [((1, 300, 300, 2, 1, 128, 128), {"blocks": SUMS, "mask": "ends", "sinks": True, "gate": True})],
    "v5p": [((3, 7, 500, 3, 3, 96, 40), {"blocks": SMALL, "mask": "both", "bias": True, "cap": 30.0})],
    "v6e": [((2, 256, 256, 2, 1, 64, 64), {"blocks": SMALL, "dtype": "float32", "mask": "both", "cap": 80.0}),
            ((1, 130, 700, 4, 2, 256, 256), {"blocks": SMALL, "mask": "starts", "runs": 3})],
    "tpu7x": [((1, 130, 256, 2, 2, 192, 128), {"blocks": SUMS, "bias": True, "gate": True})],
}  # fmt: skip
EACH = [(chip, *case) for chip, cases in CASES.items() for case in cases]


MASKED = Case(tile=(128, 128), axes=1, groups=True), Case(tile=(512, 512), axes=9)


@tiers.parametrize("chip, case", [(c, m) for c in TOPOLOGIES for m in MASKED], often=[("v6e", MASKED[0])])
def test_patterns_compile(chip, case):
    """Lists of tiles, coordinates and groups: forward and backward, under names of their own."""
    targets.prepare()
    compiled = compile_flash(case, Shape(batch=2, length=1024), targets.Target.of(TOPOLOGIES[chip]), chip)
    assert hlo.analyse(compiled.as_text()).kernels == {"masked_forward": 1, "masked_backward": 1}


@tiers.parametrize("chip, shape, features", EACH, often=EACH[:1])
def test_compiles(chip, shape, features, monkeypatch):
    """Forward and backward become calls of the kernels, once where not said otherwise, under their own names."""
    if "runs" in features:  # as if fast memory held no more keys
        parts = lambda kind, each, keys, tile, rest: -(-keys // tile // features["runs"]) * tile
        monkeypatch.setattr(tuning, "resident_keys", parts)
    targets.prepare()
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    B, T, S, H, K, d, e = shape
    dtype = features.get("dtype", "bfloat16")
    of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = {"q": of(B, T, H, d), "k": of(B, S, K, d), "v": of(B, S, K, e)}
    if features.get("sinks"):
        arrays["sinks"] = of(H, dtype=jnp.float32)
    if features.get("gate"):
        arrays["gate"] = of(B, T, H, e)
    if features.get("bias"):
        arrays["key_bias"] = of(B, K, S, dtype=jnp.float32)
    names = {"both": ("starts", "ends"), None: ()}.get(features.get("mask"), (features.get("mask"),))
    bounds = {name: of(B, T, dtype=jnp.int32) for name in names}

    def loss(arrays, bounds):
        with tuning.device_kind(chip):
            o, lse = flash_attention(
                **arrays, **bounds, soft_cap=features.get("cap"), platform="tpu", blocks=features["blocks"]
            )
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(jnp.maximum(lse, -9))

    text = jax.jit(jax.value_and_grad(loss)).lower(arrays, bounds).compile().as_text()
    kernels = hlo.analyse(text).kernels
    assert kernels == {"flash_forward": features.get("runs", 1), "flash_backward": features.get("runs", 1)}
