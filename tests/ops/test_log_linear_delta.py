"""The gated delta rule in levels: chunks, the binary counter and products of transitions written out, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.log_linear import flops_per_token, log_linear
from tests.mixers import flops
from tests.ops import test_log_linear as added
from tests.ops.test_log_linear import DOCUMENTS, OFFSETS, B, D, E, H, T, parts


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays(length=T, levels=7):
    """q, k, u, log_decay, weights and beta, keys of length 1."""
    q, k, u, log_decay, weights = added.arrays(length, levels)
    beta = np.random.default_rng(2).random((B, length, H))
    return q, k / np.linalg.norm(k, axis=-1, keepdims=True), u, 0.3 * log_decay, weights, beta


def by_hand(q, k, u, log_decay, weights, beta):
    """One document from its beginning, every pair by the product of the transitions between, in NumPy."""
    o = np.zeros(u.shape)
    for b, t, h in np.ndindex(*u.shape[:3]):
        level_of = {s: level for level, positions in parts(t, weights.shape[3]).items() for s in positions}
        reader = q[b, t, h]  # q_t through the transitions after s
        for s in range(t, -1, -1):
            o[b, t, h] += weights[b, t, h, level_of[s]] * beta[b, s, h] * (reader @ k[b, s, h]) * u[b, s, h]
            erase = np.eye(D) - beta[b, s, h] * np.outer(k[b, s, h], k[b, s, h])
            reader = np.exp(log_decay[b, s, h]) * erase @ reader
    return o


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(chunk, impl, inputs, documents=None, offsets=None, state=None):
    *arrays, beta = inputs
    places = {"documents_BT": documents, "offsets_BT": offsets, "state_BHLde": state}
    return log_linear(*arrays, beta_BTH=beta, **places, chunk=chunk, impl=impl)


@pytest.mark.parametrize("levels", [7, 3])
def test_is_the_transitions_written_out(levels):
    """The counter, and chunks of a power of two and of none; with few levels the last takes what is left."""
    inputs = arrays(levels=levels)
    want = by_hand(*inputs)
    for chunk, impl in ((1, "definition"), (5, "chunked"), (8, "chunked")):
        np.testing.assert_allclose(run(chunk, impl, inputs)[0], want, atol=1e-12)


@pytest.mark.parametrize("chunk", [8, 5])
def test_chunks_equal_the_counter(chunk):
    """Values, states and the gradients of all inputs, in packed rows whose chunks begin anywhere, with a state."""
    inputs, state = arrays(), np.random.default_rng(1).standard_normal((B, H, 6, D, E))
    state[:, :, 1], state[:, :, 3:] = 0, 0  # 5 positions before: levels 1 and 3

    @functools.partial(jax.jit, static_argnums=0)
    def both(impl, inputs, state):
        def scalar(inputs, state):
            out = run(chunk, impl, inputs, jnp.asarray(DOCUMENTS), jnp.asarray(OFFSETS), state)
            return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in out), out

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(inputs, state)

    (found, (of_inputs, of_state)), (expected, (want_of_inputs, want_of_state)) = (
        jax.device_get(both(impl, inputs, state)) for impl in ("chunked", "definition")
    )
    held = lambda of_state: of_state[:, :, [0, 2]]  # levels that the counter leaves empty are never read
    got, want = (found, of_inputs, held(of_state)), (expected, want_of_inputs, held(want_of_state))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_documents_are_what_they_are_alone(impl):
    """A packed row's second document equals it in a row of its own, wherever chunks begin."""
    inputs = arrays()
    o, _ = run(8, impl, inputs, DOCUMENTS, OFFSETS)
    alone, _ = run(8, impl, [x[:, 9:] for x in inputs])
    np.testing.assert_allclose(o[0, 9:], alone[0], atol=1e-12)


def test_streams_cut_anywhere():
    """Pieces of odd lengths, one position too, with the state handed on: the whole, and its state."""
    inputs = arrays()
    whole, after = run(8, "definition", inputs)
    state, first, pieces = jnp.zeros((B, H, 6, D, E)), 0, []
    for n in (3, 1, 7, 5, 1, 4):
        offsets = np.broadcast_to(np.arange(first, first + n, dtype=np.int32), (B, n))
        o, state = run(4, "chunked", [x[:, first : first + n] for x in inputs], None, offsets, state)
        pieces.append(o)
        first += n
    assert first == T
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-12)
    np.testing.assert_allclose(state, after, atol=1e-12)


@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_equal_weights_are_the_gated_delta_rule(impl):
    """All levels weighed by 1: one memory, to which the levels' states add up. Only level 0: `beta (q . k) u`."""
    q, k, u, log_decay, weights, beta = arrays()
    one = np.ones_like(weights)
    want, after = jax.jit(delta_rule)(q, k, u, log_decay, beta)
    o, state = run(8, impl, (q, k, u, log_decay, one, beta))
    np.testing.assert_allclose(o, want, atol=1e-12)
    np.testing.assert_allclose(np.asarray(state).sum(2), after, atol=1e-12)
    own = one * (np.arange(one.shape[-1]) == 0)
    o, _ = run(8, impl, (q, k, u, log_decay, own, beta))
    np.testing.assert_allclose(o, beta[..., None] * np.sum(q * k, -1, keepdims=True) * u, atol=1e-12)


@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_orthogonal_keys_take_nothing_out(impl):
    """Where no key meets another, levels only decay: the recurrence in levels, of what is written."""
    q, _, u, log_decay, weights, beta = (x[:, :D] for x in arrays())
    k = np.broadcast_to(np.eye(D)[:, None], (B, D, H, D))
    o, state = run(2, impl, (q, k, u, log_decay, weights, beta))
    want, after = log_linear(q, k, beta[..., None] * u, log_decay, weights, impl="definition")
    np.testing.assert_allclose(o, want, atol=1e-13)
    np.testing.assert_allclose(state, after, atol=1e-13)


@pytest.mark.parametrize("chunk, levels, length", [(64, 7, T), (5, 7, T), (8, 3, T), (8, 3, 1)])
def test_declared_products(chunk, levels, length):
    *inputs, beta = arrays(length, levels)
    counted = flops.count(lambda: log_linear(*inputs, beta_BTH=beta, chunk=chunk))
    assert counted == pytest.approx(B * H * length * flops_per_token(length, chunk, D, E, levels, corrected=True))


def test_strengths_that_do_not_fit():
    *inputs, beta = arrays()
    with pytest.raises(UserError, match=r"beta \(2, 21, 1\).*log_decay and beta \[B, T, H\]"):
        log_linear(*inputs, beta_BTH=beta[..., :1])
