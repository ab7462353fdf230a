"""The identities of Kimi Delta Attention (Kimi Team 2025), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.kda import KDAConfig
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.norm import unit
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "q k v out beta gate.down gate.up log_decay.linear.down log_decay.linear.up",
    "taps": "filters",
    "scale": "norm",
    "decay_rate": "log_decay.a_log log_decay.dt_bias",
}
NUMBERS_OF = "gated_deltanet"
# The kernel's gradient of decays is a difference of sums over pairs: a_log's is 3.8e-4 of 12.7 from float64's.
KERNEL_TOLERANCE = 1e-4
WRITTEN_OUT = True

B, T, H, D, E = 2, 9, 3, 4, 5
rule = jax.jit(delta_rule, static_argnames=("chunk", "impl"))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@tiers.exhaustive
@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_equal_channels_are_the_gated_delta_rule(impl):
    """Where all channels decay alike; and without strength each row of the memory only decays, at its own rate."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    q, k, v, state = normal(B, T, H, D), unit(normal(B, T, H, D)), normal(B, T, H, E), normal(B, H, D, E)
    g, beta = -jnp.abs(normal(B, T, H, D)), jax.nn.sigmoid(normal(B, T, H))
    alike = jnp.broadcast_to(g[..., :1], g.shape)
    run = lambda g, beta: rule(q, k, v, g, beta, state_BHde=state, chunk=4, impl=impl)
    for a, b in zip(run(alike, beta), run(g[..., 0], beta), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)
    assert np.abs(run(g, beta)[0] - run(alike, beta)[0]).max() > 0.01
    np.testing.assert_allclose(run(g, 0 * beta)[1], state * jnp.exp(g.sum(1))[..., None], atol=1e-13)


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in numpy."""
    c, (length, _) = module.config, x.shape
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    split = lambda y: y.reshape(length, c.heads, -1)
    weight = lambda linear: np.asarray(linear.kernel[...])
    low_rank = lambda y: x @ weight(y.down) @ weight(y.up)
    filters, d = np.asarray(module.filters[...]).reshape(c.conv, c.heads, -1), module.head_dim
    rows = np.concatenate([split(x @ weight(y)) for y in (module.q, module.k, module.v)], axis=-1)
    padded = np.concatenate([np.zeros((c.conv - 1, *rows.shape[1:])), rows])
    rows = sum(filters[i] * padded[i : i + length] for i in range(c.conv))
    rows = rows * sigmoid(rows)
    q, k, v = rows[..., :d], rows[..., d : 2 * d], rows[..., 2 * d :]
    q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    beta = sigmoid(x @ weight(module.beta))
    decay, rates = module.log_decay, np.exp(np.asarray(module.log_decay.a_log[...]))
    steps = np.log1p(np.exp(low_rank(decay.linear) + np.asarray(decay.dt_bias[...])))
    a = np.exp(-rates[:, None] * split(steps))
    S, o = np.zeros((c.heads, v.shape[-1], d)), np.zeros_like(v)
    for t in range(length):
        for h in range(c.heads):
            erase = np.eye(d) - beta[t, h] * np.outer(k[t, h], k[t, h])
            S[h] = S[h] @ np.diag(a[t, h]) @ erase + beta[t, h] * np.outer(v[t, h], k[t, h])
            o[t, h] = S[h] @ q[t, h] / np.sqrt(d)
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * np.asarray(module.norm.scale[...])
    gate = sigmoid(split(low_rank(module.gate) + np.asarray(module.gate.up.bias[...])))
    return (o * gate).reshape(length, -1) @ weight(module.out)


def test_layer_is_the_formula():
    """The whole layer written out, with values wider than keys and chunks that do not divide the length."""
    module = cases.module(KDAConfig(expand=2.0, chunk=4, rank=3), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    y = jax.jit(lambda x: module(x, mixers.Sequence.whole(*x.shape[:2])).y)(x)
    for row in range(2):
        np.testing.assert_allclose(y[row], naive(module, np.asarray(x[row])), atol=1e-12)


def test_initial_decays():
    """At first, for x = 0: a time step per channel in [0.001, 0.1], a rate per head in [1, 16)."""
    with cases.drawn_by_numpy():
        module = mixers.build({"name": "kda", "heads": 64, "head_width": 4}, width=16, rngs=nnx.Rngs(0))
    steps = np.log1p(np.exp(np.asarray(module.log_decay.dt_bias[...])))
    assert steps.shape == (256,) and 0.999e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.1001
    rates = np.exp(np.asarray(module.log_decay.a_log[...]))
    assert rates.shape == (64,) and 0.999 < rates.min() < 2 and 14 < rates.max() < 16
    log_decay = module.log_decay(jnp.zeros((1, 1, 16)))
    np.testing.assert_allclose(log_decay[0, 0], -rates[:, None] * steps.reshape(64, 4), rtol=1e-5)


def test_rank_is_the_width_of_values():
    """By default, as in the paper."""
    build = lambda **fields: cases.blank(mixers.get("kda").Config(expand=2.0, **fields), jnp.float32)
    assert build().gate.down.kernel.shape == build().log_decay.linear.down.kernel.shape == (16, 8)
    assert build(rank=3).gate.down.kernel.shape == (16, 3)
    with pytest.raises(ConfigError, match="rank = 0"):
        build(rank=0)


def test_a_rank_of_nothing_is_refused():
    """Where neither decays nor gates are projected; of one of them it is that one's."""
    with pytest.raises(ConfigError, match="rank = 3 .*none where decay and gate are false"):
        mixers.config_from_node({"name": "kda", "decay": False, "gate": False, "rank": 3})
    for one in ("decay", "gate"):
        assert mixers.config_from_node({"name": "kda", one: False, "rank": 3}).rank == 3
