"""The identities of TTT-Linear (Sun et al. 2024), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.ttt_linear import TTTLinearConfig
from attnlab.ops.memory_frame import MemorySpec, initial_state
from attnlab.ops.neural_memory import neural_memory
from attnlab.ops.ttt_linear import Affine, Learned, ttt_linear
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "q k v out rate",
    "memory": "weight weight_bias",
    "scale": "gain norm",
    "bias": "shift",
    "positions": "tau",
}
BFLOAT16_GRADIENTS = False
WRITTEN_OUT = True
SPLIT_GRADIENTS = False

B, T, H, D = 2, 11, 2, 4
op = jax.jit(ttt_linear, static_argnames=("impl",))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays(tau):
    """q, k, v, rates and what is learned: a drawn map and norm, and tau."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, H, D))) for _ in range(3))
    rate = jnp.asarray(0.3 * rng.random((B, T, H)))
    first = Affine(*(jnp.asarray(rng.standard_normal(shape)) for shape in ((H, D, D), (H, D))))
    gain, shift = (jnp.asarray(rng.standard_normal((H, D))) for _ in range(2))
    return q, k, v, rate, Learned(first, gain, shift, jnp.asarray(tau))


@tiers.exhaustive
def test_without_a_rate_it_is_a_fixed_map():
    """rate = 0, and tau = 0: `q + LN(q W + b)` of the first weights."""
    q, k, v, rate, learned = arrays(np.ones(3))
    z = jnp.einsum("bthd,hde->bthe", q, learned.first.weight) + learned.first.bias
    z = z - z.mean(-1, keepdims=True)
    z = z / jnp.sqrt((z * z).mean(-1, keepdims=True) + 1e-6)
    want = q + learned.gain * z + learned.shift
    o, _ = op(q, k, v, 0 * rate, learned)
    np.testing.assert_allclose(o, want, atol=1e-12)
    o, _ = op(q, k, v, rate, arrays(np.zeros(3))[-1])
    np.testing.assert_allclose(o, want, atol=1e-12)


@tiers.exhaustive
def test_equal_rows_and_a_plain_norm_are_the_neural_memory():
    """tau = 1, gain 1, no shift: a Titans memory x + LN(x W) without momentum, at positions where the bias is 0.

    Each pair of positions has opposite keys and values: without a bias their gradients g are opposite, k^T g equal.
    """
    q, k, v, rate, learned = arrays(np.ones(4))
    mirrored = lambda y: jnp.stack([y[:, :6], -y[:, :6]], axis=2).reshape(B, 12, H, D)[:, :T]
    k, v, rate = mirrored(k), mirrored(v), jnp.abs(mirrored(rate[..., None] * jnp.ones(D)))[..., 0]
    weight = learned.first.weight
    plain = Learned(Affine(weight, jnp.zeros((H, D))), jnp.ones((H, D)), jnp.zeros((H, D)), learned.tau)
    spec = MemorySpec(4, residual_norm=True, rates=(1.0,))
    # Their loss is |k + LN(k W) - v|^2 / 2, and what it reads q + LN(q W).
    want, _ = neural_memory(q, k, v, None, None, rate, initial_state((weight,), 1, False), spec)
    o, _ = op(q, k, v, rate, plain)
    np.testing.assert_allclose(o[:, 1::2], want[:, 1::2], atol=1e-12)
    assert np.abs(o - op(q, k, v, 0 * rate, plain)[0])[:, 1::2].max() > 0.01


@tiers.exhaustive
def test_the_next_mini_batch_begins_with_the_last_row():
    """Where tau of the last row is 0 every mini-batch begins with the first map, whatever the rows before it had."""
    *rows, learned = arrays(np.array([1.0, 0.5, 0.0]))
    o, state = op(*rows, learned)
    for a, b in zip(jax.tree.leaves(state.start), jax.tree.leaves(learned.first), strict=True):
        np.testing.assert_allclose(a, jnp.broadcast_to(b, a.shape), atol=0)
    later, _ = op(*(y[:, 3:] for y in rows), learned)
    np.testing.assert_allclose(o[:, 3:], later, atol=1e-12)
    carried, _ = op(*rows, arrays(np.array([1.0, 0.5, 0.3]))[-1])
    assert np.abs(carried - o)[:, 3:].max() > 0.01


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in numpy."""
    c, (length, _), d = module.config, x.shape, module.head_dim
    array = lambda p: np.asarray(p[...])
    q, k, v = ((x @ array(y.kernel)).reshape(length, c.heads, d) for y in (module.q, module.k, module.v))
    place = np.arange(length) % c.chunk
    angle = place[:, None, None] * c.rope_base ** (-np.arange(d // 2) / (d // 2))
    turn = lambda y, a, b: np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )
    q, k = (turn(y, y[..., : d // 2], y[..., d // 2 :]) for y in (q, k))
    rate = c.rate / d / (1 + np.exp(-(x @ array(module.rate.kernel) + array(module.rate.bias))))
    tau = np.maximum(0, 1 / np.arange(1, c.chunk + 1) + array(module.tau))
    o = np.zeros_like(q)
    for h in range(c.heads):
        gain, shift = array(module.gain)[h], array(module.shift)[h]

        def normed(z):
            deviation = np.sqrt(z.var() + 1e-6)
            return (z - z.mean()) / deviation, deviation

        W, b = array(module.weight)[h], array(module.weight_bias)[h]
        for t in range(length):
            if place[t] == 0:
                steps, bias_steps = np.zeros((d, d)), np.zeros(d)
            y, deviation = normed(k[t, h] @ W + b)
            of_y = gain * (gain * y + shift - (v[t, h] - k[t, h]))
            jacobian = (np.eye(d) - 1 / d - np.outer(y, y) / d) / deviation
            g = jacobian @ of_y
            steps, bias_steps = steps + rate[t, h] * np.outer(k[t, h], g), bias_steps + rate[t, h] * g
            now, bias_now = W - tau[place[t]] * steps, b - tau[place[t]] * bias_steps
            o[t, h] = q[t, h] + gain * normed(q[t, h] @ now + bias_now)[0] + shift
            if place[t] == c.chunk - 1:
                W, b = now, bias_now
    flat = o.reshape(length, -1)
    flat = (flat - flat.mean(-1, keepdims=True)) / np.sqrt(flat.var(-1, keepdims=True) + 1e-6)
    return (flat * array(module.norm.scale) + array(module.norm.bias)) @ array(module.out.kernel)


@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_layer_is_the_formula(impl):
    """The whole layer written out, with mini-batches that do not divide the length."""
    module = cases.module(TTTLinearConfig(chunk=4, impl=impl, rate=0.7, rope_base=50.0), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    y = jax.jit(lambda x: module(x, mixers.Sequence.whole(*x.shape[:2])).y)(x)
    for row in range(2):
        np.testing.assert_allclose(y[row], naive(module, np.asarray(x[row])), atol=1e-12)


def test_at_first():
    """tau is 1 / i, and never below 0; maps are small; the state's size is fixed."""
    with cases.drawn_by_numpy():
        module = mixers.build(TTTLinearConfig(heads=1, head_width=64), width=16, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(module.learned().tau, 1 / np.arange(1, 17), rtol=1e-6)
    assert np.std(module.weight[...]) == pytest.approx(0.02, rel=0.05) and not np.any(module.weight_bias[...])
    module.tau[...] = -0.1 + 0 * module.tau[...]
    np.testing.assert_allclose(module.learned().tau, np.maximum(1 / np.arange(1, 17) - 0.1, 0), atol=1e-7)
    for length in (1, 1000):
        sizes = [a.size for a in jax.tree.leaves(module.init_state(1, length).carried)]
        assert sizes == [64 * 64, 64, 64 * 64, 64, 1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 3}, "heads = 3 does not divide width = 16"),
        ({"head_width": 5}, "head_width = 5"),
        ({"chunk": 0}, "chunk = 0"),
        ({"rate": 0.0}, "rate = 0.0"),
        ({"impl": "xla"}, "impl = 'xla'"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.build({"name": "ttt_linear", **fields}, width=16, rngs=nnx.Rngs(0))


def test_shapes_that_do_not_fit():
    q, k, v, rate, learned = arrays(np.ones(3))
    with pytest.raises(UserError, match=r"ttt_linear: rate_BTH \(2, 11\); expected \(2, 11, 2\)"):
        ttt_linear(q, k, v, rate[..., 0], learned)
    with pytest.raises(UserError, match="a state is given"):
        ttt_linear(q, k, v, rate, learned, state=learned.begin(B))
