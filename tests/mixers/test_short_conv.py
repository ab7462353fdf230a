"""The identities of the gated short convolution (Arora et al. 2024), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.mixers.short_conv import ShortConvConfig
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "v gate out", "taps": "conv.filters"}
BIASED = [({}, "v gate", "out")]
WRITTEN_OUT = True


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in NumPy."""
    weight = lambda linear: np.asarray(linear.kernel[...])
    filters, v, y = np.asarray(module.conv.filters[...]), x @ weight(module.v), np.zeros_like(x)
    for t in range(len(x)):
        z = sum(filters[len(filters) - 1 - i] * v[t - i] for i in range(len(filters)) if i <= t)
        y[t] = (z / (1 + np.exp(-z)) * (x[t] @ weight(module.gate))) @ weight(module.out)
    return y


@pytest.mark.parametrize("impl", ["shifts", "definition"])
def test_layer_is_the_formula(impl):
    """The whole layer written out, each document of a packed row by itself."""
    module = cases.module(ShortConvConfig(impl=impl, span=4), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = cases.output(module, x, seq)
    for row, first, end in cases.DOCUMENTS:
        np.testing.assert_allclose(y[row, first:end], naive(module, np.asarray(x[row, first:end])), atol=1e-12)


def test_reaches_as_many_positions_as_it_spans():
    """A change is seen at its own position and the two behind it, and nowhere else."""
    module = cases.module(ShortConvConfig(), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    changed = np.abs(cases.output(module, x.at[:, 4].add(1.0)) - cases.output(module, x)).max((0, 2)) > 1e-9
    assert np.flatnonzero(changed).tolist() == [4, 5, 6]


def test_one_tap_is_a_gated_mlp():
    """Where the filter weighs the position alone, by 1: `(silu(x W_1) * (x W_2)) W_o`."""
    module = cases.module(ShortConvConfig(), jnp.float64)
    module.conv.filters[...] = jnp.zeros_like(module.conv.filters[...]).at[-1].set(1)
    x, _ = cases.inputs(jnp.float64)
    weight = lambda linear: np.asarray(linear.kernel[...])
    z = np.asarray(x) @ weight(module.v)
    y = (z / (1 + np.exp(-z)) * (np.asarray(x) @ weight(module.gate))) @ weight(module.out)
    np.testing.assert_allclose(cases.output(module, x), y, atol=1e-12)


def test_impossible_knobs():
    with pytest.raises(ConfigError, match="span = 1"):
        ShortConvConfig(span=1)
    with pytest.raises(ConfigError, match="expand = 1.3"):
        ShortConvConfig(expand=1.3).head_dim(16)
