"""The gated delta rule: chunks against the recurrence, in float64."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops.delta_rule import chunked_flops, delta_rule, invert_unit_triangular
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.mixers import flops

B, T, H, D, E = 2, 13, 2, 3, 5
DOCUMENTS = np.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3], [1] * 6 + [2] * 7], np.int32)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays(seed=0, length=T, channels=False):
    """q, k, v, log_decay, of channels if asked, beta and an incoming state; one decay is nearly 0."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)
    log_decay = -np.abs(normal(*(B, length, H, D)[: 4 if channels else 3]))
    log_decay[:, 4] = -40
    beta = 1 / (1 + np.exp(normal(B, length, H)))
    q, k, v = normal(B, length, H, D), normal(B, length, H, D), normal(B, length, H, E)
    return (q, k / np.linalg.norm(k, axis=-1, keepdims=True), v, log_decay, beta), normal(B, H, D, E)


def formula(q, k, v, log_decay, beta, documents, state):
    """The equation of the paper for one head of one sequence, in numpy, with its state [e, d]."""
    S, before, o = np.asarray(state).T, 0, []
    for t in range(len(q)):
        a = np.exp(log_decay[t]) * (documents[t] == before)
        S = (S * a) @ (np.eye(len(q[t])) - beta[t] * np.outer(k[t], k[t])) + beta[t] * np.outer(v[t], k[t])
        o.append(S @ q[t])
        before = documents[t]
    return np.stack(o), S.T


@pytest.mark.parametrize("channels", [False, True])
def test_definition_is_the_formula(channels):
    inputs, state = arrays(channels=channels)
    run = jax.jit(lambda *inputs: delta_rule(*inputs, documents_BT=DOCUMENTS, state_BHde=state, impl="definition"))
    o, end = map(np.asarray, run(*inputs))
    for b, h in itertools.product(range(B), range(H)):
        want, want_end = formula(*(x[b, :, h] for x in inputs), DOCUMENTS[b], state[b, h])
        np.testing.assert_allclose(o[b, :, h], want, atol=1e-12)
        np.testing.assert_allclose(end[b, h], want_end, atol=1e-12)


CHUNKS = [(chunk, packed, False) for chunk in (1, 4, 5, 64) for packed in (True, False)]


@tiers.often("5-True-True", "64-False-False")
@tiers.parametrize(
    "chunk, packed, channels",
    [*CHUNKS, (5, True, True), (64, False, True)],
    often=[(1, True, False), (5, True, False), (64, False, False), (5, True, True)],
)
def test_chunks_equal_the_recurrence(chunk, packed, channels):
    """Values and the gradients of all six arguments, also for chunks that do not divide the length."""
    inputs, state = arrays(channels=channels)
    documents = DOCUMENTS if packed else None

    def run(impl):
        def scalar(inputs, state):
            o, end = delta_rule(*inputs, documents_BT=documents, state_BHde=state, chunk=chunk, impl=impl)
            weigh = lambda x: jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape)))
            return weigh(o) + weigh(end), (o, end)

        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(inputs, state)

    for got, want in zip(jax.tree.leaves(run("chunked")), jax.tree.leaves(run("definition")), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-11)


@tiers.often("True")
@pytest.mark.parametrize("channels", [False, True])
def test_a_chunk_longer_than_one_base_block(channels):
    """Chunks of 20 and 40 positions: inverses, and pairs whose channels decay, joined from blocks twice."""
    inputs, state = arrays(length=40, channels=channels)
    rule = jax.jit(delta_rule, static_argnames=("chunk", "impl"))
    want = rule(*inputs, state_BHde=state, impl="definition")
    for chunk in (20, 40):
        for a, b in zip(rule(*inputs, state_BHde=state, chunk=chunk), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


@tiers.parametrize("size", [1, 7, 8, 9, 33], often=[1, 33])
def test_inverse_and_its_gradient(size):
    lower = np.tril(np.random.default_rng(0).standard_normal((3, size, size)), -1) / 2
    eye = np.eye(size)

    @jax.jit
    def run(lower):
        scalar = lambda inverse: (jnp.sum(jnp.cos(inverse)), inverse)
        return jax.grad(lambda x: scalar(invert_unit_triangular(jnp.tril(x, -1))), has_aux=True)(lower)

    gradient, inverse = map(np.asarray, run(lower))
    np.testing.assert_allclose(inverse @ (eye + lower), np.broadcast_to(eye, lower.shape), atol=1e-10)
    right = np.linalg.inv(eye + lower)
    turned = right.swapaxes(1, 2)
    np.testing.assert_allclose(gradient, np.tril(turned @ np.sin(right) @ turned, -1), rtol=1e-9, atol=1e-10)


def test_one_position_takes_no_chunk():
    """T = 1 is one step: the products of two vectors with the state, and no inverse."""
    (q, k, v, log_decay, beta), state = arrays()
    inputs = [x[:, :1] for x in (q, k, v, log_decay, beta)]
    run = lambda impl: delta_rule(*inputs, documents_BT=DOCUMENTS[:, :1], state_BHde=state, impl=impl)
    for a, b in zip(*jax.jit(lambda: (run("chunked"), run("definition")))(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)
    assert flops.count(lambda: run("chunked")) == B * H * chunked_flops(64, 1, D, E) == B * H * 4 * D * E


@pytest.mark.parametrize("chunk, length", [(64, 13), (5, 13), (40, 40), (16, 33)])
def test_declared_products(chunk, length):
    for channels in (False, True):
        inputs, state = arrays(length=length, channels=channels)
        counted = flops.count(lambda: delta_rule(*inputs, state_BHde=state, chunk=chunk))
        assert counted == B * H * chunked_flops(chunk, length, D, E, channels)


@tiers.often("False-0.002")
@pytest.mark.parametrize("channels, atol", [(False, 2e-3), (True, 1e-5)])
def test_strong_decay_and_long_documents_stay_finite(channels, atol):
    """In fp32, where quotients of decays would be 0 / 0: log decays of -80 and 0, side by side, over 200 positions. Of
    channels no sum is taken from another: nothing is lost."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, 200, 1, 8))
    k = np.float32(k / np.linalg.norm(k, axis=-1, keepdims=True))
    shape = (1, 200, 1, 8)[: 4 if channels else 3]
    log_decay = np.float32(np.where(rng.random(shape) < 0.5, -80.0, 0.0))
    beta = np.full((1, 200, 1), 0.9, np.float32)

    def scalar(k, log_decay, impl):
        o, _ = delta_rule(k, k, 2 * k, log_decay, beta, impl=impl)
        return jnp.sum(o * jnp.cos(jnp.arange(o.size).reshape(o.shape))), o

    run = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True), static_argnums=2)
    (_, o), gradients = run(k, log_decay, "chunked")
    (_, want), wanted = run(k, log_decay, "definition")
    for a, b in zip((o, *gradients), (want, *wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_what_does_not_fit_is_refused():
    (q, k, v, log_decay, beta), _ = arrays()
    with pytest.raises(UserError, match="do not fit"):
        delta_rule(q, k[..., :2], v, log_decay, beta)
    with pytest.raises(UserError, match="beta"):
        delta_rule(q, k, v, log_decay, beta[..., :1])
    with pytest.raises(UserError, match=r"log_decay \(2, 13, 2, 1\); expected .*\(2, 13, 2, 3\)"):
        delta_rule(q, k, v, log_decay[..., None], beta)
    with pytest.raises(UserError, match="chunk = 0"):
        delta_rule(q, k, v, log_decay, beta, chunk=0)
    with pytest.raises(UserError, match="unknown impl"):
        delta_rule(q, k, v, log_decay, beta, impl="fast")


@tiers.parametrize("heads", [4, 1], often=[1])
def test_it_runs_on_each_devices_part(heads):
    """Over a mesh: values and gradients of one device; heads that the mesh does not divide stay together."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape)
    k = normal(8, 5, heads, D)
    inputs = (normal(8, 5, heads, D), k / np.linalg.norm(k, axis=-1, keepdims=True), normal(8, 5, heads, E))
    gates = -np.abs(normal(8, 5, heads)), 1 / (1 + np.exp(normal(8, 5, heads)))
    documents = np.broadcast_to(np.asarray([1, 1, 2, 2, 2]), (8, 5))

    def scalar(*xs):
        o, state = delta_rule(*xs, documents_BT=documents, chunk=2)
        return jnp.sum(jnp.sin(o) * jnp.arange(5)[:, None, None]) + jnp.sum(jnp.sin(state))

    gradient = jax.value_and_grad(scalar, argnums=(0, 1, 2, 3, 4))
    split = jax.jit(partition.traced(gradient, mesh, sharding.ACTIVATION_RULES))
    got, want = split(*inputs, *gates), jax.jit(gradient)(*inputs, *gates)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)
