"""The recurrence in levels: chunks, the binary counter and the tree's parts written out, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops.linear_recurrence import linear_recurrence
from attnlab.ops.log_linear import flops_per_token, log_linear
from tests.mixers import flops

B, T, H, D, E = 2, 21, 2, 3, 4
# The first row goes on with a document of which 5 positions were before.
DOCUMENTS = np.array([[0] * 9 + [1] * 12, [1] * 20 + [2]], np.int32)
OFFSETS = np.array([[*range(5, 14), *range(12)], [*range(20), 0]], np.int32)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays(length=T, levels=7):
    """q, k, u, log_decay and weights."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((B, length, H, *shape))
    return normal(D), normal(D), normal(E), -np.abs(normal()), normal(levels)


def parts(t, levels):
    """Positions of each level seen from t, from the lowest bit up; what the last does not reach is in it."""
    found, end = {0: [t]}, t
    for bit in range(t.bit_length()):
        if t >> bit & 1:
            level = min(bit + 1, levels - 1)
            found[level] = [*range(end - 2**bit, end), *found.get(level, [])]
            end -= 2**bit
    assert end == 0
    return found


def by_hand(q, k, u, log_decay, weights):
    """One document from its beginning, level by level, in NumPy."""
    o = np.zeros(u.shape)
    for b, t, h in np.ndindex(*u.shape[:3]):
        for level, positions in parts(t, weights.shape[3]).items():
            for s in positions:
                decay = np.exp(log_decay[b, s + 1 : t + 1, h].sum())
                o[b, t, h] += weights[b, t, h, level] * decay * (q[b, t, h] @ k[b, s, h]) * u[b, s, h]
    return o


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(chunk, impl, inputs, documents, offsets, state):
    return log_linear(*inputs, documents_BT=documents, offsets_BT=offsets, state_BHLde=state, chunk=chunk, impl=impl)


def test_levels_tile_what_came_before():
    """Every earlier position is in one level, which has 2^b or none; a pair's highest differing bit says which."""
    for t in range(70):
        found = parts(t, 10)
        assert sorted(sum(found.values(), [])) == list(range(t + 1))
        for level, positions in found.items():
            assert level == 0 or len(positions) == 2 ** (level - 1)
            assert all((t ^ s).bit_length() == level for s in positions)


@pytest.mark.parametrize("levels", [7, 3])
def test_is_the_tree_written_out(levels):
    """The counter and the chunks; with few levels the last takes what is left."""
    inputs = arrays(levels=levels)
    want = by_hand(*inputs)
    for chunk, impl in ((1, "definition"), (5, "chunked")):
        np.testing.assert_allclose(run(chunk, impl, inputs, None, None, None)[0], want, atol=1e-12)


def test_chunks_equal_the_counter():
    """Values, states and the gradients of all inputs, in packed rows whose chunks begin anywhere, with a state."""
    inputs, state = arrays(), np.random.default_rng(1).standard_normal((B, H, 6, D, E))
    state[:, :, 1], state[:, :, 3:] = 0, 0  # 5 positions before: levels 1 and 3

    @functools.partial(jax.jit, static_argnums=0)
    def both(impl, inputs, state):
        def scalar(inputs, state):
            out = run(8, impl, inputs, jnp.asarray(DOCUMENTS), jnp.asarray(OFFSETS), state)
            return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in out), out

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(inputs, state)

    found, expected = (jax.device_get(both(impl, inputs, state)) for impl in ("chunked", "definition"))
    for got, want in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-11)
    of_empty = np.asarray([1, 3, 4, 5])  # levels that the counter leaves empty are never read
    for got, want in zip(jax.tree.leaves(found[1][0]), jax.tree.leaves(expected[1][0]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-11)
    held = np.delete(np.arange(6), of_empty)
    np.testing.assert_allclose(found[1][1][:, :, held], expected[1][1][:, :, held], atol=1e-11)


def test_equal_weights_are_one_memory():
    """All levels weighed by 1: the linear recurrence. Only level 0: `(q . k) u` of the position."""
    q, k, u, log_decay, weights = arrays()
    one = np.ones_like(weights)
    want, after = jax.jit(linear_recurrence)(q, k, u, log_decay=log_decay)
    o, state = run(8, "chunked", (q, k, u, log_decay, one), None, None, None)
    np.testing.assert_allclose(o, want, atol=1e-12)
    np.testing.assert_allclose(np.asarray(state).sum(2), after, atol=1e-12)
    own = one * (np.arange(one.shape[-1]) == 0)
    o, _ = run(8, "chunked", (q, k, u, log_decay, own), None, None, None)
    np.testing.assert_allclose(o, np.sum(q * k, -1, keepdims=True) * u, atol=1e-12)


@pytest.mark.parametrize("chunk, levels, length", [(64, 7, T), (5, 7, T), (8, 3, T), (8, 3, 1)])
def test_declared_products(chunk, levels, length):
    counted = flops.count(lambda: log_linear(*arrays(length, levels), chunk=chunk))
    assert counted == pytest.approx(B * H * length * flops_per_token(length, chunk, D, E, levels))


def test_shapes_that_do_not_fit():
    q, k, u, log_decay, weights = arrays()
    with pytest.raises(UserError, match=r"weights \(2, 21, 2, 1\).*2 or more"):
        log_linear(q, k, u, log_decay, weights[..., :1])
