"""The identities of flow attention (Wu et al. 2022), in float64 unless they say otherwise."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.ops.documents import document_index
from attnlab.ops.flow_attention import flow_attention
from attnlab.ops.flow_definition import FlowOutput, FlowRule, FlowState, empty_state
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out"}
WRITTEN_OUT = True
SPLIT_GRADIENTS = False

EXACT = FlowRule(epsilon=0.0, clip=None)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


run = jax.jit(flow_attention, static_argnames=("rule", "causal", "chunk", "impl"))


def features(sinks: int = 13, sources: int | None = None, heads: int = 2, width: int = 5, value_width: int = 3):
    """q [2, T, H, d] and k [2, S, H, d] in (0, 1), v [2, S, H, e]."""
    rng = np.random.default_rng(3)
    sources = sinks if sources is None else sources
    q, k = (1 / (1 + np.exp(-2 * rng.standard_normal((2, n, heads, width)))) for n in (sinks, sources))
    return tuple(map(jnp.asarray, (q, k, rng.standard_normal((2, sources, heads, value_width)))))


def weights(q, k, rule: FlowRule, *, causal: bool, **fields):
    """The matrix [B, H, T, S] that the op applies to values: its output for values that are unit vectors."""
    units = jnp.broadcast_to(jnp.eye(k.shape[1])[None, :, None], (*k.shape[:3], k.shape[1]))
    return np.moveaxis(np.asarray(run(q, k, units, rule, causal=causal, **fields).o), 1, 2)


def normalised_linear(q, k, causal: bool):
    """q_i . k_j / sum_j q_i . k_j."""
    scores = np.einsum("bthd,bshd->bhts", q, k)
    scores = np.tril(scores) if causal else scores
    return scores / scores.sum(-1, keepdims=True)


@tiers.often("9-14")
@pytest.mark.parametrize("sinks, sources", [(13, 13), (9, 14)])
def test_conservation(sinks, sources):
    """Where every source emits 1 the sinks receive m in all; where every sink receives 1 the sources give n."""
    q, k, v = features(sinks, sources)
    out = run(q, k, v, EXACT, causal=False)
    np.testing.assert_allclose(out.outgoing.sum(1), sinks, rtol=1e-12)
    # sigmoid(I^ n / m) is the quotient of the op with allocation and without.
    ratio = out.o / run(q, k, v, dataclasses.replace(EXACT, allocation=False), causal=False).o
    incoming = np.log(ratio / (1 - ratio))[..., 0] * sources / sinks
    np.testing.assert_allclose(incoming.sum(1), sources, rtol=1e-9)


def test_competition_sums_to_the_number_of_sources():
    """competition_j is what source j's column has over plain normalised linear attention's; they sum to m."""
    q, k, _ = features(9, 14)
    rule = dataclasses.replace(EXACT, allocation=False)
    competition = (weights(q, k, rule, causal=False) / normalised_linear(q, k, False))[:, :, 0]
    np.testing.assert_allclose(competition.sum(-1), 14, rtol=1e-12)
    assert np.ptp(competition, axis=-1).min() > 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_one_before_allocation_and_competition(causal):
    q, k, _ = features()
    rule = FlowRule(competition=False, allocation=False, epsilon=0.0)
    np.testing.assert_allclose(weights(q, k, rule, causal=causal).sum(-1), 1, rtol=1e-12)


def test_causal_competition_conserves_only_nearly():
    """Competition is fixed when a source appears, so later rows sum to about 1 and not to 1."""
    q, k, _ = features(40)
    rows = weights(q, k, FlowRule(allocation=False), causal=True).sum(-1)
    np.testing.assert_allclose(rows[..., 0], 1, atol=1e-5)
    assert 1e-3 < np.abs(rows - 1).max() < 0.5


@tiers.often("False")
@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_a_setting(causal):
    """feature=elu without competition and allocation: Katharopoulos et al. 2020, eq. 4 and 7, phi(x) = elu(x) + 1."""
    knobs = {
        "heads": 2,
        "feature": "elu",
        "epsilon": 1e-12,
        "competition": False,
        "allocation": False,
        "causal": causal,
    }
    layer = mixers.build({"name": "flow", **knobs}, width=8, rngs=nnx.Rngs(0), dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8)))
    q, k, v = (np.asarray(project(x)).reshape(2, 9, 2, 4) for project in (layer.q, layer.k, layer.v))
    q, k = (np.where(y > 0, y + 1, np.exp(y)) for y in (q, k))
    o = np.einsum("bhts,bshd->bthd", normalised_linear(q, k, causal), v)
    y = layer(x, mixers.Sequence.whole(2, 9)).y
    np.testing.assert_allclose(y, layer.out(jnp.asarray(o).reshape(2, 9, 8)), rtol=1e-9)


@tiers.exhaustive
@pytest.mark.parametrize("causal", [False, True])
def test_no_clip_range_is_normalised_linear_attention_times_allocation(causal):
    """clip -> 0 makes competition uniform; allocation of a known incoming flow is left."""
    q, k, _ = features()
    got = weights(q, k, FlowRule(epsilon=0.0, clip=0.0), causal=causal)
    plain = normalised_linear(q, k, causal)
    seen = np.tril(np.ones((13, 13))) if causal else np.ones((13, 13))
    N = np.arange(1, 14)[:, None, None] if causal else 1
    q, k = np.asarray(q), np.asarray(k)
    total = lambda x: np.einsum("ts,bshd->bthd", seen, x)
    outflow = (k * total(q)).sum(-1, keepdims=True)
    incoming = (q * total(k * N / outflow)).sum(-1) / (N[..., 0] if causal else 1)
    expected = plain * np.moveaxis(1 / (1 + np.exp(-incoming)), 1, 2)[..., None]
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-14)
    assert np.abs(weights(q, k, FlowRule(epsilon=0.0), causal=causal) - expected).max() > 1e-3


def test_scale_of_keys_cancels():
    """With epsilon 0, keys (or queries) times a constant give the same; epsilon is why nothing else does."""
    q, k, v = features()
    o = run(q, k, v, EXACT, causal=False).o
    for scaled in ((q, 7.0 * k), (0.1 * q, k)):
        np.testing.assert_allclose(run(*scaled, v, EXACT, causal=False).o, o, rtol=1e-11)
    loose = dataclasses.replace(EXACT, epsilon=0.1)
    assert np.abs(run(q, 7.0 * k, v, loose, causal=False).o - run(q, k, v, loose, causal=False).o).max() > 1e-3


@tiers.exhaustive
def test_order_of_sources_is_free():
    """Bidirectional: keys with their values in any order give the same; sinks carry their outputs along."""
    q, k, v = features(9, 14)
    order = np.random.default_rng(0).permutation(14)
    o = run(q, k, v, FlowRule(), causal=False).o
    np.testing.assert_allclose(run(q, k[:, order], v[:, order], FlowRule(), causal=False).o, o, rtol=1e-11)
    np.testing.assert_allclose(run(q[:, ::-1], k, v, FlowRule(), causal=False).o, o[:, ::-1], rtol=1e-11)


def test_cross_attention_has_the_factor_n_over_m():
    """Every sink twice: the same outputs, as flows double and n / m with them. Every source twice likewise."""
    q, k, v = features(9, 14)
    o = run(q, k, v, EXACT, causal=False).o
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    alone = lambda rule: run(q, twice(k), twice(v), rule, causal=False).o
    linear = FlowRule(competition=False, allocation=False, epsilon=0.0)
    np.testing.assert_allclose(alone(linear), run(q, k, v, linear, causal=False).o, rtol=1e-11)
    allocated = dataclasses.replace(linear, allocation=True)
    np.testing.assert_allclose(alone(allocated), run(q, k, v, allocated, causal=False).o, rtol=1e-11)
    np.testing.assert_allclose(
        run(twice(q), k, v, allocated, causal=False).o[:, :9], run(q, k, v, allocated, causal=False).o, rtol=1e-11
    )
    definition = run(q, k, v, EXACT, causal=False, impl="definition").o
    np.testing.assert_allclose(o, definition, rtol=1e-11)
    with pytest.raises(UserError, match="may differ only"):
        flow_attention(q, k, v, EXACT, causal=True)


def unscaled(out: FlowOutput) -> FlowState:
    """The state with the sum of exponentials itself: the peak that it is divided by is free."""
    state = out.state
    if state.peak is None:
        return state
    return dataclasses.replace(state, rivals=state.rivals * jnp.exp(state.peak), peak=None)


RULES = {
    "plain": FlowRule(),
    "no clip, averages": FlowRule(clip=None, averages=True),
    "competition only": FlowRule(allocation=False, clip=1.0, averages=True),
}


@tiers.often("no clip, averages")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_step_chunk_and_parallel_agree(rule):
    """Chunks of any size, one position at a time and the definition give the same outputs and the same state."""
    q, k, v = features()
    segments = jnp.asarray([[1] * 6 + [2] * 7, [3] * 2 + [0] * 3 + [4] * 8])
    documents = document_index(segments)
    expected = run(q, k, v, rule, causal=True, documents=documents, impl="definition")
    chunked = run(q, k, v, rule, causal=True, documents=documents, chunk=3)
    state, outputs = empty_state(rule, *q.shape[::2], q.shape[3], v.shape[3], q.dtype), []
    for t in range(13):
        at = slice(t, t + 1)
        index = np.asarray(documents)[:, at] != np.asarray(documents)[:, t - 1 : t] if t else np.ones((2, 1))
        out = run(q[:, at], k[:, at], v[:, at], rule, causal=True, documents=jnp.asarray(index, jnp.int32), state=state)
        state = out.state
        outputs.append(out.o)
    streamed = FlowOutput(jnp.concatenate(outputs, axis=1), state, None)
    for out in (chunked, streamed):
        np.testing.assert_allclose(out.o, expected.o, rtol=1e-10, atol=1e-11)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11)
        jax.tree.map(close, unscaled(out), unscaled(expected))


@tiers.exhaustive
def test_causality():
    """A later position changes nothing before it: derivatives by later inputs are 0, by earlier ones not."""
    q, k, v = features(7)
    output = lambda *x: flow_attention(*x, FlowRule(), causal=True, chunk=3).o[0, 3].sum()
    for part in jax.jit(jax.grad(output, (0, 1, 2)))(q, k, v):
        reach = np.abs(part[0]).sum((1, 2))
        assert np.all(reach[:4] > 0) and np.all(reach[4:] == 0)


def test_state_size():
    """A head carries d e + 4 d + 1 numbers, a stream one count."""
    q, k, v = features()
    state = run(q, k, v, FlowRule(), causal=True).state
    sizes = [np.size(x[0]) for x in jax.tree.leaves(dataclasses.replace(state, count=state.count[:, None]))]
    assert sum(sizes) == 2 * (5 * 3 + 4 * 5 + 1) + 1


def test_averages_are_sums_over_counts():
    """The two forms' states differ by the factor N and their outputs not at all."""
    q, k, v = features()
    sums, averages = (run(q, k, v, FlowRule(averages=on), causal=True) for on in (False, True))
    np.testing.assert_allclose(averages.o, sums.o, rtol=1e-12)
    for field in dataclasses.fields(FlowState):
        if field.name not in ("count", "peak"):
            a, s = (getattr(out.state, field.name) for out in (averages, sums))
            np.testing.assert_allclose(a * 13, s, rtol=1e-12)


@tiers.often("True")
@pytest.mark.parametrize("averages", [False, True])
def test_averages_stay_exact_in_very_long_streams(averages):
    """fp32 at 2^27 positions: a position adds less to a sum than its last digit, an average has nothing to change."""
    length, steps = 2**27, 2**14
    q = k = jnp.full((1, 1, 1, 2), 0.3, jnp.float32)
    v = jnp.ones((1, 1, 1, 1), jnp.float32)
    rule = FlowRule(averages=averages)
    state = run(q, k, v, rule, causal=True).state  # what a stream of equal positions holds after the first
    scale = jnp.float32(1 if averages else length)
    state = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x * scale, state)
    state = dataclasses.replace(state, count=jnp.full((1,), length, jnp.int32))
    step = lambda state, _: (flow_attention(q, k, v, rule, causal=True, state=state).state, None)
    after, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(state)
    assert int(after.count[0]) == length + steps
    sources = float(after.sources[0, 0, 0]) / (1 if averages else length + steps)
    error = abs(sources / 0.3 - 1)
    assert error < 1e-6 if averages else error > 1e-5


def test_extreme_features_stay_finite():
    """Features of exactly 0 and 1 in fp32, where flows are as far apart as they can be, clipped or not."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.random((1, 40, 2, 4)) > 0.7, jnp.float32) for _ in range(2))
    q = q.at[:, 20:30].set(0)
    k = k.at[:, 5:8].set(0)
    v = jnp.asarray(rng.standard_normal((1, 40, 2, 3)), jnp.float32)
    for rule, causal in ((FlowRule(clip=None), True), (FlowRule(), False)):
        loss = lambda *x, rule=rule, causal=causal: flow_attention(*x, rule, causal=causal, chunk=16).o.sum()
        for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)):
            assert np.all(np.isfinite(leaf))


def test_clipped_share_is_reported():
    """The metric counts sources above the clip, without padding; at clip 1, the mean flow, about half are."""
    x, seq = cases.inputs(jnp.float64)
    graphdef, params = cases.split(cases.module(mixers.get("flow").Config(clip=1.0, causal=False), jnp.float64))
    share = jax.jit(lambda x: nnx.merge(graphdef, params)(x, seq).metrics["flow_clipped"])
    loud = jnp.where((seq.segments == 0)[..., None], 50.0 * x, x)
    assert 0.3 < share(x) < 0.7
    assert share(loud) == share(x)
    unclipped = cases.module(mixers.get("flow").Config(clip=None), jnp.float64)
    metrics = jax.eval_shape(lambda x: unclipped(x, seq).metrics, x)
    assert "flow_clipped" not in metrics


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"clip": -1.0}, "clip = -1.0"),
        ({"clip": 100.0}, "from 0 to 50"),
        ({"epsilon": 0.0}, "above 0"),
        ({"causal": False, "form": "averages"}, "nothing runs"),
        ({"feature": "tanh"}, "sigmoid, relu, elu"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "flow", **fields})
