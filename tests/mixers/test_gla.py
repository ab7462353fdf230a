"""The identities of gated linear attention (Yang et al. 2024), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.gla import GLAConfig
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out gate log_decay.down log_decay.up", "scale": "norm"}
# A document's first output is (q . k) v: its norm's gradient grows, and in float32 rounds, as q . k goes to 0.
KERNEL_TOLERANCE = 1e-3
WRITTEN_OUT = True


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(GLAConfig(chunk=4, rank=3, **fields), jnp.float64)


def weight(linear):
    return np.asarray(linear.kernel[...])


def sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))


def inputs_of(module, x):
    """q, k [T, H, d], v [T, H, e] and decays [T, H, d], of one sequence."""
    c = module.config
    repeated = lambda y, heads: np.repeat(y.reshape(len(x), heads, -1), c.heads // heads, axis=1)
    logits = x @ weight(module.log_decay.down) @ weight(module.log_decay.up) + np.asarray(module.log_decay.up.bias[...])
    K = module.key_heads
    return (
        repeated(x @ weight(module.q), c.heads) / np.sqrt(module.key_dim),
        *(repeated(x @ weight(linear), K) for linear in (module.k, module.v)),
        repeated(sigmoid(logits) ** (1 / c.temperature), K),
    )


def finished(module, x, o):
    """The layer's output of the heads' [T, H, e]."""
    gate = x @ weight(module.gate)
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * np.asarray(module.norm.scale[...])
    return (o.reshape(len(x), -1) * gate * sigmoid(gate)) @ weight(module.out)


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in NumPy."""
    q, k, v, a = inputs_of(module, x)
    S, o = np.zeros((*q.shape[1:], v.shape[2])), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(q.shape[1]):
            S[h] = np.diag(a[t, h]) @ S[h] + np.outer(k[t, h], v[t, h])
            o[t, h] = S[h].T @ q[t, h]
    return finished(module, x, o)


@pytest.mark.parametrize("fields", [{}, {"key_heads": 2, "key_width": 3, "temperature": 1.0}])
def test_layer_is_the_formula(fields):
    """The whole layer written out, with chunks that do not divide the length, and shared keys and values."""
    module = make(**fields)
    x, _ = cases.inputs(jnp.float64)
    for got, row in zip(cases.output(module, x), np.asarray(x), strict=True):
        np.testing.assert_allclose(got, naive(module, row), atol=1e-12)


@pytest.mark.parametrize("bias", [1e4, -1e4])
def test_limits_of_the_decay(bias):
    """b to infinity: plain causal linear attention. To minus infinity: `(q_t . k_t) v_t`, of the position alone."""
    module = make()
    module.log_decay.up.bias[...] = jnp.full_like(module.log_decay.up.bias[...], bias)
    x, _ = cases.inputs(jnp.float64)
    got = cases.output(module, x)
    for y, row in zip(got, np.asarray(x), strict=True):
        q, k, v, _ = inputs_of(module, row)
        seen = np.tril(np.ones((len(row), len(row)))) if bias > 0 else np.eye(len(row))
        o = np.einsum("thd,shd,ts,she->the", q, k, seen, v)
        np.testing.assert_allclose(y, finished(module, row, o), atol=1e-12)


def test_equal_channels_are_one_decay():
    """Where all channels of a head decay alike, a pair's weight is one number: the product of decays times q k."""
    module = make()
    spread = lambda y: jnp.repeat(y.reshape(*y.shape[:-1], 4, -1)[..., :1], module.key_dim, -1).reshape(y.shape)
    up = module.log_decay.up
    up.kernel[...], up.bias[...] = spread(up.kernel[...]), spread(up.bias[...])
    x, _ = cases.inputs(jnp.float64)
    for y, row in zip(cases.output(module, x), np.asarray(x), strict=True):
        q, k, v, a = inputs_of(module, row)
        total = np.cumsum(np.log(a[..., 0]), axis=0)
        weights = np.exp(np.minimum(total[:, None] - total[None], 0)) * np.tril(np.ones((len(row),) * 2))[..., None]
        o = np.einsum("thd,shd,tsh,she->the", q, k, weights, v)
        np.testing.assert_allclose(y, finished(module, row, o), atol=1e-12)


def test_shapes_and_knobs():
    """Keys are half as wide as values; what cannot be is refused."""
    module = mixers.build({"name": "gla"}, width=16, rngs=nnx.Rngs(0))
    assert module.q.kernel.shape == module.k.kernel.shape == (16, 8) and module.log_decay.down.kernel.shape == (16, 16)
    assert module.init_carried(1, 1, jnp.float64).shape == (1, 4, 2, 4)
    with pytest.raises(ConfigError, match=r"key_heads = 3.*divisors of heads \(4\)"):
        GLAConfig(key_heads=3)
    with pytest.raises(ConfigError, match=r"key_width.*odd \(5\)"):
        GLAConfig(head_width=5).key_dim(16)
