"""Softmax attention against the formula written out in NumPy, and what its knobs must mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks, mixers
from attnlab.errors import ConfigError
from tests import tiers
from tests.masks.test_power_blocks import sees
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out", "bias": "sinks", "scale": "q_norm k_norm temperature"}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def rms(x, scale, epsilon=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def normed(x, norm, kind, epsilon=None):
    """RMSNorm or LayerNorm with the module's parameters; cosine: length 1."""
    if kind == "cosine":
        return x / np.sqrt((x * x).sum(-1, keepdims=True) + (epsilon or 1e-6))
    if kind == "layer":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + (epsilon or 1e-5))
        return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    return rms(x, np.asarray(norm.scale[...]), epsilon or 1e-6)


def rotate(x, positions, base, width, scaling=None):
    """Complex form of RoPE, one head vector at a time, of the first `width` channels."""
    x, rest = np.split(x, [width or x.shape[-1]], axis=-1)
    d = x.shape[-1]
    frequencies, factor = base ** (-2.0 * np.arange(d // 2) / d), 1.0
    if scaling is not None:  # tests/ops/test_rope_scaling.py writes its rules out
        frequencies, factor = scaling.of(base, d)
    z = x[..., : d // 2] + 1j * x[..., d // 2 :]
    z = factor * z * np.exp(1j * positions[:, None] * frequencies)
    return np.concatenate([z.real, z.imag, rest], -1)


def layer(module, x, positions, segments):
    """The whole layer for one row, head by head and query by query."""
    c = module.config
    projected = lambda m, x: x @ np.asarray(m.kernel[...]) + (0 if m.bias is None else np.asarray(m.bias[...]))
    d, group = module.head_dim, c.heads // c.key_heads
    if (K := c.input_conv) > 1:
        taps = np.asarray(module.input_taps[...])
        near = lambda t: [i for i in range(K) if t >= i and segments[t - i] == segments[t]]
        x = np.stack([x[t] + sum(taps[K - 1 - i] * x[t - i] for i in near(t)) for t in range(len(x))])
    q, k, v = (projected(m, x) for m in (module.q, module.k, module.v))
    masked = np.ones((len(x),) * 2, bool) if c.mask is None else sees(masks.config_from_node(c.mask), len(x))
    out = np.zeros((len(x), c.heads * d))
    for h in range(c.heads):
        a, b = h * d, (h // group) * d
        qh, kh, vh = q[:, a : a + d], k[:, b : b + d], v[:, b : b + d]
        if c.qk_norm:
            norms = (None, None) if c.qk_norm == "cosine" else (module.q_norm, module.k_norm)
            qh, kh = (normed(y, norm, c.qk_norm, c.qk_epsilon) for y, norm in zip((qh, kh), norms))
        if c.rope_base is not None:
            qh, kh = (rotate(y, positions, c.rope_base, c.rope_width, c.rope_scaling) for y in (qh, kh))
        for t in range(len(x)):
            seen = [
                s
                for s in range(len(x))
                if segments[s] == segments[t] != 0
                and (s <= t or not c.causal)
                and (c.window is None or t - s < c.window)
                and masked[positions[t], positions[s]]
            ]
            if not seen:
                continue
            scale = d**-0.5 if c.query_scale is None else c.query_scale
            if c.qk_norm == "cosine":
                scale = np.log1p(np.exp(float(module.temperature[...][h]))) * np.log(len(seen))
            logits = kh[seen] @ qh[t] * scale
            if c.soft_cap is not None:
                logits = c.soft_cap * np.tanh(logits / c.soft_cap)
            total = np.exp(logits).sum() + (np.exp(float(module.sinks[...][h])) if c.sinks else 0)
            out[t, a : a + d] = np.exp(logits) / total @ vh[seen]
    return projected(module.out, out)


@tiers.parametrize("name", cases.configs("softmax"), often=list(cases.configs("softmax"))[1:4])
def test_equals_the_formula(name):
    """Every knob: the layer is softmax(q k^T / sqrt(d)) v as written, in float64."""
    config, _ = cases.configs("softmax")[name]
    module = cases.module(config, jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = cases.output(module, x, seq)
    for row in range(2):
        expected = layer(module, np.asarray(x[row]), cases.POSITIONS[row], cases.SEGMENTS[row])
        np.testing.assert_allclose(y[row], expected, atol=1e-10)


def test_window_counts_itself():
    """A window of w lets a change reach exactly w positions, its own included."""
    module = cases.module(mixers.get("softmax").Config(window=3), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(*x.shape[:2])
    moved = np.abs(cases.output(module, x.at[:, 4].add(1.0), seq) - cases.output(module, x, seq)).max((0, 2)) > 0
    assert np.flatnonzero(moved).tolist() == [4, 5, 6]


def test_relative_positions():
    """RoPE: shifting all positions changes nothing."""
    module = cases.module(mixers.get("softmax").Config(), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(*x.shape[:2])
    shifted = mixers.Sequence(seq.positions + 1000)
    np.testing.assert_allclose(cases.output(module, x, shifted), cases.output(module, x, seq), atol=1e-10)


@tiers.exhaustive
def test_biases_of_keys_cancel_and_those_of_values_are_added():
    """Without RoPE a bias of keys adds one number to all logits of a query: nothing changes, and its gradient is 0.
    Weights sum to 1: a bias of values comes out through the output's projection, whose own bias is added."""
    make = lambda bias: cases.module(mixers.get("softmax").Config(bias=bias, rope_base=None), jnp.float64)
    plain, full = make("none"), make("all")
    for name in ("q", "k", "v", "out"):
        getattr(full, name).kernel[...] = getattr(plain, name).kernel[...]
    full.q.bias[...] = jnp.zeros(16)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(*x.shape[:2])
    added = full.v.bias[...] @ full.out.kernel[...] + full.out.bias[...]
    assert np.abs(full.k.bias[...]).min() > 1e-3 and np.abs(added).max() > 0.1
    np.testing.assert_allclose(cases.output(full, x, seq), cases.output(plain, x, seq) + added, atol=1e-12)
    graphdef, params = cases.split(full)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(x, seq).y))))(params)
    np.testing.assert_allclose(gradient["k"]["bias"][...], 0, atol=1e-12)
    assert np.abs(gradient["v"]["bias"][...]).min() > 1e-3


def test_cosine_attention_does_not_see_the_length_of_keys():
    """Scaling W_k and W_q changes nothing but through the epsilon of 1e-6; the first temperature is 1 / 0.24."""
    module = cases.module(mixers.get("softmax").Config(qk_norm="cosine"), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    first = cases.output(module, 1e3 * x, seq)
    for name in ("q", "k"):
        getattr(module, name).kernel[...] = 7 * getattr(module, name).kernel[...]
    np.testing.assert_allclose(cases.output(module, 1e3 * x, seq), first, atol=1e-7)
    fresh = mixers.build({"name": "softmax", "qk_norm": "cosine"}, width=16, rngs=nnx.Rngs(0), dtype=jnp.float64)
    np.testing.assert_allclose(jax.nn.softplus(fresh.temperature[...]), np.full(4, 1 / 0.24), rtol=1e-12)


def test_logits_of_cosine_attention_grow_with_the_number_of_keys():
    """One key that agrees with the query, against n - 1 that are orthogonal to it, weighs n^s / (n^s + n - 1), with
    s = softplus(tau)."""
    module = cases.module(mixers.get("softmax").Config(qk_norm="cosine", rope_base=None, causal=False), jnp.float64)
    s = np.asarray(jax.nn.softplus(module.temperature[...]))
    for n in (3, 9):
        q, k, v = np.zeros((3, 1, n, 4, 4))
        q[..., 0] = k[:, 0, :, 0] = k[:, 1:, :, 1] = v[:, 0] = 1.0
        module.positioned = lambda x, seq, qkv=(q, k, v): tuple(map(jnp.asarray, qkv))
        o = jax.jit(lambda n=n: module.heads(jnp.zeros((1, n, 16)), mixers.Sequence.whole(1, n)).y)()
        np.testing.assert_allclose(o[0, 0, :, 0], n**s / (n**s + n - 1), rtol=1e-12)


def test_windowed_state_does_not_grow():
    """With a window of w the state holds w - 1 keys, however long the sequence."""
    sizes = {mixers.get("softmax").cost(mixers.get("softmax").Config(window=3), 16, n).state_bytes for n in (8, 1024)}
    assert len(sizes) == 1


def test_more_positions_than_room_are_loud():
    """A cache that overflows gives NaN, never a plausible number."""
    module = cases.module(mixers.get("softmax").Config(), jnp.float32)
    state = module.init_state(1, 3)
    x, seq = jnp.ones((1, 4, 16), jnp.float32), mixers.Sequence.whole(1, 4)
    y, _ = cases.streamed(jax.jit(module.extend), state, x, seq, (2, 2))
    assert np.isfinite(y[:, :2]).all() and np.isnan(y[:, 2:]).all()


def test_a_stream_says_where_it_stands():
    """`extend` refuses a sequence whose documents nobody has derived."""
    module = mixers.build({"name": "softmax"}, width=16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Stream.extend"):
        module.extend(jnp.ones((1, 2, 16)), mixers.Sequence.whole(1, 2), module.init_state(1, 3))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 0}, "heads = 0"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads = 3"),
        ({"window": 0}, "window = 0"),
        ({"window": 3, "causal": False}, "causal"),
        ({"head_width": 3}, "head_width = 3"),
        ({"soft_cap": -1.0}, "soft_cap"),
        ({"impl": "cuda"}, "impl = 'cuda'"),
        ({"bias": "kv"}, "none, qkv, all"),
        ({"rope_width": 3}, "rope_width = 3 .*even"),
        ({"rope_width": 2, "rope_base": None}, "rope_width = 2 .*none where rope_base is"),
        ({"qk_norm": "rms"}, "qk_norm = 'rms' .*false, true, layer, cosine"),
        ({"widow": 3}, "did you mean 'window'"),
        ({"heads": "four"}, "an integer"),
    ],
)
def test_impossible_configs(fields, message):
    """Impossible values are refused at construction, by name."""
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "softmax", **fields})


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ConfigError, match="heads = 3 does not divide width = 16"):
        mixers.build({"name": "softmax", "heads": 3}, width=16, rngs=nnx.Rngs(0))


def test_rope_turns_no_more_than_a_head():
    with pytest.raises(ConfigError, match="rope_width = 6 .*4, a head's width, or less"):
        mixers.build({"name": "softmax", "rope_width": 6}, width=16, rngs=nnx.Rngs(0))
