"""Cross-entropy's implementations: when each is chosen, and rows and vocabulary split over devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.errors import UserError
from attnlab.ops.cross_entropy import CROSS_ENTROPY, CrossEntropySpec, cross_entropy
from attnlab.ops.dispatch import interpreted
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests.ops.devices import on
from tests.ops.test_attention_flash_gpu import KIND


def spec(**changes):
    return CrossEntropySpec(**(dict(rows=16384, width=2048, columns=32768, dtype="bfloat16", chunk=8192) | changes))


@pytest.mark.parametrize(
    ("kind", "changes", "impl"),
    [
        ("TPU v6e", {}, "chunked"),
        ("TPU v6e", {"width": 512}, "pallas"),
        ("TPU v6e", {"width": 1024}, "chunked"),
        ("TPU v5e", {"width": 512}, "chunked"),
        ("TPU v6e", {"columns": 131072}, "pallas"),
        ("TPU v6e", {"width": 512, "rows": 64}, "chunked"),
        ("TPU v5e", {"columns": 65536}, "pallas"),
        ("TPU v6e", {"width": 512, "dtype": "float64"}, "chunked"),
    ],
)
def test_auto(kind, changes, impl):
    """Kernels for narrow rows, and where logits are a quarter of the memory."""
    with on(kind):
        assert CROSS_ENTROPY.pick(spec(**changes)) == impl
    assert CROSS_ENTROPY.pick(spec(**changes)) == "chunked"  # here


def test_what_it_cannot_do_it_says():
    with on("TPU v6e"):
        for changes, said in (({"dtype": "float64"}, "not float64"), ({"width": 2**18}, "width 262144 does not fit")):
            with pytest.raises(UserError, match=said):
                CROSS_ENTROPY.pick(spec(**changes), "pallas")


def test_auto_on_gpus():
    """Kernels where logits are a quarter of a Hopper's memory; what they cannot do is said. Of the backward's a chunk's
    logits count."""
    large = spec(rows=65536, columns=131072)
    for kind, changes, impl in (
        (KIND, {}, "pallas"), ("NVIDIA H200", {"columns": 65536}, "chunked"), (KIND, {"rows": 16384}, "chunked"),
        (KIND, {"dtype": "float32"}, "chunked"), ("NVIDIA A100-SXM4-80GB", {}, "chunked"),
    ):  # fmt: skip
        with on(kind, "gpu"):
            assert CROSS_ENTROPY.pick(dataclasses.replace(large, **changes)) == impl
    with on(KIND, "gpu"), pytest.raises(UserError, match="bfloat16, not float32"):
        CROSS_ENTROPY.pick(spec(dtype="float32"), "pallas")
    with on("NVIDIA A100-SXM4-80GB", "gpu"), pytest.raises(UserError, match="for Hopper, not NVIDIA A100"):
        CROSS_ENTROPY.pick(spec(), "pallas")
    with on(KIND, "gpu"), ops.recording() as chosen:
        CROSS_ENTROPY.choose(spec(), "pallas")
    each = 2.0 * 16384 * 2048 * 32768
    assert chosen.kernel_flops({"cross_entropy_value": 1, "cross_entropy_slopes.3": 4}) == 2 * each


def test_kernel_flops():
    """A product of every row with every column for the value, two for the forward and two for the backward."""
    with on("TPU v6e"), ops.recording() as chosen:
        CROSS_ENTROPY.choose(spec(), "pallas")
    each = 2.0 * 16384 * 2048 * 32768
    for name, products in (("value", 1), ("forward", 2), ("backward", 2)):
        assert chosen.kernel_flops({f"cross_entropy_{name}.2": 1}) == products * each


def value_and_gradients(impl, hidden, kernel, targets, weights):
    def loss(hidden, kernel):
        nll, lse = cross_entropy(hidden, kernel, targets, weights, 16, impl)
        return jnp.sum(nll * jnp.arange(nll.size).reshape(nll.shape)) + jnp.sum(lse * lse)

    return jax.value_and_grad(loss, (0, 1))(hidden, kernel)


@pytest.mark.parametrize("mesh", [{"data": 2, "context": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 4}])
def test_rows_and_vocabulary_split_over_devices(mesh):
    """Each device has its rows and its columns; the same, by chunks and by the kernels."""
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=s).astype(np.float32) for s in ((2, 6, 8), (8, 40)))
    targets = rng.integers(0, 40, (2, 6)).astype(np.int32)
    weights = np.asarray([[1, 0.5, 0, 1, 2, 1], [0, 1, 1, 0, 1, 1]], np.float32)
    poisoned = hidden.copy()
    poisoned[0, 2] = np.nan
    inputs = poisoned, kernel, np.where(weights == 0, 99, targets).astype(np.int32), weights
    expected = jax.jit(lambda: value_and_gradients("definition", hidden, kernel, targets, weights))()
    devices = sharding.make_mesh(MeshConfig(**mesh), 2, length=6)
    for impl in ("chunked", "pallas"):
        with interpreted(), ops.recording() as chosen:
            run = lambda: value_and_gradients(impl, *inputs)
            found = jax.jit(partition.traced(run, devices, sharding.ACTIVATION_RULES))()
        columns, rows = 40 // mesh["tensor"], 12 // (devices.size // mesh["tensor"])
        assert {(c.spec.rows, c.spec.columns) for c in chosen.choices} == {(rows, columns)}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
