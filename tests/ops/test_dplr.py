"""The recurrence of transitions that are diagonal plus low rank: chunks against the recurrence, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.dplr import chunked_flops, dplr
from attnlab.ops.linear_recurrence import linear_recurrence
from tests import tiers
from tests.mixers import flops

B, T, H, D, E = 2, 23, 2, 3, 5
DOCUMENTS = np.array([[0] * 6 + [1] * 9 + [2] * 8, [1] * 22 + [2]], np.int32)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays():
    """r, k, v, log_decay, one of them nearly -inf, a, b and a state."""
    rng = np.random.default_rng(0)
    r, k, log_decay, a, b = rng.standard_normal((5, B, T, H, D))
    log_decay = -np.abs(log_decay)
    log_decay[:, 11, :, 1] = -800.0
    v, state = rng.standard_normal((B, T, H, E)), rng.standard_normal((B, H, D, E))
    return tuple(map(jnp.asarray, (r, k, v, log_decay, a / 2, b / 2, state)))


def by_hand(r, k, v, log_decay, a, b, state, documents):
    """The equation with its transition as a matrix, in NumPy."""
    o, after = np.zeros(v.shape), np.zeros(state.shape)
    for row in range(B):
        for h in range(H):
            S, document = state[row, h], 0
            for t in range(T):
                if documents is not None and documents[row, t] != document:
                    S, document = np.zeros_like(S), documents[row, t]
                at = row, t, h
                S = (np.diag(np.exp(log_decay[at])) + np.outer(b[at], a[at])) @ S + np.outer(k[at], v[at])
                o[at] = S.T @ r[at]
            after[row, h] = S
    return o, after


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(chunk, impl, inputs, documents):
    """Values, and gradients of all seven arguments."""

    def scalar(*inputs):
        out = dplr(*inputs[:-1], documents_BT=documents, state_BHde=inputs[-1], chunk=chunk, impl=impl)
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in out), out

    return jax.value_and_grad(scalar, argnums=tuple(range(7)), has_aux=True)(*inputs)


@tiers.often("True")
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_equal_the_recurrence(packed):
    """The definition is the equation in NumPy; chunks that divide nothing, and the whole as one, are it, too."""
    inputs, documents = arrays(), jnp.asarray(DOCUMENTS) if packed else None
    expected = both(1, "definition", inputs, documents)
    for got, want in zip(expected[0][1], by_hand(*map(np.asarray, inputs), DOCUMENTS if packed else None), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-11)
    for got, want in zip(
        jax.tree.leaves(both(5 if packed else 64, "chunked", inputs, documents)), jax.tree.leaves(expected)
    ):
        np.testing.assert_allclose(got, want, atol=1e-10 * max(1, np.abs(want).max()))


@tiers.exhaustive
def test_limits():
    """a = 0: a decay for each channel alone. g = 0, a = -k, b = beta k: the delta rule."""
    r, k, v, log_decay, a, b, state = arrays()
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.nn.sigmoid(a[..., 0])
    zero = jnp.zeros_like(a)

    @jax.jit
    def pairs():
        run = functools.partial(dplr, state_BHde=state, chunk=8)
        return (
            (run(r, k, v, log_decay, zero, b), linear_recurrence(r, k, v, log_decay=log_decay, state_BHde=state)),
            (run(r, beta[..., None] * k, v, zero, -k, beta[..., None] * k),
             delta_rule(r, k, v, jnp.zeros_like(beta), beta, state_BHde=state)),
        )  # fmt: skip

    for pair in pairs():
        for got, want in zip(*pair, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("chunk, length", [(64, 23), (5, 13), (1, 3), (16, 1)])
def test_declared_products(chunk, length):
    inputs = [x[:, :length] for x in arrays()[:6]]
    assert flops.count(lambda: dplr(*inputs, chunk=chunk)) == B * H * chunked_flops(chunk, length, D, E)


def test_shapes_that_do_not_fit():
    inputs = arrays()[:6]
    with pytest.raises(UserError, match=r"\(2, 23, 2, 3\) and v \(2, 23, 2\) do not fit"):
        dplr(*inputs[:2], inputs[2][..., 0], *inputs[3:])
    with pytest.raises(UserError, match="chunk=0"):
        dplr(*inputs, chunk=0)


def test_single_precision_is_near_double():
    """In chunks, with gradients: on CPUs XLA of jax 0.10 writes beyond the arrays, where it is let (`runtime`)."""
    inputs, documents = arrays(), jnp.asarray(DOCUMENTS)
    single = tuple(x.astype(jnp.float32) for x in inputs)
    exact, found = (jax.tree.leaves(both(4, "chunked", x, documents)) for x in (inputs, single))
    for ours, theirs in zip(found, exact, strict=True):
        assert np.max(np.abs(ours - theirs)) < 1e-5 * np.max(np.abs(theirs))
