"""Differential attention (Ye et al. 2024) against its formula in NumPy, and its limits, in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.diff import DiffConfig, lambda_init
from tests import tiers
from tests.mixers import cases
from tests.mixers.test_softmax import rotate

# What the laws are told of this mixer: tests/mixers/stated.py.
KERNEL_TOLERANCE = 1e-4  # the gradient of lambda is one sum over all numbers of the layer
ROLES = {"matrix": "q k v out share", "scale": "norm lambda_q1 lambda_k1 lambda_q2 lambda_k2"}
NUMBERS_OF = "softmax"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def layer(module, x, positions, segments, number):
    """The whole layer for one row, head by head and query by query."""
    c, T = module.config, len(x)
    linear = lambda m, y: y @ np.asarray(m.kernel[...]) + (0 if m.bias is None else np.asarray(m.bias[...]))
    d, e = module.head_dim, module.head_dim * (2 if c.version == 1 else 1)
    q, k, v = (linear(m, x).reshape(T, -1, n) for m, n in ((module.q, d), (module.k, d), (module.v, e)))
    if c.rope_base is not None:
        q, k = (np.stack([rotate(y[:, i], positions, c.rope_base, None) for i in range(y.shape[1])], 1) for y in (q, k))
    if c.version == 1:
        a, b, f, g = (np.asarray(getattr(module, f"lambda_{n}")[...]) for n in ("q1", "k1", "q2", "k2"))
        first = 0.8 - 0.6 * np.exp(-0.3 * number)
        share = np.full((T, c.heads), np.exp(a @ b) - np.exp(f @ g) + first)
    else:
        share = 1 / (1 + np.exp(-linear(module.share, x)))
    o = np.zeros((T, c.heads, e))
    for h, t in np.ndindex(c.heads, T):
        own = h // (c.heads // c.key_heads)
        seen = [s for s in range(T) if segments[s] == segments[t] != 0]
        seen = [s for s in seen if (s <= t or not c.causal) and t - s < (c.window or T)]
        if not seen:
            continue
        for i, sign in enumerate((1, -share[t, h])):
            key = 2 * own + i if c.version == 1 else own
            p = np.exp(k[seen, key] @ q[t, 2 * h + i] / np.sqrt(d))
            o[t, h] += sign * (p / p.sum()) @ v[seen, own]
        if c.version == 1:
            scale = np.asarray(module.norm.scale[...]) * (1 - first)
            o[t, h] = o[t, h] / np.sqrt((o[t, h] ** 2).mean() + 1e-5) * scale
    return linear(module.out, o.reshape(T, -1))


@tiers.often(
    "{'window': 4, 'rope_base': 100.0, 'head_width': 6}", "{'version': 2, 'heads': 4, 'kv_heads': 2, 'window': 4}"
)
@pytest.mark.parametrize(
    "fields",
    [
        {"heads": 4, "kv_heads": 2, "bias": "all"},
        {"window": 4, "rope_base": 100.0, "head_width": 6},
        {"version": 2, "heads": 4, "kv_heads": 2, "window": 4},
        {"version": 2, "causal": False, "rope_base": None},
    ],
    ids=str,
)
def test_equals_the_formula(fields):
    """The layer as written, of packed rows, the fourth of a stack."""
    module = cases.module(DiffConfig(**fields), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = jax.jit(lambda x, n: module(x, dataclasses.replace(seq, layer=n)).y)(x, jnp.int32(3))
    for row in range(2):
        expected = layer(module, np.asarray(x[row]), cases.POSITIONS[row], cases.SEGMENTS[row], 3)
        used = cases.SEGMENTS[row] > 0
        np.testing.assert_allclose(y[row][used], expected[used], atol=1e-10)


def test_lambda_by_layer():
    """0.2 in the first layer of a stack, then towards 0.8; a mixer by itself is the first."""
    assert cases.module(DiffConfig(), jnp.float64).stack_reads == ("layer",)
    np.testing.assert_allclose([lambda_init(n, jnp.float64) for n in (0, 1, 23)], [0.2, 0.3555, 0.7994], atol=1e-4)
    module = mixers.build({"name": "diff", "head_width": 64}, width=16, rngs=nnx.Rngs(0), dtype=jnp.float64)
    assert abs(module.lambda_of(0.2) - 0.2) < 0.5
    x, seq = cases.inputs(jnp.float64)
    run = jax.jit(lambda n: module(x, dataclasses.replace(seq, layer=n)).y)
    np.testing.assert_allclose(run(jnp.int32(0)), jax.jit(lambda: module(x, seq).y)(), atol=1e-12)
    assert np.abs(run(jnp.int32(9)) - run(jnp.int32(0))).max() > 0.01


@tiers.exhaustive
def test_without_a_share_version_2_is_softmax_attention():
    """sigmoid(x W) = 0 leaves the first of each pair of queries."""
    module = cases.module(DiffConfig(version=2, rope_base=None), jnp.float64)
    softmax = cases.module(mixers.get("softmax").Config(heads=2, rope_base=None), jnp.float64)
    for name in ("k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    softmax.q.kernel[...] = module.q.kernel[...].reshape(16, 2, 2, -1)[:, :, 0].reshape(16, -1)
    x, seq = cases.inputs(jnp.float64)
    x = x.at[..., 0].set(1.0)
    module.share.kernel[...] = jnp.zeros((16, 2)).at[0].set(-60.0)
    ours, theirs = jax.jit(lambda x: (module(x, seq).y, softmax(x, seq).y))(x)
    used = np.asarray(seq.segments) > 0
    np.testing.assert_allclose(ours[used], theirs[used], atol=1e-12)


@tiers.exhaustive
def test_without_a_share_version_1_is_softmax_attention_whose_heads_are_normed():
    """lambda = 0 leaves the first of each pair of queries and keys, normed and scaled by 1 - lambda_init = 0.8."""
    module = cases.module(DiffConfig(rope_base=None), jnp.float64)
    plain = mixers.get("softmax").Config(heads=2, head_width=module.value_dim, rope_base=None)
    softmax = cases.module(plain, jnp.float64)
    softmax.v.kernel[...] = module.v.kernel[...]
    d = module.head_dim
    for name in ("q", "k"):  # widths of values, of which the second half is 0; scores are divided by sqrt(2 d)
        pairs = getattr(module, name).kernel[...].reshape(16, 2, 2, d) * 2**0.25
        getattr(softmax, name).kernel[...] = pairs.at[:, :, 1].set(0).reshape(16, -1)
    for name, value in (("q1", 0.0), ("k1", 0.0), ("q2", np.log(1.2) / d), ("k2", 1.0)):
        getattr(module, f"lambda_{name}")[...] = jnp.full(d, value)
    x, seq = cases.inputs(jnp.float64)
    ours, theirs = jax.jit(lambda x: (module.heads(x, seq.derived()).y, softmax.heads(x, seq.derived()).y))(x)
    used = np.asarray(seq.segments) > 0
    theirs = np.asarray(theirs)[used]
    normed = theirs / np.sqrt((theirs**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(module.norm.scale[...])
    np.testing.assert_allclose(ours[used], 0.8 * normed, atol=1e-12)


@tiers.exhaustive
def test_equal_pairs_are_one_softmax_less_its_share():
    """q1 = q2 and k1 = k2: 1 - lambda of one softmax, which the norm then takes out; 0.8 v where v alone is seen."""
    module = cases.module(DiffConfig(rope_base=None), jnp.float64)
    for linear in (module.q, module.k):
        pairs = linear.kernel[...].reshape(16, -1, 2, module.head_dim)
        linear.kernel[...] = pairs.at[:, :, 1].set(pairs[:, :, 0]).reshape(16, -1)
    x, seq = cases.inputs(jnp.float64)
    before, used = [], np.asarray(seq.segments) > 0
    module.norm = lambda y: before.append(y) or y
    for logarithm in (0.0, 1.0):  # lambda = lambda_init, and e - 1 more
        for name, value in (("q1", logarithm / module.head_dim), ("k1", 1.0), ("q2", 0.0)):
            getattr(module, f"lambda_{name}")[...] = jnp.full(module.head_dim, value)
        module.heads(x, seq.derived())
    plain, more = (np.asarray(o)[used] for o in before)
    np.testing.assert_allclose(more / (1.8 - np.e), plain / 0.8, atol=1e-10)
    v = np.asarray(x @ module.v.kernel[...]).reshape(*x.shape[:2], 2, -1)
    np.testing.assert_allclose(before[0][0, 0], 0.8 * v[0, 0], atol=1e-12)


def test_state_holds_each_value_once():
    """Version 1: two keys of d and a value of 2 d for each key head and position; version 2 as softmax attention."""
    for version, numbers in ((1, 4 * 4), (2, 2 * 8)):
        cost = mixers.get("diff").cost(DiffConfig(version=version), 16, 100)
        lengths = 2 if version == 1 else 1
        assert cost.state_bytes == 100 * 2 * numbers * 4 + 4 * lengths + 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"version": 3}, "version = 3 .*1, 2"),
        ({"qk_norm": True}, "unknown key 'mixer.qk_norm'"),
        ({"kv_heads": 3}, "kv_heads = 3"),
        ({"heads": 8}, "heads = 8 .*twice as many divide width = 16"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.build({"name": "diff", **fields}, width=16, rngs=nnx.Rngs(0))
