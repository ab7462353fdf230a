"""Forgetting attention (Lin et al. 2025) against its formula in NumPy, and its limits, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.fox import FoxConfig, spread_logits
from tests import tiers
from tests.mixers import cases
from tests.mixers import test_contract as battery
from tests.mixers.test_softmax import rms, rotate

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "q k v out forget k_shift v_shift gate",
    "bias": "forget_bias",
    "scale": "q_norm k_norm o_norm",
}
NUMBERS_OF = "softmax"
PRO = {"qk_norm": True, "shift": True, "output_norm": True, "output_gate": True}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def layer(module, x, positions, segments):
    """The whole layer for one row, head by head and query by query, all forget gates in between multiplied."""
    c, d, T = module.config, module.head_dim, len(x)
    linear = lambda m: x @ np.asarray(m.kernel[...]) + (0 if m.bias is None else np.asarray(m.bias[...]))
    q, k, v = (linear(m).reshape(T, -1, d) for m in (module.q, module.k, module.v))
    if c.shift:
        joined = lambda t: t > 0 and segments[t] == segments[t - 1]
        before = lambda y: np.stack([y[t - 1] if joined(t) else 0 * y[t] for t in range(T)])
        shares = [sigmoid(linear(m))[..., None] for m in (module.k_shift, module.v_shift)]
        k, v = (a * before(y) + (1 - a) * y for a, y in zip(shares, (k, v)))
    if c.qk_norm:
        scaled = lambda y, norm: rms(y, np.asarray(norm.scale[...]), c.qk_epsilon or 1e-6)
        q, k = scaled(q, module.q_norm), scaled(k, module.k_norm)
    f = {
        "input": lambda: sigmoid(linear(module.forget)),
        "constant": lambda: sigmoid(np.tile(np.asarray(module.forget_bias[...]), (T, 1))),
        "fixed": lambda: np.tile(np.exp(-1 / np.geomspace(c.lifetime_min or 2, 128, c.heads)), (T, 1)),
    }[c.forget]()
    o = np.zeros((T, c.heads, d))
    for h in range(c.heads):
        own = h // (c.heads // c.key_heads)
        turn = lambda y: y if c.rope_base is None else rotate(y, positions, c.rope_base, None)
        qh, kh = turn(q[:, h]), turn(k[:, own])
        for t in range(T):
            seen = [s for s in range(t + 1) if segments[s] == segments[t] != 0 and t - s < (c.window or T)]
            if seen:
                p = np.array([np.exp(qh[t] @ kh[s] / np.sqrt(d)) * np.prod(f[s + 1 : t + 1, h]) for s in seen])
                o[t, h] = (p / p.sum()) @ v[seen, own]
    if c.output_norm:
        o = rms(o, np.asarray(module.o_norm.scale[...]))
    o = o.reshape(T, -1) * (sigmoid(linear(module.gate)) if c.output_gate else 1)
    return o @ np.asarray(module.out.kernel[...]) + (0 if module.out.bias is None else np.asarray(module.out.bias[...]))


@tiers.often("pro", "windowed")
@pytest.mark.parametrize(
    "fields",
    [
        PRO,
        {"kv_heads": 2, "window": 4, "rope_base": 100.0, "forget": "constant", "bias": "all"},
        {"forget": "fixed", "lifetime_min": 1.0, "kv_heads": 2, "qk_norm": True, "qk_epsilon": 0.1, "rope_base": 50.0},
    ],
    ids=["pro", "windowed", "fixed"],
)
def test_equals_the_formula(fields):
    """The layer as written, of packed rows."""
    module = cases.module(FoxConfig(**fields), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = jax.jit(lambda x: module(x, seq).y)(x)
    for row in range(2):
        expected = layer(module, np.asarray(x[row]), cases.POSITIONS[row], cases.SEGMENTS[row])
        used = cases.SEGMENTS[row] > 0
        np.testing.assert_allclose(y[row][used], expected[used], atol=1e-10)


@tiers.exhaustive
def test_limits_of_the_gate():
    """f = 1 is softmax attention without positions; f = 0 sees the position alone, so that o_t = v_t."""
    module = cases.module(FoxConfig(), jnp.float64)
    softmax = cases.module(mixers.get("softmax").Config(rope_base=None), jnp.float64)
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    module.forget.kernel[...] = 0 * module.forget.kernel[...]
    x, seq = cases.inputs(jnp.float64)
    graphdef, params = cases.split(module)

    @jax.jit
    def of(x, params, bias):
        params["forget"]["bias"] = params["forget"]["bias"].replace(jnp.full(4, bias))
        return nnx.merge(graphdef, params)(x, seq).y

    used = np.asarray(seq.segments) > 0
    values = (x @ module.v.kernel[...]) @ module.out.kernel[...]
    run = lambda x, bias: of(x, jax.tree.map(lambda a: a, params), bias)
    np.testing.assert_allclose(run(x, 60.0)[used], softmax(x, seq).y[used], atol=1e-12)
    np.testing.assert_allclose(run(x, -60.0)[used], values[used], atol=1e-12)


@tiers.exhaustive
def test_a_constant_gate_is_alibi():
    """Logits fall by 1 / n per position of distance, n the head's lifetime: a slope of its own for each head."""
    module = cases.module(FoxConfig(forget="fixed"), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    reads = jax.jit(lambda x: (lambda kv: (kv.left, kv.faded))(module.reads(x, mixers.Sequence.whole(*x.shape[:2])).kv))
    left, faded = reads(x)
    distance = np.arange(cases.LENGTH)[:, None] - np.arange(cases.LENGTH)
    bias = left[0, :, None] + faded[0, None]
    np.testing.assert_allclose(bias, -distance[..., None] / np.geomspace(2, 128, 4), atol=1e-12)
    np.testing.assert_allclose(sigmoid(np.asarray(spread_logits(2, jnp.float64))), np.exp([-1 / 2, -1 / 128]))


def test_sums_of_gates_begin_with_documents():
    """So that a document's biases round by what it has forgotten itself, not by what all before it in the row have."""
    module = cases.module(FoxConfig(), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    left, logs = np.asarray(module.left(x, seq.derived())), np.log(sigmoid(np.asarray(module.forget(x))))
    for row, first, end in cases.DOCUMENTS:
        expected = logs[row, first:end].cumsum(0)
        np.testing.assert_allclose(left[row, first:end] - left[row, first], expected - expected[0], atol=1e-12)
        assert (np.abs(left[row, first]) <= np.abs(expected[0]) + 1e-12).all()


def test_lifetimes():
    """The constant gate begins, and the fixed one stays, with those of the knobs; one that nothing reads, or that is
    shorter in the last head than in the first, is refused."""
    built = mixers.build(
        {"name": "fox", "forget": "constant", "heads": 3, "head_width": 2, "lifetime_min": 3.0, "lifetime_max": 12.0},
        width=6, rngs=nnx.Rngs(0), dtype=jnp.float64,
    )  # fmt: skip
    np.testing.assert_allclose(sigmoid(np.asarray(built.forget_bias[...])), np.exp([-1 / 3, -1 / 6, -1 / 12]))
    np.testing.assert_allclose(spread_logits(1, jnp.float32, (0.01, 0.01)), [-100.0], rtol=1e-6)  # exp(100): none
    fixed = cases.module(FoxConfig(forget="fixed", lifetime_max=4.0, heads=2), jnp.float64)
    left = fixed.left(jnp.zeros((1, 3, cases.WIDTH)), mixers.Sequence.whole(1, 3))
    np.testing.assert_allclose(left[0, 1:] - left[0, :-1], [[-1 / 2, -1 / 4]] * 2, atol=1e-12)


def test_every_head_has_scales_of_its_own():
    """[H, d] of queries and outputs, [K, d] of keys, 1 at first, split over devices as heads are."""
    config = FoxConfig(**PRO, kv_heads=2)
    made = mixers.build(config, width=cases.WIDTH, rngs=nnx.Rngs(0), dtype=jnp.float64)
    for norm, heads, axis in ((made.q_norm, 4, "heads"), (made.k_norm, 2, "kv_heads"), (made.o_norm, 4, "heads")):
        np.testing.assert_array_equal(norm.scale[...], np.ones((heads, 4)))
        assert norm.scale.get_metadata()["axes"] == (axis, "head")


@tiers.exhaustive
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_pro_block_on_several_devices(kv_heads):
    """Its norms are split with their heads; the one of a single key head, which all query heads read, is not."""
    battery.same_on_eight_devices(FoxConfig(**PRO, kv_heads=kv_heads))


def test_a_stream_keeps_what_is_left_of_each_key():
    """After n positions of one document, of the key at s is left what the positions behind it left."""
    module = cases.module(FoxConfig(shift=True), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    extend = jax.jit(lambda x, seq, state: module.extend(x, seq, state))
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    _, state = cases.streamed(extend, state, x, mixers.Sequence.whole(*x.shape[:2]), (5, 5))
    f = sigmoid(np.asarray(module.forget(x)))[:, :10]
    for s in (0, 4, 9):
        np.testing.assert_allclose(np.exp(state.carried.faded[:, s]), np.prod(f[:, s + 1 :], axis=1), rtol=1e-10)


def test_long_streams_keep_near_keys_exact():
    """In fp32 the biases of near keys do not lose digits to a sum of all that a long stream has forgotten."""
    with jax.enable_x64(False):
        module = mixers.build({"name": "fox", "forget": "fixed", "window": 8}, width=16, rngs=nnx.Rngs(0))
        extend = jax.jit(lambda x, seq, state: module.extend(x, seq, state).state)
        stream, state, x = mixers.Stream.start(1), module.init_state(1, 4096), jnp.ones((1, 1024, 16))
        for _ in range(4):
            seq, stream = cases.placed(stream, mixers.Sequence.whole(1, 1024))
            state = extend(x, seq, state)
        expected = -np.arange(6, -1, -1)[:, None] / np.geomspace(2, 128, 4)
        np.testing.assert_allclose(state.carried.faded[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"forget": "half"}, "forget = 'half' .*input, constant, fixed"),
        ({"qk_norm": "cosine"}, "qk_norm = 'cosine' .*true or false"),
        ({"impl": "xla"}, "impl = 'xla' .*auto, definition, tiles"),
        ({"causal": False}, "unknown key 'mixer.causal'"),
        ({"lifetime_min": 4.0}, "lifetime_min = 4.0 .*none where forget is input"),
        ({"lifetime_max": 0.0, "forget": "fixed"}, "lifetime_max = 0.0 .*0.02 or more, or none"),
        ({"lifetime_max": 9.0, "forget": "fixed", "heads": 1}, "lifetime_max = 9.0 .*none where heads is 1"),
        ({"lifetime_max": 1.0, "forget": "fixed"}, "lifetime_max = 1.0 .*2.0 or more"),
        ({"lifetime_min": 9.0, "lifetime_max": 8.0, "forget": "constant"}, r"lifetime_min = 9.0 .*max \(8.0\) or less"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "fox", **fields})
