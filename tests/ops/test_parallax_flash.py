"""Our kernels as an implementation of Parallax: when they are chosen, what they cost, and split over devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from attnlab.ops import Mask, parallax_flash
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.dispatch import interpreted
from attnlab.ops.parallax import PARALLAX, parallax
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests.ops.devices import on
from tests.ops.test_attention_flash_gpu import KIND


def spec(**changes):
    facts = dict(batch=2, queries=4096, keys=4096, heads=8, kv_heads=2, width=128, value_width=64, dtype="bfloat16",
                 causal=True, window=None, intervals=False, soft_cap=False, sinks=False)  # fmt: skip
    return AttentionSpec(**(facts | changes))


def test_auto():
    """On TPU, but for what is shorter than a tile, and float64."""
    with on("TPU v6e"):
        for changes in ({}, {"intervals": True}, {"causal": False}, {"queries": 1000, "keys": 1000}, {"kv_heads": 8}):
            assert PARALLAX.pick(spec(**changes)) == "flash", changes
        for changes in ({"queries": 64, "keys": 64}, {"keys": 100}, {"dtype": "float64"}):
            assert PARALLAX.pick(spec(**changes)) == "xla", changes
    assert PARALLAX.pick(spec()) == "xla"


def test_auto_on_gpus():
    """On Hopper, but for what its kernels cannot do, each for a reason. Four products of the visible pairs forward;
    backward weights, slopes and tilts twice, and two products of rows and three of keys."""
    with on(KIND, "gpu"):
        for changes in ({}, {"intervals": True}, {"keys": 10**6, "causal": False}):
            assert PARALLAX.pick(spec(**changes)) == "flash", changes
        assert PARALLAX.pick(spec(queries=64, keys=64)) == "xla"
        refused = {"not float32": {"dtype": "float32"}, "not 192": {"width": 192}, "not 136": {"value_width": 136}}
        for said, changes in refused.items():
            assert PARALLAX.pick(spec(**changes)) == "xla"
            assert said in parallax_flash.unsupported(spec(**changes))
        pairs = 2.0 * 2 * 8 * 4096 * 4097 / 2
        assert parallax_flash.kernel_flops(spec()) == {
            "parallax_forward": pytest.approx(pairs * (2 * 128 + 2 * 64)),
            "parallax_backward_rows": pytest.approx(pairs * (4 * 128 + 64)),
            "parallax_backward": pytest.approx(pairs * (4 * 128 + 2 * 64)),
        }
    with on("NVIDIA A100-SXM4-80GB", "gpu"):
        assert "for Hopper, not NVIDIA A100" in parallax_flash.unsupported(spec())


def test_kernel_flops():
    """Four products of the visible pairs forward, eight backward; a run over a part of the keys is that part."""
    pairs = 2.0 * 2 * 8 * 4096 * 4097 / 2
    with on("TPU v6e"):
        assert parallax_flash.kernel_flops(spec()) == {
            "parallax_forward": pytest.approx(pairs * (2 * 128 + 2 * 64)),
            "parallax_backward": pytest.approx(pairs * (6 * 128 + 2 * 64)),
        }
        long = parallax_flash.kernel_flops(spec(queries=1024, keys=1_000_000, causal=False))
    runs = 2.0 * 2 * 8 * 1024 * 1e6 * 384 / long["parallax_forward"]
    assert runs == pytest.approx(round(runs)) and runs > 1


def test_queries_split_over_devices():
    """The same where each of two devices has half of the causal queries, dealt out."""
    rng = np.random.default_rng(0)
    normal = lambda heads: rng.normal(size=(1, 32, heads, 16)).astype(np.float32)
    arrays, do = [normal(2), normal(2), normal(1), normal(1)], normal(2)

    def run(impl):
        o, vjp = jax.vjp(lambda *a: parallax(*a, Mask(causal=True), impl=impl), *arrays)
        return o, *vjp(do)

    devices = sharding.make_mesh(MeshConfig(data=1, context=2), 1)
    with interpreted():
        results = jax.jit(partition.traced(lambda: run("flash"), devices, sharding.ACTIVATION_RULES))()
    for a, b in zip(results, jax.jit(lambda: run("definition"))(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
