"""The identities of landmark attention (Mohtashami and Jaggi 2023), in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers import landmark
from tests import tiers
from tests.mixers import cases, flops, plain
from tests.mixers import test_contract as battery

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out"}
T, D = cases.LENGTH, cases.WIDTH


def keys_seen(config, t):
    return landmark.seen(t, config.size, config.top_k)


def keys_computed(config):
    """All, but that `gate` has the logits, half a key each, of landmarks that are not retrieved."""
    if config.top_k is None:
        return T
    return T - sum(len(range(config.size, t + 1, config.size)[config.top_k :]) for t in range(T)) / T / 2


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("landmark").Config(**fields), jnp.float64)


@functools.cache
def inputs():
    return np.random.default_rng(5).standard_normal((2, T, D)), mixers.Sequence.whole(2, T)


def softmax(y):
    return np.exp(y) / np.exp(y).sum(-1, keepdims=True)


def weights_of(t, logits, ranks, size, top_k):
    """Of the query at t on all positions up to it, and the margin of its choice of blocks, by their ranks."""
    own, gap = t // size, np.inf
    blocks = sorted(range(own), key=lambda b: -ranks[b])
    if top_k is not None and own > top_k:
        gap = ranks[blocks[top_k - 1]] - ranks[blocks[top_k]]
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
        g = np.arange(c.heads) // (c.heads // c.key_heads)
        logits = np.einsum("hd,shd->hs", q[t], k[: t + 1, g]) / np.sqrt(d)
        landmarks = logits[:, c.size - 1 : t // c.size * c.size : c.size]
        ranks = landmarks[h] if c.choice == "head" else softmax(landmarks).max(0)
        weights, gap = weights_of(t, logits[h], ranks, c.size, c.top_k)
        assert abs(weights.sum() - 1) < 1e-12 and not weights[c.size - 1 :: c.size].any()
        o[t, h] = weights @ v[: t + 1, g[h]]
        gaps.append(gap)
    return o.reshape(len(x), -1) @ weight(module.out), min(gaps)


@tiers.often("{'block': 1, 'kv_heads': 2}", "{'block': 1, 'top_k': 2, 'kv_heads': 2, 'choice': 'token'}")
@pytest.mark.parametrize(
    "fields",
    [
        {"block": 1, "kv_heads": 2},
        {"block": 1, "top_k": 2},
        {"block": 1, "top_k": 2, "kv_heads": 2, "choice": "token"},
    ],
    ids=str,
)
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
    plainly = cases.module(mixers.get("softmax").Config(impl="definition"), jnp.float64)
    for name in ("q", "k", "v", "out"):
        getattr(plainly, name).kernel[...] = getattr(module, name).kernel[...]
    y = cases.output(module, x, seq)
    np.testing.assert_allclose(y[:, :6], cases.output(plainly, x, seq)[:, :6], atol=1e-12)
    assert np.abs(y[:, 6:] - cases.output(plainly, x, seq)[:, 6:]).min(-1).max() > 1e-3


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


@functools.partial(jax.jit, static_argnums=0)
def _streamed(graphdef, params, x, cotangent, seq, state):
    """Position by position, and the gradient to x."""

    def run(x):
        def step(carried, inputs):
            (state, stream), (x, positions, segments) = carried, inputs
            one, stream = stream.extend(mixers.Sequence(positions[:, None], segments[:, None]))
            out = nnx.merge(graphdef, params).extend(x[:, None], one, state)
            return (out.state, stream), out.y[:, 0]

        rows = jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1), (x, seq.positions, seq.segments))
        _, y = jax.lax.scan(step, (state, mixers.Stream.start(len(x))), rows)
        return jnp.swapaxes(y, 0, 1)

    y, pull = jax.vjp(run, x)
    return y, pull(cotangent)[0]


@functools.partial(jax.jit, static_argnums=0)
def _whole(graphdef, params, x, cotangent, seq):
    y, pull = jax.vjp(lambda x: nnx.merge(graphdef, params)(x, seq).y, x)
    return y, pull(cotangent)[0]


@tiers.parametrize("choice", ["head", "token"], often=["token"])
def test_decoding_reads_what_it_retrieves(choice):
    """Of a cache of 20 blocks a step gathers two for each head; it is the whole, packed, values and gradients, also
    where fewer blocks are complete than it retrieves."""
    module, rng = make(block=2, top_k=2, kv_heads=2, choice=choice), np.random.default_rng(7)
    segments = np.stack([np.repeat([1, 2, 0], [9, 48, 3]), np.repeat([0, 4, 5], [2, 7, 51])]).astype(np.int32)
    seq = mixers.Sequence(np.arange(60, dtype=np.int32) - np.zeros((2, 1), np.int32), segments)
    x, cotangent = rng.standard_normal((2, 2, 60, D))
    cotangent *= (segments > 0)[..., None]
    state = module.init_state(2, 60, jnp.float64)
    streamed = _streamed(*cases.split(module), x, cotangent, seq, state)
    for got, want in zip(streamed, _whole(*cases.split(module), x, cotangent, seq), strict=True):
        np.testing.assert_allclose(got[segments > 0], want[segments > 0], atol=1e-12)
    one, _ = mixers.Stream.start(2).extend(mixers.Sequence(np.zeros((2, 1), np.int32)))
    assert np.isnan(module.extend(x[:, :1], one, dataclasses.replace(state, carried=overfull(state.carried))).y).all()


def overfull(carried):
    """The cache with all its places taken."""
    return dataclasses.replace(carried, kv=dataclasses.replace(carried.kv, length=jnp.int32(60)))


@pytest.mark.parametrize("fields", [{}, {"top_k": 1}, {"top_k": 4}, {"top_k": 4, "choice": "token", "kv_heads": 1}])
def test_decoding_costs_what_is_declared(fields):
    """Products of one step over 1023 keys are those that the layer declares of the query that sees most, but for the
    value that a landmark has not, and of its own block one that it does not see."""
    module, length = cases.blank(landmark.LandmarkConfig(block=31, **fields), jnp.float32), 1024
    x, (graphdef, params) = jnp.zeros((1, 1, D), jnp.float32), cases.split(module)
    one, _ = mixers.Stream.start(1).extend(mixers.Sequence(jnp.zeros((1, 1), jnp.int32)))
    state = jax.eval_shape(lambda: module.init_state(1, length))
    step = lambda params, x, state: nnx.merge(graphdef, params).extend(x, one, state).y
    declared = type(module).flops(module.config, D, length)[0]["projections"]
    keys, others = (of(length - 2, 32, module.config.top_k) for of in (landmark.seen, landmark.left))
    assert flops.count(step, params, x, state) == pytest.approx(declared + 4 * D * keys + 2 * D * others, rel=0.05)


def test_a_choice_without_retrieval_is_refused():
    with pytest.raises(ConfigError, match="choice = 'token'.*head, the default, where top_k is none"):
        landmark.LandmarkConfig(choice="token")
