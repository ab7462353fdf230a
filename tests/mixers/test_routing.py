"""The identities of routing attention (after Roy et al. 2020), in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.mixers.heads import split_heads
from attnlab.mixers.routing import normed
from attnlab.ops.attention import attention
from attnlab.ops.masks import Mask
from tests import tiers
from tests.mixers import cases
from tests.mixers import test_contract as battery

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "qk v out", "tokens": "centroids", "average": "total count steps"}
OF_A_STEP = "steps"
BLOCK = 64
BIASED = [({}, "qk v", "out")]
NUMBERS_OF = "moba"
T, D = cases.LENGTH, cases.WIDTH


def keys_seen(config, t):
    """At most: all before it in one cluster."""
    return min(t + 1, config.window)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("routing").Config(**fields), jnp.float64)


@functools.cache
def inputs():
    return np.random.default_rng(5).standard_normal((2, T, D)), mixers.Sequence.whole(2, T)


def naive(module, x):
    """The layer on one document, query by query; the margin by which clusters are chosen; the sum of distances."""
    c, d, weight = module.config, module.head_dim, lambda y: np.asarray(y.kernel[...])
    u, v = ((x @ weight(y)).reshape(len(x), c.heads, d) for y in (module.qk, module.v))
    u = u - u.mean(-1, keepdims=True)
    u = u / np.sqrt((u * u).mean(-1, keepdims=True) + 1e-6)
    scores = np.einsum("thd,hcd->thc", u, mu := np.asarray(module.current_centroids()))
    top = np.sort(scores, axis=-1)
    gap = (top[..., -1] - top[..., -2]).min() if c.clusters > 1 else np.inf
    cluster, o, distance = scores.argmax(-1), np.zeros_like(v), 0.0
    for t, h in np.ndindex(len(x), c.heads):
        members = [s for s in range(t + 1) if cluster[s, h] == cluster[t, h]][-c.window :]
        p = np.exp(u[members, h] @ u[t, h] * (d**-0.5 if c.scale == "root" else 1))
        o[t, h] = p / p.sum() @ v[members, h]
        distance += ((u[t, h] - mu[h, cluster[t, h]]) ** 2).sum() / c.heads
    members = np.eye(mu.shape[1])[cluster]
    of_clusters = np.einsum("thc,thd->hcd", members, u), members.sum(0)
    return o.reshape(len(x), -1) @ weight(module.out), gap, distance, of_clusters


def published(total, count, sums, numbers, keep):
    """Moving averages and centroids after a step of the published code, counts in positions: `online_kmeans` of
    google-research, routing_transformer/utils.py."""
    total, count = keep * total + (1 - keep) * sums, keep * count + (1 - keep) * numbers
    whole = count.sum(-1, keepdims=True)
    return total, count, total / ((count + 1e-5) / (whole + count.shape[1] * 1e-5) * whole)[..., None]


AVERAGED = {"clusters": 2, "window": 3, "centroid_decay": 0.9}


@tiers.often(str(AVERAGED))
@pytest.mark.parametrize(
    "fields", [{"clusters": 2, "window": 2, "scale": "one"}, {"clusters": 3, "window": 3}, AVERAGED], ids=str
)
def test_layer_is_the_formula(fields):
    """The whole layer written out, in packed rows, with its loss; and streams, which hold a ring per cluster."""
    module = make(**fields, commitment=0.5)
    x, seq = cases.inputs(jnp.float64)
    (y, losses), (gradients, _) = battery.value_and_gradients(*cases.split(module), x, seq)
    found = [np.asarray(y)]
    extend, state = functools.partial(battery.extend, *cases.split(module)), battery.begun(*cases.split(module))
    found.append(cases.streamed(extend, state, x, seq, battery.CUTS[1])[0])
    total, averages = 0.0, []
    for row, first, end in cases.DOCUMENTS:
        want, gap, distance, of_clusters = naive(module, np.asarray(x)[row, first:end])
        assert gap > 1e-4
        total, averages = total + distance, [*averages, of_clusters]
        for y in found:
            np.testing.assert_allclose(y[row, first:end], want, atol=1e-12)
    positions = sum(end - first for _, first, end in cases.DOCUMENTS)
    np.testing.assert_allclose(losses["commitment"], 0.5 * total / positions, rtol=1e-12)
    if "centroid_decay" in fields:
        for name, sums in zip(("total", "count"), zip(*averages)):
            np.testing.assert_allclose(gradients[name][...], sum(sums), atol=1e-12)
        np.testing.assert_array_equal(gradients["steps"][...], 1)


@pytest.mark.parametrize("weight", [1.0, 7.0, 1e5])
def test_centroids_are_the_published_ones_whatever_the_weight(weight):
    """Steps of averages over a batch's weight, as trainers make them, give the centroids of the published code, whose
    counts are in positions: of a cluster of many positions, of one of a hundredth of a position a step, of one without.
    """
    keep, module, rng = 0.9, make(clusters=3, centroid_decay=0.9), np.random.default_rng(2)
    shape = module.total[...].shape
    total, count = rng.standard_normal(shape), np.full(shape[:2], 4.0)
    module.total[...], module.count[...] = jnp.asarray(total / weight), jnp.asarray(count / weight)
    module.steps[...] = jnp.full(shape[:1], 1 / weight)
    for _ in range(3):
        numbers = np.broadcast_to([50.0, 0.01, 0.0], shape[:2])
        sums = numbers[..., None] * rng.standard_normal(shape)
        for average, seen in ((module.total, sums), (module.count, numbers), (module.steps, np.ones(shape[:1]))):
            average[...] = keep * average[...] + (1 - keep) * seen / weight
        total, count, want = published(total, count, sums, numbers, keep)
        np.testing.assert_allclose(module.current_centroids(), want, rtol=1e-12)


def test_a_rare_cluster_has_its_centroid_at_the_mean_of_its_members():
    """One position of ten thousand: smoothing by 1e-5 of a position moves it by as much."""
    module = make(clusters=2, centroid_decay=0.9)
    mean, share = np.random.default_rng(3).standard_normal(module.total[...].shape), np.array([1 - 1e-4, 1e-4])
    module.total[...] = jnp.asarray(mean * share[:, None])
    module.count[...] = jnp.broadcast_to(jnp.asarray(share), module.count[...].shape)
    module.steps[...] = jnp.full(module.steps[...].shape, 1e-4)
    np.testing.assert_allclose(module.current_centroids() / mean, np.full_like(mean, 1), atol=1.1e-5)


@tiers.exhaustive
def test_one_cluster_is_softmax_attention_of_normed_shared_queries():
    """With room for all; written with the softmax layer's op."""
    module, (x, seq) = make(clusters=1, window=T), inputs()
    u, v = (split_heads(y(jnp.asarray(x)), 4) for y in (module.qk, module.v))
    u = normed(u)
    o = attention(u, u, v, Mask(causal=True), impl="definition").reshape(2, T, -1)
    np.testing.assert_allclose(cases.output(module, x, seq), o @ module.out.kernel[...], atol=1e-12)


@tiers.exhaustive
def test_names_of_clusters_do_not_matter():
    """Permuted centroids give the same."""
    module, (x, seq) = make(clusters=3, window=2, impl="definition"), inputs()
    y = cases.output(module, x, seq)
    module.centroids[...] = module.centroids[...][:, jnp.array([2, 0, 1])]
    np.testing.assert_allclose(cases.output(module, x, seq), y, atol=1e-12)


def test_centroids_learn_by_the_loss_alone():
    """They have no gradient of the output, and one of the loss, towards what is theirs."""
    module, (x, seq) = make(clusters=2, commitment=1.0, impl="definition"), inputs()
    graphdef, params = cases.split(module)
    both = lambda share: jax.grad(
        lambda p: (lambda out: out.y.sum() * (1 - share) + share * out.losses["commitment"])(
            battery.nnx.merge(graphdef, p)(jnp.asarray(x), seq)
        )
    )(params)["centroids"][...]
    output, loss = jax.jit(lambda: (both(0.0), both(1.0)))()
    assert not np.any(output) and np.abs(loss).max() > 0
    moved = jax.tree.map(lambda a: a, params)
    moved["centroids"][...] = params["centroids"][...] - 0.1 * loss
    out = jax.jit(lambda p: battery.nnx.merge(graphdef, p)(jnp.asarray(x), seq).losses["commitment"])
    before = out(params)
    assert out(moved) < before


def test_initial_centroids():
    """As long as what they are compared with, averages too, before any step has been."""
    for fields in ({}, {"centroid_decay": 0.9}):
        built = mixers.build({"name": "routing", **fields}, width=16, rngs=cases.nnx.Rngs(0))
        np.testing.assert_allclose((built.current_centroids() ** 2).mean(-1), 1, atol=1e-3)
