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
    return np.random.default_rng(seed).standard_normal(shape)


def test_layer_norm_is_the_formula():
    x, scale, bias = normal(3, 5), normal(5, seed=1), normal(5, seed=2)
    normed = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.3)
    plain = lambda x, scale, bias: normed(x) * scale + bias
    results = []
    for f in (lambda *a: layer_norm(*a, epsilon=0.3), plain):
        scalar = lambda *a, f=f: jnp.sum(jnp.sin(f(*a)))
        results.append(lambda *a, f=f, scalar=scalar: (f(*a), *jax.grad(scalar, argnums=(0, 1, 2))(*a)))
    ours, formula = jax.jit(lambda *arrays: [f(*arrays) for f in results])(x, scale, bias)
    for a, b in zip(ours, formula, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


def test_unit_has_length_one_and_zero_stays():
    run = jax.jit(lambda x: (unit(x), jax.grad(lambda x: unit(x).sum())(x)))
    x = 1e3 * normal(3, 5)
    np.testing.assert_allclose(np.linalg.norm(run(x)[0], axis=-1), 1, atol=1e-11)
    of_zero, gradient = run(0 * x)
    assert not np.any(of_zero) and np.all(np.isfinite(gradient))


def test_partial_rotary_turns_the_first_channels_alone():
    """As if they were the head; the gradient is the rotation back."""
    x, position = normal(2, 7, 3, 10), np.arange(14).reshape(2, 7)

    @jax.jit
    def run(x):
        turned, vjp = jax.vjp(lambda x: rope(x, position, 50.0, 4), x)
        return (
            turned,
            *vjp(turned),
            rope(x[..., :4], position, 50.0),
            *(rope(x, position, 50.0, *n) for n in ((10,), ())),
        )

    turned, back, alone, ten, whole = map(np.asarray, run(x))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], alone)
    np.testing.assert_array_equal(ten, whole)
    angle = position[..., None, None] * 50.0 ** (-2 * np.arange(2) / 4)
    z = (x[..., :2] + 1j * x[..., 2:4]) * np.exp(1j * angle)
    np.testing.assert_allclose(turned[..., :4], np.concatenate([z.real, z.imag], -1), atol=1e-13)
    np.testing.assert_allclose(back, x, atol=1e-13)


def test_a_bias_is_a_row_of_the_kernel():
    """Values and gradients of `x W + b`: those of `[x, 1] [W; b]`."""
    module = Linear(4, 3, ("embed", "heads"), rngs=nnx.Rngs(0), dtype=jnp.float64, bias=True)
    assert module.bias.shape == (3,) and not np.any(module.bias[...])
    module.bias[...] = normal(3, seed=1)
    x = normal(2, 5, 4)
    graphdef, params = nnx.split(module)
    value, of_params = jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(x)))))(params)
    rows = np.concatenate([module.kernel[...], module.bias[...][None]])
    ones = np.concatenate([x, np.ones((2, 5, 1))], -1)
    want, of_rows = np.sum(np.sin(ones @ rows)), np.einsum("bti,bto->io", ones, np.cos(ones @ rows))
    np.testing.assert_allclose(value, want, rtol=1e-13)
    np.testing.assert_allclose(of_params["kernel"][...], of_rows[:-1], atol=1e-12)
    np.testing.assert_allclose(of_params["bias"][...], of_rows[-1], atol=1e-12)


def test_seen_counts_the_mask():
    """The number of keys that each query sees is the mask written out, summed; outside bounds nothing is counted."""
    segments = np.asarray([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 0, 0]])
    masks = [Mask(), Mask(causal=True), Mask(causal=True, window=2), Mask(window=2)]
    masks += [mask_from_segments(segments, 6, causal=c, window=w) for c, w in ((True, None), (False, None), (True, 2))]
    masks += [Mask(np.asarray([[-2, 0, 4, 5, 0, 0]]), np.asarray([[3, 9, 2, 5, 6, 0]]))]
    counted = jax.jit(lambda masks: [mask.seen(6, 6) for mask in masks])(masks)
    for mask, seen in zip(masks, counted, strict=True):
        np.testing.assert_array_equal(seen, jax.tree.map(np.asarray, mask).visible(6, 6)[:, 0].sum(-1))
