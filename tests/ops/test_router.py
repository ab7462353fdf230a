"""Top-k routing against its formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops import router
from tests import tiers


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def logits(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_takes_the_k_largest(k):
    x = logits(40, 5)
    taken = np.asarray(router.top_k_mask(x, k))
    order = np.argsort(-np.asarray(x), axis=-1)
    expected = np.zeros_like(taken)
    np.put_along_axis(expected, order[:, :k], True, axis=-1)
    np.testing.assert_array_equal(taken, expected)


def test_ties_go_to_the_lower_index():
    """Exactly k are taken, whatever is equal."""
    taken = router.top_k_mask(jnp.asarray([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]]), 2)
    np.testing.assert_array_equal(taken, [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]])


def test_logits_differ_where_probabilities_do_not():
    """Why the choice is by logits: in bfloat16 a softmax makes different logits equal."""
    x = jnp.asarray([[4.0, 4.001, -60.0, -50.0]], jnp.float32)
    p = jax.nn.softmax(x.astype(jnp.bfloat16), axis=-1)
    assert p[0, 0] == p[0, 1]
    np.testing.assert_array_equal(router.top_k_mask(x, 1), [[0, 1, 0, 0]])


def test_probabilities_are_fp32():
    assert router.softmax(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32
    assert router.norm_logits(jnp.ones((2, 3, 4), jnp.bfloat16)).dtype == jnp.float32
    assert router.softmax(jnp.ones((2, 3))).dtype == jnp.float64


def test_renormalised_weights_sum_to_k_over_the_taken():
    p = router.softmax(logits(20, 6))
    taken = router.top_k_mask(p, 4)
    r = np.asarray(router.renormalised(p, taken))
    np.testing.assert_allclose(r.sum(-1), 4.0, atol=1e-12)
    np.testing.assert_array_equal(r[~np.asarray(taken)], 0.0)
    kept = np.where(taken, p, 0)
    np.testing.assert_allclose(r, 4 * kept / kept.sum(-1, keepdims=True), atol=1e-12)


@pytest.mark.parametrize("dense", [True, False])
def test_straight_through(dense):
    """Forward 0 or 1 exactly; backward the gradient of p, for the taken ones or for all."""
    x, upstream = logits(30, 5), logits(30, 5, seed=1)
    taken = router.top_k_mask(x, 2)
    value = router.straight_through(router.softmax(x), taken, dense=dense)
    np.testing.assert_array_equal(value, taken.astype(float))
    got = jax.grad(lambda x: jnp.sum(upstream * router.straight_through(router.softmax(x), taken, dense=dense)))(x)
    kept = upstream if dense else jnp.where(taken, upstream, 0)
    expected = jax.grad(lambda x: jnp.sum(kept * router.softmax(x)))(x)
    np.testing.assert_allclose(got, expected, atol=1e-14)
    assert np.abs(got).max() > 1e-3


def test_straight_through_is_exact_in_fp32():
    """The value is 1, not 1 to within rounding."""
    p = jnp.asarray(np.random.default_rng(0).random((1000, 1)), jnp.float32)
    taken = jnp.ones((1000, 1), bool)
    np.testing.assert_array_equal(router.straight_through(p, taken, dense=True), 1.0)


def test_norm_logits_formula():
    q = logits(7, 5, 4)
    norm = np.linalg.norm(np.asarray(q), axis=-1)
    np.testing.assert_allclose(router.norm_logits(q), norm / norm.std(-1, ddof=1, keepdims=True), rtol=1e-10)


@tiers.often("q1", "q2")
@pytest.mark.parametrize("q", [np.zeros((3, 4)), np.ones((3, 4)), np.array([[0.0] * 4, [1.0] * 4, [2.0] * 4])])
def test_equal_norms_and_zero_queries_are_finite(q):
    """No deviation to divide by, or no direction to move in: neither gives NaN."""
    f = lambda q: router.softmax(router.norm_logits(q))
    for dtype in (jnp.float32, jnp.float64):
        value, back = jax.vjp(f, jnp.asarray(q, dtype))
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(back(jnp.arange(3, dtype=dtype))[0]))
    if np.ptp(np.linalg.norm(q, axis=-1)) == 0:
        np.testing.assert_allclose(f(jnp.asarray(q)), 1 / 3)


def test_norm_logits_need_two():
    with pytest.raises(ValueError, match="at least 2"):
        router.norm_logits(jnp.ones((1, 1, 4)))


def test_load_balance_formula_and_gradient():
    """E sum P f over the tokens that count; no gradient through f."""
    x = logits(2, 9, 5)
    used = jnp.asarray(np.arange(18).reshape(2, 9) % 4 > 0)
    taken = router.top_k_mask(x, 2)
    p = jax.nn.softmax(x, axis=-1)
    f = np.asarray(taken)[np.asarray(used)].mean(0)
    expected = 5 * np.sum(np.asarray(p)[np.asarray(used)].mean(0) * f)
    np.testing.assert_allclose(router.load_balance(p, taken, used), expected, atol=1e-14)
    loss = lambda p, t: router.load_balance(p, t, used)
    of_p, of_f = jax.grad(loss, argnums=(0, 1))(p, taken.astype(p.dtype))
    np.testing.assert_array_equal(of_f, 0.0)
    np.testing.assert_allclose(of_p, 5 * f * np.asarray(used)[..., None] / np.asarray(used).sum(), atol=1e-14)


def test_no_token_that_counts():
    """A batch of padding has a loss of 0, not NaN."""
    p = jnp.full((1, 3, 4), 0.25)
    assert router.load_balance(p, router.top_k_mask(p, 2), jnp.zeros((1, 3), bool)) == 0
