"""What passes between positions: every digit of it, its gradient, and nothing of other documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.linear_recurrence import linear_recurrence
from attnlab.ops.position_decay import decays_between
from attnlab.ops.two_stage import two_stage

C = 64
SEEN = np.tril(np.ones((C, C), bool))
DOCUMENTS = np.repeat([0, 1, 2], [23, 1, 40])


def logs(scale, *shape):
    return -(scale * np.random.default_rng(0).exponential(size=(*shape, C))).astype(np.float32)


def exact(log, seen):
    """float64, each pair's sum by itself."""
    log = log.astype(np.float64)
    between = [[log[i + 1 : t + 1].sum() for i in range(C)] for t in range(C)]
    return np.where(seen, np.exp(between), 0)


between = jax.jit(decays_between)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 20.0])
@pytest.mark.parametrize("seen", [SEEN, SEEN & (DOCUMENTS[:, None] == DOCUMENTS)], ids=["one", "documents"])
def test_weights_have_every_digit(scale, seen):
    log = logs(scale)
    total, weights = map(np.asarray, between(log, seen))
    expected = exact(log, seen)
    assert (weights == 0)[expected == 0].all()
    large = expected > 1e-6
    np.testing.assert_allclose(weights[large], expected[large], rtol=2e-6)
    begin = seen.argmax(1)
    np.testing.assert_allclose(total, [log[b : t + 1].sum(dtype=np.float64) for t, b in enumerate(begin)], rtol=1e-6)


def test_gradients_are_of_the_sums():
    """The derivative by each step's log is that of the pairs which it lies between."""
    log = logs(0.3).astype(np.float64)
    by = np.random.default_rng(1).standard_normal((C, C))
    with jax.enable_x64(True):
        found = jax.jit(jax.grad(lambda log: jnp.sum(by * decays_between(log, SEEN)[1])))(log)
    weights = by * exact(log, SEEN)
    np.testing.assert_allclose(found, [weights[s:, :s].sum() for s in range(C)], rtol=1e-9, atol=1e-12)


def rows(scale):
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 2, 3 * C, 2, 16)).astype(np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log, beta = rng.standard_normal((2, 2, 3 * C, 2)).astype(np.float32)
    return q, k, v, -scale * np.logaddexp(0, log), 1 / (1 + np.exp(-beta))


RUNS = {
    "delta_rule": lambda *x, impl: delta_rule(*x, impl=impl)[0],
    "linear_recurrence": lambda q, k, v, log, _, impl: linear_recurrence(q, k, v, log_decay=log, impl=impl)[0],
}


@functools.partial(jax.jit, static_argnames="impl")
def every(*arrays, impl):
    return {name: run(*arrays, impl=impl) for name, run in RUNS.items()}


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_chunks_are_as_near_to_float64_as_steps(scale):
    """Chunks of strong decays lose no more than the recurrence in float32 does."""
    arrays = rows(scale)
    found = jax.device_get(every(*arrays, impl="chunked"))
    with jax.enable_x64(True):
        expected = jax.device_get(every(*map(np.float64, arrays), impl="definition"))
    for name in RUNS:
        assert np.abs(found[name] - expected[name]).max() <= 4e-7 * np.abs(expected[name]).max(), name


def test_both_stages_have_every_digit():
    keep, eta = logs(1.0), logs(0.5)[::-1].copy()
    run = jax.jit(two_stage)
    found = run(keep, eta, SEEN)
    with jax.enable_x64(True):
        expected = run(keep.astype(np.float64), eta.astype(np.float64), SEEN)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        large = np.abs(other) > 1e-6
        np.testing.assert_allclose(np.asarray(one)[large], np.asarray(other)[large], rtol=3e-6)
