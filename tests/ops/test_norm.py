"""Norms, RoPE, biases and counts of keys against their formulas, in float64: values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.mixers.parts import Linear
from attnlab.ops import Mask, mask_from_segments
from attnlab.ops.norm import layer_norm, unit
from attnlab.ops.rope import rope


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def test_layer_norm_is_the_formula():
    x, scale, bias = normal(3, 5), normal(5, seed=1), normal(5, seed=2)
    normed = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.3)
    plain = lambda x, scale, bias: normed(x) * scale + bias
    results = []
    for f in (lambda *a: layer_norm(*a, epsilon=0.3), plain):
        scalar = lambda *a, f=f: jnp.sum(jnp.sin(f(*a)))
        results.append((f(x, scale, bias), *jax.grad(scalar, argnums=(0, 1, 2))(x, scale, bias)))
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, atol=1e-13)


def test_unit_has_length_one_and_zero_stays():
    x = 1e3 * normal(3, 5)
    np.testing.assert_allclose(jnp.linalg.norm(unit(x), axis=-1), 1, atol=1e-11)
    assert not np.any(unit(0 * x)) and np.all(np.isfinite(jax.grad(lambda x: unit(x).sum())(0 * x)))


def test_partial_rotary_turns_the_first_channels_alone():
    """As if they were the head; the gradient is the rotation back."""
    x, position = normal(2, 7, 3, 10), jnp.arange(14).reshape(2, 7)
    turned = rope(x, position, 50.0, 4)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], rope(x[..., :4], position, 50.0))
    np.testing.assert_array_equal(rope(x, position, 50.0, 10), rope(x, position, 50.0))
    angle = position[..., None, None] * 50.0 ** (-2 * np.arange(2) / 4)
    z = (x[..., :2] + 1j * x[..., 2:4]) * jnp.exp(1j * angle)
    np.testing.assert_allclose(turned[..., :4], jnp.concatenate([z.real, z.imag], -1), atol=1e-13)
    back = jax.grad(lambda x: jnp.sum(rope(x, position, 50.0, 4) * turned))(x)
    np.testing.assert_allclose(back, x, atol=1e-13)


def test_a_bias_is_a_row_of_the_kernel():
    """Values and gradients of `x W + b`: those of `[x, 1] [W; b]`."""
    module = Linear(4, 3, ("embed", "heads"), rngs=nnx.Rngs(0), dtype=jnp.float64, bias=True)
    assert module.bias.shape == (3,) and not np.any(module.bias[...])
    module.bias[...] = normal(3, seed=1)
    x = normal(2, 5, 4)
    graphdef, params = nnx.split(module)
    value, of_params = jax.value_and_grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(x))))(params)
    rows = jnp.concatenate([module.kernel[...], module.bias[...][None]])
    ones = jnp.concatenate([x, jnp.ones((2, 5, 1))], -1)
    want, of_rows = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(ones @ w)))(rows)
    np.testing.assert_allclose(value, want, rtol=1e-13)
    np.testing.assert_allclose(of_params["kernel"][...], of_rows[:-1], atol=1e-12)
    np.testing.assert_allclose(of_params["bias"][...], of_rows[-1], atol=1e-12)


def test_seen_counts_the_mask():
    """The number of keys that each query sees is the mask written out, summed; outside bounds nothing is counted."""
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 0, 0]])
    masks = [Mask(), Mask(causal=True), Mask(causal=True, window=2), Mask(window=2)]
    masks += [mask_from_segments(segments, 6, causal=c, window=w) for c, w in ((True, None), (False, None), (True, 2))]
    masks += [Mask(jnp.asarray([[-2, 0, 4, 5, 0, 0]]), jnp.asarray([[3, 9, 2, 5, 6, 0]]))]
    for mask in masks:
        np.testing.assert_array_equal(mask.seen(6, 6), mask.visible(6, 6)[:, 0].sum(-1))
