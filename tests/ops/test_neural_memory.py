"""The identities of neural memory (Behrouz et al. 2025), in float64."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops import chunk_steps
from attnlab.ops.documents import document_index, positions_in_documents
from attnlab.ops.memory_frame import ACTIVATIONS, MemorySpec, forward, gelu, gelu_slope, gradients, initial_state
from attnlab.ops.neural_memory import neural_memory
from tests import tiers

B, T, H, d = 2, 13, 2, 3
LINEAR, MLP = MemorySpec(4, False, (1.0,)), MemorySpec(4, True, (0.5, 0.2))
SEGMENTS = np.array([[1, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4], [5] * 9 + [0] * 2 + [6] * 2], np.int32)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def data(seed=0, length=T):
    """q, k, v, log_keep, log_eta, theta."""
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.standard_normal((B, length, H, *s))
    gate = lambda: -np.log1p(np.exp(normal() - 1))
    return unit(normal(d)), unit(normal(d)), normal(d), gate(), gate(), 0.3 / (1 + np.exp(normal()))


def layers(*widths, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((H, i, o)) for i, o in zip(widths[:-1], widths[1:]))


@functools.partial(jax.jit, static_argnames=("spec", "impl"))
def memory(weights, inputs, spec, documents=None, state=None, impl="chunked"):
    initial = initial_state(weights, 1, inputs[4] is not None)
    return neural_memory(*inputs, initial, spec, documents_BT=documents, state=state, impl=impl)


def close(a, b, atol=1e-11):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol * max(1.0, np.abs(y).max(initial=0)))


def without(inputs, *, keep=False, eta=False):
    q, k, v, log_keep, log_eta, theta = inputs
    return q, k, v, None if keep else log_keep, None if eta else log_eta, theta


@tiers.parametrize("chunk", [1, 4, T, 40], often=[4])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_are_the_sequential_recurrence(chunk, packed):
    """The closed form of a chunk equals one step after another with `jax.grad`, for chunks that do not divide T too;
    states and the values of packed documents included."""
    documents = document_index(jnp.asarray(SEGMENTS)) if packed else None
    spec = dataclasses.replace(LINEAR, chunk=chunk)
    close(*(memory(layers(d, d), data(), spec, documents, impl=impl) for impl in ("chunked", "definition")))


@tiers.exhaustive
@pytest.mark.parametrize("spec", [
    dataclasses.replace(MLP, grad_at="decayed"),
    dataclasses.replace(MLP, read_after_write=False, chunk=3),
    MemorySpec(5, False, (0.3, 0.1, 0.1, 0.1)),
    dataclasses.replace(MLP, rates=(0.5, 0.2, 0.3), activation="gelu", norm_scale=True, grad_at="decayed"),
])  # fmt: skip
def test_networks_and_their_gradients_are_those_of_the_recurrence(spec):
    """Deeper memories, and the gradients of outputs and final state for all that enters."""
    weights = layers(d, *[6] * (len(spec.rates) - 1 - spec.norm_scale), d)
    if spec.norm_scale:
        weights += (jnp.asarray(np.random.default_rng(5).standard_normal((H, 1, d))),)
    documents = document_index(jnp.asarray(SEGMENTS))

    def scalar(weights, inputs, impl):
        y, state = memory(weights, inputs, spec, documents, impl=impl)
        waves = lambda leaf: jnp.sum(jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)) * leaf)
        return sum(waves(leaf) for leaf in [y, *state.weights, *state.momentum])

    both = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1)), static_argnums=2)
    results = [both(weights, data(), impl) for impl in ("chunked", "definition")]
    close(*results, atol=1e-9)


@tiers.exhaustive
def test_chunk_of_one_is_the_delta_rule():
    """Linear, chunk 1, no momentum: without forgetting DeltaNet; with it Gated DeltaNet, when the gradient is taken at
    the decayed weights, and only then."""
    inputs = data()
    q, k, v, log_keep, _, theta = (np.asarray(x) for x in inputs)
    weights = layers(d, d)

    def delta_rule(keep):
        w = np.broadcast_to(weights[0], (B, H, d, d)).copy()
        out = []
        for t in range(T):
            w *= keep[:, t, :, None, None]
            error = v[:, t] - np.einsum("bhio,bhi->bho", w, k[:, t])
            w += np.einsum("bh,bhi,bho->bhio", theta[:, t], k[:, t], error)
            out.append(np.einsum("bhio,bhi->bho", w, q[:, t]))
        return np.stack(out, axis=1)

    one = dataclasses.replace(LINEAR, chunk=1)
    close(memory(weights, without(inputs, keep=True, eta=True), one)[0], delta_rule(np.ones_like(theta)))
    gated = delta_rule(np.exp(log_keep))
    decayed = dataclasses.replace(one, grad_at="decayed")
    close(memory(weights, without(inputs, eta=True), decayed)[0], gated)
    assert np.abs(memory(weights, without(inputs, eta=True), one)[0] - gated).max() > 1e-2


@tiers.exhaustive
def test_one_chunk_is_linear_attention():
    """Linear, chunk = T, W_0 = 0: `y_t = sum_i theta_i (q_t . k_i) v_i`, decayed by the forgetting between them."""
    inputs = data()
    q, k, v, log_keep, _, theta = inputs
    weights = (jnp.zeros((H, d, d)),)
    spec = dataclasses.replace(LINEAR, chunk=T)
    total = jnp.cumsum(log_keep, axis=1)
    for forgets in (False, True):
        decay = jnp.exp(total[:, :, None] - total[:, None]) if forgets else 1.0
        scores = jnp.einsum("bthd,bshd->btsh", q, k) * theta[:, None] * jnp.tri(T)[:, :, None] * decay
        expected = jnp.einsum("btsh,bshd->bthd", scores, v)
        close(memory(weights, without(inputs, keep=not forgets, eta=True), spec)[0], expected)


@tiers.exhaustive
def test_no_step_leaves_the_initial_memory():
    """theta = 0: `M_{beta W_0}(q)`, the initial weights times what forgetting leaves."""
    q, k, v, log_keep, log_eta, theta = data()
    weights = layers(d, 6, d)
    y, _ = memory(weights, (q, k, v, log_keep, log_eta, 0 * theta), MLP)
    beta = jnp.exp(jnp.cumsum(log_keep, axis=1))[..., None, None]
    close(y, forward(MLP, tuple(beta * w for w in weights), q[..., None, :])[..., 0, :])


def test_forgetting_everything_leaves_the_last_surprise():
    """alpha = 1: W_t = S_t."""
    q, k, v, log_keep, log_eta, theta = data()
    _, state = memory(layers(d, d), (q, k, v, np.full_like(log_keep, -60.0), log_eta, theta), LINEAR)
    close(state.weights, state.momentum, 1e-12)


def test_limits_of_the_momentum():
    """eta = 0 is no momentum; with eta = 1 and one chunk step i counts t - i + 1 times."""
    inputs = q, k, v, log_keep, log_eta, theta = data()
    weights = layers(d, d)
    none = memory(weights, (q, k, v, log_keep, np.full_like(log_eta, -60.0), theta), LINEAR)[0]
    close(none, memory(weights, without(inputs, eta=True), LINEAR)[0])
    spec = dataclasses.replace(LINEAR, chunk=T)
    y, _ = memory((np.zeros((H, d, d)),), (q, k, v, None, 0 * log_eta, theta), spec)
    times = np.maximum(np.arange(T)[:, None] - np.arange(T) + 1, 0)[:, :, None]
    close(y, np.einsum("btsh,bshd->bthd", np.einsum("bthd,bshd->btsh", q, k) * theta[:, None] * times, v))


@tiers.exhaustive
def test_dual_form_is_explicit_weights_per_position():
    """The MLP read through a chunk's steps equals M with every W_t built from the closed form's gradients."""
    q, k, v, log_keep, log_eta, theta = inputs = data()
    weights = layers(d, 6, d)
    spec = dataclasses.replace(MLP, chunk=T)
    y, _ = memory(weights, inputs, spec)
    inner, deltas = gradients(spec, weights, k.swapaxes(1, 2), v.swapaxes(1, 2))
    w, s = list(weights), [0.0] * 2
    wide = lambda x, t: x[:, t, :, None, None]
    read = jax.jit(lambda w, q: forward(spec, w, q))
    for t in range(T):
        for layer, rate in enumerate(spec.rates):
            slope = jnp.einsum("bhi,bho->bhio", inner[layer][:, :, t], deltas[layer][:, :, t])
            s[layer] = wide(jnp.exp(log_eta), t) * s[layer] - rate * wide(theta, t) * slope
            w[layer] = wide(jnp.exp(log_keep), t) * w[layer] + s[layer]
        close(y[:, t], read(tuple(w), q[:, t, :, None])[..., 0, :])


@tiers.often("options2-2")
@tiers.parametrize("depth", [1, 2, 4], often=[2])
@pytest.mark.parametrize("options", [
    {"residual_norm": False},
    {"residual_norm": True},
    {"residual_norm": True, "activation": "gelu", "norm_scale": True, "epsilon": 0.1},
])  # fmt: skip
def test_hand_written_gradient_is_that_of_jax(depth, options):
    """a^T delta of every layer, and of the norm's scale, is `jax.grad` of the loss, also at scaled weights."""
    spec = dataclasses.replace(LINEAR, **options)
    rng = np.random.default_rng(0)
    widths = [d, *[5] * (depth - 1), d]
    shapes = [*zip(widths[:-1], widths[1:]), *[(1, d)] * spec.norm_scale]
    weights = tuple(rng.standard_normal(s) for s in shapes)
    k, v, scale = (rng.standard_normal(s) for s in ((4, d), (4, d), (4,)))

    @jax.jit
    def both(k, v, scale):
        loss = lambda w, k, v: 0.5 * jnp.sum((forward(spec, w, k) - v) ** 2)
        of_one = lambda k, v, scale: jax.grad(loss)(tuple(scale * w for w in weights), k, v)
        return gradients(spec, weights, k, v, scale), jax.vmap(of_one)(k, v, scale)

    (inner, deltas), expected = jax.tree.map(np.asarray, both(k, v, scale))
    close([a[:, :, None] * b[:, None] for a, b in zip(inner, deltas, strict=True)], list(expected))


def test_gelu_and_its_slope():
    z = np.linspace(-5, 5, 41)
    for form in ACTIVATIONS:
        ours = lambda z: (gelu(z, form), gelu_slope(z, form))
        jaxs = lambda z: jax.vmap(jax.value_and_grad(lambda z: jax.nn.gelu(z, approximate=form == "gelu_tanh")))(z)
        close(*jax.jit(lambda z: (ours(z), jaxs(z)))(z))


def test_memory_written_out():
    """M(x) = x + (1 + g) LN(W2 gelu(W1 x)) in NumPy, for the exact GELU and an epsilon that counts."""
    spec = dataclasses.replace(MLP, activation="gelu", norm_scale=True, epsilon=0.5)
    rng = np.random.default_rng(4)
    first, second, g, x = (rng.standard_normal(s) for s in ((d, 5), (5, d), (1, d), (7, d)))
    hidden = x @ first
    z = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) @ second
    normed = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 0.5)
    close(jax.jit(lambda *w: forward(spec, w, x))(first, second, g), x + (1 + g) * normed)


@tiers.exhaustive
def test_scale_that_does_not_learn_is_none():
    """g = 0 at a rate of 0 is the norm without a scale; at another rate it is not."""
    weights = layers(d, 6, d)
    plain, _ = memory(weights, data(), MLP)
    scaled = [
        memory((*weights, jnp.zeros((H, 1, d))), data(), dataclasses.replace(MLP, norm_scale=True, rates=rates))[0]
        for rates in ((*MLP.rates, 0.0), (*MLP.rates, 0.3))
    ]
    close(scaled[0], plain)
    assert np.abs(scaled[1] - plain).max() > 1e-3


@pytest.mark.parametrize("read_after_write", [True, False])
def test_a_pair_is_stored_exactly(read_after_write):
    """theta = 1, chunk 1, a key of length 1: after one write W k = v, at the position itself or at the next."""
    _, k, v, *_, theta = data()
    spec = dataclasses.replace(LINEAR, chunk=1, read_after_write=read_after_write)
    k, v = (np.repeat(x[:, :1], T, axis=1) for x in (k, v))
    y = np.asarray(memory(layers(d, d), (k, k, v, None, None, np.ones_like(theta)), spec)[0])
    first = 0 if read_after_write else 1
    close(y[:, first:], v[:, first:])
    assert first == 0 or np.abs(y[:, 0] - v[:, 0]).max() > 1e-2


@tiers.exhaustive
@tiers.parametrize("cut", [[1] * T, [3, 1, 7, 2]], often=[[3, 1, 7, 2]])
def test_steps_are_chunks(cut):
    """Any cutting of packed rows with the state handed on gives the outputs and the state of the whole; sizes of the
    state stay."""
    weights, inputs, spec = layers(d, d), data(), dataclasses.replace(LINEAR, grad_at="decayed")
    whole, end = memory(weights, inputs, spec, document_index(jnp.asarray(SEGMENTS)))
    state, before, parts, first = None, None, [], 0
    for n in cut:
        piece = slice(first, first + n)
        segments = jnp.asarray(SEGMENTS[:, piece])
        documents = document_index(segments, before)
        y, state = memory(weights, tuple(x[:, piece] for x in inputs), spec, documents, state)
        parts.append(y)
        before, first = segments[:, -1], first + n
    close(jnp.concatenate(parts, axis=1), whole)
    close(state, end)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, initial_state(weights, B, True))


def test_state_without_documents_is_refused():
    inputs = data()
    with pytest.raises(UserError, match="which positions continue"):
        memory(layers(d, d), inputs, LINEAR, None, initial_state(layers(d, d), B, True))


def repeated(theta, chunk=16, steps=512):
    """Error of a linear memory after each of so many writes of one pair; eta = 0.9."""
    inputs = data(length=1)
    _, k, v, _, log_eta, _ = (np.repeat(x, steps, axis=1) for x in inputs)
    inputs = k, k, v, None, np.full_like(log_eta, np.log(0.9)), np.full_like(log_eta, theta)
    y, _ = memory(layers(d, d), inputs, dataclasses.replace(LINEAR, chunk=chunk))
    return np.abs(y - v).max((0, 2, 3))


def test_the_bound_keeps_stale_gradients_stable():
    """512 writes of one pair of unit length with eta = 0.9 and chunk 16: steps of (1 - eta) / chunk settle, of 1 or of
    1 / chunk alone (their sum over a chunk is 5.4) grow without limit."""
    bounded = repeated(0.1 / 16)
    assert bounded.max() < 3 * bounded[0] and bounded[-1] < 1e-3 * bounded[0]
    assert repeated(1 / 16)[-1] > 1e3
    assert not repeated(1.0)[-1] < 1e30


# --- the scan over chunk steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
def test_chunk_steps_take_every_position_once(chunk):
    """On random packings every position is in one step, a step needs one state, and the bound on steps holds."""
    rng = np.random.default_rng(chunk)

    @jax.jit
    def plan(documents, seen):
        position = positions_in_documents(documents, seen)
        return position, *chunk_steps.plan(documents, position, chunk)

    for share in (0.02, 0.3, 0.9):
        starts = rng.random((64, 37)) < share
        documents = np.cumsum(starts, axis=1).astype(np.int32)
        position, start, taken = map(np.asarray, plan(documents, rng.integers(1, 9, 64).astype(np.int32)))
        assert np.all(taken.sum(0) == 37) and np.all(start[1:] == (start + taken)[:-1])
        for n, b in zip(*np.nonzero(taken)):
            turn = slice(start[n, b], start[n, b] + taken[n, b])
            phase = position[b, turn]
            if position[b, start[n, b]] == 0:  # documents in their first chunks
                assert np.all(phase < chunk)
            else:  # the rest of one chunk of one document
                assert len(set(documents[b, turn])) == 1 and len(set(phase // chunk)) == 1
