"""Agent attention's ops against their definition, in float64: pooling, documents, chunks, streams, extreme logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops import agent_attention as ops
from attnlab.ops import agent_causal as causal
from attnlab.ops import agent_refreshed
from attnlab.ops.documents import document_index
from tests import tiers

SEGMENTS = np.array([[1] * 3 + [2] * 13 + [0] * 2 + [4] * 5, [0] * 2 + [3] * 21], np.int32)
T = SEGMENTS.shape[1]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def inputs(length=T, heads=2, width=3, value_width=4, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, heads, width)] * 2 + [(2, length, heads, value_width)]
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    return scale * q, scale * k, v


def agents_of(m, heads=2, width=3):
    return np.random.default_rng(9).standard_normal((heads, m, width))


@functools.partial(jax.jit, static_argnums=5)
def causal_definition(q, k, v, agents, documents, chunk=None):
    documents = jnp.zeros(q.shape[:2], jnp.int32) if documents is None else documents
    t = jnp.arange(q.shape[1])
    visible = (documents[:, :, None] == documents[:, None]) & (t[:, None] >= t)
    own = (
        agents[None, None]
        if chunk is None
        else agent_refreshed.definition_refreshed_agents(q, agents, documents, chunk)
    )
    return ops.definition(q, k, v, own, visible)


def value_and_gradients(f, *args):
    """Jitted: f(*args) and the gradients of a weighted sum of it."""

    def loss(*args):
        y = f(*args)
        return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(args))), has_aux=True))(*args)
    return y, gradients


def assert_same(result, expected, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


def test_definition_is_two_softmaxes():
    """One head, one row, in NumPy, by the formula."""
    q, k, v = inputs(5)
    agents = agents_of(2)
    got = np.asarray(jax.jit(ops.definition)(q, k, v, agents[None, None], np.ones((2, 5, 5), bool)))[1, :, 1]
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    q, k, v, a = q[1, :, 1], k[1, :, 1], v[1, :, 1], agents[1]
    np.testing.assert_allclose(got, softmax(q @ a.T / 3**0.5) @ (softmax(a @ k.T / 3**0.5) @ v), atol=1e-13)


@pytest.mark.parametrize("length, bins", [(11, 4), (12, 4), (3, 7), (5, 5), (14, 7), (1, 3)])
def test_adaptive_pool_covers_floor_to_ceil(length, bins):
    """Bin i is the mean over floor(i n / s) to ceil((i + 1) n / s), more bins than positions included."""
    x = np.random.default_rng(0).standard_normal((2, length, 3))
    cells = [x[:, i * length // bins : -(-(i + 1) * length // bins)].mean(1) for i in range(bins)]
    np.testing.assert_allclose(jax.jit(lambda x: ops.adaptive_pool(x, 1, bins))(x), np.stack(cells, 1), atol=1e-14)


def test_grid_agents_are_means_of_cells():
    """Rows and columns pooled one after the other are the cells' means, the class token left out."""
    q, _, _ = inputs(1 + 5 * 7)
    both = jax.jit(lambda q: (ops.grid_agents(q, (5, 7), 9), ops.definition_grid_agents(q, (5, 7), 9)))
    found, expected = map(np.asarray, both(q))
    np.testing.assert_allclose(found, expected[:, 0].swapaxes(1, 2), atol=1e-14)


@tiers.parametrize("agents", [1, 4, 30], often=[4])
def test_packed_documents(agents):
    """Agents of each document over its own keys, with documents shorter than m, equal to the definition."""
    segments = jnp.asarray(SEGMENTS)

    def written_out(q, k, v):
        return ops.definition(q, k, v, *ops.definition_pooled_agents(q, segments, agents))

    fast = lambda q, k, v: ops.packed_agent_attention(q, k, v, segments, agents)
    assert_same(value_and_gradients(fast, *inputs()), value_and_gradients(written_out, *inputs()))


def test_conv_is_correlation_with_zeros_around():
    """The 3 x 3 form by its formula, class tokens left out; a row without a grid meets the middle row only."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 2 + 12, 3)), rng.standard_normal((3, 3, 3))
    image = np.pad(x[:, 2:].reshape(2, 3, 4, 3), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(image[:, i : i + 3, j : j + 4] * kernel[i, j] for i in range(3) for j in range(3))
    convs = lambda x, kernel: [ops.depthwise_conv(x, kernel, grid) for grid in ((3, 4), None, (1, 14))]
    got, row, one = map(np.asarray, jax.jit(convs)(x, kernel))
    np.testing.assert_allclose(got[:, 2:], expected.reshape(2, 12, 3), atol=1e-13)
    np.testing.assert_array_equal(got[:, :2], 0)
    np.testing.assert_allclose(row, one, atol=1e-13)


def test_fixed_agents_in_chunks_of_any_size():
    """Chunked equals the definition, packed and not, where the chunk divides nothing and where it is longer."""
    args = (*inputs(), agents_of(3))
    for documents, chunk in ((document_index(jnp.asarray(SEGMENTS)), 5), (None, 64)):
        expected = value_and_gradients(lambda q, k, v, a: causal_definition(q, k, v, a, documents), *args)
        fast = lambda q, k, v, a: causal.fixed_agent_attention(q, k, v, a[None], documents, chunk=chunk)[0]
        assert_same(value_and_gradients(fast, *args), expected)


@tiers.exhaustive
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 9, 16, 22, 23, 24, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_fixed_agents_in_more_chunks(chunk, packed):
    documents = document_index(jnp.asarray(SEGMENTS)) if packed else None
    q, k, v = inputs()
    o, _ = causal.fixed_agent_attention(q, k, v, agents_of(3)[None], documents, chunk=chunk)
    assert_same(o, causal_definition(q, k, v, agents_of(3), documents))


@tiers.often("True-4-2")
@pytest.mark.parametrize("packed, chunk, agents", [(True, 4, 2), (False, 6, 3)])
def test_refreshed_agents_in_chunks(packed, chunk, agents):
    """Chunks that count from each document's start, by slots, equal the definition; so without documents."""
    documents = document_index(jnp.asarray(SEGMENTS)) if packed else None
    fast = lambda q, k, v, a: agent_refreshed.refreshed_agent_attention(q, k, v, a, documents, chunk=chunk)[0]
    slow = lambda q, k, v, a: causal_definition(q, k, v, a, documents, chunk)
    args = (*inputs(), agents_of(agents))
    assert_same(value_and_gradients(fast, *args), value_and_gradients(slow, *args))


@tiers.exhaustive
@pytest.mark.parametrize("chunk, agents", [(1, 1), (2, 2), (4, 2), (6, 3), (8, 1), (11, 11), (22, 2), (32, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_refreshed_agents_in_more_chunks(packed, chunk, agents):
    documents = document_index(jnp.asarray(SEGMENTS)) if packed else None
    q, k, v = inputs()
    run = jax.jit(functools.partial(agent_refreshed.refreshed_agent_attention, chunk=chunk))
    o, _ = run(q, k, v, agents_of(agents), documents)
    assert_same(o, causal_definition(q, k, v, agents_of(agents), documents, chunk))


def test_streams_of_refreshed_agents_cut_anywhere():
    """Pieces shorter than, as long as, and longer than a chunk, which begin and end anywhere in one."""
    q, k, v = inputs(value_width=3)
    agents, segments = agents_of(2), SEGMENTS
    expected = causal_definition(q, k, v, agents, document_index(jnp.asarray(segments)), 4)

    @jax.jit
    def extend(q, k, v, segments, before, stream):
        documents = document_index(segments, before)
        return agent_refreshed.refreshed_agent_attention(q, k, v, agents, documents, stream, chunk=4)

    stream, before = agent_refreshed.Stream.empty(2, 2, 2, 3, T, jnp.float64), np.full((2,), -1, np.int32)
    parts, first = [], 0
    for n in (1, 1, 9, 1, 1, 1, 9):
        piece = slice(first, first + n)
        part, stream = extend(q[:, piece], k[:, piece], v[:, piece], segments[:, piece], before, stream)
        before, first = segments[:, first + n - 1], first + n
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-11)
    overflow, _ = extend(q[:, :1], k[:, :1], v[:, :1], before[:, None] + 1, before, stream)
    assert np.all(np.isnan(overflow))


def test_extreme_logits_in_fp32():
    """Logits that jump by thousands, up and down and between documents, lose nothing in fp32."""
    q, k, v = inputs(scale=40.0)
    k[:, 9] *= 30
    k[:, 15:] *= 1e-3
    documents, agents = document_index(jnp.asarray(SEGMENTS)), agents_of(3)
    # Whole numbers over a power of two: the logits are exact in fp32, before the scale by a power of two.
    q, k, agents = (np.round(16 * x) / 16 for x in (q, k, agents))
    q, k, agents = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]) for x in (q, k, agents))
    single = [x.astype(np.float32) for x in (q, k, v, agents)]

    def fast(q, k, v, agents):
        return causal.fixed_agent_attention(q, k, v, agents[None], documents, chunk=16)[0]

    o, gradients = value_and_gradients(fast, *single)
    np.testing.assert_allclose(o, causal_definition(q, k, v, agents, documents), atol=2e-5)
    assert all(np.all(np.isfinite(x)) for x in gradients)


@tiers.often("True")
@pytest.mark.parametrize("refreshed", [False, True])
def test_nothing_later_and_no_other_document_is_felt(refreshed):
    """Huge logits and values behind a position, or in the document before, change no bit, in the same chunk too."""
    documents = document_index(jnp.asarray(SEGMENTS))
    q, k, v = (x.astype(np.float32) for x in inputs())
    agents = agents_of(2).astype(np.float32)

    @jax.jit
    def run(q, k, v):
        if refreshed:
            return agent_refreshed.refreshed_agent_attention(q, k, v, agents, documents, chunk=4)[0]
        return causal.fixed_agent_attention(q, k, v, agents[None], documents, chunk=16)[0]

    expected = np.asarray(run(q, k, v))
    later, others = ([x.copy() for x in (q, k, v)] for _ in range(2))
    for x in later:
        x[:, 10:] *= 1e3
    for x in others:
        x[0, 3:] *= 1e3
        x[1, :2] *= 1e3
    np.testing.assert_array_equal(np.asarray(run(*later))[:, :10], expected[:, :10])
    np.testing.assert_array_equal(np.asarray(run(*others))[0, :3], expected[0, :3])
    np.testing.assert_array_equal(np.asarray(run(*others))[1, 2:], expected[1, 2:])
