"""Stick-breaking attention (Tan et al. 2024) against its formula in NumPy, and its limits, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.stick_breaking import StickBreakingConfig
from attnlab.ops.masks import Mask
from attnlab.ops.stick_breaking import stick_breaking
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out"}
BLOCK = 128

IMPLS = ["definition", "blocks"]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def layer(module, x, segments):
    """The whole layer for one row: of each query a stick is broken key by key."""
    c, d, T = module.config, module.head_dim, len(x)
    linear = lambda m, y: y @ np.asarray(m.kernel[...]) + (0 if m.bias is None else np.asarray(m.bias[...]))
    q, k, v = (linear(m, x).reshape(T, -1, d) for m in (module.q, module.k, module.v))
    o = np.zeros((T, c.heads, d))
    for h, t in np.ndindex(c.heads, T):
        own, left = h // (c.heads // c.key_heads), 1.0
        if segments[t] == 0:
            continue
        for s in range(t if c.attend_current else t - 1, -1, -1):
            if segments[s] == segments[t]:
                share = left / (1 + np.exp(-q[t, h] @ k[s, own] / np.sqrt(d)))
                o[t, h] += share * v[s, own]
                left -= share
        o[t, h] += left * v[t, own]
    return linear(module.out, o.reshape(T, -1))


@pytest.mark.parametrize("fields", [{"kv_heads": 2}, {"attend_current": True, "bias": "all"}], ids=str)
def test_equals_the_formula(fields):
    """The layer as written, of packed rows."""
    module = cases.module(StickBreakingConfig(**fields), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = jax.jit(lambda x: module(x, seq).y)(x)
    for row in range(2):
        used = cases.SEGMENTS[row] > 0
        np.testing.assert_allclose(
            y[row][used], layer(module, np.asarray(x[row]), cases.SEGMENTS[row])[used], atol=1e-10
        )


def op(impl, bias, current=False):
    """o of values 1, 0, 0, ... beside the values themselves, with logits of about `bias` [T, T] alone."""
    T = len(bias)
    q, k = jnp.eye(T)[None, :, None], jnp.asarray(bias).T[None, :, None]
    v = jnp.concatenate([jnp.ones((T, 1)), jnp.eye(T)], axis=1)[None, :, None]
    run = lambda q, k, v: stick_breaking(q, k, v, Mask(causal=True), scale=1.0, current=current, impl=impl)
    return np.asarray(jax.jit(run)(q, k, v))[0, :, 0]


@tiers.exhaustive
@pytest.mark.parametrize("impl", IMPLS)
def test_limits_of_the_shares(impl):
    """Weights and what is left sum to 1; shares of 0 leave all to v_i; a share of 1 of the key before copies it,
    whatever keys farther back would take; equal shares fall off geometrically."""
    T, rng = 6, np.random.default_rng(0)
    before = np.eye(T, k=-1)
    random = op(impl, rng.normal(size=(T, T)))
    np.testing.assert_allclose(random[:, 0], 1, atol=1e-12)
    assert np.all(np.triu(random[:, 1:], 1) == 0) and np.all(np.tril(random[:, 1:]).T[np.triu_indices(T)] > 0)
    np.testing.assert_allclose(op(impl, np.full((T, T), -60.0))[:, 1:], np.eye(T), atol=1e-12)
    copied = op(impl, 120 * before - 60 + 90 * np.tril(np.ones((T, T)), -2))[:, 1:]
    np.testing.assert_allclose(copied[1:], np.eye(T)[:-1], atol=1e-12)
    half = op(impl, np.zeros((T, T)))[-1, 1:]
    np.testing.assert_allclose(half, [2.0**-5, 2.0**-4, 2.0**-3, 2.0**-2, 2.0**-1, 2.0**-5], atol=1e-12)
    half = op(impl, np.zeros((T, T)), current=True)[-1, 1:]
    np.testing.assert_allclose(half, [2.0**-6, 2.0**-5, 2.0**-4, 2.0**-3, 2.0**-2, 2.0**-1 + 2.0**-6], atol=1e-12)


def test_large_logits_are_finite():
    """In fp32, shares of all but 1 and 0 at once: values and gradients, blocks as the definition."""
    with jax.enable_x64(False):
        rng = np.random.default_rng(1)
        q, k, v = (jnp.asarray(rng.normal(size=(1, 150, 2, 4)), jnp.float32) for _ in range(3))

        def run(impl, q, k, v):
            o = stick_breaking(30 * q, 30 * k, v, Mask(causal=True), impl=impl)
            return jnp.sum(jnp.cos(jnp.arange(o.size).reshape(o.shape)) * o), o

        for impl in IMPLS:
            f = jax.jit(jax.value_and_grad(lambda *a, impl=impl: run(impl, *a), (0, 1, 2), has_aux=True))
            (_, o), gradients = f(q, k, v)
            assert all(np.isfinite(g).all() for g in (o, *gradients))


def test_positions_are_not_read():
    """Order is what stands between: other positions are no change at all."""
    module = cases.module(StickBreakingConfig(), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    run = jax.jit(lambda positions: module(x, mixers.Sequence(positions, seq.segments)).y)
    np.testing.assert_array_equal(run(seq.positions), run(seq.positions + 5))


@pytest.mark.parametrize("fields", [{"causal": False}, {"window": 3}, {"rope_base": 100.0}, {"qk_norm": True}])
def test_what_it_does_not_have_is_unknown(fields):
    with pytest.raises(ConfigError, match=f"unknown key 'mixer.{next(iter(fields))}'"):
        mixers.config_from_node({"name": "stick_breaking", **fields})
