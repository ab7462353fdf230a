"""The identities of gated slot attention (Zhang et al. 2024), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.mixers.gsa import GSAConfig
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out forget", "scale": "norm"}
NUMBERS_OF = "gla"
WRITTEN_OUT = True
SPLIT_GRADIENTS = False


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(GSAConfig(**{"chunk": 4, "slots": 5, **fields}), jnp.float64)


def weight(linear):
    return np.asarray(linear.kernel[...])


def silu(z):
    return z * np.exp(-np.logaddexp(0, -z))


def inputs_of(module, x):
    """q, k, v [T, H, d] and decays [T, H, m], of one sequence."""
    split = lambda y: y.reshape(len(x), module.config.heads, -1)
    decay = np.exp(-np.logaddexp(0, -x @ weight(module.forget)) / module.config.temperature)
    return *(split(silu(x @ weight(y))) for y in (module.q, module.k, module.v)), split(decay)


def finished(module, o):
    """The layer's output of the heads' [T, H, d]."""
    o = silu(o).reshape(len(o), -1)
    return o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * np.asarray(module.norm.scale[...]) @ weight(module.out)


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in NumPy."""
    q, k, v, a = inputs_of(module, x)
    keys = np.zeros((q.shape[1], a.shape[2], q.shape[2]))
    values, o = np.zeros_like(keys), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(q.shape[1]):
            keys[h] = a[t, h][:, None] * keys[h] + np.outer(1 - a[t, h], k[t, h])
            values[h] = a[t, h][:, None] * values[h] + np.outer(1 - a[t, h], v[t, h])
            p = np.exp(keys[h] @ q[t, h])
            o[t, h] = values[h].T @ (p / p.sum())
    return finished(module, o)


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "slots": 3}])
def test_layer_is_the_formula(fields):
    """The whole layer written out, with chunks that do not divide the length."""
    module = make(**fields)
    x, _ = cases.inputs(jnp.float64)
    for got, row in zip(cases.output(module, x), np.asarray(x), strict=True):
        np.testing.assert_allclose(got, naive(module, row), atol=1e-12)


@tiers.exhaustive
def test_slots_that_forget_all_hold_the_position():
    """Decays of 0: every slot is the present key and value, so that o = v whatever the query."""
    module = make(temperature=1e-9)
    x, _ = cases.inputs(jnp.float64)
    for got, row in zip(cases.output(module, x), np.asarray(x), strict=True):
        np.testing.assert_allclose(got, finished(module, inputs_of(module, row)[2]), atol=1e-9)


def test_equal_gates_are_one_average():
    """Where all slots decay alike they are equal, softmax is uniform, and o is one running average of values."""
    module = make()
    kernel = module.forget.kernel[...].reshape(cases.WIDTH, module.config.heads, -1)
    module.forget.kernel[...] = jnp.repeat(kernel[..., :1], kernel.shape[-1], -1).reshape(cases.WIDTH, -1)
    x, _ = cases.inputs(jnp.float64)
    for got, row in zip(cases.output(module, x), np.asarray(x), strict=True):
        _, _, v, a = inputs_of(module, row)
        o, average = np.zeros_like(v), 0
        for t in range(len(row)):
            average = a[t, :, :1] * average + (1 - a[t, :, :1]) * v[t]
            o[t] = average
        np.testing.assert_allclose(got, finished(module, o), atol=1e-12)


def test_state_is_the_slots():
    """Of fixed size, m keys and values a head; no slots are refused."""
    state = make(slots=7).init_carried(2, 1000, jnp.float64)
    assert state.slot_keys.shape == (2, 4, 4, 7) and state.slot_values.shape == (2, 4, 7, 4)
    with pytest.raises(ConfigError, match="slots = 0"):
        GSAConfig(slots=0)
