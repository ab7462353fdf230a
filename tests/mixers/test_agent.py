"""The identities of agent attention (Han et al. 2023) and of its causal forms, in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.mixers.agent import resize
from attnlab.ops import agent_attention as ops
from attnlab.ops import agent_causal as causal
from attnlab.ops import agent_refreshed
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "q k v out",
    "taps": "conv_kernel",
    "bias": "conv_bias",
    "tokens": "agents",
    "positions": " ".join(f"bias_{at}.{of}" for at in ("in", "out") for of in ("table", "row", "column", "leading")),
}
NUMBERS_OF = "softmax"
WRITTEN_OUT = True
SPLIT_GRADIENTS = False

FORMS = ("bidirectional", "learned", "pooled")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("agent").Config(**fields), jnp.float64)


def inputs(length=11, heads=2, width=4):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.standard_normal((2, length, heads, width))) for _ in range(3)]


def agents_of(m=3, heads=2, width=4):
    return jnp.asarray(np.random.default_rng(5).standard_normal((heads, m, width)))


@functools.partial(jax.jit, static_argnums=0)
def mix(form, q, k, v, agents):
    """One form over whole rows; `agents` [H, m, d]."""
    if form == "bidirectional":
        return ops.agent_attention(q, k, v, jnp.stack([agents.swapaxes(0, 1)] * q.shape[0]))
    if form == "learned":
        return causal.fixed_agent_attention(q, k, v, agents[None], chunk=4)[0]
    return agent_refreshed.refreshed_agent_attention(q, k, v, agents, chunk=2 * agents.shape[1])[0]


@pytest.mark.parametrize("form", FORMS)
def test_constant_values_come_out(form):
    """Both softmaxes are row-stochastic: V constant gives that constant."""
    q, k, v = inputs()
    v = jnp.broadcast_to(v[:1, :1], v.shape)
    np.testing.assert_allclose(mix(form, q, k, v, agents_of()), v, atol=1e-13)


@tiers.exhaustive
def test_rank_is_at_most_the_number_of_agents():
    """The map from V to O is of rank m, read off with V the identity."""
    q, k, _ = inputs(12, heads=1)
    identity = jnp.broadcast_to(jnp.eye(12)[:, None], (2, 12, 1, 12))
    for m in (1, 3):
        weights = mix("bidirectional", q, k, identity, agents_of(m, heads=1))[0, :, 0]
        assert np.linalg.matrix_rank(np.asarray(weights), tol=1e-10) == m
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-13)


def test_permuting_tokens_permutes_outputs():
    """Without biases and convolution, agents fixed."""
    q, k, v = inputs()
    order = np.random.default_rng(0).permutation(11)
    expected = mix("bidirectional", q, k, v, agents_of())[:, order]
    permuted = mix("bidirectional", q[:, order], k[:, order], v[:, order], agents_of())
    np.testing.assert_allclose(permuted, expected, atol=1e-13)


@tiers.exhaustive
@pytest.mark.parametrize("form", FORMS)
def test_one_agent_is_one_average_for_all_queries(form):
    """m = 1: a position's output is the agent's average over the keys it sees, whatever the query; pooled causal agents
    are queries themselves, so there only the first chunk, whose agent is learned."""
    q, k, v = inputs(2 if form == "pooled" else 11)
    agents = agents_of(1)
    o = mix(form, q, k, v, agents)
    logits = jnp.einsum("hd,bjhd->bjh", agents[:, 0], k) / 2
    weights = jnp.exp(logits)[..., None]
    if form == "bidirectional":
        expected = jnp.broadcast_to((weights * v).sum(1, keepdims=True) / weights.sum(1, keepdims=True), v.shape)
    else:
        expected = jnp.cumsum(weights * v, 1) / jnp.cumsum(weights, 1)
    np.testing.assert_allclose(o, expected, atol=1e-12)
    np.testing.assert_allclose(mix(form, -3 * q, k, v, agents), o, atol=1e-12)


@tiers.exhaustive
@pytest.mark.parametrize("form", ["learned", "pooled"])
def test_step_is_chunk_is_naive(form):
    """One position at a time, the chunked form and the definition agree; the chunk does not divide the length."""
    module = make(form=form, agents=2, chunk=4)
    slow = make(form=form, agents=2, chunk=4, impl="definition")
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(*x.shape[:2])
    expected = jax.jit(slow)(x, seq).y
    np.testing.assert_allclose(jax.jit(module)(x, seq).y, expected, atol=1e-12)
    step = jax.jit(module.extend)
    state = module.init_state(2, x.shape[1], jnp.float64)
    y, state = cases.streamed(step, state, x, seq, [1] * x.shape[1])
    np.testing.assert_allclose(y, expected, atol=1e-12)


def test_learned_agents_are_gated_slots():
    """Learned agents are the keys of a bounded memory: slot a becomes (1 - g) slot + g v, g = e^{s_ta} / D_a(t), read
    by softmax(q A^T)."""
    o = mix("learned", *inputs(), agents_of())
    q, k, v = (np.asarray(x) for x in inputs())
    agents = np.asarray(agents_of())
    write = np.exp(np.einsum("hmd,bthd->tbhm", agents, k) / 2)
    read = np.exp(np.einsum("hmd,bthd->tbhm", agents, q) / 2)
    slots, total = 0.0, 0.0
    for t in range(q.shape[1]):
        total = total + write[t]
        gate = (write[t] / total)[..., None]
        slots = (1 - gate) * slots + gate * v[:, t][:, :, None]
        expected = np.einsum("bhm,bhme->bhe", read[t] / read[t].sum(-1, keepdims=True), slots)
        np.testing.assert_allclose(o[:, t], expected, atol=1e-12)


@tiers.often("pooled")
@pytest.mark.parametrize("form", ["learned", "pooled"])
def test_causality(form):
    """The gradient of the outputs up to t for any later input is exactly zero, and for t's own it is not."""
    module = make(form=form, agents=2, chunk=4)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(*x.shape[:2])
    slope = jax.jit(jax.grad(lambda x, seen: jnp.sum(seen * module(x, seq).y)))
    for t in (0, 3, 4, 9):
        gradient = np.asarray(slope(x, 1.0 * (np.arange(cases.LENGTH) <= t)[:, None]))
        np.testing.assert_array_equal(gradient[:, t + 1 :], 0)
        assert np.all(np.abs(gradient[:, t]).max(-1) > 0)


@tiers.exhaustive
def test_agents_equal_to_keys_and_no_temperature_copy_values():
    """Agents on all the keys (K-means with as many means as keys), logits of one sharp maximum: hard routing copies the
    value of the nearest key of the query's nearest agent."""
    q, k, v = inputs()
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)  # nearest is largest product
    q, k = 200 * q, 200 * k
    nearest = jnp.argmax(jnp.einsum("bthd,bjhd->bthj", q, k), -1)
    expected = jnp.take_along_axis(v, nearest[..., None], axis=1)
    np.testing.assert_allclose(ops.agent_attention(q, k, v, k), expected, atol=1e-6)


def test_resize_of_a_table_to_its_own_size_is_the_identity():
    """7 x 7 to 7 x 7; and to another size it is bilinear at half-pixel centres, without antialiasing, down and up."""
    table = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 7)))
    np.testing.assert_array_equal(resize(table, (7, 7)), table)

    def along_last(x, n):
        centre = np.clip((np.arange(n) + 0.5) * x.shape[-1] / n - 0.5, 0, x.shape[-1] - 1)
        low = np.minimum(centre.astype(int), x.shape[-1] - 2)
        return x[..., low] * (1 - (centre - low)) + x[..., low + 1] * (centre - low)

    for shape in ((14, 10), (3, 5)):
        expected = along_last(along_last(np.asarray(table), shape[1]).swapaxes(1, 2), shape[0]).swapaxes(1, 2)
        np.testing.assert_allclose(resize(table, shape), expected, atol=1e-12)


@tiers.often("grid1")
@pytest.mark.parametrize("grid", [pytest.param((2, 3), marks=pytest.mark.slow), (3, 4)])
def test_image_by_the_formula(grid):
    """Pooled agents, all biases (of another grid than the tables' too), class tokens and the convolution, in NumPy; the
    implementations agree, gradients too."""
    fields = {"grid": (2, 3), "agents": 4, "heads": 2}
    module, slow = make(**fields), make(**fields, impl="definition")
    rows, columns = grid
    T, lead = rows * columns + 2, 2
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, T, cases.WIDTH)))
    seq = dataclasses.replace(mixers.Sequence.whole(2, T), grid=grid)

    @jax.jit
    def run(x):
        y, pull = jax.vjp(lambda x: module(x, seq).y, x)
        y_slow, pull_slow = jax.vjp(lambda x: slow(x, seq).y, x)
        return y, y_slow, pull(jnp.cos(y)), pull_slow(jnp.cos(y)), [p(x) for p in (module.q, module.k, module.v)]

    y, y_slow, (slope,), (slope_slow,), qkv = run(x)
    np.testing.assert_allclose(y, y_slow, atol=1e-12)
    np.testing.assert_allclose(slope, slope_slow, atol=1e-11)

    q, k, v = (np.asarray(y).reshape(2, T, 2, 8) for y in qkv)
    image = q[:, lead:].reshape(2, rows, columns, 2, 8)
    cut = lambda n, i: slice(i * n // 2, -(-(i + 1) * n // 2))
    agents = np.stack([image[:, cut(rows, i), cut(columns, j)].mean((1, 2)) for i in (0, 1) for j in (0, 1)], 1)

    def bias(tables):
        row, column = (np.asarray(resize(t[...], (n,))) for t, n in zip((tables.row, tables.column), grid))
        places = np.asarray(resize(tables.table[...], grid)) + row[..., :, None] + column[..., None, :]
        leading = np.repeat(np.asarray(tables.leading[...])[..., None], lead, -1)
        return np.concatenate([leading, places.reshape(2, 4, -1)], -1)

    softmax = lambda z, axis: np.exp(z) / np.exp(z).sum(axis, keepdims=True)
    gather = softmax(np.einsum("bmhd,bthd->bhmt", agents, k) / 8**0.5 + bias(module.bias_in), -1)
    hand_out = softmax(np.einsum("bmhd,bthd->bhmt", agents, q) / 8**0.5 + bias(module.bias_out), -2)
    o = np.einsum("bhmt,bhme->bthe", hand_out, np.einsum("bhmt,bthe->bhme", gather, v)).reshape(2, T, -1)
    padded = np.pad(v[:, lead:].reshape(2, rows, columns, -1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(module.conv_kernel[...])
    conv = sum(padded[:, i : i + rows, j : j + columns] * kernel[i, j] for i in range(3) for j in range(3))
    o[:, lead:] += conv.reshape(2, rows * columns, -1) + np.asarray(module.conv_bias[...])
    np.testing.assert_allclose(y, o @ np.asarray(module.out.kernel[...]), atol=1e-12)


def test_state_of_learned_agents_does_not_grow():
    """Learned: m (d + 2) numbers a head and the convolution's tail, whatever the length. Pooled: a cache besides."""
    cls = mixers.get("agent")
    cost = lambda length, **fields: cls.cost(cls.Config(**fields), 16, length).state_bytes
    assert cost(32) == cost(4096) == 4 * (4 * 16 * (4 + 2) + 2 * 16) + 1
    assert cost(4096, form="pooled") - cost(32, form="pooled") == 4 * (4096 - 32) * 2 * 16


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"grid": (7, 7), "causal": True}, "grid"),
        ({"grid": (7, 7), "agents": 10}, "square"),
        ({"form": "pooled", "agents": 10}, "multiples of agents"),
        ({"form": "learned", "causal": False}, "form = 'learned'"),
        ({"form": "mean"}, "learned, pooled"),
        ({"grid": (7,)}, "two numbers"),
        ({"agents": 0}, "1 or more"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "agent", **fields})


def test_impossible_images():
    """Documents in an image, an image larger than its row, and agents that make no square are refused."""
    x, seq = cases.inputs(jnp.float64)
    whole = mixers.Sequence.whole(*x.shape[:2])
    with pytest.raises(UnsupportedPattern, match="packed documents with a grid"):
        make(causal=False)(x, dataclasses.replace(seq, grid=(2, 3)))
    with pytest.raises(UnsupportedPattern, match="do not hold"):
        make(causal=False)(x, dataclasses.replace(whole, grid=(4, 3)))
    with pytest.raises(ConfigError, match="square"):
        make(causal=False, agents=3)(x, dataclasses.replace(whole, grid=(2, 3)))


def test_all_agents_of_an_image_are_counted():
    """There are as many however few its positions: 16 of 11, in four products; without a grid one for each position."""
    of = lambda **fields: mixers.get("agent").cost(mixers.get("agent").Config(causal=False, **fields), 16, 11).flops
    assert of(grid=(2, 3))["agents"] == 8.0 * 4 * 16 * 4 and of()["agents"] == 8.0 * 4 * 11 * 4
