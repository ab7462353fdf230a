"""Our kernels as an implementation of local linear attention: when they are chosen, what they cost, and how they run
split over devices, rematerialised and scanned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops import local_linear_kernel, mask_from_segments
from attnlab.ops.dispatch import interpreted
from attnlab.ops.local_linear import LOCAL_LINEAR, local_linear
from attnlab.ops.local_linear_kernel import LocalLinearSpec
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests.ops.devices import on
from tests.ops.test_attention_flash_gpu import KIND


def spec(**changes):
    facts = dict(batch=2, queries=4096, keys=4096, heads=8, kv_heads=2, width=128, value_width=64, dtype="bfloat16",
                 causal=True, window=None, intervals=False, soft_cap=False, sinks=False)  # fmt: skip
    return LocalLinearSpec(**(facts | changes))


def test_auto():
    """On TPU, but for what is shorter than a tile, other dtypes, blocks of channels, and more keys than fit."""
    with on("TPU v6e"):
        for changes in ({}, {"intervals": True}, {"causal": False}, {"queries": 1000, "keys": 1000}, {"kv_heads": 8}):
            assert LOCAL_LINEAR.pick(spec(**changes)) == "pallas", changes
        for changes in ({"queries": 64, "keys": 64}, {"dtype": "float64"}, {"blocks": 2}, {"keys": 10**6}):
            assert LOCAL_LINEAR.pick(spec(**changes)) == "cg", changes
        assert "blocks=2" in local_linear_kernel.unsupported(spec(blocks=2))
        assert "room for" in local_linear_kernel.unsupported(spec(keys=10**6))
    assert LOCAL_LINEAR.pick(spec()) == "cg"


def test_auto_on_gpus():
    """On Hopper, any number of keys, but for what its kernels cannot do, each for a reason. An iteration is three
    products of the visible pairs."""
    with on(KIND, "gpu"):
        for changes in ({}, {"keys": 10**6}, {"causal": False}):
            assert LOCAL_LINEAR.pick(spec(**changes)) == "pallas", changes
        assert LOCAL_LINEAR.pick(spec(queries=64, keys=64)) == "cg"
        refused = {"not float32": {"dtype": "float32"}, "not 192": {"width": 192}, "not 136": {"value_width": 136}}
        for said, changes in (refused | {"blocks=2": {"blocks": 2}}).items():
            assert LOCAL_LINEAR.pick(spec(**changes)) == "cg"
            assert said in local_linear_kernel.unsupported(spec(**changes))
        pairs = 2.0 * 2 * 8 * 4096 * 4097 / 2
        flops = local_linear_kernel.kernel_flops(spec(iterations=6))
        assert flops["local_linear_forward"] == pytest.approx(pairs * ((4 + 3 * 6) * 128 + 64))
        names = {"adjoint", "backward", "backward_rows", "forward"}
        assert flops.keys() == {f"local_linear_{name}" for name in names}
    with on("NVIDIA A100-SXM4-80GB", "gpu"):
        assert "for Hopper, not NVIDIA A100" in local_linear_kernel.unsupported(spec())


def test_kernel_flops():
    """Two products of the visible pairs for each iteration, beside those of statistics and gradients."""
    pairs = 2.0 * 2 * 8 * 4096 * 4097 / 2
    with on("TPU v6e"):
        assert local_linear_kernel.kernel_flops(spec(iterations=6)) == {
            "local_linear_forward": pytest.approx(pairs * ((3 + 2 * 6) * 128 + 64)),
            "local_linear_backward": pytest.approx(pairs * ((9 + 2 * 6) * 128 + 2 * 64)),
        }


def test_runs_as_the_op_does():
    """Values, gradients, residuals and iterations of the definition and of `cg`, where two devices each have half of
    the queries, dealt out, in packed rows, under checkpoint in a scan."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    arrays, do = [normal(2, 1, 32, 2, 16), normal(1, 32, 1, 16), normal(1, 32, 1, 16)], normal(1, 32, 2, 16)
    segments = jnp.asarray([[1] * 11 + [2] * 17 + [0] * 4])
    ridge = np.asarray([0.5, 0.9], np.float32)
    mask = mask_from_segments(segments, 32, causal=True)

    def run(impl, gradients=True):
        layer = jax.checkpoint(lambda k, v, r, q: local_linear(q, k, v, mask, r, max_iterations=60, impl=impl))

        def both(q, k, v, r):
            o, facts = jax.lax.scan(lambda o, q: (o + (f := layer(k, v, r, q + o))[0], f[1]), 0 * q[0], q)
            return o, facts

        if not gradients:
            return both(*arrays, ridge)[1].iterations_BTH
        (o, facts), vjp = jax.vjp(both, *arrays, ridge)
        zero = jax.tree.map(jnp.zeros_like, facts)
        return o, facts.residual_BTH, facts.iterations_BTH, vjp((do, zero))

    devices = sharding.make_mesh(MeshConfig(data=1, context=2), 1)
    with interpreted():
        ours = jax.jit(partition.traced(lambda: run("pallas"), devices, sharding.ACTIVATION_RULES))()
    of_cg, exact = jax.jit(lambda: (run("cg", gradients=False), run("definition")))()
    np.testing.assert_allclose(ours[0], exact[0], atol=1e-4)
    for a, b in zip(ours[3], exact[3], strict=True):
        np.testing.assert_allclose(a, b, atol=5e-4)
    assert ours[1].max() < 1e-5 and np.abs(ours[2] - of_cg).max() <= 1 and of_cg.max() > 8
    assert not np.any(ours[0][:, 28:])
