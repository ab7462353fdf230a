"""The identities of top-k broadcast, a layer of ours after Bengio 2017, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.topk_broadcast import TopkBroadcastConfig
from attnlab.ops.running_softmax import running_softmax
from attnlab.ops.topk_broadcast import topk_broadcast
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "v score out"}
BIASED = [({}, "v", "out")]
NUMBERS_OF = "softmax"

B, T, H, E = 2, 11, 2, 3
op = jax.jit(topk_broadcast, static_argnames=("keep", "causal", "chunk", "impl"))


def keys_seen(config, t):
    return min(t + 1 if config.causal else cases.LENGTH, config.keep)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((B, T, H))), jnp.asarray(rng.standard_normal((B, T, H, E)))


def naive(module, x, segments):
    """The layer on rows [B, T, D] of documents, position by position in numpy; 0 from padding before the projection."""
    c, d = module.config, module.head_dim
    array = lambda linear: np.asarray(linear.kernel[...])
    scores, v = x @ array(module.score), (x @ array(module.v)).reshape(*x.shape[:2], c.heads, d)
    o = np.zeros_like(v)
    for b, t, h in np.ndindex(*scores.shape):
        seen = [s for s in range(x.shape[1]) if segments[b, s] == segments[b, t] and (s <= t or not c.causal)]
        best = sorted(seen, key=lambda s: (-scores[b, s, h], s))[: c.keep]
        w = np.exp(scores[b, best, h] - scores[b, best, h].max())
        o[b, t, h] = w @ v[b, best, h] / w.sum() * (segments[b, t] > 0)
    return o.reshape(*x.shape[:2], -1) @ array(module.out)


@pytest.mark.parametrize("impl", ["definition", "chunked"])
@pytest.mark.parametrize("causal", [True, False])
def test_layer_is_the_formula(causal, impl):
    """The whole layer written out, over packed documents with padding, in chunks that do not divide the length."""
    module = cases.module(TopkBroadcastConfig(keep=3, chunk=4, causal=causal, impl=impl), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    used = np.asarray(seq.segments) > 0
    y = jax.jit(lambda x: module(x, seq).y)(x)
    np.testing.assert_allclose(y[used], naive(module, np.asarray(x), cases.SEGMENTS)[used], atol=1e-12)


@tiers.exhaustive
def test_keeping_all_is_the_running_softmax():
    """keep >= T: the softmax over all scores so far, `key_score` of the mixer `ablated`; to both sides its last row."""
    scores, v = arrays()
    documents = jnp.zeros((B, T), jnp.int32)
    want, _ = jax.jit(running_softmax)(scores, v)
    o, _ = op(scores, v, documents, keep=T, chunk=4)
    np.testing.assert_allclose(o, want, atol=1e-13)
    o, _ = op(scores, v, documents, keep=T, causal=False)
    np.testing.assert_allclose(o, np.broadcast_to(np.asarray(want)[:, -1:], o.shape), atol=1e-13)


@tiers.exhaustive
def test_keeping_one_copies_its_value():
    """keep = 1: exactly the value of the highest score so far, of equal ones the oldest; scores have no gradient."""
    scores, v = arrays()
    scores, documents = jnp.round(scores), jnp.zeros((B, T), jnp.int32)

    @jax.jit
    def run(scores):
        o, back = jax.vjp(lambda s: topk_broadcast(s, v, documents, keep=1, chunk=4)[0], scores)
        return o, back(jnp.ones_like(o))[0]

    o, slopes = map(np.asarray, run(scores))
    for b, t, h in np.ndindex(B, T, H):
        best = np.argmax(np.asarray(scores)[b, : t + 1, h])
        np.testing.assert_array_equal(o[b, t, h], np.asarray(v)[b, best, h])
    np.testing.assert_allclose(slopes, 0, atol=1e-14)


@tiers.exhaustive
def test_a_position_reads_few():
    """The Jacobian of an output is 0 but for `keep` positions; what has dropped out never comes back."""
    module = cases.module(TopkBroadcastConfig(heads=1, keep=3), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(1, cases.LENGTH)
    slopes = jax.jit(jax.jacrev(lambda x: module(x, seq).y[0].sum(-1)))(x[:1])[:, 0]
    read = np.abs(np.asarray(slopes)).max(-1) > 0
    assert list(read.sum(-1)) == [min(t + 1, 3) for t in range(cases.LENGTH)]
    assert not np.any(np.triu(read, 1))
    gone = read[:-1] & ~read[1:]  # what has dropped out never comes back
    assert not any(np.any(read[t + 1 :, s]) for t, s in zip(*np.nonzero(gone)))


@pytest.mark.parametrize(
    "fields, message",
    [({"keep": 0}, "keep = 0"), ({"chunk": 0}, "chunk = 0"), ({"impl": "xla"}, "impl = 'xla'")],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.build({"name": "topk_broadcast", **fields}, width=16, rngs=nnx.Rngs(0))


def test_what_does_not_fit():
    scores, v = arrays()
    with pytest.raises(UserError, match=r"topk_broadcast: scores \(2, 11\); expected \(2, 11, 2\)"):
        topk_broadcast(scores[..., 0], v, jnp.zeros((B, T), jnp.int32), keep=2)
    live = mixers.build(TopkBroadcastConfig(heads=H), width=H * E, rngs=nnx.Rngs(0)).init_state(B, T).carried
    with pytest.raises(UserError, match="a stream is causal"):
        topk_broadcast(scores, v, jnp.zeros((B, T), jnp.int32), live, keep=8, causal=False)
