"""Attention that also returns its log-sum-exp, in float64: against the formula, and merged with other keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from attnlab.ops.attention import attention_with_lse
from attnlab.ops.masks import Mask
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.ops import reference

B, T, S, H, K, D, E = 2, 7, 9, 4, 2, 4, 3


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape)
    start = np.asarray([[0, 0, 1, 3, 3, 8, 9], [0, 1, 1, 1, 2, 2, 2]])
    mask = Mask(start, np.asarray([[1, 9, 4, 7, 9, 9, 9], [0, 2, 5, 5, 6, 7, 9]]))  # one row of each sees nothing
    return normal(B, T, H, D), normal(B, S, K, D), normal(B, S, K, E), normal(H), mask


@pytest.mark.parametrize("impl", ["definition", "xla"])
@pytest.mark.parametrize("soft_cap, sinks", [(None, False), (2.0, True)])
def test_value_and_gradients(impl, soft_cap, sinks):
    """lse and o, and the gradients of both in q, k, v and sinks, are those of the formula written out."""
    q, k, v, sink, mask = arrays()
    sink = sink if sinks else None
    waves = lambda *shape: np.cos(np.arange(np.prod(shape))).reshape(shape)
    do, dlse = waves(B, T, H, E), waves(B, T, H)

    @jax.jit
    def run(q, k, v, sink, mask):
        def op(q, k, v, sink):
            o, lse = attention_with_lse(q, k, v, mask, soft_cap=soft_cap, sinks_H=sink, impl=impl)
            return o, jnp.where(lse > -1e19, lse, 0)

        (o, lse), vjp = jax.vjp(op, q, k, v, sink)
        return [o, *jax.tree.leaves(vjp((jnp.asarray(do), jnp.asarray(dlse)))), lse]

    *expected, lse = reference.attention(q, k, v, mask, do, sinks=sink, soft_cap=soft_cap, dlse=dlse)
    for got, want in zip(run(q, k, v, sink, mask), [*expected, np.where(lse > -np.inf, lse, 0)], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


@tiers.parametrize("impl", ["definition", "xla"], often=["xla"])
def test_two_sets_of_keys_merge_to_one(impl):
    """Weighed by sigmoid(lse_2 - lse_1), attention over two parts is attention over all, where a part is empty too."""
    q, k, v, _, mask = arrays()
    cut = 4
    first = Mask(mask.k_start, np.minimum(mask.k_end, cut))
    second = Mask(np.maximum(mask.k_start - cut, 0), mask.k_end - cut)

    @jax.jit
    def every(q, k, v):
        run = lambda k, v, mask: attention_with_lse(q, k, v, mask, impl=impl)
        return run(k, v, mask), run(k[:, :cut], v[:, :cut], first), run(k[:, cut:], v[:, cut:], second)

    (whole, lse), (a, lse_a), (b, lse_b) = jax.device_get(every(q, k, v))
    weight = scipy.special.expit(lse_b - lse_a)[..., None]
    np.testing.assert_allclose((1 - weight) * a + weight * b, whole, atol=1e-12)
    some = lse > -1e19
    assert some.any() and not some.all() and np.all(np.isfinite(lse))
    np.testing.assert_allclose(np.logaddexp(lse_a, lse_b)[some], lse[some], atol=1e-12)


def test_it_runs_on_each_devices_part():
    """Over a mesh, both outputs are those of one device."""
    q, k, v, _, mask = arrays()
    devices = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), 2)
    run = lambda q, k, v: attention_with_lse(q, k, v, mask)
    split = jax.jit(partition.traced(run, devices, sharding.ACTIVATION_RULES))
    for a, b in zip(split(q, k, v), jax.jit(run)(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
