"""The identities of DeepSeek's sparse attention (DeepSeek-AI 2025), in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.mixers.dsa import DSAConfig
from attnlab.mixers.mla import MLAConfig
from tests import tiers
from tests.mixers import cases
from tests.mixers import test_contract as battery
from tests.mixers.test_softmax import rms, rotate

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q q_down down shared k v out index_q index_k index_w", "scale": "norm q_norm index_norm"}
BLOCK = 64
BIASED = [({}, "down q shared", "out"), ({"query_rank": 6}, "down q_down shared", "out")]
NUMBERS_OF = "softmax"
SPLIT_GRADIENTS = False
T, D = cases.LENGTH, cases.WIDTH


def keys_seen(config, t):
    return min(t + 1, config.top_k)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(DSAConfig(**fields), jnp.float64)


def naive(module, x):
    """The layer on one document, query by query; the margin of its choices; the sum of divergences."""
    c, H, weight = module.config, module.config.heads, lambda m: np.asarray(m.kernel[...])
    latent = rms(x @ weight(module.down), np.asarray(module.norm.scale[...]))
    source = x if c.query_rank is None else rms(x @ weight(module.q_down), np.asarray(module.q_norm.scale[...]))
    q = (source @ weight(module.q)).reshape(len(x), H, -1)
    k, v = ((latent @ weight(m)).reshape(len(x), H, -1) for m in (module.k, module.v))
    d, at = k.shape[-1], np.arange(len(x))
    key = rotate(x @ weight(module.shared), at, c.rope_base, None)
    index_q = (source @ weight(module.index_q)).reshape(len(x), c.index_heads, c.index_width)
    index_k, norm = x @ weight(module.index_k), module.index_norm
    index_k = (index_k - index_k.mean(-1, keepdims=True)) / np.sqrt(index_k.var(-1, keepdims=True) + 1e-5)
    index_k = index_k * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    turn = lambda y: rotate(y, at, c.rope_base, c.index_width // 2)
    index_k, index_q = turn(index_k), np.stack([turn(index_q[:, j]) for j in range(c.index_heads)], axis=1)
    w = x @ weight(module.index_w) / np.sqrt(c.index_heads * c.index_width)
    turned = np.stack([rotate(q[:, h, d:], at, c.rope_base, None) for h in range(H)], axis=1)
    o, gaps, divergence = np.zeros(v.shape), [np.inf], 0.0
    softmax = lambda y: np.exp(y - y.max()) / np.exp(y - y.max()).sum()
    for t in range(len(x)):
        scores = np.maximum(index_k[: t + 1] @ index_q[t].T, 0) @ w[t]
        order = np.argsort(-scores, kind="stable")
        if t + 1 > c.top_k:
            gaps.append(scores[order[c.top_k - 1]] - scores[order[c.top_k]])
        chosen = order[: c.top_k]
        p = [
            softmax((k[chosen, h] @ q[t, h, :d] + key[chosen] @ turned[t, h]) / np.sqrt(q.shape[-1])) for h in range(H)
        ]
        for h in range(H):
            o[t, h] = p[h] @ v[chosen, h]
        mean = np.mean(p, axis=0)
        divergence += (mean * np.log(mean / softmax(scores[chosen]))).sum()
    return o.reshape(len(x), -1) @ weight(module.out), min(gaps), divergence


@tiers.often("{'top_k': 2, 'query_rank': 6, 'index_heads': 6}")
@pytest.mark.parametrize("fields", [{"top_k": 3}, {"top_k": 2, "query_rank": 6, "index_heads": 6}], ids=str)
def test_layer_is_the_formula(fields):
    """The whole layer written out, in packed rows, with its loss; and streams."""
    module = make(heads=2, index_loss=0.5, rank=5, **fields)
    x, seq = cases.inputs(jnp.float64)
    (y, losses), _ = battery.value_and_gradients(*cases.split(module), x, seq)
    found = [np.asarray(y)]
    if "query_rank" not in fields:
        extend, state = functools.partial(battery.extend, *cases.split(module)), battery.begun(*cases.split(module))
        found.append(cases.streamed(extend, state, x, seq, battery.CUTS[1])[0])
    total = 0.0
    for row, first, end in cases.DOCUMENTS:
        want, gap, divergence = naive(module, np.asarray(x)[row, first:end])
        assert gap > 1e-4
        total += divergence
        for y in found:
            np.testing.assert_allclose(y[row, first:end], want, atol=1e-11)
    positions = sum(end - first for _, first, end in cases.DOCUMENTS)
    np.testing.assert_allclose(losses["indexer"], 0.5 * total / positions, rtol=1e-10)


@tiers.exhaustive
def test_room_for_all_is_latent_attention():
    """Both implementations, whatever the indexer says."""
    x, seq = cases.inputs(jnp.float64)
    mla = cases.module(MLAConfig(rank=7, impl="definition"), jnp.float64)
    expected = np.asarray(battery.call(*cases.split(mla), x, seq))
    for impl in ("indexed", "definition"):
        module = make(rank=7, top_k=T, impl=impl)
        for name in ("q", "down", "shared", "k", "v", "out"):
            getattr(module, name).kernel[...] = getattr(mla, name).kernel[...]
        module.norm.scale[...] = mla.norm.scale[...]
        y = battery.call(*cases.split(module), x, seq)
        np.testing.assert_allclose(y, expected, atol=1e-12)


def test_the_indexer_learns_by_its_loss_and_nothing_else_does():
    """Gradients of the output at the indexer, and of the loss at all else, are exactly 0."""
    graphdef, params = cases.split(make(top_k=3, query_rank=6, heads=2))
    x, seq = cases.inputs(jnp.float64)

    @jax.jit
    def gradients(params, x):
        out = lambda p, x: battery.nnx.merge(graphdef, p)(x, seq)
        of = lambda f: jax.grad(lambda p, x: f(out(p, x)), argnums=(0, 1))(params, x)
        return of(lambda o: (o.y * o.y).sum()), of(lambda o: o.losses["indexer"])

    (output, _), (loss, of_x) = gradients(params, x)
    assert not np.any(of_x)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(output), jax.tree.leaves(loss)):
        index = "index_" in jax.tree_util.keystr(path)
        assert np.any(a) != index and np.any(b) == index, jax.tree_util.keystr(path)


@tiers.exhaustive
def test_scaled_weights_choose_alike():
    """Twice as large scores: the same keys, and the same output."""
    module = make(top_k=3, impl="definition")
    x, seq = cases.inputs(jnp.float64)
    y = np.asarray(battery.call(*cases.split(module), x, seq))
    module.index_w.kernel[...] = 2 * module.index_w.kernel[...]
    np.testing.assert_array_equal(battery.call(*cases.split(module), x, seq), y)


def test_without_rotary_channels_the_base_is_the_indexers():
    """Where latent attention has nothing to turn, and refuses another base, the indexer's channels are turned by it."""
    x, seq = cases.inputs(jnp.float64)
    of = lambda base: make(rotary_width=0, rope_base=base).indexer(x, seq.derived())[0]
    assert np.abs(np.asarray(of(100.0) - of(10_000.0))).max() > 0.01
