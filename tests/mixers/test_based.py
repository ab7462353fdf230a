"""The identities of Based's linear attention (Arora et al. 2024), in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.ops.feature_maps import Taylor
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out"}
WRITTEN_OUT = True


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(dtype=jnp.float64, **fields):
    return cases.module(mixers.get("based").Config(**fields), dtype)


def whole(dtype=jnp.float64):
    x, _ = cases.inputs(dtype)
    return x, mixers.Sequence.whole(*x.shape[:2])


def weights(module, x):
    """1 + z + z^2 / 2 of all pairs [B, H, T, S], z = q . k / sqrt(f), zero for later keys."""
    split = lambda y: np.asarray(y).reshape(*x.shape[:2], module.config.heads, -1)
    q, k = split(x @ module.q.kernel[...]), split(x @ module.k.kernel[...])
    z = np.einsum("bthf,bshf->bhts", q, k) / math.sqrt(module.config.feature_width)
    return np.tril(1 + z + z**2 / 2)


@tiers.often("5-True", "16-False")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("f", [1, 2, 3, 5, 16])
def test_features_make_the_taylor_kernel(symmetric, f):
    """phi(q) . phi(k) = 1 + z + z^2 / 2, z = q . k / sqrt(f), for even and odd widths; by channels the same."""
    q, k = 2 * np.random.default_rng(f).standard_normal((2, 7, f))
    phi = Taylor(f, symmetric)
    with_one = np.concatenate([q, np.ones((7, 1))], axis=1)
    by_channels = phi.pairs.scale * with_one[:, phi.pairs.first] * with_one[:, phi.pairs.second]
    np.testing.assert_allclose(phi(jnp.asarray(q)), by_channels, rtol=1e-12)
    z = q @ k.T / math.sqrt(f)
    np.testing.assert_allclose(phi(jnp.asarray(q)) @ phi(jnp.asarray(k)).T, 1 + z + z**2 / 2, rtol=1e-12, atol=1e-12)


def test_number_of_features():
    """273 in the released code, 153 of them distinct, for queries and keys of width 16; the config counts the same."""
    for features, counts in (("full", {1: 3, 4: 21, 5: 31, 16: 273}), ("symmetric", {1: 3, 4: 15, 5: 21, 16: 153})):
        for f, count in counts.items():
            phi = mixers.get("based").Config(feature_width=f, features=features).feature_map()
            assert phi.count == jax.eval_shape(phi, jnp.ones((1, f))).shape[-1] == count


def test_features_are_the_first_terms_of_exp():
    """For small z the kernel is exp(z) up to z^3 / 6."""
    q, k = 0.2 * np.random.default_rng(0).standard_normal((2, 50, 16))
    z = (q * k).sum(-1) / 4
    phi = Taylor(16, symmetric=False)
    kernel = (phi(jnp.asarray(q)) * phi(jnp.asarray(k))).sum(-1)
    np.testing.assert_array_less(np.abs(kernel - np.exp(z)), np.abs(z) ** 3 / 6 * np.exp(np.abs(z)) + 1e-15)


@tiers.exhaustive
def test_weights_are_at_least_one_half():
    """1 + z + z^2 / 2 = ((z + 1)^2 + 1) / 2; z = -1 attains the bound."""
    q = np.random.default_rng(0).standard_normal((100, 16))
    k = -4 * q / (q**2).sum(-1, keepdims=True)  # z = -1 on the diagonal
    kernel = Taylor(16)(jnp.asarray(q)) @ Taylor(16)(jnp.asarray(k)).T
    assert kernel.min() >= 0.5 - 1e-12
    np.testing.assert_allclose(jnp.diagonal(kernel), 0.5, atol=1e-12)


@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_layer_is_the_normalised_taylor_kernel(impl):
    """The whole layer, written out with the weights of all pairs."""
    module = make(impl=impl, chunk=4)
    x, seq = whole()
    w = weights(module, x)
    v = np.asarray(x @ module.v.kernel[...]).reshape(*x.shape[:2], 4, -1)
    o = np.einsum("bhts,bshe->bthe", w, v) / w.sum(-1).swapaxes(1, 2)[..., None]
    expected = o.reshape(*x.shape[:2], -1) @ np.asarray(module.out.kernel[...])
    np.testing.assert_allclose(cases.output(module, x, seq), expected, atol=1e-12)


def test_packed_is_unpacked_features():
    """153 or 273 features: the same layer, value and gradients."""
    x, seq = whole()

    def run(features):
        graphdef, params = cases.split(make(features=features))
        loss = lambda p, x: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(x, seq).y))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    for a, b in zip(jax.tree.leaves(run("symmetric")), jax.tree.leaves(run("full")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@tiers.exhaustive
def test_step_is_chunk():
    """Position by position from the empty state gives the whole, and the last column of the state is the sum of
    the keys' features."""
    module = make()
    x, seq = whole()
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    y, state = cases.streamed(jax.jit(module.extend), state, x, seq, [1] * cases.LENGTH)
    np.testing.assert_allclose(y, cases.output(module, x, seq), atol=1e-12)
    k = module.config.feature_map()((x @ module.k.kernel[...]).reshape(*x.shape[:2], 4, -1))
    np.testing.assert_allclose(state.carried[..., -1], k.sum(1), atol=1e-11)


@tiers.exhaustive
def test_values_of_one_give_one():
    """The weights of a query sum to one: heads' outputs for constant values are the constant."""
    module = make()
    x, seq = whole()
    x = x.at[..., 0].set(1.0)
    module.v.kernel[...] = jnp.zeros_like(module.v.kernel[...]).at[0].set(1.0)
    np.testing.assert_allclose(module.heads(x, seq).y, 1.0, atol=1e-12)


def test_denominators_are_positive():
    """In float32 features of huge, nearly orthogonal queries and keys round a weight below its bound; what is divided
    by is on the bound then, and untouched elsewhere."""
    q = jnp.asarray([1.0, 0.7] * 8, jnp.float32) * 1e4
    k = jnp.asarray([0.7, -1.0] * 8, jnp.float32) * 1e4
    rounded = (Taylor(16)(q) * Taylor(16)(k)).sum()
    assert rounded.dtype == jnp.float32 and rounded < 0.5, "the case must be one where rounding breaks the bound"
    module = make()
    sums = jnp.asarray([[3.0, 5.0, 0.0], [3.0, 5.0, -4.0], [3.0, 5.0, 1e-9], [3.0, 5.0, 2.0]])
    np.testing.assert_allclose(module.averaged(sums), [[6.0, 10.0]] * 3 + [[1.5, 2.5]], rtol=1e-9)


def test_epsilon_is_added_to_the_denominator():
    """One position: v / (1 + epsilon / weight)."""
    module = make(epsilon=0.25)
    x, _ = whole()
    x = x[:, :1]
    weight = weights(module, x)[:, :, 0]  # [B, H, 1]
    v = np.asarray(x @ module.v.kernel[...]).reshape(2, 1, 4, -1)
    expected = v * (weight / (weight + 0.25))[:, None]
    np.testing.assert_allclose(jax.jit(module.heads)(x, mixers.Sequence.whole(2, 1)).y, expected, atol=1e-12)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 0}, "heads = 0"),
        ({"feature_width": 0}, "feature_width = 0"),
        ({"features": "packed"}, "symmetric, full"),
        ({"epsilon": -1.0}, "epsilon = -1.0"),
        ({"impl": "scan"}, "auto, definition, chunked"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "based", **fields})
