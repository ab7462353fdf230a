"""The linear recurrence: chunked, over all pairs and run step by step, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops.documents import document_index
from attnlab.ops.linear_recurrence import flops_per_token, linear_recurrence
from tests import tiers
from tests.mixers import flops

B, T, H, D, E = 2, 11, 3, 4, 5
# The first row goes on with a document that began before, the second ends on its first position of one.
DOCUMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]], np.int32)
DECAYS = ["none", "constant", "data", "channels"]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def inputs(decay, length=T, seed=0):
    """q, k, u, log_decay and state."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)
    shape = {"constant": (H,), "data": (B, length, H), "channels": (B, length, H, D)}.get(decay)
    log_decay = None if shape is None else -np.abs(normal(*shape))
    return normal(B, length, H, D), normal(B, length, H, D), normal(B, length, H, E), log_decay, normal(B, H, D, E)


def stepwise(q, k, u, log_decay, state, documents, bonus=None):
    """The recurrence itself, in NumPy; with a bonus a position reads before it writes, and its own so weighted."""
    q, k, u, state = (np.asarray(x) for x in (q, k, u, state))
    length = q.shape[1]
    log_decay = np.asarray(0.0 if log_decay is None else log_decay)
    log_decay = np.broadcast_to(log_decay if log_decay.ndim == 4 else log_decay[..., None], (B, length, H, D))
    o, after = np.zeros(u.shape), np.zeros(state.shape)
    for b in range(B):
        S, document = state[b], 0
        for t in range(length):
            if documents is not None and documents[b, t] != document:
                S, document = np.zeros_like(S), documents[b, t]
            written = k[b, t][:, :, None] * u[b, t][:, None, :]
            before, S = S, np.exp(log_decay[b, t])[:, :, None] * S + written
            read = S if bonus is None else before + np.asarray(bonus)[:, :, None] * written
            o[b, t] = np.einsum("hd,hde->he", q[b, t], read)
        after[b] = S
    return o, after


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(impl, chunk, documents, *arrays):
    """(o, state), and gradients for q, k, u, log_decay and state of a scalar of both."""

    def scalar(arrays):
        q, k, u, log_decay, state = arrays
        o, after = linear_recurrence(
            q, k, u, log_decay=log_decay, documents_BT=documents, state_BHde=state, chunk=chunk, impl=impl
        )
        weigh = lambda y, by: jnp.sum(y * by(jnp.arange(y.size).reshape(y.shape)))
        return weigh(o, jnp.cos) + weigh(after, jnp.sin), (o, after)

    (_, values), gradients = jax.value_and_grad(scalar, has_aux=True)(arrays)
    return values, gradients


def assert_close(a, b, atol=1e-12):
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.all(np.isfinite(p))
        np.testing.assert_allclose(p, q, rtol=0, atol=atol)


@tiers.often("channels-True")
@tiers.parametrize("packed", [False, True], often=[True])
@tiers.parametrize("decay", DECAYS, often=["data", "channels"])
def test_definition_is_the_recurrence(decay, packed):
    """The sum over pairs, and the chunked form, are the recurrence run step by step."""
    documents = DOCUMENTS if packed else None
    arrays = inputs(decay)
    expected = stepwise(*arrays, documents)
    for impl, chunk in (("definition", 1), ("chunked", 4)):
        assert_close(value_and_gradients(impl, chunk, documents, *arrays)[0], expected)


@tiers.often("channels-True-1", "data-True-4", "channels-True-4", "data-True-64")
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_chunked_is_the_definition(decay, packed, chunk):
    """Values and all gradients, for chunks of one, with a rest and longer than the whole."""
    documents = DOCUMENTS if packed else None
    arrays = inputs(decay)
    expected = value_and_gradients("definition", 1, documents, *arrays)
    assert_close(value_and_gradients("chunked", chunk, documents, *arrays), expected)


@pytest.mark.parametrize("impl, chunk", [("chunked", 4), ("definition", 64)])
@tiers.parametrize("decay", ["none", "constant", "data"], often=["none", "data"])
def test_heads_may_share_queries_and_keys(decay, impl, chunk):
    """One query and one key of all heads are the same one in each; gradients are sums over heads."""
    q, k, *rest = inputs(decay)
    q, k = q[:, :, :1], k[:, :, :1]
    repeated = (np.repeat(x, H, axis=2) for x in (q, k))
    (values, ours), (expected, of_heads) = (
        value_and_gradients(impl, chunk, DOCUMENTS, *given, *rest) for given in ((q, k), repeated)
    )
    assert_close(values, expected)
    sums = [np.sum(x, axis=2, keepdims=True) for x in of_heads[:2]]
    assert_close(ours, (*sums, *of_heads[2:]))
    with pytest.raises(UserError, match=r"expected q, k \[B, T, H, d\], u"):
        linear_recurrence(q, k, rest[0], log_decay=inputs("channels")[3])


def test_no_state_is_a_state_of_zeros():
    """Whole sequences, in one chunk and several."""
    *arrays, state = inputs("data")
    expected, by_zeros = value_and_gradients("definition", 1, None, *arrays, np.zeros_like(state))
    for chunk in (4, 64):
        values, gradients = value_and_gradients("chunked", chunk, None, *arrays, None)
        assert_close(values, expected)
        assert_close(gradients[:4], by_zeros[:4])


@tiers.often("data")
@tiers.parametrize("decay", DECAYS, often=["data", "channels"])
def test_cut_anywhere(decay):
    """Any pieces, each from the state after the one before, give the whole."""
    segments = np.asarray([[5, 5, 5, 1, 1, 0, 0, 2, 2, 2, 2], [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8]])
    q, k, u, log_decay, _ = inputs(decay)

    @jax.jit
    def run(q, k, u, logs, segments, before, state):
        index = document_index(segments, before)
        return linear_recurrence(q, k, u, log_decay=logs, documents_BT=index, state_BHde=state, chunk=4)

    expected = run(q, k, u, log_decay, segments, None, None)
    for cut in ([1] * T, [5, 1, 5]):
        state, before, first, parts = np.zeros((B, H, D, E)), np.full((B,), -1), 0, []
        for n in cut:
            piece = slice(first, first + n)
            logs = log_decay[:, piece] if decay in ("data", "channels") else log_decay
            o, state = run(q[:, piece], k[:, piece], u[:, piece], logs, segments[:, piece], before, state)
            parts.append(o)
            before, first = segments[:, first + n - 1], first + n
        assert_close((np.concatenate(parts, axis=1), state), expected)


@tiers.parametrize("value", [0.0, -50.0, -1e6, -np.inf], often=[-np.inf])
def test_extreme_decays(value):
    """No decay, a large one and complete forgetting, at all positions or some, are exact and finite in float32 too."""
    q, k, u, log_decay, state = inputs("data")
    some = np.where(np.arange(T)[:, None] % 3 == 1, value, log_decay)
    channels = np.where(np.arange(T * D).reshape(T, 1, D) % 3 == 1, value, log_decay[..., None])
    low = lambda *arrays: value_and_gradients("chunked", 4, None, *(x.astype(np.float32) for x in arrays))
    for logs in (some, channels, everywhere := np.full((B, T, H), value)):
        expected = stepwise(q, k, u, logs, state, None)
        values, gradients = value_and_gradients("chunked", 4, None, q, k, u, logs, state)
        assert_close(values, expected)
        _, expected_gradients = value_and_gradients("definition", 1, None, q, k, u, logs, state)
        assert_close(gradients, expected_gradients, 1e-11)
        single = low(q, k, u, logs, state)
        assert_close(single[0], expected, 1e-4)
        assert_close(single[1], expected_gradients, 1e-3)
    *rest, of_logs, of_state = map(np.asarray, expected_gradients)
    single = low(q, k, u, everywhere[0, 0], state)  # constants: what every position says
    assert_close(single[0], expected, 1e-4)
    assert_close(single[1], (*rest, of_logs.sum((0, 1)), of_state), 1e-3)


def test_constant_is_data_dependent_with_one_value():
    """Both forms of log_decay, and the gradient of the one as the sum of the other's."""
    q, k, u, log_decay, state = inputs("constant")
    everywhere = np.broadcast_to(log_decay, (B, T, H))
    constant, by_constant = value_and_gradients("chunked", 4, None, q, k, u, log_decay, state)
    data, by_data = value_and_gradients("chunked", 4, None, q, k, u, everywhere, state)
    assert_close(constant, data)
    assert_close(by_constant[3], np.asarray(by_data[3]).sum((0, 1)))


def test_causality_is_bitwise():
    """What comes later changes nothing before, to the last bit."""
    q, k, u, log_decay, state = (x.astype(np.float32) for x in inputs("data"))
    jitted = jax.jit(lambda *a: linear_recurrence(*a[:3], log_decay=a[3], state_BHde=a[4], chunk=4)[0])
    run = lambda *arrays: np.asarray(jitted(*arrays))
    before = run(q, k, u, log_decay, state)
    for t in (1, 5, 10):
        later = [np.concatenate([x[:, :t], -3 * np.abs(x[:, t:])], 1) for x in (q, k, u, log_decay)]
        np.testing.assert_array_equal(run(*later, state)[:, :t], before[:, :t])


def test_bfloat16_sums_are_float32():
    """A long sum of bfloat16 inputs has float32's error: the state is float32, the output rounded once."""
    q, k, u, _, _ = inputs("none", length=1000, seed=1)
    q, k, u = (np.abs(x).astype(jnp.bfloat16) for x in (q, k, u))
    o, state = jax.jit(linear_recurrence)(q, k, u)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    q, k, u = (x.astype(np.float64) for x in (q, k, u))
    states = np.cumsum(k[..., None] * u[..., None, :], 1)
    np.testing.assert_allclose(state, states[:, -1], rtol=1e-5)
    exact = np.einsum("bthd,bthde->bthe", q, states)
    np.testing.assert_allclose(np.asarray(o).astype(np.float64), exact, rtol=2**-8)


@tiers.parametrize("decay", ["constant", "channels"], often=["channels"])
def test_bonus(decay):
    """A position that reads before it writes, its own product weighted: values, the state, and through all of it."""
    *arrays, state = inputs(decay)
    bonus = np.random.default_rng(2).standard_normal((H, D))
    run = lambda documents: linear_recurrence(
        *arrays[:3], log_decay=arrays[3], documents_BT=documents, state_BHde=state, bonus_Hd=bonus, chunk=4,
        impl="chunked",
    )  # fmt: skip
    for documents in (None, DOCUMENTS):
        assert_close(jax.jit(run)(documents), stepwise(*arrays, state, documents, bonus))


@tiers.exhaustive
@pytest.mark.parametrize("decay", ["data", "channels"])
def test_one_position_is_a_step(decay):
    *arrays, state = inputs(decay, length=1)
    one = lambda impl: value_and_gradients(impl, 4, DOCUMENTS[:, :1], *arrays, state)
    assert_close(one("chunked")[0], stepwise(*arrays, state, DOCUMENTS))
    assert_close(one("chunked"), one("definition"))


@pytest.mark.parametrize("chunk", [4, 11, 64])
def test_flops(chunk):
    """The declared products are those of the program."""
    q, k, u, _, _ = inputs("none")
    for decay in ("none", "channels"):
        run = lambda *a: linear_recurrence(*a, log_decay=inputs(decay)[3], chunk=chunk)[0]
        counted = flops.count(run, q, k, u) / (B * T * H)
        assert counted == pytest.approx(flops_per_token(T, chunk, D, E, decay == "channels"))


def test_refused():
    """Shapes that do not fit and unknown implementations are refused by name."""
    q, k, u, log_decay, state = inputs("data")
    for arguments, message in (
        ({"log_decay": log_decay[:, :3]}, "log_decay"),
        ({"log_decay": jnp.zeros((B, T, H, D + 1))}, "log_decay"),
        ({"bonus_Hd": jnp.zeros((H,))}, "bonus_Hd"),
        ({"documents_BT": DOCUMENTS[:, :3]}, "documents_BT"),
        ({"state_BHde": state.swapaxes(2, 3)}, "state_BHde"),
        ({"chunk": 0}, "chunk=0"),
        ({"impl": "fast"}, "unknown impl 'fast'"),
    ):
        with pytest.raises(UserError, match=message):
            linear_recurrence(q, k, u, **arguments)
    with pytest.raises(UserError, match="do not fit"):
        linear_recurrence(q, k[:, :3], u)


@tiers.often("chunked")
@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_strong_decays_of_other_documents(impl):
    """Decays of one document change no bit of another's outputs, and leave all gradients finite, however strong."""
    q, k, u, log_decay, state = inputs("data")
    documents = DOCUMENTS

    @jax.jit
    def run(log_decay):
        def scalar(log_decay):
            o, after = linear_recurrence(
                q, k, u, log_decay=log_decay, documents_BT=documents, state_BHde=state, chunk=4, impl=impl
            )
            return jnp.sum(o**2) + jnp.sum(after**2), o

        return jax.grad(scalar, has_aux=True)(log_decay)

    gradient, o = map(np.asarray, run(log_decay))
    changed, strong = map(np.asarray, run(np.where((documents == 1)[..., None], 700 * log_decay, log_decay)))
    assert np.all(np.isfinite(changed))
    for found, expected in ((strong, o), (changed, gradient)):
        np.testing.assert_array_equal(found[documents != 1], expected[documents != 1])
