"""Multi-head latent attention (DeepSeek-AI 2024) against its formula in NumPy, and its limits, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.mla import MLAConfig
from attnlab.ops.keys_values import Cached
from tests import tiers
from tests.mixers import cases
from tests.mixers.test_softmax import rms, rotate

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q q_down down shared k v out", "scale": "norm q_norm"}
BIASED = [({}, "down q shared", "out"), ({"query_rank": 6}, "down q_down shared", "out")]
NUMBERS_OF = "softmax"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def layer(module, x, positions, segments):
    """The whole layer for one row, head by head and query by query."""
    c, H = module.config, module.config.heads
    weight = lambda m: np.asarray(m.kernel[...])
    linear = lambda m, x: x @ weight(m) + (0 if m.bias is None else np.asarray(m.bias[...]))
    latent = rms(linear(module.down, x), np.asarray(module.norm.scale[...]))
    source = x if c.query_rank is None else rms(linear(module.q_down, x), np.asarray(module.q_norm.scale[...]))
    q = linear(module.q, source).reshape(len(x), H, -1)
    k, v = (linear(m, latent).reshape(len(x), H, -1) for m in (module.k, module.v))
    d = k.shape[-1]
    shared = linear(module.shared, x) if q.shape[-1] > d else np.zeros((len(x), 0))
    o = np.zeros(v.shape)
    for h in range(H):
        turned = q[:, h, d:]
        if c.rope_base is not None and turned.size:
            turned = rotate(turned, positions, c.rope_base, None)
        key = shared if c.rope_base is None or not turned.size else rotate(shared, positions, c.rope_base, None)
        for t in range(len(x)):
            seen = [s for s in range(len(x)) if segments[s] == segments[t] != 0 and (s <= t or not c.causal)]
            if seen:
                logits = np.array([q[t, h, :d] @ k[s, h] + turned[t] @ key[s] for s in seen]) / np.sqrt(q.shape[-1])
                p = np.exp(logits)
                o[t, h] = (p / p.sum()) @ v[seen, h]
    return linear(module.out, o.reshape(len(x), -1))


@tiers.often("{'rank': 5}", "{'causal': False, 'rotary_width': 0}")
@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 5},
        {"heads": 2, "query_rank": 6, "value_width": 3, "rope_base": 100.0, "bias": "all"},
        {"causal": False, "rotary_width": 0},
        {"rotary_width": 4, "rope_base": None},
    ],
    ids=str,
)
def test_equals_the_formula(fields):
    """The layer as written, of packed rows."""
    module = cases.module(MLAConfig(**fields), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = jax.jit(lambda x: module(x, seq).y)(x)
    for row in range(2):
        expected = layer(module, np.asarray(x[row]), cases.POSITIONS[row], cases.SEGMENTS[row])
        used = cases.SEGMENTS[row] > 0
        np.testing.assert_allclose(y[row][used], expected[used], atol=1e-10)


def test_absorbed_equals_expanded():
    """Queries against latents, one key and value for all heads, are queries against keys and values made of them."""
    module = cases.module(MLAConfig(rank=7, value_width=3), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(*x.shape[:2])

    def both(x):
        q, latents = module.queries(x, seq), module.latents(x, seq)
        assert latents.shape == (2, cases.LENGTH, 1, 7 + 2)
        mask, cached = seq.mask(causal=True), latents[:, :, 0]
        return module.absorbed(q, Cached(cached, cached), mask), module.expanded(q, latents).attend(
            q, mask, **module._options
        )

    absorbed, expanded = jax.jit(both)(x)
    assert np.abs(expanded).max() > 0.1
    np.testing.assert_allclose(absorbed, expanded, atol=1e-12)


def test_a_stream_takes_whichever_costs_less():
    """One query is absorbed, many are not; with 128 heads of 128, a latent of 512 and 64 channels turned, up to 157."""
    module = cases.module(MLAConfig(), jnp.float64)
    x, seq, _ = cases.long_inputs(module.config, jnp.float64)
    assert module.absorbs(1) and not module.absorbs(x.shape[1] // 3)  # as test_contract_chunks.py cuts them
    config = MLAConfig(heads=128, head_width=128)
    large = nnx.eval_shape(lambda: mixers.build(config, width=5120, rngs=nnx.Rngs(0)))
    assert large.widths.pair == 320 and large.widths.absorbed_pair == 1152
    assert [large.absorbs(n) for n in (157, 158)] == [True, False]


@tiers.exhaustive
def test_a_latent_as_wide_as_the_model_is_softmax_attention():
    """Without positions, of inputs that the norm leaves as they are and with W_c = I, keys and values are softmax's."""
    module = cases.module(MLAConfig(rotary_width=0), jnp.float64)
    softmax = cases.module(mixers.get("softmax").Config(rope_base=None), jnp.float64)
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    module.down.kernel[...], module.norm.scale[...] = jnp.eye(16), jnp.ones(16)
    x, _ = cases.inputs(jnp.float64)
    x = x * jnp.sqrt((1 - 1e-6) / jnp.mean(x * x, axis=-1, keepdims=True))
    seq = mixers.Sequence.whole(*x.shape[:2])
    ours, theirs = jax.jit(lambda x: (module(x, seq).y, softmax(x, seq).y))(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_the_state_holds_latents_alone():
    """r + d_r numbers a position, whatever the heads, and the length."""
    cost = mixers.get("mla").cost
    for heads in (2, 8):
        config = MLAConfig(heads=heads, head_width=8, rank=12, rotary_width=4)
        assert cost(config, 16, 100).state_bytes == 100 * (12 + 4) * 4 + 4 + 1  # and whether it overflowed


def test_the_norm_comes_before_the_cache():
    """The size of W_c does not matter, neither to the layer nor to what is cached."""
    module = cases.module(MLAConfig(), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    seq, (graphdef, params) = mixers.Sequence.whole(*x.shape[:2]), cases.split(module)

    @jax.jit
    def run(params, x):
        of = nnx.merge(graphdef, params)
        return of.latents(1e4 * x, seq)[..., : of.widths.latent]

    first = run(params, x)
    module.down.kernel[...] = 7 * np.asarray(module.down.kernel[...])
    np.testing.assert_allclose(run(cases.split(module)[1], x), first, atol=1e-9)


def test_relative_positions():
    """Shifting all positions changes nothing; moving one does."""
    module = cases.module(MLAConfig(), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    positions = np.broadcast_to(np.arange(cases.LENGTH, dtype=np.int32), x.shape[:2])
    run = jax.jit(lambda positions: module(x, mixers.Sequence(positions)).y)
    y = run(positions)
    np.testing.assert_allclose(run(positions + 1000), y, atol=1e-10)
    assert np.abs(run(positions * 2) - y).max() > 1e-3


def test_more_positions_than_room_are_loud():
    """A cache that overflows gives NaN where keys and values are made of it, too."""
    module = mixers.build({"name": "mla"}, width=16, rngs=nnx.Rngs(0), dtype=jnp.float64)
    assert not module.absorbs(6)
    x, extend = jnp.ones((1, 12, 16)), jax.jit(lambda x, seq, state: module.extend(x, seq, state))
    y, _ = cases.streamed(extend, module.init_state(1, 8, jnp.float64), x, mixers.Sequence.whole(1, 12), (6, 6))
    assert np.isfinite(y[:, :6]).all() and np.isnan(y[:, 6:]).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, "rank = 0"),
        ({"rotary_width": 3}, "rotary_width = 3 .*even"),
        ({"query_rank": 0}, "query_rank = 0"),
        ({"rotary_width": 0, "rope_base": 100.0}, "rope_base = 100.0 .*10000.0 or none where rotary_width is 0"),
        ({"window": 3}, "unknown key"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "mla", **fields})
