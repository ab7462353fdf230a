"""Attention of packed rows by the TPU's compiler, with no TPU, for every generation."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES
from kernels_pallas import tuning
from kernels_pallas.routed_attention import pack_rows, routed_attention, unpack_rows
from kernels_pallas.tuning import BackwardBlocks, Blocks, ForwardBlocks
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
# Per generation: B, N tiles of R rows, S, K, d, e, and features.
CASES = {
    "v5e": ((2, 3, 128, 300, 1, 128, 128), {}),
    "v5p": ((1, 2, 256, 500, 3, 96, 40), {"cap": 30.0}),
    "v6e": ((1, 3, 128, 700, 2, 64, 64), {"dtype": "float32"}),
    "tpu7x": ((3, 1, 128, 256, 1, 192, 128), {"runs": 2}),
}


@tiers.parametrize("chip", CASES, often=["v5e"])
def test_compiles(chip, monkeypatch):
    """Rows moved, attended and moved back: both directions are calls of the kernels, under their own names."""
    (B, N, R, S, K, d, e), features = CASES[chip]
    if "runs" in features:  # as if fast memory held no more keys
        parts = lambda kind, each, keys, tile, rest: -(-keys // tile // features["runs"]) * tile
        monkeypatch.setattr(tuning, "resident_keys", parts)
    targets.prepare()
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    dtype = features.get("dtype", "bfloat16")
    of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = of(B, N * R, d), of(B, S, K, d), of(B, S, K, e), of(B, K, S, d), of(B, K, S, dtype=jnp.int32)
    rest = [of(B, n, dtype=jnp.int32) for n in (N * R, N * R, N)]
    blocks = Blocks(ForwardBlocks(R, 128, 128, 128), BackwardBlocks(R, 128, 128, 128))

    def loss(arrays, rest):
        q, k, v, elements, place = arrays
        with tuning.device_kind(chip):
            q += pack_rows(elements, place, rest[2], R, platform="tpu")
            o, lse = routed_attention(q, k, v, *rest, soft_cap=features.get("cap"), platform="tpu", blocks=blocks)
            o = unpack_rows(o, place, rest[2], R, platform="tpu")
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(jnp.maximum(lse, -9))

    text = jax.jit(jax.value_and_grad(loss, allow_int=True)).lower(arrays, rest).compile().as_text()
    runs = features.get("runs", 1)
    moved = {"rows_packed": 2, "rows_unpacked": 2}
    assert hlo.analyse(text).kernels == {"routed_forward": runs, "routed_backward": runs} | moved
