"""Laying activations over a mesh: the same numbers, on the devices that the rules say."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops import Mask, attention
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests.ops import reference


def mesh(**sizes):
    return sharding.make_mesh(MeshConfig(**sizes), 8)


def test_outside_a_mesh_nothing_is_laid_out():
    """Without `use`, arrays stay as they are and the platform is jax's."""
    x = jnp.ones((2, 3))
    assert partition.constrain(x, "batch", None) is x
    assert partition.platform() == jax.default_backend() and partition.ways("heads") == 1


def test_one_platforms_form_alone_is_traced():
    """Of the devices of the mesh; without one, of jax's."""
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v6e")
    elsewhere = types.SimpleNamespace(size=1, devices=np.array([tpu], object))
    form = lambda: partition.by_platform(2, 3, cpu=lambda a, b: a + b, default=lambda a, b: a * b)
    assert form() == 5
    with partition.use(elsewhere, {}):
        assert form() == 6
    assert form() == 5


def test_constrain_follows_the_rules():
    """An axis is split over what the rules name, and stays whole where the mesh does not divide it."""

    def f(x):
        return partition.constrain(x, "batch", None, "heads"), partition.constrain(x[:, :, :3], None, None, "heads")

    run = jax.jit(partition.traced(f, mesh(data=2, fsdp=2, tensor=2), sharding.ACTIVATION_RULES))
    split, whole = run(jnp.zeros((8, 5, 4)))
    assert split.sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    assert split.addressable_shards[0].data.shape == (2, 5, 2)
    assert whole.sharding.is_fully_replicated


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_attention_runs_on_each_devices_part(kv_heads):
    """Values and gradients are those of one device; no device gathers a batch or a head."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((8, 13, 4, 6)).astype(np.float32)
    k, v = (rng.standard_normal((8, 13, kv_heads, 6)).astype(np.float32) for _ in range(2))
    sinks, weights = np.linspace(-1, 1, 4, dtype=np.float32), np.cos(np.arange(q.size)).reshape(q.shape)

    def f(q, k, v, sinks):
        o, vjp = jax.vjp(lambda q, k, v, s: attention(q, k, v, Mask(causal=True), sinks_H=s), q, k, v, sinks)
        return o, *vjp(jnp.asarray(weights, o.dtype))

    run = jax.jit(partition.traced(f, mesh(data=4, tensor=2), sharding.ACTIVATION_RULES))
    placed = jax.device_put((q, k, v), sharding.batch_sharding(mesh(data=4, tensor=2)))
    compiled = run.lower(*placed, sinks).compile()
    expected = reference.attention(q, k, v, Mask(causal=True), weights, sinks=sinks)
    for a, b in zip(compiled(*placed, sinks), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-6, atol=2e-5)
    assert "all-gather" not in compiled.as_text()
    jaxpr = str(jax.make_jaxpr(run)(*placed, sinks))
    assert "f32[2,13,2,6]" in jaxpr  # two of four query heads, also where they share one key head


def test_one_element_is_not_split():
    """Where every array has one element along an axis, the output has one, too."""

    def f(x):
        return partition.local(lambda x: 2 * x, (x,), (("batch", None),), ("batch", None))

    run = jax.jit(partition.traced(f, mesh(data=8), sharding.ACTIVATION_RULES))
    np.testing.assert_array_equal(run(jnp.ones((1, 3))), 2 * np.ones((1, 3)))
