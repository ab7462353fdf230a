"""The identities of Hebbian fast weights, a layer of ours, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.hebbian import HebbianConfig
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out rate", "decay_rate": "keep", "bias": "rate_bias"}
WRITTEN_OUT = True


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(HebbianConfig(**fields), jnp.float64)


def whole():
    x, _ = cases.inputs(jnp.float64)
    return x, mixers.Sequence.whole(*x.shape[:2])


def projected(module, x):
    """q, k, v [T, H, d] of one sequence, in numpy."""
    array = lambda linear: np.asarray(linear.kernel[...])
    return ((x @ array(y)).reshape(len(x), module.config.heads, -1) for y in (module.q, module.k, module.v))


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in numpy."""
    c, (q, k, v) = module.config, projected(module, x)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    kept = sigmoid(np.asarray(module.keep[...])) if c.decay else np.ones(c.heads)
    eta = np.ones(v.shape[:2])
    if c.rate == "head":
        eta = eta * np.log1p(np.exp(np.asarray(module.rate_bias[...])))
    elif c.rate == "data":
        eta = sigmoid(x @ np.asarray(module.rate.kernel[...]))
    W, o = np.zeros((c.heads, v.shape[-1], v.shape[-1])), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(c.heads):
            W[h] = kept[h] * W[h] + eta[t, h] * np.outer(k[t, h], v[t, h])
            o[t, h] = q[t, h] @ W[h]
    return o.reshape(len(x), -1) @ np.asarray(module.out.kernel[...])


@pytest.mark.parametrize(
    "fields", [{"impl": "definition"}, {"rate": "data", "impl": "chunked"}, {"rate": "one", "decay": False}]
)
def test_layer_is_the_formula(fields):
    """The whole layer written out, in chunks that do not divide the length."""
    module = make(chunk=4, **fields)
    x, seq = whole()
    y = jax.jit(lambda x: module(x, seq).y)(x)
    for row in range(2):
        np.testing.assert_allclose(y[row], naive(module, np.asarray(x[row])), atol=1e-11)


def test_without_decay_it_is_linear_attention():
    """lambda = 1, eta = 1: the sum of `(q_t . k_s) v_s` over s <= t, all pairs written out."""
    module = make(decay=False, rate="one")
    x, seq = whole()
    y = jax.jit(lambda x: module(x, seq).y)(x)
    for row in range(2):
        q, k, v = projected(module, np.asarray(x[row]))
        scores = np.tril(np.einsum("thd,shd->hts", q, k))
        o = np.einsum("hts,she->the", scores, v).reshape(cases.LENGTH, -1)
        np.testing.assert_allclose(y[row], o @ np.asarray(module.out.kernel[...]), atol=1e-11)


def test_constant_slopes_are_lightnings_recurrence():
    """Heads' outputs are those of lightning attention's recurrence with slopes -log lambda, before norm and gate."""
    module = make(rate="one", chunk=4)
    x, seq = whole()
    q, k, v = (np.stack(y) for y in zip(*(projected(module, row) for row in np.asarray(x))))
    slope = np.log1p(np.exp(-np.asarray(module.keep[...])))
    distance = np.arange(cases.LENGTH)[:, None] - np.arange(cases.LENGTH)
    weights = np.where(distance >= 0, np.exp(-slope[:, None, None] * np.maximum(distance, 0)), 0)
    want = np.einsum("bhts,bshe->bthe", np.einsum("bthd,bshd->bhts", q, k) * weights, v)
    np.testing.assert_allclose(jax.jit(lambda x: module.heads(x, seq).y)(x), want, atol=1e-11)


def test_at_first():
    """Heads keep from 0.9 to 0.999, what they forget log-uniform; rates are 1; the state is H matrices."""
    module = mixers.build(HebbianConfig(heads=3, head_width=5), width=16, rngs=nnx.Rngs(0), dtype=jnp.float64)
    np.testing.assert_allclose(1 / (1 + np.exp(-np.asarray(module.keep[...]))), [0.9, 0.99, 0.999], rtol=1e-12)
    np.testing.assert_allclose(np.log1p(np.exp(np.asarray(module.rate_bias[...]))), np.ones(3), rtol=1e-12)
    assert module.init_state(2, 1000).carried.shape == (2, 3, 5, 5)


@pytest.mark.parametrize(
    "fields, message",
    [({"heads": 3}, "heads = 3"), ({"rate": "oja"}, "rate = 'oja'"), ({"chunk": 0}, "chunk = 0")],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.build({"name": "hebbian", **fields}, width=16, rngs=nnx.Rngs(0))
