"""Attention with weights 1 + s + s^2 / 2: blocks and the features of the recurrence against the formula, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops.documents import document_index
from attnlab.ops.feature_maps import Taylor
from attnlab.ops.linear_recurrence import flops_per_token, linear_recurrence
from attnlab.ops.masks import Mask, mask_from_segments
from attnlab.ops.taylor_attention import pairs_are_fewer, taylor_attention

run = functools.partial(jax.jit, static_argnames=("impl", "scale"))(taylor_attention)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays(T, H=4, K=2, d=6, e=5, size=1.0):
    rng = np.random.default_rng(0)
    shapes = (2, T, H, d), (2, T, K, d), (2, T, K, e)
    return [jnp.asarray(size * rng.standard_normal(shape)) for shape in shapes]


def packed(T):
    """Documents and padding behind, other ones in each row."""
    segments = np.zeros((2, T), np.int32)
    for row, ends in enumerate(((T // 3, T - 2), (5, T // 2, T))):
        for i, (first, end) in enumerate(zip((0, *ends), ends), start=1):
            segments[row, first:end] = i
    return jnp.asarray(segments)


def written_out(q, k, v, segments, scale):
    """Key by key, of each query's document."""
    (B, T, H, _), G = q.shape, q.shape[2] // k.shape[2]
    o = np.zeros((B, T, H, v.shape[3]))
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] != 0]
        s = np.asarray(k)[b, seen, h // G] @ np.asarray(q)[b, t, h] * scale
        w = 1 + s + s**2 / 2
        o[b, t, h] = (w / w.sum()) @ np.asarray(v)[b, seen, h // G] if seen else 0
    return o


@pytest.mark.parametrize("impl", ["blocks", "definition"])
def test_is_the_formula(impl):
    """Packed rows with padding, key heads shared, another scale; blocks that do not divide the length."""
    q, k, v = arrays(23)
    segments = packed(23)
    mask = mask_from_segments(segments, 23, causal=True)
    for scale in (6**-0.5, 0.9):
        o = run(q, k, v, mask, scale=scale, impl=impl)
        np.testing.assert_allclose(o, written_out(q, k, v, segments, scale), atol=1e-13)


@pytest.mark.parametrize("T, mask", [(300, "packed"), (300, "causal"), (70, "window"), (70, "all")])
def test_blocks_are_the_definition(T, mask):
    """Values and gradients over several blocks of rows, whatever of the keys the rows see."""
    masks = {"causal": Mask(causal=True), "window": Mask(causal=True, window=9), "all": Mask()}
    mask = mask_from_segments(packed(T), T, causal=True) if mask == "packed" else masks[mask]
    given = arrays(T)

    @functools.partial(jax.jit, static_argnums=0)
    def both(impl, *given):
        def value(*given):
            o = taylor_attention(*given, mask, impl=impl)
            return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

        return jax.value_and_grad(value, (0, 1, 2), has_aux=True)(*given)

    for a, b in zip(*(jax.tree.leaves(both(impl, *given)) for impl in ("auto", "definition")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_is_the_recurrence_of_features():
    """With values and a column of ones, in documents: values and gradients."""
    q, k, v = arrays(40, K=4)
    segments = jnp.asarray([[1] * 11 + [2] * 29, [1] * 40])
    mask, documents = mask_from_segments(segments, 40, causal=True), document_index(segments)

    def of_features(q, k, v):
        u = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        sums, _ = linear_recurrence(q, k, u, documents_BT=documents, features=Taylor(6), chunk=8)
        return sums[..., :-1] / sums[..., -1:]

    def both(op):
        value = lambda *a: (jnp.sum(jnp.sin(op(*a))), op(*a))
        return jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(q, k, v)

    pairs, features = both(lambda *a: taylor_attention(*a, mask)), both(of_features)
    for a, b in zip(jax.tree.leaves(pairs), jax.tree.leaves(features), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_huge_scores_stay_finite_and_weights_are_no_less_than_a_half():
    """Scores of 1e6, of either sign, and of -1, where a weight is least: the mean of values weighted so, with
    gradients, in float32 as in float64."""
    q, k, v = arrays(60, size=1e3)
    v = v / 1e3
    k = k.at[:, 7].set(-jnp.sqrt(6.0) * q[:, 7, ::2] / jnp.sum(q[:, 7, ::2] ** 2, -1, keepdims=True))
    want, mask = run(q, k, v, Mask(causal=True), impl="definition"), Mask(causal=True)
    near = [x.astype(jnp.float32) for x in (q, k, v)]
    np.testing.assert_allclose(run(*near, mask), want, atol=1e-4)
    slopes = jax.jit(jax.grad(lambda *a: taylor_attention(*a, mask).sum(), (0, 1, 2)))(*near)
    assert all(np.isfinite(x).all() for x in slopes)


def test_memory_is_linear_in_the_length():
    """No array of the program, forward and backward, holds more than a block of 256 rows' weights."""
    T = 4096
    shapes = [jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)] * 3
    step = jax.jit(jax.grad(lambda *a: taylor_attention(*a, Mask(causal=True)).sum(), (0, 1, 2)))
    assert step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 8 * 256 * T * 4 < T * T * 4


def test_pairs_are_fewer_in_short_rows():
    """Where the FLOPs of causal pairs are below those of features, and not far above where they begin to be."""
    for d in (64, 128):
        F, pairs = Taylor(d).count, lambda T: 4 * d * (T + 1) / 2
        features = lambda T: flops_per_token(T, 64, Taylor(d).count, d + 1)
        assert pairs_are_fewer(2 * F - 1, d) and not pairs_are_fewer(2 * F, d)
        assert pairs(2 * F) < features(2 * F) and pairs(4 * F) > features(4 * F)
