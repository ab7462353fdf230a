"""The identities of Mamba-2 (Dao and Gu 2024), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.mamba2 import Mamba2Config
from attnlab.ops.linear_recurrence import linear_recurrence
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "q k v out gate step",
    "taps": "conv_q.filters conv_k.filters conv_v.filters",
    "scale": "norm skip",
    "decay_rate": "a_log dt_bias",
}
# In float32 gradients of decays are sums of differences, in the kernel as in XLA's form.
KERNEL_TOLERANCE = 1e-4
WRITTEN_OUT = True


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(Mamba2Config(**{"state_width": 5, **fields}), jnp.float64)


def call(module, x):
    graphdef, params = cases.split(module)
    run = lambda params, x: nnx.merge(graphdef, params)(x, mixers.Sequence.whole(*x.shape[:2])).y
    return np.asarray(jax.jit(run)(params, x))


def silu(z):
    return z / (1 + np.exp(-z))


def convolved(conv, y):
    """SiLU of the convolution of y [T, channels] with its bias."""
    filters = np.asarray(conv.filters[...])
    padded = np.concatenate([np.zeros((len(filters) - 1, y.shape[1])), y])
    return silu(sum(w * padded[i : i + len(y)] for i, w in enumerate(filters)) + np.asarray(conv.bias[...]))


def inputs_of(module, x):
    """q, k [T, G, N], v [T, H, P], dt [T, H], of one sequence [T, D]."""
    weight, c = lambda linear: np.asarray(linear.kernel[...]), module.config
    made = [
        convolved(conv, x @ weight(linear)).reshape(len(x), n, -1)
        for linear, conv, n in (
            (module.q, module.conv_q, c.groups),
            (module.k, module.conv_k, c.groups),
            (module.v, module.conv_v, c.heads),
        )
    ]
    return *made, np.log1p(np.exp(x @ weight(module.step) + np.asarray(module.dt_bias[...])))


def finished(module, x, o):
    """The layer's output of the heads' [T, H, P]: gate, norm of each group, projection."""
    weight, groups = lambda linear: np.asarray(linear.kernel[...]), module.config.groups
    y = (o.reshape(len(x), -1) * silu(x @ weight(module.gate))).reshape(len(x), groups, -1)
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5)
    return (y.reshape(len(x), -1) * np.asarray(module.norm.scale[...])) @ weight(module.out)


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in NumPy."""
    c = module.config
    q, k, v, dt = inputs_of(module, x)
    A, D = np.exp(np.asarray(module.a_log[...])), np.asarray(module.skip[...])
    S, o = np.zeros((c.heads, c.state_width, module.head_dim)), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(c.heads):
            g = h * c.groups // c.heads
            S[h] = np.exp(-A[h] * dt[t, h]) * S[h] + np.outer(k[t, g], dt[t, h] * v[t, h])
            o[t, h] = S[h].T @ q[t, g] + D[h] * v[t, h]
    return finished(module, x, o)


@pytest.mark.parametrize("fields", [{}, {"groups": 2, "expand": 1.5}])
def test_layer_is_the_formula(fields):
    """The whole layer written out, with chunks that do not divide the length, and groups of heads."""
    module = make(chunk=4, **fields)
    x, _ = cases.inputs(jnp.float64)
    for got, row in zip(call(module, x), np.asarray(x), strict=True):
        np.testing.assert_allclose(got, naive(module, row), atol=1e-12)


def test_is_masked_attention():
    """The duality: `(L * q k^T) v` with `L_ts = exp(-A (dt_{s+1} + .. + dt_t)) dt_s`, plus D v (section 5)."""
    module = make()
    x, _ = cases.inputs(jnp.float64)
    row = np.asarray(x[0])
    q, k, v, dt = inputs_of(module, row)
    o, total = np.zeros_like(v), np.cumsum(dt, axis=0)
    for h, A in enumerate(np.exp(np.asarray(module.a_log[...]))):
        mask = np.tril(np.exp(-A * (total[:, None, h] - total[None, :, h]))) * dt[None, :, h]
        o[:, h] = (mask * (q[:, 0] @ k[:, 0].T)) @ v[:, h] + float(module.skip[h]) * v[:, h]
    np.testing.assert_allclose(call(module, x)[0], finished(module, row, o), atol=1e-12)


def test_constant_steps_are_a_fixed_decay():
    """Where dt does not depend on the input and D is 0: linear attention with one decay per head, as lightning's."""
    module = make()
    module.step.kernel[...] = jnp.zeros_like(module.step.kernel[...])
    module.skip[...] = jnp.zeros_like(module.skip[...])
    x, _ = cases.inputs(jnp.float64)
    q, k, v, dt = map(np.stack, zip(*(inputs_of(module, row) for row in np.asarray(x)), strict=True))
    assert np.ptp(dt, axis=(0, 1)).max() < 1e-15
    shared = lambda y: jnp.asarray(np.repeat(y, module.config.heads, axis=2))
    decay = -jnp.exp(module.a_log[...]) * dt[0, 0]
    o, _ = jax.jit(linear_recurrence)(shared(q), shared(k), dt[..., None] * v, log_decay=decay)
    for got, row, heads in zip(call(module, x), np.asarray(x), np.asarray(o), strict=True):
        np.testing.assert_allclose(got, finished(module, row, heads), atol=1e-12)


def test_first_values():
    """For x = 0: time steps in [0.001, 0.1], rates in [1, 16), D = 1; the paper's widths where they are asked for."""
    module = mixers.build({"name": "mamba2", "heads": 64, "head_width": 2}, width=16, rngs=nnx.Rngs(0))
    steps, rates = np.log1p(np.exp(np.asarray(module.dt_bias[...]))), np.exp(np.asarray(module.a_log[...]))
    assert 0.999e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.1001
    assert 0.999 < rates.min() < 2 and 14 < rates.max() < 16
    assert np.all(module.skip[...] == 1)
    assert Mamba2Config(heads=32).head_dim(1024) == 64 and Mamba2Config().state_width == 128


def test_impossible_knobs():
    with pytest.raises(ConfigError, match=r"groups = 3.*divisors of heads \(4\)"):
        Mamba2Config(groups=3)
    with pytest.raises(ConfigError, match="expand = 1.3"):
        Mamba2Config(expand=1.3).head_dim(16)
