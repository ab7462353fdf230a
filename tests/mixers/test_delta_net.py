"""The identities of DeltaNet (Yang et al. 2024), in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.delta_net import DeltaNetConfig
from attnlab.mixers.gated_deltanet import GatedDeltaNetConfig
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out beta gate", "taps": "filters", "scale": "norm"}
NUMBERS_OF = "gated_deltanet"
WRITTEN_OUT = True


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(DeltaNetConfig(chunk=4, **fields), jnp.float64)


def weight(linear):
    return np.asarray(linear.kernel[...])


def silu(z):
    return z / (1 + np.exp(-z))


def inputs_of(module, x):
    """q, k [T, H, d], v [T, H, e] and beta [T, H], of one sequence."""
    c, d = module.config, module.head_dim
    filters = np.asarray(module.filters[...]).reshape(c.conv, c.heads, -1)
    rows = np.concatenate(
        [(x @ weight(y)).reshape(len(x), c.heads, -1) for y in (module.q, module.k, module.v)], axis=-1
    )
    padded = np.concatenate([np.zeros((c.conv - 1, *rows.shape[1:])), rows])
    rows = silu(sum(filters[i] * padded[i : i + len(x)] for i in range(c.conv)))
    q, k, v = rows[..., :d], rows[..., d : 2 * d], rows[..., 2 * d :]
    q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    beta = 1 / (1 + np.exp(-x @ weight(module.beta)))
    return q / np.sqrt(d), k, v, 2 * beta if c.negative_eigenvalues else beta


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in NumPy."""
    q, k, v, beta = inputs_of(module, x)
    S, o = np.zeros((q.shape[1], v.shape[2], q.shape[2])), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(q.shape[1]):
            erase = np.eye(q.shape[2]) - beta[t, h] * np.outer(k[t, h], k[t, h])
            S[h] = S[h] @ erase + beta[t, h] * np.outer(v[t, h], k[t, h])
            o[t, h] = S[h] @ q[t, h]
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * np.asarray(module.norm.scale[...])
    o = o.reshape(len(x), -1)
    return (o * silu(x @ weight(module.gate)) if module.config.gate else o) @ weight(module.out)


@pytest.mark.parametrize("fields", [{}, {"negative_eigenvalues": True, "gate": True, "expand": 1.5}])
def test_layer_is_the_formula(fields):
    """The whole layer written out, with chunks that do not divide the length, and strengths up to 2."""
    module = make(**fields)
    x, _ = cases.inputs(jnp.float64)
    for got, row in zip(cases.output(module, x), np.asarray(x), strict=True):
        np.testing.assert_allclose(got, naive(module, row), atol=1e-12)


@tiers.exhaustive
def test_is_gated_deltanet_without_decay():
    """With the same parameters, bit for bit; and not with its decay."""
    module = make()
    assert not hasattr(module, "log_decay")
    fields = {f.name: getattr(module.config, f.name) for f in dataclasses.fields(GatedDeltaNetConfig)}
    fields.pop("decay")
    x, _ = cases.inputs(jnp.float64)
    same, decayed = (cases.module(GatedDeltaNetConfig(**fields, decay=d), jnp.float64) for d in (False, True))
    for other in (same, decayed):
        nnx.update(other, nnx.state(module, nnx.Param))
    np.testing.assert_array_equal(cases.output(same, x), cases.output(module, x))
    assert np.abs(cases.output(decayed, x) - cases.output(module, x)).max() > 1e-3


def test_strengths():
    """beta is between 0 and 1, or 0 and 2: then `I - beta k k^T` of a unit key has an eigenvalue down to -1."""
    logits = jnp.asarray([-1e3, 0.0, 1e3])
    for negative, expected in ((False, [0, 0.5, 1]), (True, [0, 1, 2])):
        found = make(negative_eigenvalues=negative).strength(logits)
        np.testing.assert_allclose(found, expected, atol=1e-15)


def test_no_knob_of_decay():
    with pytest.raises(ConfigError, match="decay"):
        mixers.config_from_node({"name": "delta_net", "decay": True})
