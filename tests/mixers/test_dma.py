"""The identities of dynamic mask attention (Shi et al. 2025) and of the running top-w, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.ops.dynamic_mask_attention import dynamic_mask_attention
from attnlab.ops.masks import NEVER
from attnlab.ops.running_topw import running_topw
from tests import tiers
from tests.mixers import cases, plain
from tests.mixers import test_contract as battery

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v score out", "scale": "q_norm k_norm strength"}
BIASED = [({}, "q k v score", "out")]
NUMBERS_OF = "softmax"
SPLIT_GRADIENTS = False
T, D = cases.LENGTH, cases.WIDTH


def keys_seen(config, t):
    return min(t + 1, config.keep)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("dma").Config(**fields), jnp.float64)


def live_by_prefix(scores, documents, w):
    """Row by row: the w best of the document so far, of equal ones the oldest."""
    for t in range(len(scores)):
        own = [s for s in range(t + 1) if documents[s] == documents[t]]
        yield sorted(sorted(own, key=lambda s: (-scores[s], s))[:w])


@tiers.often("5-2")
@pytest.mark.parametrize("w, chunk", [(3, 4), (5, 2), (1, 7), (30, 8)])
def test_running_top_is_that_of_each_prefix(w, chunk):
    """Deaths, who is live before each chunk and after the last position; with ties, over documents, in two pieces."""
    n, cut, rng = 23, 9, np.random.default_rng(w)
    scores = rng.integers(0, 6, (2, 2, n)).astype(np.float64)
    documents = np.array([[0] * 5 + [1] * 18, [0] * 23])
    run = functools.partial(jax.jit(running_topw, static_argnums=3, static_argnames="chunk"), chunk=chunk)
    none = jnp.zeros((2, 2, 0), bool)
    whole = run(scores, documents, none, w)
    first = run(scores[..., :cut], documents[:, :cut], none, w)
    order = np.asarray(first.after)
    old = np.take_along_axis(scores, np.maximum(order, 0), axis=-1)
    more = documents[:, cut:] - documents[:, cut - 1 : cut]
    second = run(np.concatenate([old, scores[..., cut:]], -1), more, order >= 0, w)
    for b, k in np.ndindex(2, 2):
        expected = list(live_by_prefix(scores[b, k], documents[b], w))
        death = np.asarray(whole.death[b, k])
        for t, live in enumerate(expected):
            assert [s for s in range(t + 1) if death[s] > t] == live
        assert max(death) == NEVER
        after = [s for s in np.asarray(whole.after[b, k]) if s >= 0]
        assert after == expected[-1]
        for c, live in enumerate(np.asarray(whole.before[b, k])[1:], start=1):
            assert [s for s in live if s >= 0] == expected[c * chunk - 1]
        # Of the second piece keys are places of the live ones and what came after them.
        name = np.concatenate([order[b, k], np.arange(cut, n)])
        assert [name[s] for s in np.asarray(second.after[b, k]) if s >= 0] == expected[-1]


def naive(module, x):
    """The layer on one document, query by query; the margin of its choices."""
    c, d = module.config, module.head_dim
    apply = lambda y, x: x @ np.asarray(y.kernel[...]) + (0 if y.bias is None else np.asarray(y.bias[...]))
    q, k, v = (apply(y, x).reshape(len(x), -1, d) for y in (module.q, module.k, module.v))
    rms = lambda y, n: y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * np.asarray(n.scale[...])
    turn = lambda y: plain.rope(y, c.rope_base)
    q, k = turn(rms(q, module.q_norm)), turn(rms(k, module.k_norm))
    delta = np.asarray(module.strength[...]) * np.log1p(np.exp(apply(module.score, v.reshape(len(x), -1))))
    delta = np.exp(delta) if c.form == "exp" else delta
    o = np.zeros_like(q)
    for h in range(c.heads):
        g = h // (c.heads // c.key_heads)
        for t, live in enumerate(live_by_prefix(delta[:, g], np.zeros(len(x)), c.keep)):
            if c.keep_self and t not in live:
                live = [s for s in live if s != min(live, key=lambda s: delta[s, g])] + [t]
            p = np.exp(k[live, g] @ q[t, h] / np.sqrt(d) + delta[live, g])
            o[t, h] = p / p.sum() @ v[live, g]
    gap = min(np.abs(np.subtract.outer(y, y)[~np.eye(len(y), dtype=bool)]).min() for y in delta.T)
    return apply(module.out, o.reshape(len(x), -1)), gap


FORMS = {}, {"form": "exp"}, {"bias": "all"}, {"keep_self": True}


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_layer_is_the_formula(fields):
    """The whole layer written out, in packed rows; and streams, which keep what the whole does."""
    module = make(keep=3, kv_heads=2, chunk=2, **fields)
    x, seq = cases.inputs(jnp.float64)
    found = [cases.output(module, x, seq)]
    if "form" not in fields:
        state, extend = battery.begun(*cases.split(module)), functools.partial(battery.extend, *cases.split(module))
        found.append(cases.streamed(extend, state, x, seq, battery.CUTS[1])[0])
    for row, first, end in cases.DOCUMENTS:
        want, gap = naive(module, np.asarray(x)[row, first:end])
        assert gap > 1e-4
        for y in found:
            np.testing.assert_allclose(y[row, first:end], want, atol=1e-12)


@tiers.exhaustive
def test_without_strength_it_is_softmax_attention_to_the_first_keys():
    """All scores are equal: with room for all it is softmax attention of normed heads, with less the oldest stay."""
    x, seq = cases.inputs(jnp.float64)[0], mixers.Sequence.whole(2, T)
    softmax = cases.module(mixers.get("softmax").Config(impl="definition", qk_norm=True), jnp.float64)
    module, few = make(keep=T), make(keep=4)
    for target in (softmax, few):
        for name in ("q", "k", "v", "out"):
            getattr(target, name).kernel[...] = getattr(module, name).kernel[...]
        for name in ("q_norm", "k_norm"):
            getattr(target, name).scale[...] = getattr(module, name).scale[...]
    for m in (module, few):
        m.strength[...] = jnp.zeros_like(m.strength[...])
    expected = cases.output(softmax, x, seq)
    np.testing.assert_allclose(cases.output(module, x, seq), expected, atol=1e-12)
    y = cases.output(few, x, seq)
    np.testing.assert_allclose(y[:, :4], expected[:, :4], atol=1e-12)
    later = x.at[:, 4:-1].set(3.0)
    np.testing.assert_array_equal(cases.output(few, later, seq)[:, -1], y[:, -1])


def test_a_constant_bias_changes_nothing_and_only_kept_keys_have_gradients():
    """Biases cancel in a softmax; gradients of biases are those of the keys that the last row keeps."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, T, 1, 4))) for _ in range(3))
    bias, documents = jnp.asarray(rng.standard_normal((1, T, 1))), jnp.zeros((1, T), jnp.int32)

    @jax.jit
    def run(bias):
        last = lambda bias: dynamic_mask_attention(q, k, v, bias, documents, keep=3, chunk=4)[0]
        return last(bias), jax.grad(lambda bias: last(bias)[0, -1].sum())(bias)

    (y, gradient), (moved, _) = run(bias), run(bias + 5)
    np.testing.assert_allclose(moved, y, atol=1e-12)
    kept = list(live_by_prefix(np.asarray(bias)[0, :, 0], np.zeros(T), 3))[-1]
    np.testing.assert_array_equal(np.flatnonzero(np.abs(gradient[0, :, 0]) > 1e-12), kept)


@tiers.often("4")
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_a_kept_own_key_takes_the_place_of_the_worst(chunk):
    """Values and gradients are of all pairs, with ties, over documents; scores that fall leave every row the first keys
    and itself; with room for all nothing changes; one key, which would be itself alone, is refused."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((2, T, 2, 4))) for _ in range(3))
    documents = jnp.asarray([[0] * 4 + [1] * (T - 4), [0] * T])
    bias = jnp.asarray(rng.integers(0, 4, (2, T, 2)).astype(float))

    def run(impl, keep, own, bias):
        def value(q, k, v, bias):
            o = dynamic_mask_attention(q, k, v, bias, documents, keep=keep, own=own, chunk=chunk, impl=impl)[0]
            return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

        return jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)

    run = jax.jit(run, static_argnums=(0, 1, 2))
    for keep in (2, 4):
        for a, b in zip(*(jax.tree.leaves(run(i, keep, True, bias)) for i in ("chunked", "definition")), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    for a, b in zip(*(jax.tree.leaves(run("chunked", T, own, bias)) for own in (True, False)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    falling = jnp.broadcast_to(-jnp.arange(float(T))[:, None] / 8, bias.shape)
    (_, o), _ = run("chunked", 3, True, falling)
    keys = [0, 1, T - 1]
    p = np.exp(np.einsum("hd,shd->hs", q[1, -1], k[1, keys]) / 2 + falling[1, keys].T)
    np.testing.assert_allclose(o[1, -1], np.einsum("hs,shd->hd", p / p.sum(-1, keepdims=True), v[1, keys]), atol=1e-12)
    with pytest.raises(ConfigError, match="keep = 1.*2 or more where keep_self"):
        make(keep=1, keep_self=True)


def test_initial_strength():
    """Of small deviation, not zero: at zero the scores would have no gradient."""
    module = mixers.build({"name": "dma", "heads": 64, "head_width": 4}, width=16, rngs=cases.nnx.Rngs(0))
    assert 0.01 < np.std(module.strength[...]) < 0.03
