"""The identities of RAttention (Wang et al. 2025), in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from tests import tiers
from tests.mixers import cases, plain
from tests.mixers import test_contract as battery

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out", "scale": "near_scale far_scale"}
NUMBERS_OF = "softmax"
SPLIT_GRADIENTS = False
T, D = 11, cases.WIDTH


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("rattention").Config(**fields), jnp.float64)


@functools.cache
def inputs():
    return jnp.asarray(np.random.default_rng(5).standard_normal((2, T, D))), mixers.Sequence.whole(2, T)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def normed(o, scale):
    return o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-8) * np.asarray(scale[...])


def naive(module, x):
    """The layer on one document [n, D], pair by pair, in NumPy."""
    c, d = module.config, module.head_dim
    q, k, v = ((x @ np.asarray(y.kernel[...])).reshape(len(x), -1, d) for y in (module.q, module.k, module.v))
    turn = lambda y: plain.rope(y, c.rope_base)
    turned_q, turned_k = (turn(q), turn(k)) if c.rope_base else (q, k)
    f = softmax if c.features == "softmax" else lambda x: np.maximum(x, 0)
    phi = lambda y: np.concatenate([f(y), f(-y)], -1)
    near, far = np.zeros_like(q), np.zeros_like(q)
    for t, h in np.ndindex(len(x), c.heads):
        g, first = h // (c.heads // c.key_heads), max(0, t - c.window + 1)
        p = softmax(turned_k[first : t + 1, g] @ turned_q[t, h] / np.sqrt(d))
        near[t, h] = p @ v[first : t + 1, g]
        far[t, h] = (phi(k[:first, g]) @ phi(q[t, h])) @ v[:first, g]
    o = normed(near, module.near_scale) + normed(far, module.far_scale)
    return o.reshape(len(x), -1) @ np.asarray(module.out.kernel[...])


@pytest.mark.parametrize("features", ["softmax", "relu"])
def test_layer_is_the_formula(features):
    """The whole layer written out, in packed rows; and in streams, whose keys leave the window one by one."""
    module = make(window=3, features=features, kv_heads=2, heads=4)
    x, seq = cases.inputs(jnp.float64)
    y, state = cases.output(module, x, seq), battery.begun(*cases.split(module))
    extend = functools.partial(battery.extend, *cases.split(module))
    stream, _ = cases.streamed(extend, state, x, seq, battery.CUTS[1])
    for row, first, end in cases.DOCUMENTS:
        want = naive(module, np.asarray(x)[row, first:end])
        np.testing.assert_allclose(y[row, first:end], want, atol=1e-11)
        np.testing.assert_allclose(stream[row, first:end], want, atol=1e-11)


@tiers.exhaustive
def test_a_window_of_all_is_softmax_attention():
    """Nothing is before the window: with heads normed, it is softmax attention."""
    module, (x, seq) = make(window=T, impl="definition"), inputs()
    full = cases.module(mixers.get("softmax").Config(impl="definition"), jnp.float64)
    for name in ("q", "k", "v"):
        getattr(full, name).kernel[...] = getattr(module, name).kernel[...]
    full.out.kernel[...] = jnp.eye(D)
    heads = np.asarray(cases.output(full, x, seq)).reshape(2, T, 4, -1)
    want = normed(heads, module.near_scale).reshape(2, T, -1) @ np.asarray(module.out.kernel[...])
    np.testing.assert_allclose(cases.output(module, x, seq), want, atol=1e-11)
    wider = make(window=5 * T, impl="definition")
    np.testing.assert_allclose(cases.output(wider, x, seq), want, atol=1e-11)


def test_negated_queries_and_keys_change_nothing():
    """Features of -x are those of x with their halves exchanged; products of both stay as they are."""
    module, (x, seq) = make(window=2, impl="definition"), inputs()
    y = cases.output(module, x, seq)
    for name in ("q", "k"):
        getattr(module, name).kernel[...] = -getattr(module, name).kernel[...]
    np.testing.assert_allclose(cases.output(module, x, seq), y, atol=1e-12)


@tiers.exhaustive
def test_order_before_the_window_does_not_matter():
    """Linear attention knows no positions: what has left the window is a set."""
    module, (x, seq) = make(window=3, impl="definition"), inputs()
    swapped = x.at[:, :4].set(x[:, jnp.array([2, 0, 3, 1])])
    y, z = cases.output(module, x, seq), cases.output(module, swapped, seq)
    np.testing.assert_allclose(z[:, 6:], y[:, 6:], atol=1e-11)
    assert np.abs(z[:, 5] - y[:, 5]).max() > 1e-3
