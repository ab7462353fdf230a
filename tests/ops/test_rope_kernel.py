"""Our kernel as an implementation of RoPE: when it is chosen, and split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.errors import UserError
from attnlab.ops.dispatch import interpreted
from attnlab.ops.rope import ROPE, RopeSpec, rope
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests.ops.devices import on


def spec(**changes):
    facts = dict(batch=4, positions=4096, heads=16, width=128, dtype="bfloat16", turned=128, norm=True)
    return RopeSpec(**(facts | changes))


def test_auto():
    """The kernel where heads are as wide as registers, and positions are more than a few."""
    for kind in ("TPU v5e", "TPU v5p", "TPU v6e", "TPU7x", "TPU v99"):
        with on(kind):
            for changes in (
                {},
                {"norm": False},
                {"dtype": "float32"},
                {"heads": 25, "width": 256},
                {"turned": 64, "positions": 1000},
            ):
                assert ROPE.pick(spec(**changes)) == "pallas", changes
            for changes in ({"width": 64}, {"positions": 1}, {"dtype": "float64"}):
                assert ROPE.pick(spec(**changes)) == "xla", changes
            with pytest.raises(UserError, match="64 wide; allowed: a multiple of 128"):
                ROPE.pick(spec(width=64), "pallas")
    assert ROPE.pick(spec()) == "xla"


def test_positions_split_over_devices():
    """Each of four devices has a quarter of the positions, which rows share, and half of the heads; gradients, too."""
    x = np.random.default_rng(0).standard_normal((2, 32, 2, 128)).astype(np.float32)
    scale, positions = np.linspace(0.5, 2.0, 128, dtype=np.float32), np.arange(32)[None]

    def run(impl):
        scalar = lambda x, scale: jnp.sum(jnp.sin(rope(x, positions, scale_d=scale, impl=impl)))
        return jax.value_and_grad(scalar, (0, 1))(x, scale)

    devices = sharding.make_mesh(MeshConfig(data=1, context=4, tensor=2), 1)
    with interpreted(), ops.recording() as chosen:
        found = jax.jit(partition.traced(lambda: run("pallas"), devices, sharding.ACTIVATION_RULES))()
    assert {str(c.spec) for c in chosen.choices} == {"B2 T8 H1 d128 float32 turned=128 norm"}
    expected = jax.jit(lambda: run("definition"))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
