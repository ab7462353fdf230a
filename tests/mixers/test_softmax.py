"""Softmax attention against the formula written out in NumPy, and what its knobs must mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from tests.mixers import cases


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def rotate(x, positions, base):
    """Complex form of RoPE, one head vector at a time."""
    d = x.shape[-1]
    z = x[..., : d // 2] + 1j * x[..., d // 2 :]
    z = z * np.exp(1j * positions[:, None] * base ** (-2.0 * np.arange(d // 2) / d))
    return np.concatenate([z.real, z.imag], -1)


def layer(module, x, positions, segments):
    """The whole layer for one row, head by head and query by query."""
    c = module.config
    kernel = lambda m: np.asarray(m.kernel[...])
    d, group = module.head_dim, c.heads // module.kv_heads
    q, k, v = (x @ kernel(m) for m in (module.q, module.k, module.v))
    out = np.zeros((len(x), c.heads * d))
    for h in range(c.heads):
        a, b = h * d, (h // group) * d
        qh, kh, vh = q[:, a : a + d], k[:, b : b + d], v[:, b : b + d]
        if c.qk_norm:
            qh, kh = rms(qh, np.asarray(module.q_norm.scale[...])), rms(kh, np.asarray(module.k_norm.scale[...]))
        if c.rope_base is not None:
            qh, kh = rotate(qh, positions, c.rope_base), rotate(kh, positions, c.rope_base)
        for t in range(len(x)):
            seen = [
                s
                for s in range(len(x))
                if segments[s] == segments[t] != 0
                and (s <= t or not c.causal)
                and (c.window is None or t - s < c.window)
            ]
            if not seen:
                continue
            logits = kh[seen] @ qh[t] / np.sqrt(d)
            if c.soft_cap is not None:
                logits = c.soft_cap * np.tanh(logits / c.soft_cap)
            total = np.exp(logits).sum() + (np.exp(float(module.sinks[...][h])) if c.sinks else 0)
            out[t, a : a + d] = np.exp(logits) / total @ vh[seen]
    return out @ kernel(module.out)


@pytest.mark.parametrize("name", list(cases.configs("softmax")))
def test_equals_the_formula(name):
    """Every knob: the layer is softmax(q k^T / sqrt(d)) v as written, in float64."""
    config, _ = cases.configs("softmax")[name]
    module = cases.module(config, jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = np.asarray(module(x, seq).y)
    for row in range(2):
        expected = layer(module, np.asarray(x[row]), cases.POSITIONS[row], cases.SEGMENTS[row])
        np.testing.assert_allclose(y[row], expected, atol=1e-10)


def test_window_counts_itself():
    """A window of w lets a change reach exactly w positions, its own included."""
    module = cases.module(mixers.get("softmax").Config(window=3), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(*x.shape[:2])
    moved = np.abs(module(x.at[:, 4].add(1.0), seq).y - module(x, seq).y).max((0, 2)) > 0
    assert np.flatnonzero(moved).tolist() == [4, 5, 6]


def test_relative_positions():
    """RoPE: shifting all positions changes nothing."""
    module = cases.module(mixers.get("softmax").Config(), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(*x.shape[:2])
    shifted = mixers.Sequence(seq.positions + 1000)
    np.testing.assert_allclose(module(x, shifted).y, module(x, seq).y, atol=1e-10)


def test_windowed_state_does_not_grow():
    """With a window of w the state holds w - 1 keys, however long the sequence."""
    sizes = {mixers.get("softmax").cost(mixers.get("softmax").Config(window=3), 16, n).state_bytes for n in (8, 1024)}
    assert len(sizes) == 1


def test_more_positions_than_room_are_loud():
    """A cache that overflows gives NaN, never a plausible number."""
    module = mixers.build({"name": "softmax"}, width=16, rngs=nnx.Rngs(0))
    state = module.init_state(1, 3)
    x, seq = jnp.ones((1, 4, 16), jnp.float32), mixers.Sequence.whole(1, 4)
    y, _ = cases.streamed(module.extend, state, x, seq, (2, 2))
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
