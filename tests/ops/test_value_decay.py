"""The recurrence whose values' channels decay: chunks against the recurrence, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops.value_decay import flops_per_token, value_decay
from tests import tiers
from tests.mixers import flops

B, T, H, D, M = 2, 37, 2, 3, 5
DOCUMENTS = np.array([[0] * 10 + [1] * 12 + [2] * 15, [1] * 36 + [2]], np.int32)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays():
    """q, k, u, log_decay, one of them nearly -inf, and a state."""
    q, k = np.random.default_rng(0).standard_normal((2, B, T, H, D))
    log_decay = -np.abs(np.random.default_rng(4).standard_normal((B, T, H, M)))
    log_decay[:, 20, :, 1] = -800
    u = np.random.default_rng(1).standard_normal((B, T, H, M))
    return q, k, u, log_decay, u[:, 0, :, None, :] * q[:, 0, ..., None]


def by_hand(q, k, u, log_decay, state, documents):
    """The recurrence in NumPy."""
    o, after = np.zeros(u.shape), np.zeros(state.shape)
    for b in range(B):
        S, document = state[b], 0
        for t in range(T):
            if documents is not None and documents[b, t] != document:
                S, document = np.zeros_like(S), documents[b, t]
            S = S * np.exp(log_decay[b, t])[:, None, :] + k[b, t][..., None] * u[b, t][:, None, :]
            o[b, t] = np.einsum("hd,hdm->hm", q[b, t], S)
        after[b] = S
    return o, after


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(chunk, impl, inputs, documents):
    """Values, and gradients of all five arguments."""

    def scalar(q, k, u, log_decay, state):
        out = value_decay(q, k, u, log_decay, documents_BT=documents, state_BHdm=state, chunk=chunk, impl=impl)
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in out), out

    return jax.value_and_grad(scalar, argnums=(0, 1, 2, 3, 4), has_aux=True)(*inputs)


@tiers.often("True")
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_equal_the_recurrence(packed):
    """The definition is the recurrence in NumPy; chunks that are sub-blocks, joined ones and the whole are it, too."""
    inputs, documents = arrays(), DOCUMENTS if packed else None
    expected = both(1, "definition", inputs, documents)
    for got, want in zip(expected[0][1], by_hand(*inputs, documents), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    for chunk in (5, 32) if packed else (64,):
        for got, want in zip(jax.tree.leaves(both(chunk, "chunked", inputs, documents)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(got, want, atol=1e-11)


@pytest.mark.parametrize("chunk, length", [(64, 37), (5, 13), (32, 33), (16, 1)])
def test_declared_products(chunk, length):
    q, k, u, log_decay, _ = (x[:, :length] for x in arrays())
    counted = flops.count(lambda: value_decay(q, k, u, log_decay, chunk=chunk))
    assert counted == pytest.approx(B * H * length * flops_per_token(length, chunk, D, M))


def test_shapes_that_do_not_fit():
    q, k, u, log_decay, _ = arrays()
    with pytest.raises(UserError, match=r"log_decay \(2, 37, 2\) do not fit"):
        value_decay(q, k, u, log_decay[..., 0])
    with pytest.raises(UserError, match="chunk=0"):
        value_decay(q, k, u, log_decay, chunk=0)
