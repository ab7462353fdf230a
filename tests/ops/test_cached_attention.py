"""Attention over a cache against attention's definition, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops.attention import attention
from attnlab.ops.cached_attention import cached_attention
from attnlab.ops.masks import Axis, Mask, mask_for_extension
from tests import tiers


@tiers.often("extras1-2-4-2-3", "extras1-1-3-1-1", "extras0-2-4-2-1")
@pytest.mark.parametrize("queries", [1, 3])
@tiers.parametrize("batch, heads, kv_heads", [(1, 3, 3), (2, 4, 2), (1, 3, 1)], often=[(2, 4, 2), (1, 3, 1)])
@pytest.mark.parametrize("extras", [{}, {"soft_cap": 2.0, "sinks": True, "scale": 0.3}])
def test_equals_the_definition(batch, heads, kv_heads, queries, extras):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        S, d, e = 11, 6, 5
        normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
        q, k, v = normal(batch, queries, heads, d), normal(batch, S, kv_heads, d), normal(batch, S, kv_heads, e)
        sinks = normal(heads) if extras.get("sinks") else None
        options = {name: value for name, value in extras.items() if name != "sinks"}
        start = jnp.asarray(rng.integers(0, 5, (batch, queries)), jnp.int32)
        mask = mask_for_extension(4, queries, start, window=4)
        weights = normal(batch, queries, heads, e)
        rows = lambda x: x.swapaxes(1, 2).reshape(-1, S, x.shape[-1])

        def cached(q, k, v, sinks):
            return cached_attention(q, rows(k), rows(v), mask, sinks_H=sinks, **options)

        def definition(q, k, v, sinks):
            return attention(q, k, v, mask, sinks_H=sinks, impl="definition", **options)

        over = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
        both = []
        for f in (cached, definition):
            scalar = lambda *a, f=f: (jnp.sum(f(*a) * weights), f(*a))
            both.append(jax.jit(jax.value_and_grad(scalar, over, has_aux=True))(q, k, v, sinks))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), *both)


@tiers.often("3-auto", "1-one_query")
@pytest.mark.parametrize("queries, impl", [(1, "one_query"), (1, "tiles"), (3, "auto")])
def test_biases(queries, impl):
    """Of keys by query heads and of queries by key heads, beside sinks, values and gradients; none is left out."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        B, S, H, K, d = 2, 9, 4, 2, 5
        shapes = (B, queries, H, d), (B, S, K, d), (B, S, K, d), (H,), (B, S, H), (1, queries, K)
        arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        mask = mask_for_extension(5, queries, jnp.asarray([[0] * queries, [2] * queries]))
        rows = lambda x: x.swapaxes(1, 2).reshape(-1, S, d)

        def gradients(f):
            run = lambda q, k, v, *rest: f(q, k, v, mask, **dict(zip(names, rest)))
            names = "sinks_H", "key_bias_BSh", "query_bias_BTh"
            weights = jnp.cos(jnp.arange(B * queries * H * d)).reshape(shapes[0])
            return jax.jit(jax.grad(lambda *a: jnp.sum(weights * run(*a)), range(6)))(*arrays)

        found = gradients(lambda q, k, v, mask, **o: cached_attention(q, rows(k), rows(v), mask, impl=impl, **o))
        expected = gradients(lambda *args, **options: attention(*args, impl="definition", **options))
        for a, b in zip(found, expected, strict=True):
            assert np.abs(b).max() > 1e-3
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("masks", [1, 2, 4])
def test_masks_of_heads(masks):
    """One query, by its own implementation, under a mask of all heads, of each key head, of each query head."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        B, S, H, K, d = 2, 9, 4, 2, 5
        q, k, v = (jnp.asarray(rng.normal(size=shape)) for shape in ((B, 1, H, d), (B, S, K, d), (B, S, K, d)))
        key = jnp.asarray(rng.integers(0, 4, (B, masks, S)), jnp.int32)
        lo = jnp.asarray(rng.integers(0, 3, (B, masks, 1)), jnp.int32)
        mask = Mask(axes=(Axis(key, lo, lo + 2),))
        rows = lambda x: x.swapaxes(1, 2).reshape(-1, S, d)
        found = cached_attention(q, rows(k), rows(v), mask, impl="one_query")
        np.testing.assert_allclose(found, attention(q, k, v, mask, impl="definition"), atol=1e-12)


def test_a_query_that_sees_nothing_gives_zero():
    q, kv = jnp.full((1, 1, 2, 4), 1e4), jnp.full((2, 5, 4), 1e4)
    nothing = Mask(jnp.full((1, 1), 5, jnp.int32), jnp.full((1, 1), 5, jnp.int32))
    f = lambda q, k, v: jnp.sum(cached_attention(q, k, v, nothing))
    value, grads = jax.value_and_grad(f, (0, 1, 2))(q, kv, kv)
    assert value == 0 and all(jnp.all(g == 0) for g in grads)


def test_low_precision_keeps_its_type():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((1, 1, 2, 8), (2, 7, 8), (2, 7, 8)))
    mask = mask_for_extension(6, 1)
    o = cached_attention(q, k, v, mask)
    wide = cached_attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    assert o.dtype == jnp.bfloat16
    np.testing.assert_allclose(o.astype(jnp.float32), wide, atol=0.02)
