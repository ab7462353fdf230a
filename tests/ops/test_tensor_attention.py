"""Tensor attention (Alman and Song 2023): what it is in its limits, and its tiles against the definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops import Mask, mask_for_extension, mask_from_segments, tensor_attention_xla
from attnlab.ops.masks import mean_visible_pairs
from attnlab.ops.tensor_attention import tensor_attention
from attnlab.parallel import partition
from tests import tiers
from tests.ops import reference

T, D, E = 21, 4, 3
SEGMENTS = np.asarray([[1] * 6 + [2] * 2 + [3] * 9 + [0] * 4, [0] * 2 + [4] * 9 + [5] * 10])
# By name: the mask, the most keys that a row sees (none: all), and queries, of which the first is key S - T of S.
MASKS = {
    "both ways": lambda: (Mask(), None, T),
    "causal window": lambda: (Mask(causal=True, window=5), 5, T),
    "packed": lambda: (mask_from_segments(SEGMENTS, T, causal=True), None, T),
    "packed both ways": lambda: (mask_from_segments(SEGMENTS, T, causal=False), None, T),
    "packed window": lambda: (mask_from_segments(SEGMENTS, T, causal=True, window=4), 4, T),
    "stream in a window": lambda: (
        mask_for_extension(7, 14, np.asarray([[0] * 9 + [22] + [17] * 4]), window=4),
        4,
        14,
    ),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays(queries=T, B=2, S=T, H=2, seed=0):
    """q, k1, k2, v1, v2."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, *shape)) for shape in [(queries, H, D), *[(S, H, D)] * 2, *[(S, H, E)] * 2]]


def run(q, k1, k2, v1, v2, mask=None, **options):
    pairs = jnp.concatenate([k1, k2], -1), jnp.concatenate([v1, v2], -1)
    return tensor_attention(q, *pairs, Mask(causal=True) if mask is None else mask, **options)


@tiers.often("chunked")
@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_limits(impl):
    """Second keys and values of 1: softmax attention of scale 1 / d. The two of a pair change places: nothing changes.
    One key: the product of its values."""
    q, k1, k2, v1, v2 = arrays()
    one, of = np.ones_like, jax.jit(functools.partial(run, impl=impl))
    expected = reference.attention(q, k1, v1, Mask(causal=True), v1, scale=1 / D)[0]
    np.testing.assert_allclose(of(q, k1, one(k2), v1, one(v2)), expected, atol=1e-12)
    np.testing.assert_allclose(of(q, k2, k1, v2, v1), of(q, k1, k2, v1, v2), atol=1e-12)
    alone = jax.jit(lambda *a: run(*a, Mask(causal=True, window=1), reach=1, impl=impl))(q, k1, k2, v1, v2)
    np.testing.assert_allclose(alone, v1 * v2, atol=1e-12)


@tiers.often("definition")
@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_is_attention_to_kronecker_keys(impl):
    """S^2 keys k1_j * k2_l with values v1_j * v2_l, in ordinary attention."""
    q, k1, k2, v1, v2 = arrays(S=7)
    products = lambda a, b: (a[:, :, None] * b[:, None]).reshape(2, 49, *a.shape[2:])
    expected = reference.attention(q, products(k1, k2), products(v1, v2), Mask(), q[..., :E], scale=0.7)[0]
    found = jax.jit(lambda *a: run(*a, Mask(), scale=0.7, impl=impl))(q, k1, k2, v1, v2)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@tiers.often("packed window-False", "packed-True", "stream in a window-True")
@pytest.mark.parametrize("kind, serial", [*((kind, True) for kind in MASKS), ("packed window", False)])
def test_tiles_equal_the_definition(kind, serial, monkeypatch):
    """Values and gradients, where rows and pairs do not divide into tiles, as CPUs and as accelerators run it."""
    monkeypatch.setattr(tensor_attention_xla, "ROWS", 20)  # 4 first keys a group, beside 5 rows
    if not serial:
        monkeypatch.setattr(partition, "by_platform", lambda *args, cpu, default: default(*args))
    mask, reach, queries = MASKS[kind]()
    inputs = arrays(queries)

    def both(impl):
        scalar = lambda *a: (lambda o: (jnp.sum(jnp.cos(jnp.arange(o.size)).reshape(o.shape) * o), o))(
            run(*a, mask, reach=reach, chunk=5, impl=impl)
        )
        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3, 4), has_aux=True))(*inputs)

    for a, b in zip(jax.tree.leaves(both("chunked")), jax.tree.leaves(both("definition")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_rows_that_see_nothing_are_zero():
    """Exactly, with gradients of zero."""
    mask = mask_from_segments(SEGMENTS, T, causal=True)
    scalar = lambda *a: (lambda o: (o.sum(), o))(run(*a, mask))
    gradients, o = jax.jit(jax.grad(scalar, argnums=(0, 1, 2, 3, 4), has_aux=True))(*arrays())
    padding = np.asarray(SEGMENTS) == 0
    assert not np.any(np.asarray(o)[padding]) and np.all(np.isfinite(o))
    for gradient in gradients:
        assert not np.any(np.asarray(gradient)[padding])


def test_pairs_that_rows_see():
    """The mean over rows of the square of what a row sees."""
    for causal, window in ((False, None), (True, None), (True, 4), (True, 30)):
        seen = np.asarray(Mask(causal=causal, window=window).seen(T, T))
        assert mean_visible_pairs(T, causal, window) == pytest.approx((seen**2 * np.ones(T)).mean())


def test_refused():
    """What does not fit, and rows that see too many keys, with what is allowed."""
    q, *pairs = arrays()
    with pytest.raises(UserError, match=r"k .* do not fit; expected .* k \[B, S, H, 2 d\]"):
        tensor_attention(q, pairs[0], pairs[2], Mask())
    with pytest.raises(UserError, match="chunk=0 is not allowed; allowed: 1 or more"):
        run(q, *pairs, chunk=0)
    q, *pairs = arrays(queries=300, S=300)
    with pytest.raises(UserError, match="300 keys a query, 90000 pairs; allowed: up to 256"):
        run(q, *pairs)
    assert jax.eval_shape(lambda: run(q, *pairs, Mask(causal=True, window=9), reach=9)).shape == (2, 300, 2, E)
