"""Attention that also returns its log-sum-exp, in float64: against the formula, and merged with other keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops.attention import attention_with_lse
from attnlab.ops.masks import Mask
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers

B, T, S, H, K, D, E = 2, 7, 9, 4, 2, 4, 3


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    start = jnp.asarray([[0, 0, 1, 3, 3, 8, 9], [0, 1, 1, 1, 2, 2, 2]])
    mask = Mask(start, jnp.asarray([[1, 9, 4, 7, 9, 9, 9], [0, 2, 5, 5, 6, 7, 9]]))  # one row of each sees nothing
    return normal(B, T, H, D), normal(B, S, K, D), normal(B, S, K, E), normal(H), mask


@pytest.mark.parametrize("impl", ["definition", "xla"])
@pytest.mark.parametrize("soft_cap, sinks", [(None, False), (2.0, True)])
def test_value_and_gradients(impl, soft_cap, sinks):
    """lse and o, and the gradients of both in q, k, v and sinks, are those of the formula written out."""
    q, k, v, sink, mask = arrays()

    def formula(q, k, v, sink):
        logits = jnp.einsum("bthd,bshd->bths", q, jnp.repeat(k, H // K, 2)) * D**-0.5
        logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
        weights = jnp.where(mask.visible(T, S)[:, 0, :, None], jnp.exp(logits), 0)
        total = weights.sum(-1) + (jnp.exp(sink) if sinks else 0)
        some = total > 0
        o = jnp.einsum("bths,bshe->bthe", weights, jnp.repeat(v, H // K, 2)) / jnp.where(some, total, 1)[..., None]
        return o, jnp.where(some, jnp.log(jnp.where(some, total, 1)), 0)

    def op(q, k, v, sink):
        sinks_H = sink if sinks else None
        o, lse = attention_with_lse(q, k, v, mask, soft_cap=soft_cap, sinks_H=sinks_H, impl=impl)
        return o, jnp.where(lse > -1e19, lse, 0)

    def run(f):
        scalar = lambda *xs: sum(jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))) for y in f(*xs))
        both = lambda *xs: (*f(*xs), *jax.grad(scalar, argnums=(0, 1, 2, 3))(*xs))
        return jax.jit(both)(q, k, v, sink)

    for got, want in zip(run(op), run(formula), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


@tiers.parametrize("impl", ["definition", "xla"], often=["xla"])
def test_two_sets_of_keys_merge_to_one(impl):
    """Weighed by sigmoid(lse_2 - lse_1), attention over two parts is attention over all, where a part is empty too."""
    q, k, v, _, mask = arrays()
    cut = 4
    whole, lse = attention_with_lse(q, k, v, mask, impl=impl)
    first = Mask(mask.k_start, jnp.minimum(mask.k_end, cut))
    second = Mask(jnp.maximum(mask.k_start - cut, 0), mask.k_end - cut)
    a, lse_a = attention_with_lse(q, k[:, :cut], v[:, :cut], first, impl=impl)
    b, lse_b = attention_with_lse(q, k[:, cut:], v[:, cut:], second, impl=impl)
    weight = jax.nn.sigmoid(lse_b - lse_a)[..., None]
    np.testing.assert_allclose((1 - weight) * a + weight * b, whole, atol=1e-12)
    some = np.asarray(lse) > -1e19
    assert some.any() and not some.all() and np.all(np.isfinite(lse))
    np.testing.assert_allclose(jnp.logaddexp(lse_a, lse_b)[some], lse[some], atol=1e-12)


def test_it_runs_on_each_devices_part():
    """Over a mesh, both outputs are those of one device."""
    q, k, v, _, mask = arrays()
    devices = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), 2)
    run = lambda q, k, v: attention_with_lse(q, k, v, mask)
    split = jax.jit(partition.traced(run, devices, sharding.ACTIVATION_RULES))
    for a, b in zip(split(q, k, v), run(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
