"""The recurrence h_t = a_t h_{t-1} + x_t: blocks against positions, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops.segmented_ema import definition, segmented_ema


@pytest.mark.parametrize("length", [1, 2, 9, 33])
def test_blocks_equal_the_recurrence(length):
    """Values and all gradients, with segments that begin inside blocks and a start that reaches into the first."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        decay = rng.random((2, length, 3)) * (rng.random((2, length, 3)) > 0.2)
        x, start = rng.standard_normal((2, length, 2, 3)), rng.standard_normal((2, 2, 3))
        scalar = lambda f: lambda *xs: jnp.sum(jnp.sin(f(*xs)) * jnp.arange(1.0, length + 1)[:, None, None])
        run = lambda f: jax.jit(lambda *xs: (f(*xs), *jax.grad(scalar(f), argnums=(0, 1, 2))(*xs)))(decay, x, start)
        expected = [np.asarray(y) for y in run(definition)]
        for got, want in zip(run(segmented_ema), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)
        h = start
        for t in range(length):
            h = decay[:, t, None] * h + x[:, t]
            np.testing.assert_allclose(expected[0][:, t], h, atol=1e-12)
