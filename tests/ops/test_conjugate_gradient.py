"""Conjugate gradients on many systems at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops.conjugate_gradient import conjugate_gradient, default_tolerance

N, D = 5, 6


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def systems(dtype=jnp.float64, condition=30.0):
    """Matrices [N, D, D] of the given condition number, and right-hand sides."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((N, D, D)))[0]
    a = np.einsum("nij,j,nkj->nik", basis, np.geomspace(1, condition, D), basis)
    return jnp.asarray(a, dtype), jnp.asarray(rng.standard_normal((N, D)), dtype)


def product(a):
    return lambda y: jnp.einsum("nij,nj->ni", a, y, precision="highest")


@pytest.mark.parametrize("early_exit", [True, False])
def test_solves_in_as_many_turns_as_the_width(early_exit):
    a, b = systems()
    found = conjugate_gradient(product(a), b, iterations=D, tolerance=1e-15, early_exit=early_exit)
    np.testing.assert_allclose(found.x_Nd, np.linalg.solve(a, b[..., None])[..., 0], atol=1e-11)
    assert np.all(np.asarray(found.iterations_N) == D)


def test_one_turn_is_the_exact_step_along_the_right_hand_side():
    a, b = systems()
    found = conjugate_gradient(product(a), b, iterations=1)
    step = (b * b).sum(-1) / (b * product(a)(b)).sum(-1)
    np.testing.assert_allclose(found.x_Nd, step[:, None] * b, rtol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_stops_at_the_tolerance_and_reports_the_residual(dtype):
    a, b = systems(dtype)
    found = conjugate_gradient(product(a), b, iterations=100)
    left = np.linalg.norm(product(a)(found.x_Nd) - b, axis=-1) / np.linalg.norm(b, axis=-1)
    assert np.all(np.asarray(found.residual_N) <= default_tolerance(dtype))
    np.testing.assert_allclose(left, found.residual_N, atol=20 * float(jnp.finfo(dtype).eps))
    loose = conjugate_gradient(product(a), b, iterations=100, tolerance=0.1)
    assert np.all(np.asarray(loose.iterations_N) < np.asarray(found.iterations_N))
    assert np.all(np.asarray(loose.residual_N) <= 0.1)


def test_early_exit_changes_nothing():
    a, b = systems()
    until_done, all_turns = (
        conjugate_gradient(product(a), b, iterations=40, tolerance=0.1, early_exit=early_exit)
        for early_exit in (True, False)
    )
    # Two programs: their products need not round alike.
    np.testing.assert_allclose(until_done.x_Nd, all_turns.x_Nd, atol=1e-12)


def test_a_solution_does_not_depend_on_the_other_systems():
    """Bitwise, although the loop goes on for the slowest."""
    easy, b = systems(condition=1.5)
    hard, _ = systems(condition=1e4)
    # Elementwise, so that a row's rounding does not depend on the shape of the product.
    run = lambda a: conjugate_gradient(lambda y: (a * y[:, None]).sum(-1), b, iterations=60, tolerance=1e-2)
    alone, among = run(easy), run(jnp.where(jnp.arange(N)[:, None, None] == 0, easy, hard))
    np.testing.assert_array_equal(among.x_Nd[0], alone.x_Nd[0])
    assert among.iterations_N.max() > alone.iterations_N.max()


def test_nothing_to_solve():
    """b = 0 gives x = 0 in no turns; a matrix of zeros, which has no solution, gives no NaN."""
    a, b = systems()
    zero = conjugate_gradient(product(a), 0 * b, iterations=5)
    assert not np.any(zero.x_Nd) and not np.any(zero.iterations_N) and not np.any(zero.residual_N)
    singular = conjugate_gradient(product(0 * a), b, iterations=5)
    assert not np.any(singular.x_Nd) and np.all(np.asarray(singular.residual_N) == 1)
