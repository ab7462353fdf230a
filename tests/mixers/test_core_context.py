"""The identities of core-context-aware attention (Chen et al. 2024), in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.mixers import core_context
from tests import tiers
from tests.mixers import cases, plain
from tests.mixers import test_contract as battery

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out"}
WRITTEN_OUT = True
T, D = cases.LENGTH, cases.WIDTH


def keys_seen(config, t):
    return core_context.seen(t, config.group, config.window)


def keys_computed(config):
    cores = cases.LENGTH // config.group if cases.LENGTH - config.window >= config.group else 0
    return cases.LENGTH + cores


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("core_context").Config(**fields), jnp.float64)


@functools.cache
def inputs():
    return np.random.default_rng(5).standard_normal((2, T, D)), mixers.Sequence.whole(2, T)


def naive(module, x):
    """The layer on one document, query by query."""
    c, d, g, weight = module.config, module.head_dim, module.config.group, lambda y: np.asarray(y.kernel[...])
    q, k, v = ((x @ weight(y)).reshape(len(x), -1, d) for y in (module.q, module.k, module.v))
    if c.rope_base is not None:
        q, k = (plain.rope(y, c.rope_base) for y in (q, k))
    o, G = np.zeros_like(q), c.heads // c.key_heads
    weights = lambda logits: np.exp(logits) / np.exp(logits).sum()
    for t, h in np.ndindex(len(x), c.heads):
        keys, values, bias, far = [], [], [], max(0, (t + 1 - c.window) // g)
        for p in range(far):
            own, last = range(p * g, p * g + g), q[p * g + g - 1]
            last = last[h] if c.cores == "query_heads" else last[h // G * G : h // G * G + G].mean(0)
            pi = weights(k[own, h // G] @ last / np.sqrt(d))
            keys.append(pi @ k[own, h // G])
            values.append(pi @ v[own, h // G])
            bias.append(np.log(g) if c.log_size else 0)
        near = range(g * far, t + 1)
        assert len(near) <= c.raw and len(keys) + len(near) == core_context.seen(t, g, c.window)
        keys, values, bias = keys + list(k[near, h // G]), values + list(v[near, h // G]), bias + [0] * len(near)
        o[t, h] = weights(np.array(keys) @ q[t, h] / np.sqrt(d) + bias) @ np.array(values)
    return o.reshape(len(x), -1) @ weight(module.out)


def test_layer_is_the_formula():
    """The whole layer written out, in packed rows; and streams, whose old keys have gone."""
    module = make(group=2, window=3, kv_heads=2, log_size=True)
    x, seq = cases.inputs(jnp.float64)
    y, state = cases.output(module, x, seq), battery.begun(*cases.split(module))
    assert state.carried.cache.k.shape[1] == 3
    extend = functools.partial(battery.extend, *cases.split(module))
    stream, _ = cases.streamed(extend, state, x, seq, battery.CUTS[1])
    for row, first, end in cases.DOCUMENTS:
        want = naive(module, np.asarray(x)[row, first:end])
        np.testing.assert_allclose(y[row, first:end], want, atol=1e-12)
        np.testing.assert_allclose(stream[row, first:end], want, atol=1e-12)


@tiers.often("kv_heads")
@pytest.mark.parametrize("cores", ["query_heads", "kv_heads"])
def test_windows_that_groups_do_not_divide(cores):
    """Groups of 3 and a window of 2, both kinds of cores of one key head."""
    module, (x, seq) = make(group=3, window=2, kv_heads=1, cores=cores, impl="definition"), inputs()
    np.testing.assert_allclose(cases.output(module, x, seq)[1], naive(module, x[1]), atol=1e-12)


@tiers.exhaustive
def test_groups_of_one_and_long_windows_are_softmax_attention():
    """A core of one key is that key; and a window as long as the row leaves no cores."""
    x, seq = inputs()
    module = make(group=1, window=2, kv_heads=2, impl="definition")
    softmax = cases.module(mixers.get("softmax").Config(kv_heads=2, impl="definition"), jnp.float64)
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    expected = cases.output(softmax, x, seq)
    np.testing.assert_allclose(cases.output(module, x, seq), expected, atol=1e-12)
    module.config = core_context.CoreContextConfig(group=4, window=T, kv_heads=2, impl="definition")
    np.testing.assert_allclose(cases.output(module, x, seq), expected, atol=1e-12)


@tiers.exhaustive
def test_constant_values_are_preserved():
    """All weights, of cores and inside them, sum to 1; and gradients reach every position, cores through pi."""
    module, (x, seq) = make(group=3, window=2, bias="qkv", impl="definition"), inputs()
    module.v.kernel[...] = jnp.zeros_like(module.v.kernel[...])
    value = np.asarray(module.v.bias[...]) @ np.asarray(module.out.kernel[...])
    np.testing.assert_allclose(cases.output(module, x, seq), np.broadcast_to(value, x.shape), atol=1e-12)
    module = make(group=3, window=2, impl="definition")
    graphdef, params = cases.split(module)
    last = lambda x: battery.call(graphdef, params, x, seq)[0, -1].sum()
    assert np.all(np.abs(jax.grad(last)(jnp.asarray(x))[0]).max(-1) > 1e-6)
