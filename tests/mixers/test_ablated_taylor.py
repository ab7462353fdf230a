"""The identities of ablated attention with weights=taylor, in float64; the others are in test_ablated.py."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.ablated import AblatedConfig
from attnlab.ops.dispatch import recording
from tests.mixers import cases
from tests.mixers import test_contract as battery
from tests.mixers.test_ablated import naive, whole


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_taylor_is_based_at_full_width():
    """Without RoPE it is the mixer `based` whose queries and keys are as wide as its values, without its epsilon."""
    module = cases.module(AblatedConfig(rope_base=None), jnp.float64)
    based = cases.module(mixers.get("based").Config(feature_width=4, epsilon=0.0), jnp.float64)
    nnx.update(based, nnx.state(module))
    x, seq = whole()
    np.testing.assert_allclose(jax.jit(based)(x, seq).y, jax.jit(module)(x, seq).y, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"taylor_state": "cache"}], ids=str)
def test_taylor_streams_by_features_or_a_cache(fields):
    """In packed rows, whole (by pairs) and in pieces: the layer written out, of each document."""
    module = cases.module(AblatedConfig(rope_base=50.0, chunk=4, **fields), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    graphdef, params = cases.split(module)
    extend = functools.partial(battery.extend, graphdef, params)
    at_once = cases.output(module, x, seq)
    streamed, _ = cases.streamed(extend, battery.begun(graphdef, params), x, seq, battery.CUTS[1])
    for row, first, end in cases.DOCUMENTS:
        want = naive(module, np.asarray(x)[row, first:end], None)
        for y in (at_once, streamed):
            np.testing.assert_allclose(y[row, first:end], want, atol=1e-12)


def test_what_taylor_keeps_and_costs():
    """Features are of one size; a cache grows, and is smaller up to about d^2 / 4 positions. Short rows cost what pairs
    do, long ones what features do, unless a cache or an implementation is asked for."""
    cls = mixers.get("ablated")
    cost = lambda length, **fields: cls.cost(AblatedConfig(heads=2, head_width=64, **fields), 128, length)
    kept = lambda length, state: cost(length, taylor_state=state).state_bytes
    assert kept(900, "cache") < kept(900, "features") == kept(5000, "features") < kept(1200, "cache")
    short, long, pairs = 2 * 2145 - 1, 2 * 2145, lambda T: 4 * 128 * (T + 1) / 2
    assert cost(short).flops["attention"] == pairs(short) and cost(short).span == (short + 1) / 2
    assert "attention" not in cost(long).flops and cost(long).flops == cost(long, impl="chunked").flops
    assert cost(long, taylor_state="cache").flops["attention"] == pairs(long)
    assert "attention" not in cost(short, impl="chunked").flops
    with pytest.raises(ConfigError, match="taylor_state = 'cache'.*features where weights is not taylor"):
        AblatedConfig(weights="static", taylor_state="cache")

    def chosen(length, **fields):
        module = cases.blank(AblatedConfig(heads=2, **fields), jnp.float32)
        graphdef, params = cases.split(module)
        x = jax.ShapeDtypeStruct((1, length, cases.WIDTH), jnp.float32)
        with recording() as record:
            jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x, mixers.Sequence.whole(1, length)).y, params, x)
        return [(c.op, c.implementation) for c in record.choices if c.op != "rope"]

    pairs, features = [("taylor_attention", "blocks")], [("linear_recurrence", "chunked")]  # d = 8: F = 45
    assert chosen(89) == pairs and chosen(90) == features
    assert chosen(89, impl="chunked") == features and chosen(90, taylor_state="cache") == pairs
