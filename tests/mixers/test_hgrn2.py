"""The identities of HGRN2 (Qin et al. 2024), in float64."""

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
from attnlab.mixers.hgrn2 import HGRN2Config
from attnlab.models.lm import LanguageModelConfig
from attnlab.models.transformer import mixer_table
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q forget v out", "scale": "norm", "bias": "bound"}
BIASED = [({}, "q forget v", "out")]
NUMBERS_OF = "gla"
WRITTEN_OUT = True


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(HGRN2Config(chunk=4, **fields), jnp.float64)


@functools.partial(jax.jit, static_argnums=0)
def stream(graphdef, params, x):
    """y of whole sequences, and the memory after them."""
    module = nnx.merge(graphdef, params)
    state = module.init_state(len(x), x.shape[1], x.dtype)
    seq, _ = mixers.Stream.start(len(x)).extend(mixers.Sequence.whole(*x.shape[:2]))
    return module(x, mixers.Sequence.whole(*x.shape[:2])).y, module.extend(x, seq, state).state.carried


def weight(linear):
    return np.asarray(linear.kernel[...])


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def decays(module, x):
    """f [T, H, d] of one sequence."""
    b = module.config.lower_bound
    return (b + (1 - b) * sigmoid(x @ weight(module.forget))).reshape(len(x), module.config.heads, -1)


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in NumPy."""
    split = lambda y: y.reshape(len(x), module.config.heads, -1)
    q, v, f = x @ weight(module.q), split(x @ weight(module.v)), decays(module, x)
    q = split(q * sigmoid(q))
    S, o = np.zeros((*f.shape[1:], v.shape[2])), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(len(S)):
            S[h] = f[t, h][:, None] * S[h] + np.outer(1 - f[t, h], v[t, h])
            o[t, h] = q[t, h] @ S[h]
    o = o.reshape(len(x), -1)
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * np.asarray(module.norm.scale[...])
    return o @ weight(module.out)


@pytest.mark.parametrize("fields", [{}, {"lower_bound": 0.7, "key_width": 3}])
def test_layer_is_the_formula(fields):
    """The whole layer written out, with chunks that do not divide the length, and with a bound."""
    module = make(**fields)
    x, _ = cases.inputs(jnp.float64)
    for got, row in zip(stream(*cases.split(module), x)[0], np.asarray(x), strict=True):
        np.testing.assert_allclose(got, naive(module, row), atol=1e-12)


@tiers.exhaustive
def test_memory_is_an_average():
    """Inputs that are 1 throughout leave `1 - prod f` in each row: weights are positive and sum to at most 1."""
    module = make(bias="qkv")
    module.v.kernel[...] = jnp.zeros_like(module.v.kernel[...])
    module.v.bias[...] = jnp.ones_like(module.v.bias[...])
    module.forget.bias[...] = jnp.zeros_like(module.forget.bias[...])
    x, _ = cases.inputs(jnp.float64)
    for memory, row in zip(stream(*cases.split(module), x)[1], np.asarray(x), strict=True):
        kept = 1 - np.prod(decays(module, row), axis=0)
        np.testing.assert_allclose(memory, np.repeat(kept[..., None], memory.shape[-1], -1), atol=1e-13)


@tiers.exhaustive
def test_channels_that_forget_alike_are_one_moving_average():
    """f equal over a head's channels: each row of the memory is `m_t = f m_{t-1} + (1 - f) v_t`."""
    module = make()
    heads = module.forget.kernel[...].reshape(cases.WIDTH, module.config.heads, -1)
    module.forget.kernel[...] = jnp.repeat(heads[..., :1], heads.shape[-1], -1).reshape(cases.WIDTH, -1)
    x, _ = cases.inputs(jnp.float64)
    for memory, row in zip(stream(*cases.split(module), x)[1], np.asarray(x), strict=True):
        f, v = decays(module, row)[..., :1], (row @ weight(module.v)).reshape(len(row), module.config.heads, -1)
        average = functools.reduce(lambda m, now: now[0] * m + (1 - now[0]) * now[1], zip(f, v), 0 * v[0])
        np.testing.assert_allclose(memory, np.repeat(average[:, None], memory.shape[1], 1), atol=1e-13)


def test_bound_of_decays():
    """No decay falls below b, the key is what is forgotten, and gates that saturate give finite gradients."""
    for b in (0.0, 0.5):
        gates = functools.partial(make().gates, b=b)
        z = np.asarray([-1e3, -2.0, 0.0, 3.0, 1e3])
        scalar = lambda z, gates=gates: (sum(map(jnp.sum, gates(z))), gates(z))
        slopes, (log_decay, k) = jax.jit(jax.grad(scalar, has_aux=True))(z)
        np.testing.assert_allclose(np.exp(log_decay), b + (1 - b) * np.exp(-np.logaddexp(0, -z)), atol=1e-15)
        np.testing.assert_allclose(k, 1 - np.exp(log_decay), atol=1e-15)
        assert np.all(np.isfinite(slopes))
    with pytest.raises(ConfigError, match="lower_bound = 1"):
        HGRN2Config(lower_bound=1.0)
    with pytest.raises(ConfigError, match="lower_bound = 0.5.*0 where bound_layers is set"):
        HGRN2Config(lower_bound=0.5, bound_layers=3)


def test_bounds_of_a_stack_grow():
    """At first l / L, as of even shares; whatever is learned 0 in the first layer, then growing, below 1; and a layer
    with a learned bound is one with that bound as a constant."""
    x, seq = cases.inputs(jnp.float64)
    learned = make(bound_layers=4)
    graphdef, _ = cases.split(learned)

    @jax.jit
    def run(params):
        module = nnx.merge(graphdef, params)
        shared, ys, found = module.init_shared(*x.shape[:2]), [], []
        for _ in range(4):
            out = module(x, dataclasses.replace(seq, shared=shared))
            shared = shared | out.shared
            ys.append(out.y)
            found.append(shared[f"hgrn2_4_{module.key_dim}_4_bound"])
        return ys, found

    bounds = lambda: run(cases.split(learned)[1])
    found = np.array(bounds()[1])
    assert not found[0].any() and (np.diff(found, axis=0) > 0).all() and found.max() < 1
    with cases.drawn_by_numpy():
        even = mixers.build(learned.config, width=cases.WIDTH, rngs=nnx.Rngs(0), dtype=jnp.float64)
    learned.bound[...] = even.bound[...]
    for l, b in enumerate(bounds()[1]):
        np.testing.assert_allclose(b, l / 4, atol=1e-12)
    learned.bound[...] = jnp.full_like(learned.bound[...], 0.7)
    ys, found = bounds()
    constant, used = make(lower_bound=float(found[2][0])), np.asarray(seq.segments) > 0
    for name in ("q", "forget", "v", "out"):
        getattr(constant, name).kernel[...] = getattr(learned, name).kernel[...]
    constant.norm.scale[...] = learned.norm.scale[...]
    np.testing.assert_allclose(ys[2][used], cases.output(constant, x, seq)[used], atol=1e-11)


def test_bounds_are_of_as_many_layers_as_there_are():
    """Fewer would make the bounds of the last ones 1; layers with other keys have bounds of their own."""

    def stack(layers, pattern, **fields):
        table = mixer_table(
            {letter: {"name": "hgrn2", "heads": 2} | own for letter, own in fields.items()}, "model.mixers"
        )
        LanguageModelConfig(vocab=5, width=8, layers=layers, pattern=pattern, mlp_width=0, mixers=table)

    stack(3, "M", M={"bound_layers": 3})
    stack(4, "AB", A={"bound_layers": 2}, B={"bound_layers": 2, "key_width": 3})
    stack(4, "AABB", A={"bound_layers": 4}, B={"bound_layers": 4, "chunk": 8})
    stack(4, "AB", A={"bound_layers": 2}, B={})
    for layers, bound in ((30, 2), (3, 4)):
        with pytest.raises(
            ConfigError, match=rf"model.mixers.M.*bound_layers = {bound} .*allowed: {layers}, .*or none"
        ):
            stack(layers, "M", M={"bound_layers": bound})
    with pytest.raises(ConfigError, match="model.mixers.A.*bound_layers = 4 .*allowed: 2, "):
        stack(4, "AB", A={"bound_layers": 4}, B={"bound_layers": 2})
    with pytest.raises(ConfigError, match="model.mixers.M.*bound_layers = 4 .*allowed: 3, "):
        stack(3, "M", M={"name": "moh", "core": {"name": "hgrn2", "bound_layers": 4}})


def test_large_gates_keep_digits():
    """In fp32 a gate near 1 still writes what its logit says: 1 - f by itself would be 0."""
    module = cases.module(HGRN2Config(), jnp.float32)
    log_decay, k = module.gates(jnp.asarray([30.0], jnp.float32))
    np.testing.assert_allclose(k, np.exp(-30.0), rtol=1e-6)
    np.testing.assert_allclose(log_decay, -np.exp(-30.0), rtol=1e-6)
