"""The identities of log-linear Gated DeltaNet (Guo et al. 2025), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.gated_deltanet import GatedDeltaNetConfig
from attnlab.mixers.log_linear_deltanet import LogLinearDeltaNetConfig
from tests import tiers
from tests.mixers import cases, test_gated_deltanet
from tests.mixers.test_log_linear import level_weights
from tests.ops.test_log_linear import parts

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = test_gated_deltanet.ROLES | {
    "matrix": test_gated_deltanet.ROLES["matrix"] + " levels.linear",
    "scale": test_gated_deltanet.ROLES["scale"] + " levels",
}
NUMBERS_OF = "gated_deltanet"
WRITTEN_OUT = True
SPLIT_GRADIENTS = False


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(LogLinearDeltaNetConfig(**{"chunk": 4, **fields}), jnp.float64)


def naive(module, x):
    """The layer on one whole sequence [T, D] in NumPy: each level's memory of its own positions, each written and then
    taken through the transitions of all that come after."""
    q, k, v, a, beta = test_gated_deltanet.inputs_of(module, x)
    H, K, d = module.config.heads, *k.shape[1:]
    weights, o = level_weights(module, x), np.zeros_like(v)
    for t, h in np.ndindex(len(x), H):
        key = h * K // H
        for level, positions in parts(t, module.config.levels).items():
            S = np.zeros((v.shape[-1], d))
            for s in range(t + 1):
                S = a[s, h] * S @ (np.eye(d) - beta[s, h] * np.outer(k[s, key], k[s, key]))
                S += beta[s, h] * np.outer(v[s, h], k[s, key]) * (s in positions)
            o[t, h] += weights[t, h, level] * S @ q[t, key]
    return test_gated_deltanet.finished(module, x, o)


@pytest.mark.parametrize("fields", [{"expand": 2.0}, {"key_heads": 2, "levels": 3, "query_scale": None}])
def test_layer_is_the_formula(fields):
    """The whole layer written out, with values wider than keys, chunks that do not divide the length, shared keys, and
    positions beyond the levels."""
    module = make(**fields)
    x, _ = cases.inputs(jnp.float64)
    for got, row in zip(cases.output(module, x), np.asarray(x), strict=True):
        np.testing.assert_allclose(got, naive(module, row), atol=1e-12)


def test_equal_weights_are_gated_deltanet():
    """Where all levels weigh the same, log 2, in packed rows: Gated DeltaNet, whose norm takes the factor out."""
    module, plain = make(), test_gated_deltanet.make(chunk=4)
    module.levels.scale[...] = jnp.zeros_like(module.levels.scale[...])
    nnx.update(plain, nnx.state(module, lambda path, _: path[0] != "levels"))
    plain.norm.epsilon /= np.log(2.0) ** 2
    x, seq = cases.inputs(jnp.float64)
    np.testing.assert_allclose(cases.output(module, x, seq), cases.output(plain, x, seq), atol=1e-12)


@tiers.exhaustive
def test_streams_cut_at_odd_places():
    """The counter and the chunks, in pieces of odd lengths of packed rows: the whole."""
    x, seq = cases.inputs(jnp.float64)
    used = np.asarray(seq.segments) > 0
    for impl in ("definition", "chunked"):
        module = make(impl=impl)
        state = module.init_state(2, cases.LENGTH, jnp.float64)
        cuts = (3, 1, 5, cases.LENGTH - 9)
        y, _ = cases.streamed(jax.jit(module.extend), state, x, seq, cuts)
        np.testing.assert_allclose(y[used], cases.output(module, x, seq)[used], atol=1e-11)


def test_levels_and_state():
    """A state of L - 1 memories whatever the length; a model without levels is refused."""
    fields = {"levels": 5, "head_width": 6, "expand": 1.5, "conv": 3}
    with cases.drawn_by_numpy():
        module = mixers.build({"name": "log_linear_deltanet", **fields}, width=16, rngs=nnx.Rngs(0))
    for length in (1, 1000):
        carried = jax.eval_shape(lambda length=length: module.init_state(2, length)).carried
        assert carried.memory.shape == (2, 4, 4, 6, 9) and carried.tail.shape == (2, 2, 4 * (6 + 6 + 9))
    assert np.all(module.levels.scale[...] == 1) and module.levels.linear.kernel.shape == (16, 20)
    assert LogLinearDeltaNetConfig().levels == 16 and issubclass(LogLinearDeltaNetConfig, GatedDeltaNetConfig)
    with pytest.raises(ConfigError, match="levels = 1"):
        LogLinearDeltaNetConfig(levels=1)
