"""The layer of local linear attention (Zuo et al. 2025), in float64; the op's identities are in tests/ops."""

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
from attnlab.ops.rope import rope
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out ridge", "bias": "ridge_bias", "scale": "q_norm k_norm"}
# Systems are solved to 1e-5 of their right sides, and again for gradients: of the ridge's kernel XLA's form is off by
# 1.5e-4 of the largest from float64, the kernel by 1.6e-4.
KERNEL_TOLERANCE = 2e-4
NUMBERS_OF = "mesa"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("local_linear").Config(**fields), jnp.float64)


def whole():
    x, _ = cases.inputs(jnp.float64)
    return x, mixers.Sequence.whole(*x.shape[:2])


def test_equals_the_formula():
    """The whole layer for a packed row, query by query, each regression as one least-squares problem."""
    module = make(kv_heads=2, window=4)
    x, seq = cases.inputs(jnp.float64)
    y = cases.output(module, x, seq)[0]
    d = module.head_dim
    q, k, v = (np.asarray(a)[0] for a in (module.queries(x), *module.keys_values(x)))
    rms = lambda a, n: a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-6) * np.asarray(n.scale[...])
    turned = lambda a: np.asarray(rope(jnp.asarray(a)[None], seq.positions[:1]))[0]
    q, k = turned(rms(q, module.q_norm)), turned(rms(k, module.k_norm))
    logits = np.asarray(x)[0] @ np.asarray(module.ridge.kernel[...]) + np.asarray(module.ridge_bias[...])
    ridge = np.log1p(np.exp(logits)) + 0.01
    o = np.zeros((cases.LENGTH, 4, d))
    for t, h in np.ndindex(9, 4):
        seen = [s for s in range(max(0, t - 3), t + 1) if cases.SEGMENTS[0, s] == cases.SEGMENTS[0, t]]
        keys, values, query = k[seen, h // 2], v[seen, h // 2], q[t, h]
        p = np.exp(keys @ query / np.sqrt(d))
        root = np.sqrt(p / p.sum())[:, None]
        design = np.concatenate([root, root * (keys - query)], 1)
        penalty = np.sqrt(ridge[t, h]) * np.eye(d + 1)[1:]
        targets = np.concatenate([root * values, np.zeros((d, d))])
        o[t, h] = np.linalg.lstsq(np.concatenate([design, penalty]), targets, rcond=None)[0][0]
    expected = o.reshape(cases.LENGTH, -1) @ np.asarray(module.out.kernel[...])
    np.testing.assert_allclose(y[:9], expected[:9], atol=1e-10)


@tiers.exhaustive
def test_a_large_ridge_is_the_softmax_layer():
    module = make(ridge=1e13)
    softmax = cases.module(mixers.get("softmax").Config(qk_norm=True), jnp.float64)
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    for name in ("q_norm", "k_norm"):
        getattr(softmax, name).scale[...] = getattr(module, name).scale[...]
    x, seq = cases.inputs(jnp.float64)
    np.testing.assert_allclose(cases.output(module, x, seq), cases.output(softmax, x, seq), atol=1e-10)


@tiers.exhaustive
def test_steps_equal_prefill():
    """One position at a time through the cache gives what the whole sequence gives."""
    module = make(kv_heads=1)
    x, seq = whole()
    expected = cases.output(module, x, seq)
    graphdef, params = cases.split(module)
    step = jax.jit(lambda p, x, seq, state: nnx.merge(graphdef, p).extend(x, seq, state))
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    y, _ = cases.streamed(functools.partial(step, params), state, x, seq, [1] * 5)
    np.testing.assert_allclose(y, expected[:, :5], atol=1e-10)


@tiers.exhaustive
@pytest.mark.parametrize("blocks", [1, 2])
def test_relative_positions(blocks):
    """RoPE and an isotropic ridge: shifting all positions changes nothing, as the pairs it turns are in one block."""
    module = make(blocks=blocks)
    x, seq = whole()
    np.testing.assert_allclose(
        cases.output(module, x, mixers.Sequence(seq.positions + 1000)), cases.output(module, x, seq), atol=1e-9
    )


@pytest.mark.parametrize("least", [0.01, 0.1])
def test_learned_ridge_begins_at_one_and_stays_above_its_least(least):
    module = mixers.build({"name": "local_linear", "ridge_min": least}, width=16, rngs=nnx.Rngs(0), dtype=jnp.float64)
    x, _ = whole()
    np.testing.assert_allclose(module.ridge_of(0 * x), 1.0, rtol=1e-12)
    module.ridge_bias[...] = jnp.full_like(module.ridge_bias[...], -1e3)
    np.testing.assert_allclose(module.ridge_of(x), least, rtol=1e-12)


def test_metrics_tell_what_the_solver_did():
    module = make()
    x, seq = whole()
    seen = {}
    for turns in (1, 16):
        module.config = dataclasses.replace(module.config, iterations=turns)
        seen[turns] = module(x, seq).metrics
    assert set(seen[1]) == {"local_linear_residual", "local_linear_iterations"}
    assert seen[1]["local_linear_iterations"] <= 1 < seen[16]["local_linear_iterations"] <= module.head_dim + 2
    assert seen[1]["local_linear_residual"] > 1e-3 and seen[16]["local_linear_residual"] < 1e-12


@tiers.exhaustive
def test_gradients_reach_the_ridge():
    graphdef, params = cases.split(make())
    x, seq = whole()
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(x, seq).y))))(params)
    assert np.abs(gradient["ridge"]["kernel"][...]).min() > 0
    assert np.abs(gradient["ridge_bias"][...]).min() > 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sinks": True}, "unknown key 'mixer.sinks'"),
        ({"soft_cap": 3.0}, "unknown key 'mixer.soft_cap'"),
        ({"ridge": 0.0}, "ridge = 0.0"),
        ({"ridge_min": 1e-5}, "ridge_min"),
        ({"iterations": 0}, "iterations = 0"),
        ({"tolerance": 2.0}, "tolerance = 2.0"),
        ({"max_iterations": 8}, r"max_iterations = 8 .*16 \(iterations\) or more"),
        ({"blocks": 0}, "blocks = 0"),
        ({"blocks": 2, "rope_width": 2}, "blocks = 2 .*1 where rope_width is set"),
        ({"qk_norm": "cosine"}, "qk_norm = 'cosine' .*false, true, layer"),
        ({"impl": "xla"}, "cg_fixed"),
        ({"window": 3, "causal": False}, "causal"),
        ({"kv_heads": 3}, "kv_heads = 3"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "local_linear", **fields})


def test_blocks_must_divide_half_a_head():
    with pytest.raises(ConfigError, match="blocks = 3 .*divisors of 2"):
        make(blocks=3)


def test_declared_flops_are_those_of_the_stated_iterations():
    """Whatever the bound: 2 products with the keys an iteration."""
    cls = mixers.get("local_linear")
    flops = lambda **fields: cls.cost(cls.Config(**fields), 64, 32).flops["attention"]
    assert flops(max_iterations=64) == flops() == flops(blocks=2)
    assert flops(iterations=17) - flops() == 4 * 64 * 33 / 2
