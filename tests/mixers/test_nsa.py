"""The identities of native sparse attention (Yuan et al. 2025), in float64."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.mixers import nsa
from tests import tiers
from tests.mixers import cases, plain
from tests.mixers import test_contract as battery

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "q k v gate out compressed_k compressed_v window_k window_v "
    "map_k.inner map_k.outer map_v.inner map_v.outer",
    "positions": "map_k.places map_v.places",
}
NUMBERS_OF = "moba"
WRITTEN_OUT = True
SPLIT_GRADIENTS = False
T, D = cases.LENGTH, cases.WIDTH


def keys_seen(config, t):
    return nsa.seen(t, config.block, config.top_k) + min(t + 1, config.window)


def keys_computed(config):
    return 2 * cases.LENGTH + cases.LENGTH // config.block


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("nsa").Config(**fields), jnp.float64)


@functools.cache
def inputs():
    return np.random.default_rng(5).standard_normal((2, T, D)), mixers.Sequence.whole(2, T)


def softmax(q, k, v):
    p = np.exp(k @ q / np.sqrt(len(q)))
    return p / p.sum(), p / p.sum() @ v


def compressed(module):
    """What makes one key, and one value, of a block [n, d]."""
    if module.config.compress == "mean":
        return [lambda block: block.mean(0)] * 2
    normal = np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)

    def learned(part, block):
        inner = (block + np.asarray(part.places[...])).ravel() @ np.asarray(part.inner.kernel[...])
        return inner * normal(inner) @ np.asarray(part.outer.kernel[...])

    return [functools.partial(learned, part) for part in (module.map_k, module.map_v)]


def naive(module, x):
    """The layer on one document, query by query, the heads of a key head together; the margin of its choices."""
    c, n, d, weight = module.config, module.config.block, module.head_dim, lambda y: np.asarray(y.kernel[...])
    turn = lambda y: plain.rope(y, c.rope_base)
    parts = lambda *names: [(x @ weight(getattr(module, y))).reshape(len(x), -1, d) for y in names]
    q, k, v = parts("q", "k", "v")
    q, k = turn(q), turn(k)
    (near_k, near_v), coarse = (k, v), (k, v)
    if c.branches == "own":
        near_k, near_v, coarse_k, coarse_v = parts("window_k", "window_v", "compressed_k", "compressed_v")
        near_k, coarse = turn(near_k), (turn(coarse_k), coarse_v)
    gates = 1 / (1 + np.exp(-(x @ weight(module.gate)).reshape(len(x), c.heads, 3)))
    o, gaps, G = np.zeros_like(q), [np.inf], c.heads // c.key_heads
    for t, g in np.ndindex(len(x), c.key_heads):
        own, ended, group = t // n, (t + 1) // n, range(g * G, (g + 1) * G)
        blocks = [[y[b * n : (b + 1) * n, g] for b in range(ended)] for y in coarse]
        means = [np.array(list(map(to_one, of))).reshape(-1, d) for to_one, of in zip(compressed(module), blocks)]
        importance = sum((softmax(q[t, h], *means)[0] for h in group), np.zeros(ended)) / G
        forced = {0, own - 1, own} & set(range(own + 1))
        others = sorted(set(range(own)) - forced, key=lambda b: -importance[b])
        room = c.top_k - len(forced)
        if len(others) > room > 0:
            gaps.append(importance[others[room - 1]] - importance[others[room]])
        blocks = forced | set(others[:room])
        chosen = [s for s in range(t + 1) if s // n in blocks]
        near = range(max(0, t - c.window + 1), t + 1)
        for h in group:
            branches = [softmax(q[t, h], *means)[1] if ended else np.zeros(d)]
            branches.append(softmax(q[t, h], k[chosen, g], v[chosen, g])[1])
            branches.append(softmax(q[t, h], near_k[near, g], near_v[near, g])[1])
            o[t, h] = gates[t, h] @ branches
    return o.reshape(len(x), -1) @ weight(module.out), min(gaps)


@tiers.often("{'compress': 'mlp', 'branches': 'own'}-1")
@pytest.mark.parametrize("fields, seed", [({}, 1), ({"compress": "mlp", "branches": "own"}, 1)], ids=str)
def test_layer_is_the_formula(fields, seed):
    """The whole layer written out, in packed rows; and streams, which choose alike."""
    module = make(block=1, top_k=4, kv_heads=2, window=3, **fields)
    x, seq = cases.inputs(jnp.float64, seed=seed)
    y, state = cases.output(module, x, seq), battery.begun(*cases.split(module))
    extend = functools.partial(battery.extend, *cases.split(module))
    stream, _ = cases.streamed(extend, state, x, seq, battery.CUTS[1])
    for row, first, end in cases.DOCUMENTS:
        want, gap = naive(module, np.asarray(x)[row, first:end])
        assert gap > 1e-4
        np.testing.assert_allclose(y[row, first:end], want, atol=1e-12)
        np.testing.assert_allclose(stream[row, first:end], want, atol=1e-12)


@tiers.often("{}")
@pytest.mark.parametrize("fields", [{}, {"compress": "mlp"}], ids=str)
def test_blocks_of_two_are_the_formula(fields):
    """With more than one key in a block, and heads that share one key head."""
    module, (x, seq) = make(block=2, top_k=3, kv_heads=1, window=1, heads=2, impl="definition", **fields), inputs()
    y = cases.output(module, x, seq)
    want, gap = naive(module, x[1])
    assert gap > 1e-4
    np.testing.assert_allclose(y[1], want, atol=1e-12)


@tiers.exhaustive
def test_branches_with_the_same_projections_are_shared_ones():
    """What branches of their own have beside is the projections alone."""
    x, seq = inputs()
    shared, own = (make(block=2, top_k=3, window=4, branches=of, impl="definition") for of in ("shared", "own"))
    for name in ("q", "k", "v", "gate", "out"):
        kernel = getattr(shared, name).kernel[...]
        for copy in (name, f"compressed_{name}", f"window_{name}"):
            if hasattr(own, copy):
                getattr(own, copy).kernel[...] = kernel
    np.testing.assert_allclose(cases.output(own, x, seq), cases.output(shared, x, seq), atol=1e-12)


def test_each_branch_by_its_gate():
    """Open alone, the selection of all blocks and the longest window are each causal softmax attention."""
    x, seq = inputs()
    ones = np.concatenate([x[..., :-1], np.ones((2, T, 1))], axis=-1)  # the last input is 1: a gate's bias
    softmax = cases.module(mixers.get("softmax").Config(impl="definition"), jnp.float64)
    module = make(block=2, top_k=6, window=T, impl="definition")
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    expected, found = cases.output(softmax, ones, seq), []
    for branch in range(3):
        gate = np.zeros((D, module.config.heads, 3))
        gate[-1] = np.where(np.arange(3) == branch, 100.0, -100.0)
        module.gate.kernel[...] = jnp.asarray(gate.reshape(D, -1))
        found.append(cases.output(module, ones, seq))
    np.testing.assert_allclose(found[1], expected, atol=1e-12)
    np.testing.assert_allclose(found[2], expected, atol=1e-12)
    np.testing.assert_allclose(found[0][:, 0], 0, atol=1e-12)  # before the first block ends
    assert np.abs(found[0][:, 1]).max() > 0.01


def test_means_have_gradients_and_the_choice_has_none():
    """Of the last query with the window on itself, by what is not selected: only through the compressed branch."""
    module, (x, seq) = make(block=1, top_k=3, window=1, heads=1, kv_heads=1, impl="definition"), inputs()
    gate, (graphdef, params) = np.zeros((D, 1, 3)), cases.split(module)

    @jax.jit
    def gradient(params, x):
        return jax.grad(lambda x: battery.nnx.merge(graphdef, params)(x, seq).y[0, -1].sum())(x)

    ones = jnp.asarray(np.concatenate([x[..., :-1], np.ones((2, T, 1))], axis=-1))
    found = []
    for branch in range(2):
        gate[-1] = np.where(np.arange(3) == branch, 100.0, -100.0)
        params["gate"]["kernel"][...] = jnp.asarray(gate.reshape(D, -1))
        found.append(np.abs(gradient(params, ones)[0]).max(-1) > 1e-30)
    assert found[0].all()
    np.testing.assert_array_equal(np.flatnonzero(found[1]), [0, T - 2, T - 1])
