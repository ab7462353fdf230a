"""The identities of lightning attention (Qin et al. 2024), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.lightning import slopes
from attnlab.ops.linear_recurrence import linear_recurrence
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out gate_down gate_up", "scale": "scale", "bias": "bias"}
WRITTEN_OUT = True

HEADS = 4


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("lightning").Config(**fields), jnp.float64)


def whole():
    x, _ = cases.inputs(jnp.float64)
    return x, mixers.Sequence.whole(*x.shape[:2])


def projections(module, x):
    """SiLU of queries, keys and values [B, T, H, d], and the gate [B, T, H, d]."""
    split = lambda y: np.asarray(y).reshape(*x.shape[:2], module.config.heads, -1)
    silu = lambda z: z / (1 + np.exp(-z))
    q, k, v = (split(silu(np.asarray(x @ w.kernel[...]))) for w in (module.q, module.k, module.v))
    z = np.asarray(x @ module.gate_down.kernel[...] @ module.gate_up.kernel[...])
    return q, k, v, split(1 / (1 + np.exp(-z)))


def finished(module, o, gate, x):
    """The layer's output from the sums o: the norm without scale over all heads, gate, projection."""
    o = o / np.sqrt((o**2).mean((-2, -1), keepdims=True) + module.config.norm_epsilon)
    return (o * gate).reshape(*x.shape[:2], -1) @ np.asarray(module.out.kernel[...])


def naive(q, k, v, rates):
    """sum_{s <= t} exp(-rate (t - s)) (q_t . k_s) v_s, by loops."""
    o = np.zeros(v.shape)
    for t in range(v.shape[1]):
        for s in range(t + 1):
            score = (q[:, t] * k[:, s]).sum(-1) * np.exp(-np.asarray(rates) * (t - s))
            o[:, t] += score[..., None] * v[:, s]
    return o


@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_naive_is_chunk(impl):
    """The whole layer, written out."""
    module = make(impl=impl, chunk=4)
    x, seq = whole()
    q, k, v, gate = projections(module, x)
    rates = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    np.testing.assert_allclose(
        cases.output(module, x, seq), finished(module, naive(q, k, v, rates), gate, x), atol=1e-12
    )


@tiers.exhaustive
def test_naive_is_step():
    """Position by position from the empty state."""
    module = make()
    x, seq = whole()
    expected = cases.output(module, x, seq)
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    y, _ = cases.streamed(jax.jit(module.extend), state, x, seq, [1] * cases.LENGTH)
    np.testing.assert_allclose(y, expected, atol=1e-12)


def test_slopes_are_alibis():
    """2^(-8 (h + 1) / H): a half, a quarter ... for eight heads."""
    np.testing.assert_allclose(slopes(8), 0.5 ** np.arange(1, 9), rtol=1e-15)


def test_interleaved_slopes_are_those_of_the_released_code():
    """Powers of two as they are; else the power of two below, then every second of the one above: a geometric series
    of ratio 2^(-2^(3 - log2 n)) each."""
    series = lambda n: (2.0 ** -(2.0 ** (3 - np.log2(n)))) ** np.arange(1, n + 1)
    for heads in (1, 2, 8, 16):
        np.testing.assert_allclose(slopes(heads, "interleaved"), slopes(heads), rtol=1e-15)
    np.testing.assert_allclose(slopes(3, "interleaved"), [2**-4, 2**-8, 2**-2], rtol=1e-15)
    np.testing.assert_allclose(slopes(12, "interleaved"), [*series(8), *series(16)[[0, 2, 4, 6]]], rtol=1e-14)


def test_layer_with_interleaved_slopes_and_another_epsilon():
    """Three heads, written out; the epsilon is added to the mean square."""
    module = make(heads=3, head_width=4, slopes="interleaved", norm_epsilon=0.1)
    x, seq = whole()
    q, k, v, gate = projections(module, x)
    expected = finished(module, naive(q, k, v, [2.0**-4, 2.0**-8, 2.0**-2]), gate, x)
    np.testing.assert_allclose(cases.output(module, x, seq), expected, atol=1e-12)


def test_no_decay_is_linear_attention():
    """decay_scale = 0: q_t times the running sum of k v^T."""
    module = make(decay_scale=0.0, chunk=4)
    x, seq = whole()
    q, k, v, gate = projections(module, x)
    memory = np.cumsum(np.einsum("bthd,bthe->bthde", k, v), axis=1)
    o = np.einsum("bthd,bthde->bthe", q, memory)
    np.testing.assert_allclose(cases.output(module, x, seq), finished(module, o, gate, x), atol=1e-12)


def test_instant_decay_leaves_the_token_itself():
    """decay_scale to infinity: (q_t . k_t) v_t."""
    module = make(decay_scale=1e9, chunk=4)
    x, seq = whole()
    q, k, v, gate = projections(module, x)
    o = (q * k).sum(-1, keepdims=True) * v
    np.testing.assert_allclose(cases.output(module, x, seq), finished(module, o, gate, x), atol=1e-12)


@tiers.exhaustive
def test_is_retention_without_rotation():
    """The sums are RetNet's parallel form (Q K^T * D) V, D_ts = gamma^(t - s), with gamma = exp(-slope)."""
    x, _ = whole()
    q, k, v, _ = projections(make(), x)
    gamma = np.exp(-np.asarray(slopes(HEADS)))
    t = np.arange(cases.LENGTH)
    D = np.where(t[:, None] >= t, gamma[:, None, None] ** np.maximum(t[:, None] - t, 0), 0.0)
    expected = np.einsum("bhts,bshe->bthe", np.einsum("bthd,bshd->bhts", q, k) * D, v)
    o, _ = linear_recurrence(*map(jnp.asarray, (q, k, v)), log_decay=-slopes(HEADS), chunk=4)
    np.testing.assert_allclose(o, expected, atol=1e-12)


def test_norm_removes_the_scale_of_values():
    """The sums have no denominator: the norm takes away any factor on the heads' outputs, and without a learned
    scale leaves a mean square of one."""
    rng = np.random.default_rng(0)
    o = jnp.asarray(rng.standard_normal((2, 3, HEADS, 4)))
    for norm_over, axes in (("layer", (-2, -1)), ("head", -1)):
        module = make(norm_over=norm_over)
        np.testing.assert_allclose(module.normed(1e6 * o), module.normed(1e3 * o), atol=1e-9)
        np.testing.assert_allclose((module.normed(1e6 * o) ** 2).mean(axes), 1.0, atol=1e-9)


def test_norms():
    """Each norm written out, with its learned scale and bias."""
    rng = np.random.default_rng(0)
    o = rng.standard_normal((2, 3, HEADS, 4)) + 1
    for norm_over, axes in (("layer", (-2, -1)), ("head", -1)):
        for norm in ("srmsnorm", "rmsnorm", "layernorm"):
            module = make(norm=norm, norm_over=norm_over)
            centred = o - o.mean(axes, keepdims=True) if norm == "layernorm" else o
            expected = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-6)
            if norm != "srmsnorm":
                expected = expected * np.asarray(module.scale[...]).reshape(HEADS, 4)
            if norm == "layernorm":
                expected = expected + np.asarray(module.bias[...]).reshape(HEADS, 4)
            np.testing.assert_allclose(module.normed(jnp.asarray(o)), expected, atol=1e-12)


@tiers.exhaustive
def test_combine_is_linear():
    """The output is the sum over heads of what each gives alone."""
    module = make()
    x, seq = whole()
    o = module.heads(x, seq).y
    alone = sum(module.combine(jnp.zeros_like(o).at[:, :, h].set(o[:, :, h]), x) for h in range(HEADS))
    np.testing.assert_allclose(alone, cases.output(module, x, seq), atol=1e-13)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 0}, "heads = 0"),
        ({"decay_scale": -1.0}, "decay_scale = -1.0"),
        ({"norm": "groupnorm"}, "srmsnorm, rmsnorm, layernorm"),
        ({"norm_epsilon": 0.0}, "norm_epsilon = 0.0"),
        ({"slopes": "alibi"}, "geometric, interleaved"),
        ({"gate_rank": 0}, "gate_rank = 0"),
        ({"chunk": 0}, "chunk = 0"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "lightning", **fields})


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="heads = 3"):
        make(heads=3)
