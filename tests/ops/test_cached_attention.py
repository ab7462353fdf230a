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
from tests.ops import reference


@tiers.often("extras1-2-4-2-3", "extras1-1-3-1-1", "extras0-2-4-2-1")
@pytest.mark.parametrize("queries", [1, 3])
@tiers.parametrize("batch, heads, kv_heads", [(1, 3, 3), (2, 4, 2), (1, 3, 1)], often=[(2, 4, 2), (1, 3, 1)])
@pytest.mark.parametrize("extras", [{}, {"soft_cap": 2.0, "sinks": True, "scale": 0.3}])
def test_equals_the_definition(batch, heads, kv_heads, queries, extras):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        S, d, e = 11, 6, 5
        normal = lambda *shape: rng.normal(size=shape)
        q, k, v = normal(batch, queries, heads, d), normal(batch, S, kv_heads, d), normal(batch, S, kv_heads, e)
        sinks = normal(heads) if extras.get("sinks") else None
        options = {name: value for name, value in extras.items() if name != "sinks"}
        start = rng.integers(0, 5, (batch, queries)).astype(np.int32)
        mask = mask_for_extension(4, queries, start, window=4)
        weights = normal(batch, queries, heads, e)
        rows = lambda x: x.swapaxes(1, 2).reshape(-1, S, x.shape[-1])

        @jax.jit
        def run(q, k, v, sinks):
            f = lambda q, k, v, sinks: cached_attention(q, rows(k), rows(v), mask, sinks_H=sinks, **options)
            o, vjp = jax.vjp(f, q, k, v, sinks)
            return jax.tree.leaves((o, vjp(jnp.asarray(weights))))

        expected = reference.attention(q, k, v, mask, weights, sinks=sinks, **options)
        for a, b in zip(run(q, k, v, sinks), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@tiers.often("3-auto", "1-one_query")
@pytest.mark.parametrize("queries, impl", [(1, "one_query"), (1, "tiles"), (3, "auto")])
def test_biases(queries, impl):
    """Of keys by query heads and of queries by key heads, beside sinks, values and gradients; none is left out."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        B, S, H, K, d = 2, 9, 4, 2, 5
        shapes = (B, queries, H, d), (B, S, K, d), (B, S, K, d), (H,), (B, S, H), (1, queries, K)
        arrays = [rng.normal(size=shape) for shape in shapes]
        mask = mask_for_extension(5, queries, np.asarray([[0] * queries, [2] * queries]))
        rows = lambda x: x.swapaxes(1, 2).reshape(-1, S, d)

        def gradients(f):
            run = lambda q, k, v, *rest: f(q, k, v, mask, **dict(zip(names, rest)))
            names = "sinks_H", "key_bias_BSh", "query_bias_BTh"
            weights = np.cos(np.arange(B * queries * H * d)).reshape(shapes[0])
            return jax.grad(lambda *a: jnp.sum(weights * run(*a)), range(6))

        found = gradients(lambda q, k, v, mask, **o: cached_attention(q, rows(k), rows(v), mask, impl=impl, **o))
        expected = gradients(lambda *args, **options: attention(*args, impl="definition", **options))
        both = jax.jit(lambda *arrays: (found(*arrays), expected(*arrays)))(*arrays)
        for a, b in zip(*both, strict=True):
            assert np.abs(b).max() > 1e-3
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("masks", [1, 2, 4])
def test_masks_of_heads(masks):
    """One query, by its own implementation, under a mask of all heads, of each key head, of each query head."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        B, S, H, K, d = 2, 9, 4, 2, 5
        q, k, v = (rng.normal(size=shape) for shape in ((B, 1, H, d), (B, S, K, d), (B, S, K, d)))
        key = rng.integers(0, 4, (B, masks, S)).astype(np.int32)
        lo = rng.integers(0, 3, (B, masks, 1)).astype(np.int32)
        mask = Mask(axes=(Axis(key, lo, lo + 2),))
        rows = lambda x: x.swapaxes(1, 2).reshape(-1, S, d)
        found = jax.jit(lambda q, k, v, mask: cached_attention(q, k, v, mask, impl="one_query"))(
            q, rows(k), rows(v), mask
        )
        np.testing.assert_allclose(found, reference.attention(q, k, v, mask, q)[0], atol=1e-12)


def test_a_query_that_sees_nothing_gives_zero():
    q, kv = np.full((1, 1, 2, 4), 1e4, np.float32), np.full((2, 5, 4), 1e4, np.float32)
    nothing = np.full((1, 1), 5, np.int32)
    f = lambda q, k, v, none: jnp.sum(cached_attention(q, k, v, Mask(none, none)))
    value, grads = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, kv, kv, nothing)
    assert value == 0 and not any(map(np.any, grads))


def test_low_precision_keeps_its_type():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((1, 1, 2, 8), (2, 7, 8), (2, 7, 8)))
    run = lambda *qkv: cached_attention(*qkv, mask_for_extension(6, 1))
    o, wide = jax.jit(lambda *qkv: (run(*qkv), run(*(x.astype(jnp.float32) for x in qkv))))(q, k, v)
    assert o.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(o).astype(np.float32), wide, atol=0.02)
