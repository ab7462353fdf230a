"""The layer of tensor attention (Alman and Song 2023), in float64; the op's identities are in tests/ops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k1 k2 v1 v2 out", "scale": "q_norm k1_norm k2_norm"}
BIASED = [({}, "k1 k2 q v1 v2", "out")]


def keys_seen(config, t):
    """Pairs of keys."""
    return (cases.LENGTH if not config.causal else min(t + 1, config.window or cases.LENGTH)) ** 2


def keys_computed(config):
    return cases.LENGTH**2


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("tensor").Config(**fields), jnp.float64)


BOTH_WAYS = {"causal": False, "offset": 0.5, "scale": "root", "qk_norm": False}


@pytest.mark.parametrize("fields", [{"window": 4}, {"offset": 0.5, "window": 4}, BOTH_WAYS])
def test_equals_the_formula(fields):
    """The whole layer for a packed row, query by query, pair by pair."""
    module = make(heads=2, **fields)
    x, seq = cases.inputs(jnp.float64)
    y, c, d = cases.output(module, x, seq)[0], module.config, module.head_dim
    project = lambda name: (np.asarray(x)[0] @ np.asarray(getattr(module, name).kernel[...])).reshape(-1, 2, d)
    q, k1, k2, v1, v2 = map(project, ("q", "k1", "k2", "v1", "v2"))
    if c.qk_norm:
        rms = lambda a, n: a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-6) * np.asarray(n.scale[...])
        q, k1 = rms(q, module.q_norm), rms(k1, module.k1_norm)
        k2 = k2 if c.offset else rms(k2, module.k2_norm)
    k2, v2 = k2 + c.offset, v2 + c.offset
    o = np.zeros((cases.LENGTH, 2, d))
    for t, h in np.ndindex(9, 2):
        seen = [s for s in range(9) if cases.SEGMENTS[0, s] == cases.SEGMENTS[0, t]]
        seen = [s for s in seen if t - 4 < s <= t] if c.causal else seen
        pairs = [(j, l) for j in seen for l in seen]
        scale = d ** (-1 if c.scale == "width" else -0.5)
        logits = scale * np.array([(q[t, h] * k1[j, h] * k2[l, h]).sum() for j, l in pairs])
        p = np.exp(logits - logits.max())
        o[t, h] = sum(w * v1[j, h] * v2[l, h] for w, (j, l) in zip(p / p.sum(), pairs))
    expected = o.reshape(cases.LENGTH, -1) @ np.asarray(module.out.kernel[...])
    np.testing.assert_allclose(y[:9], expected[:9], atol=1e-10)


@tiers.exhaustive
def test_an_offset_alone_is_the_softmax_layer():
    """With offset 1 and second projections of 0, logits are q . k1 / d."""
    module = make(offset=1.0)
    softmax = softmax_of(module, qk_norm=True)
    for linear in (module.k2, module.v2):
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    x, seq = cases.inputs(jnp.float64)
    used = np.asarray(seq.segments) > 0
    np.testing.assert_allclose(cases.output(module, x, seq)[used], cases.output(softmax, x, seq)[used], atol=1e-10)


def softmax_of(module, **fields):
    """The softmax layer of its queries, first keys and first values, with logits q . k1 / d."""
    softmax = cases.module(mixers.get("softmax").Config(rope_base=None, **fields), jnp.float64)
    scale = module.head_dim**-0.5  # softmax attention divides by the root alone
    for name, own in {"q": "q", "k": "k1", "v": "v1", "out": "out"}.items():
        getattr(softmax, name).kernel[...] = getattr(module, own).kernel[...]
    if module.config.qk_norm:
        for name, own in {"q_norm": "q_norm", "k_norm": "k1_norm"}.items():
            getattr(softmax, name).scale[...] = getattr(module, own).scale[...]
        softmax.q_norm.scale[...] *= scale
    else:
        softmax.q.kernel[...] *= scale
    return softmax


@pytest.mark.parametrize("qk_norm", [True, False])
def test_with_an_offset_it_begins_near_softmax_attention(qk_norm):
    """As a model is built, for inputs of mean square 1, at two head widths: within a tenth of its norm; without an
    offset it is not."""
    x, seq = cases.inputs(jnp.float64)
    used = np.asarray(seq.segments) > 0

    def distance(offset, heads):
        node = {"name": "tensor", "offset": offset, "qk_norm": qk_norm, "heads": heads}
        module = mixers.build(node, width=cases.WIDTH, rngs=cases.nnx.Rngs(3), dtype=jnp.float64)
        want = cases.output(softmax_of(module, heads=heads, qk_norm=qk_norm), x, seq)[used]
        return np.linalg.norm(cases.output(module, x, seq)[used] - want) / np.linalg.norm(want)

    for heads in (1, 4):
        assert 0.01 < distance(1.0, heads) < 0.1
        assert distance(0.0, heads) > 0.5


def test_permuting_positions_permutes_outputs():
    """Both ways it knows no order."""
    module, order = make(causal=False), np.random.default_rng(0).permutation(cases.LENGTH)
    x, seq = cases.inputs(jnp.float64)[0], mixers.Sequence.whole(2, cases.LENGTH)
    np.testing.assert_allclose(
        cases.output(module, x[:, order], seq), cases.output(module, x, seq)[:, order], atol=1e-12
    )


def test_windowed_state_does_not_grow():
    """The pairs' keys and values of the window, whatever the length; without one they are all kept."""
    bytes_of = lambda length, **f: mixers.get("tensor").cost(mixers.get("tensor").Config(**f), 16, length).state_bytes
    assert bytes_of(100, window=5) == bytes_of(1000, window=5) < bytes_of(100) < bytes_of(200)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"window": 3, "causal": False}, "causal = False .*true where window is set"),
        ({"window": 257}, "window = 257 .*none, or 1 to 256"),
        ({"scale": "heads"}, "scale = 'heads'"),
        ({"rope_base": 10.0}, "unknown key 'mixer.rope_base'"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "tensor", **fields})


def test_long_rows_are_refused_without_a_window():
    """When the program is traced, with what is allowed; with a window they are taken."""
    x = jnp.zeros((1, 300, cases.WIDTH))
    run = lambda module: jax.eval_shape(lambda x: module(x, mixers.Sequence.whole(1, 300)).y, x)
    with pytest.raises(UserError, match="300 keys a query, 90000 pairs; allowed: up to 256 keys .*a window"):
        run(make())
    assert run(make(window=8)).shape == x.shape
