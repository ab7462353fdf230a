"""The identities of Gaussian adaptive attention (Ioannides et al. 2024), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.mixers.gaussian_adaptive import GaussianAdaptiveConfig
from attnlab.ops.gaussian_weights import Slices, gaussian_weights
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"bias": "offset", "scale": "log_c"}

N, H, G, D = 5, 2, 3, 6
weights = jax.jit(gaussian_weights, static_argnames=("impl",))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays():
    """x [N, H, D], offsets and widths [H, G]."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, H, D)), rng.standard_normal((H, G)), np.exp(rng.standard_normal((H, G)))


def product(x, offset, c):
    """Weights of one slice x [n], the densities multiplied."""
    deviation, m = np.sqrt(x.var() + 1e-8), np.ones_like(x)
    for g in range(len(c)):
        m = (
            m
            * np.exp(-(((x - x.mean() - offset[g]) / deviation) ** 2) / (2 * c[g] ** 2))
            / np.sqrt(2 * np.pi * c[g] ** 2)
        )
    return m / m.sum()


def test_the_product_is_one_gaussian():
    """Densities multiplied, their logarithms added, and the one Gaussian; all sum to 1."""
    x, offset, c = arrays()
    want = np.stack([[product(x[n, h], offset[h], c[h]) for h in range(H)] for n in range(N)])
    for impl in ("definition", "single"):
        np.testing.assert_allclose(weights(x, offset, c, None, impl=impl), want, atol=1e-13)
    np.testing.assert_allclose(want.sum(-1), 1, atol=1e-14)


def test_many_narrow_gaussians_do_not_underflow():
    """A hundred of width 0.05, whose product is 0 in float64: the nearest features share all weight."""
    x, *_ = arrays()
    m = weights(x, np.zeros((H, 100)), np.full((H, 100), 0.05), None)
    assert np.all(np.isfinite(m))
    np.testing.assert_allclose(m.sum(-1), 1, atol=1e-12)
    distance = np.abs(x - x.mean(-1, keepdims=True))
    np.testing.assert_array_equal(np.argmax(m, -1), np.argmin(distance, -1))


def test_weights_of_scaled_and_moved_inputs():
    """x to a x + b, a > 0, leaves m where delta = 0, and where delta is scaled too."""
    x, offset, c = arrays()
    for delta in (0 * offset, offset):
        want = weights(x, delta, c, None)
        np.testing.assert_allclose(weights(3 * x + 2, 3 * delta, c, None), want, atol=1e-7)  # but for epsilon
    assert np.abs(weights(3 * x + 2, offset, c, None) - weights(x, offset, c, None)).max() > 0.01


@tiers.exhaustive
def test_wide_gaussians_weigh_alike():
    """c to infinity: 1 / n; over positions 1 / n of each slice of each document, slices as equal as can be."""
    x, offset, c = arrays()
    np.testing.assert_allclose(weights(x, offset, 1e6 * np.ones_like(c), None), 1 / D, atol=1e-9)
    slices = Slices.of(jnp.asarray([[1] * 7 + [2] * 3 + [3]]), H)
    assert slices.head_BT.tolist() == [[0] * 4 + [1] * 3 + [0, 0, 1] + [0]]
    rows = np.random.default_rng(1).standard_normal((1, 11, 4))
    m = weights(rows, offset, 1e6 * np.ones_like(c), slices)
    count = np.array([4] * 4 + [3] * 3 + [2, 2, 1] + [1])
    np.testing.assert_allclose(m[0], np.broadcast_to(1 / count[:, None], (11, 4)), atol=1e-9)


@pytest.mark.parametrize("impl", ["definition", "single"])
@pytest.mark.parametrize("axis", ["features", "positions"])
def test_layer_is_the_formula(axis, impl):
    """The whole layer written out, over packed documents with padding."""
    module = cases.module(GaussianAdaptiveConfig(axis=axis, heads=2, gaussians=3, impl=impl), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = np.asarray(jax.jit(lambda x: module(x, seq).y)(x))
    rows, offset, c = np.asarray(x), np.asarray(module.offset[...]), np.exp(np.asarray(module.log_c[...]))
    want = np.zeros_like(rows)
    for row, first, end in cases.DOCUMENTS:
        n = end - first
        for h in range(2):
            if axis == "features":
                own = [(row, t, slice(8 * h, 8 * h + 8)) for t in range(first, end)]
            else:
                at = first + np.arange(n)[np.arange(n) * 2 // n == h]
                own = [(row, at, f) for f in range(cases.WIDTH)]
            for place in own:
                want[place] = rows[place] * product(rows[place], offset[h], c[h])
    np.testing.assert_allclose(y, want, atol=1e-12)


def test_positions_do_not_stream():
    """What depends on the whole document is refused, by the state and by the next positions."""
    module = cases.module(GaussianAdaptiveConfig(axis="positions"), jnp.float32)
    x, seq = cases.inputs(jnp.float32)
    with pytest.raises(UnsupportedPattern, match="axis=positions does not stream"):
        module.init_state(2, 10)
    with pytest.raises(UnsupportedPattern, match="axis=positions does not stream"):
        module.extend(x, seq, ())
    assert cases.module(GaussianAdaptiveConfig(), jnp.float32).init_state(2, 10) == ()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 3}, "heads = 3.*divisors of the width 16"),
        ({"gaussians": 0}, "gaussians = 0"),
        ({"axis": "time"}, "axis = 'time'"),
        ({"impl": "xla"}, "impl = 'xla'"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.build({"name": "gaussian_adaptive", **fields}, width=16, rngs=nnx.Rngs(0))
