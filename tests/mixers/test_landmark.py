"""The identities of landmark attention (Mohtashami and Jaggi 2023), in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.mixers import landmark
from tests import tiers
from tests.mixers import cases, plain
from tests.mixers import test_contract as battery

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out"}
T, D = cases.LENGTH, cases.WIDTH


def keys_seen(config, t):
    return landmark.seen(t, config.size, config.top_k)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("landmark").Config(**fields), jnp.float64)


@functools.cache
def inputs():
    return np.random.default_rng(5).standard_normal((2, T, D)), mixers.Sequence.whole(2, T)


def weights_of(t, logits, size, top_k):
    """Of the query at t on all positions up to it, and the margin of its choice of blocks."""
    softmax = lambda y: np.exp(y) / np.exp(y).sum()
    own, gap = t // size, np.inf
    blocks = sorted(range(own), key=lambda b: -logits[b * size + size - 1])
    if top_k is not None and own > top_k:
        gap = logits[blocks[top_k - 1] * size + size - 1] - logits[blocks[top_k] * size + size - 1]
        blocks = blocks[:top_k]
    tokens = [s for s in range(own * size, t + 1) if s % size != size - 1]
    p, weights = softmax(logits[tokens + [b * size + size - 1 for b in blocks]]), np.zeros(t + 1)
    weights[tokens] = p[: len(tokens)]
    for b, share in zip(blocks, p[len(tokens) :]):
        ordinary = slice(b * size, b * size + size - 1)
        weights[ordinary] = share * softmax(logits[ordinary])
    return weights, gap


def naive(module, x):
    """The layer on one document, query by query; the margin of its choices."""
    c, d, weight = module.config, module.head_dim, lambda y: np.asarray(y.kernel[...])
    q, k, v = ((x @ weight(y)).reshape(len(x), -1, d) for y in (module.q, module.k, module.v))
    q, k = (plain.rope(y, c.rope_base) for y in (q, k))
    o, gaps = np.zeros_like(q), []
    for t, h in np.ndindex(len(x), c.heads):
        g = h // (c.heads // c.key_heads)
        weights, gap = weights_of(t, k[: t + 1, g] @ q[t, h] / np.sqrt(d), c.size, c.top_k)
        assert abs(weights.sum() - 1) < 1e-12 and not weights[c.size - 1 :: c.size].any()
        o[t, h] = weights @ v[: t + 1, g]
        gaps.append(gap)
    return o.reshape(len(x), -1) @ weight(module.out), min(gaps)


@tiers.often("{'block': 1, 'kv_heads': 2}")
@pytest.mark.parametrize("fields", [{"block": 1, "kv_heads": 2}, {"block": 1, "top_k": 2}], ids=str)
def test_layer_is_the_formula(fields):
    """The whole layer written out, in packed rows; both implementations; and streams."""
    module = make(**fields)
    x, seq = cases.inputs(jnp.float64)
    state, extend = battery.begun(*cases.split(module)), functools.partial(battery.extend, *cases.split(module))
    found = [cases.output(module, x, seq), cases.streamed(extend, state, x, seq, battery.CUTS[1])[0]]
    found.append(cases.output(make(**fields, impl="definition"), x, seq))
    for row, first, end in cases.DOCUMENTS:
        want, gap = naive(module, np.asarray(x)[row, first:end])
        assert gap > 1e-4
        for y in found:
            np.testing.assert_allclose(y[row, first:end], want, atol=1e-12)


@tiers.exhaustive
def test_the_first_block_is_softmax_attention():
    """Before the first landmark; and a landmark's own key and value play no part in its block."""
    x, seq = inputs()
    module = make(block=6)
    softmax = cases.module(mixers.get("softmax").Config(impl="definition"), jnp.float64)
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    y = cases.output(module, x, seq)
    np.testing.assert_allclose(y[:, :6], cases.output(softmax, x, seq)[:, :6], atol=1e-12)
    assert np.abs(y[:, 6:] - cases.output(softmax, x, seq)[:, 6:]).min(-1).max() > 1e-3


@tiers.exhaustive
def test_uniform_scores():
    """Of c own tokens and b blocks of l tokens: 1 / (c + b) for the former, 1 / ((c + b) l) for the latter."""
    module, (x, seq) = make(block=3, heads=1, rope_base=None), inputs()
    module.k.kernel[...] = jnp.zeros_like(module.k.kernel[...])
    v = x[0] @ np.asarray(module.v.kernel[...])
    own, earlier = v[8:11].sum(0), v[[0, 1, 2, 4, 5, 6]].sum(0)
    want = (own / 5 + earlier / 15) @ np.asarray(module.out.kernel[...])
    np.testing.assert_allclose(cases.output(module, x, seq)[0, 10], want, atol=1e-12)


@tiers.exhaustive
def test_retrieving_all_blocks_is_the_whole_form():
    """And one block is another thing."""
    x, seq = inputs()
    y = cases.output(make(block=2), x, seq)
    np.testing.assert_allclose(cases.output(make(block=2, top_k=4), x, seq), y, atol=1e-12)
    assert np.abs(cases.output(make(block=2, top_k=1), x, seq) - y).max() > 1e-3
