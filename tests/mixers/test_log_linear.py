"""The identities of log-linear attention (Guo et al. 2025), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.log_linear import LogLinearConfig
from attnlab.mixers.mamba2 import Mamba2Config
from tests import tiers
from tests.mixers import cases, test_mamba2
from tests.ops.test_log_linear import parts

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = test_mamba2.ROLES | {
    "matrix": test_mamba2.ROLES["matrix"] + " levels.linear",
    "scale": test_mamba2.ROLES["scale"] + " levels",
}
NUMBERS_OF = "mamba2"
WRITTEN_OUT = True
SPLIT_GRADIENTS = False


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(LogLinearConfig(**{"state_width": 5, "chunk": 4, **fields}), jnp.float64)


def level_weights(module, x):
    """Of the rows x [T, D], [T, H, L]."""
    logits = x @ np.asarray(module.levels.linear.kernel[...])
    scale = np.asarray(module.levels.scale[...])
    return np.log1p(np.exp(scale * logits.reshape(len(x), *scale.shape)))


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position and level by level in NumPy."""
    c = module.config
    q, k, v, dt = test_mamba2.inputs_of(module, x)
    A, D = np.exp(np.asarray(module.a_log[...])), np.asarray(module.skip[...])
    weights = level_weights(module, x)
    o = D[:, None] * v
    for t in range(len(x)):
        for h in range(c.heads):
            g = h * c.groups // c.heads
            for level, positions in parts(t, c.levels).items():
                S = np.zeros((c.state_width, module.head_dim))
                for s in positions:
                    S += np.exp(-A[h] * dt[s + 1 : t + 1, h].sum()) * np.outer(k[s, g], dt[s, h] * v[s, h])
                o[t, h] += weights[t, h, level] * S.T @ q[t, g]
    return test_mamba2.finished(module, x, o)


@pytest.mark.parametrize("fields", [{}, {"groups": 2, "levels": 3}])
def test_layer_is_the_formula(fields):
    """The whole layer written out, with chunks that do not divide the length, and positions beyond the levels."""
    module = make(**fields)
    x, _ = cases.inputs(jnp.float64)
    for got, row in zip(test_mamba2.call(module, x), np.asarray(x), strict=True):
        np.testing.assert_allclose(got, naive(module, row), atol=1e-12)


@tiers.exhaustive
def test_equal_weights_are_mamba2():
    """Where all levels weigh the same: Mamba-2, of values that weigh as much."""
    module = make()
    module.levels.scale[...] = jnp.zeros_like(module.levels.scale[...])  # softplus(0) = log 2
    module.skip[...] = jnp.log(2.0) * module.skip[...]
    plain = test_mamba2.make(chunk=4)
    kept = lambda path, _: path[0] != "levels"
    nnx.update(plain, nnx.state(module, kept))
    plain.skip[...] = plain.skip[...] / jnp.log(2.0)
    plain.norm.epsilon /= np.log(2.0) ** 2  # the norm takes the common factor out
    x, _ = cases.inputs(jnp.float64)
    np.testing.assert_allclose(test_mamba2.call(module, x), test_mamba2.call(plain, x), atol=1e-12)


def test_levels_and_state():
    """A state of L - 1 memories whatever the length; a model without levels is refused."""
    with cases.drawn_by_numpy():
        module = mixers.build({"name": "log_linear", "levels": 5, "state_width": 3}, width=16, rngs=nnx.Rngs(0))
    assert module.init_state(2, 1000).carried.memory.shape == (2, 4, 4, 3, 8)
    assert np.all(module.levels.scale[...] == 1) and module.levels.linear.kernel.shape == (16, 20)
    assert LogLinearConfig().levels == 16 and issubclass(LogLinearConfig, Mamba2Config)
    with pytest.raises(ConfigError, match="levels = 1"):
        LogLinearConfig(levels=1)
