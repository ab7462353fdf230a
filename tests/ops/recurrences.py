"""What tests of recurrences' kernels as implementations share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from attnlab.errors import UserError
from tests.ops.devices import on

H100 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)
DOCUMENTS = jnp.asarray([[0] * 30 + [1] * 18 + [2] * 40 + [3] * 8])


def assert_same(a, b, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol * max(1, np.abs(y).max()))


def assert_picked(op, spec, chunk):
    """On TPU the kernel, on any kind; XLA's form takes what is shorter than a chunk, float64 and states too large."""
    huge = {"width": 8192, "value_width": 8192}
    for kind in ("TPU v5e", "TPU v5p", "TPU v6e", "TPU7x", "TPU v99"):
        with on(kind):
            for changes in ({}, {"dtype": "float32"}, {"heads": 25, "width": 153}, {"positions": 1000}):
                assert op.pick(spec(**changes)) == "pallas", changes
            for changes in ({"positions": chunk - 1}, {"positions": 1}, {"dtype": "float64"}, huge):
                assert op.pick(spec(**changes)) == "chunked", changes
            assert op.pick(spec(positions=7), "pallas") == "pallas"
            with pytest.raises(UserError, match="bfloat16 and float32, not float64"):
                op.pick(spec(dtype="float64"), "pallas")
            with pytest.raises(UserError, match="state of 8192 x 8192 does not fit"):
                op.pick(spec(**huge), "pallas")
    assert op.pick(spec()) == "chunked"
