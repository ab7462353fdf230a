"""Top-k routing against its formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from attnlab.ops import router
from tests import tiers


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


top_k = jax.jit(router.top_k_mask, static_argnums=1)


def logits(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_takes_the_k_largest(k):
    x = logits(40, 5)
    taken = np.asarray(top_k(x, k))
    order = np.argsort(-x, axis=-1)
    expected = np.zeros_like(taken)
    np.put_along_axis(expected, order[:, :k], True, axis=-1)
    np.testing.assert_array_equal(taken, expected)


def test_ties_go_to_the_lower_index():
    """Exactly k are taken, whatever is equal."""
    taken = top_k(np.asarray([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]]), 2)
    np.testing.assert_array_equal(taken, [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]])


def test_logits_differ_where_probabilities_do_not():
    """Why the choice is by logits: in bfloat16 a softmax makes different logits equal."""
    x = np.asarray([[4.0, 4.001, -60.0, -50.0]], np.float32)
    p = np.asarray(jax.jit(lambda x: jax.nn.softmax(x.astype(jnp.bfloat16), axis=-1))(x))
    assert p[0, 0] == p[0, 1]
    np.testing.assert_array_equal(top_k(x, 1), [[0, 1, 0, 0]])


def test_probabilities_are_fp32():
    of = lambda fn, dtype, *shape: jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, dtype)).dtype
    assert of(router.softmax, jnp.bfloat16, 2, 3) == jnp.float32
    assert of(router.norm_logits, jnp.bfloat16, 2, 3, 4) == jnp.float32
    assert of(router.softmax, jnp.float64, 2, 3) == jnp.float64


def test_renormalised_weights_sum_to_k_over_the_taken():
    @jax.jit
    def run(x):
        p = router.softmax(x)
        taken = router.top_k_mask(p, 4)
        return p, taken, router.renormalised(p, taken)

    p, taken, r = map(np.asarray, run(logits(20, 6)))
    np.testing.assert_allclose(r.sum(-1), 4.0, atol=1e-12)
    np.testing.assert_array_equal(r[~taken], 0.0)
    kept = np.where(taken, p, 0)
    np.testing.assert_allclose(r, 4 * kept / kept.sum(-1, keepdims=True), atol=1e-12)


@pytest.mark.parametrize("dense", [True, False])
def test_straight_through(dense):
    """Forward 0 or 1 exactly; backward the gradient of p, for the taken ones or for all."""
    x, upstream = logits(30, 5), logits(30, 5, seed=1)

    @jax.jit
    def run(x):
        taken = router.top_k_mask(x, 2)
        value, back = jax.vjp(lambda x: router.straight_through(router.softmax(x), taken, dense=dense), x)
        return taken, value, *back(jnp.asarray(upstream))

    taken, value, got = map(np.asarray, run(x))
    np.testing.assert_array_equal(value, taken.astype(float))
    kept, p = upstream if dense else np.where(taken, upstream, 0), scipy.special.softmax(x, axis=-1)
    np.testing.assert_allclose(got, p * (kept - (p * kept).sum(-1, keepdims=True)), atol=1e-14)
    assert np.abs(got).max() > 1e-3


def test_straight_through_is_exact_in_fp32():
    """The value is 1, not 1 to within rounding."""
    p = np.random.default_rng(0).random((1000, 1)).astype(np.float32)
    run = jax.jit(lambda p, taken: router.straight_through(p, taken, dense=True))
    np.testing.assert_array_equal(run(p, np.ones((1000, 1), bool)), 1.0)


def test_norm_logits_formula():
    q = logits(7, 5, 4)
    norm = np.linalg.norm(q, axis=-1)
    np.testing.assert_allclose(jax.jit(router.norm_logits)(q), norm / norm.std(-1, ddof=1, keepdims=True), rtol=1e-10)


@tiers.often("q1", "q2")
@pytest.mark.parametrize("q", [np.zeros((3, 4)), np.ones((3, 4)), np.array([[0.0] * 4, [1.0] * 4, [2.0] * 4])])
def test_equal_norms_and_zero_queries_are_finite(q):
    """No deviation to divide by, or no direction to move in: neither gives NaN."""
    for dtype in (np.float32, np.float64):
        value, gradient = both_ways(q.astype(dtype))
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradient))
    if np.ptp(np.linalg.norm(q, axis=-1)) == 0:
        np.testing.assert_allclose(value, 1 / 3)


@jax.jit
def both_ways(q):
    value, back = jax.vjp(lambda q: router.softmax(router.norm_logits(q)), q)
    return value, *back(jnp.arange(3, dtype=q.dtype))


def test_norm_logits_need_two():
    with pytest.raises(ValueError, match="at least 2"):
        router.norm_logits(jnp.ones((1, 1, 4)))


def test_load_balance_formula_and_gradient():
    """E sum P f over the tokens that count; no gradient through f."""
    x = logits(2, 9, 5)
    used = np.arange(18).reshape(2, 9) % 4 > 0
    taken, p = np.asarray(top_k(x, 2)), scipy.special.softmax(x, axis=-1)
    f = taken[used].mean(0)
    loss = lambda p, t: router.load_balance(p, t, used)
    value, of_p, of_f = jax.jit(lambda p, t: (loss(p, t), *jax.grad(loss, argnums=(0, 1))(p, t.astype(p.dtype))))(
        p, taken
    )
    np.testing.assert_allclose(value, 5 * np.sum(p[used].mean(0) * f), atol=1e-14)
    np.testing.assert_array_equal(of_f, 0.0)
    np.testing.assert_allclose(of_p, 5 * f * used[..., None] / used.sum(), atol=1e-14)


def test_no_token_that_counts():
    """A batch of padding has a loss of 0, not NaN."""
    run = jax.jit(lambda p, used: router.load_balance(p, router.top_k_mask(p, 2), used))
    assert run(np.full((1, 3, 4), 0.25), np.zeros((1, 3), bool)) == 0
