"""The matrix of momentum and forgetting, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops.two_stage import LOG_FLOOR, before, log_gate, two_stage

STEPS = 9


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def gates(seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.1, 1, STEPS), rng.uniform(0.1, 1, STEPS)


stage = jax.jit(two_stage)


def stage_of(keep, eta, documents=None):
    documents = np.zeros(STEPS, int) if documents is None else documents
    seen = (documents[:, None] == documents[None]) & np.tri(STEPS, dtype=bool)
    return jax.device_get(stage(np.log(keep), None if eta is None else np.log(eta), seen)), seen


def recurrence(keep, eta, documents, first=(1.0, 0.0), inputs=None):
    """W and S after each step, every document beginning at `first`."""
    out = []
    for t in range(STEPS):
        if t == 0 or documents[t] != documents[t - 1]:
            w, s = first
        s = eta[t] * s + (0.0 if inputs is None else inputs[t])
        w = keep[t] * w + s
        out.append((w, s))
    return np.array(out).T


@pytest.mark.parametrize("documents", [np.zeros(STEPS, int), np.array([0, 0, 0, 1, 2, 2, 2, 2, 3])])
def test_coefficients_are_those_of_the_recurrence(documents):
    """Each of beta, rho, h, kappa and H is the recurrence's answer to one unit input."""
    keep, eta = gates()
    stage, _ = stage_of(keep, eta, documents)
    np.testing.assert_allclose(stage.beta_C, recurrence(keep, eta, documents, (1.0, 0.0))[0], atol=1e-14)
    rho, h = recurrence(keep, eta, documents, (0.0, 1.0))
    np.testing.assert_allclose(stage.rho_C, rho, atol=1e-14)
    np.testing.assert_allclose(stage.h_C, h, atol=1e-14)
    for i, unit in enumerate(np.eye(STEPS)):
        kappa, momentum = recurrence(keep, eta, documents, (0.0, 0.0), unit)
        np.testing.assert_allclose(stage.kappa_CC[:, i], kappa, atol=1e-14)
        np.testing.assert_allclose(stage.momentum_CC[:, i], momentum, atol=1e-14)


def test_kappa_is_the_product_of_two_semiseparable_matrices():
    """kappa = L H with the products of gates written out, and without momentum L."""
    keep, eta = gates()
    product = lambda g: np.array([[np.prod(g[i + 1 : t + 1]) * (i <= t) for i in range(STEPS)] for t in range(STEPS)])
    np.testing.assert_allclose(stage_of(keep, eta)[0].kappa_CC, product(keep) @ product(eta), atol=1e-14)
    np.testing.assert_allclose(stage_of(keep, None)[0].kappa_CC, product(keep), atol=1e-14)


def test_before_is_the_step_before():
    """`before` gives the coefficients of the last step, and of W_0 where a document begins."""
    keep, eta = gates()
    documents = np.array([0, 0, 0, 1, 2, 2, 2, 2, 3])
    stage, seen = stage_of(keep, eta, documents)
    shifted = jax.device_get(jax.jit(before)(stage, seen))
    for t in range(STEPS):
        if t and documents[t] == documents[t - 1]:
            expected = stage.beta_C[t - 1], stage.rho_C[t - 1], stage.kappa_CC[t - 1]
        else:
            expected = 1.0, 0.0, np.zeros(STEPS)
        for got, want in zip((shifted.beta_C[t], shifted.rho_C[t], shifted.kappa_CC[t]), expected):
            np.testing.assert_array_equal(got, want)


def test_normalised_steps_add_up_to_one():
    """Why theta (1 - eta) / C is bounded: the rows of H times 1 - eta add up to 1 - eta_1 .. eta_t, those of kappa to
    C at most."""
    for seed in range(20):
        keep, eta = gates(seed)
        stage, _ = stage_of(keep, eta)
        np.testing.assert_allclose(stage.momentum_CC @ (1 - eta), 1 - np.cumprod(eta), atol=1e-14)
        assert np.all(stage.kappa_CC @ (1 - eta) <= np.arange(1, STEPS + 1))


def test_closed_gates_are_finite():
    """Gates that close in every step, in float32 too: nothing is divided by a product that vanished."""
    logits, seen = np.full((64,), -1e4, np.float32), np.tri(64, dtype=bool)

    @jax.jit
    def run(z):
        def loss(z):
            stage = two_stage(log_gate(z), log_gate(z), seen)
            return sum(map(jnp.sum, jax.tree.leaves(stage))), (log_gate(z), stage.kappa_CC)

        return jax.value_and_grad(loss, has_aux=True)(z)

    (value, (gate, kappa)), slope = jax.device_get(run(logits))
    assert gate[0] == LOG_FLOOR
    assert np.isfinite(value) and np.all(np.isfinite(slope))
    np.testing.assert_allclose(kappa, np.eye(64), atol=1e-12)
