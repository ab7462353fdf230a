"""The identities of RWKV-7 (Peng et al. 2025), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.rwkv7 import RWKV7Config
from attnlab.models.transformer import StackConfig, Transformer, extend, mixer_table
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "r k v out decay.down decay.up rate.down rate.up gate.down gate.up share.down share.up",
    "scale": "norm mix k_k k_a r_k",
    "bias": "rate_bias share_bias",
    "decay_rate": "decay_bias",
}
BIASED = [({}, "r k v", "out")]
NUMBERS_OF = "gated_deltanet"
WRITTEN_OUT = True


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(RWKV7Config(**{"chunk": 4, **fields}), jnp.float64)


def weight(linear):
    return np.asarray(linear.kernel[...])


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def naive(module, x, first=None):
    """The layer on one whole sequence [T, D], position by position and head by head in NumPy; with the values [T, D] of
    the stack's first layer it is a later one."""
    H, d, vector = module.config.heads, module.head_dim, lambda name: np.asarray(getattr(module, name)[...])
    before, S, y = np.zeros(x.shape[1]), np.zeros((H, d, d)), np.zeros((len(x), H * d))
    scale, shift = np.asarray(module.norm.scale[...]), np.asarray(module.norm.bias[...])
    for t in range(len(x)):
        xr, xw, xk, xv, xa, xg = x[t] + vector("mix") * (before - x[t])
        before = x[t]
        r, k, v = xr @ weight(module.r), xk @ weight(module.k), xv @ weight(module.v)
        if first is not None:
            share = vector("share_bias") + xv @ weight(module.share.down) @ weight(module.share.up)
            v = v + (first[t] - v) * sigmoid(share)
        slow = np.tanh(xw @ weight(module.decay.down)) @ weight(module.decay.up)
        w = np.exp(-np.exp(-0.5) * sigmoid(vector("decay_bias") + slow))
        a = sigmoid(vector("rate_bias") + xa @ weight(module.rate.down) @ weight(module.rate.up))
        g = sigmoid(xg @ weight(module.gate.down)) @ weight(module.gate.up)
        along, k = k * vector("k_k"), k * (1 + (a - 1) * vector("k_a"))
        for h in range(H):
            of = slice(h * d, h * d + d)
            c = along[of] / np.sqrt(along[of] @ along[of] + 1e-6)
            S[h] = (np.diag(w[of]) - np.outer(a[of] * c, c)) @ S[h] + np.outer(k[of], v[of])
            o = S[h].T @ r[of]
            o = (o - o.mean()) / np.sqrt(o.var() + 1e-5 * d) * scale[of] + shift[of]
            y[t, of] = (o + (r[of] * k[of] * vector("r_k")[of]).sum() * v[of]) * g[of]
    return y @ weight(module.out)


def test_layer_is_the_formula():
    """The whole layer written out, with chunks that do not divide the length; in a packed row each document by itself,
    whose first position looks back at 0."""
    module = make(decay_rank=2, rate_rank=3, gate_rank=4)
    x, seq = cases.inputs(jnp.float64)
    y = cases.output(module, x, seq)
    for row, first, end in cases.DOCUMENTS:
        np.testing.assert_allclose(y[row, first:end], naive(module, np.asarray(x[row, first:end])), atol=1e-12)


def test_without_shift_and_norm_gain_only_the_bonus_is_left():
    """mu = 0 and a norm whose scale and bias are 0: `(sum r k r_k) v g` of the position alone."""
    module = make()
    for array in (module.mix, module.norm.scale, module.norm.bias):
        array[...] = jnp.zeros_like(array[...])
    x, _ = cases.inputs(jnp.float64)
    y = cases.output(module, x)
    np.testing.assert_allclose(y[0, 5], naive(module, np.asarray(x[0, 5:6]))[0], atol=1e-12)
    np.testing.assert_allclose(y, cases.output(module, x[:, ::-1])[:, ::-1], atol=1e-12)


def test_values_of_the_first_layer_are_mixed_into_those_of_later_ones():
    """A stack of three layers, packed, whole and as a stream: the layers written out, the first one's values handed on;
    softmax attention before them counts for nothing. Without the knob no layer knows of another."""
    nodes = {"S": {"name": "softmax", "heads": 2}, "R": {"name": "rwkv7", "heads": 2, "chunk": 4}}
    shape = dict(width=cases.WIDTH, layers=3, pattern="SRR", mlp_width=0, dtype="float64")
    stack = Transformer(StackConfig(mixers=mixer_table(nodes, "m"), **shape), rngs=nnx.Rngs(1))
    x, seq = cases.inputs(jnp.float64)
    found = np.asarray(jax.jit(lambda x: stack(x, seq).y)(x))
    (period,) = stack.unstacked()
    softmax, *layers = (block.sublayers[0] for block in period.blocks)
    h = np.asarray(jax.jit(lambda x: softmax(x, seq.derived()).y)(x))
    rms = lambda y, norm: y / np.sqrt((y * y).mean(-1, keepdims=True) + norm.epsilon) * np.asarray(norm.scale[...])
    for row, first, end in cases.DOCUMENTS:
        y, values = h[row, first:end], None
        for sublayer in layers:
            module, normed = sublayer.branch, rms(y, sublayer.norm)
            before = np.concatenate([np.zeros((1, cases.WIDTH)), normed[:-1]])
            own = (normed + np.asarray(module.mix[...])[3] * (before - normed)) @ weight(module.v)
            y, values = y + naive(module, normed, values), own if values is None else values
        np.testing.assert_allclose(found[row, first:end], y, atol=1e-11)
    state, parts = jax.jit(lambda: stack.init_state(2, cases.LENGTH))(), []
    periods, given = stack.unstacked(), [np.asarray(a) for a in (x, seq.positions, seq.segments)]
    step = jax.jit(
        lambda x, positions, segments, state: extend(periods, x, mixers.Sequence(positions, segments), state)
    )
    for t in range(cases.LENGTH):
        y, state = step(*(a[:, t : t + 1] for a in given), state=state)
        parts.append(y)
    used = np.asarray(seq.segments) > 0
    np.testing.assert_allclose(np.concatenate(parts, 1)[used], found[used], atol=1e-11)
    shared = lambda **fields: [y.shape[:2] for y in make(**fields).init_shared(1, 2).values()]
    assert shared(value_residual=False) == [] and shared() == [(1, 2), ()]


def test_first_values():
    """For x = 0: decays between exp(-exp(-1/2)) and 1, slow ones behind fast ones; upper layers look back less."""
    build = lambda **fields: mixers.build(
        {"name": "rwkv7", "head_width": 16, **fields}, width=64, rngs=nnx.Rngs(0), dtype=jnp.float64
    )
    with cases.drawn_by_numpy():
        low, high = build(), build(layer=11, layers=12)
    bias = np.asarray(low.decay_bias[...])
    n = np.arange(64)
    z = (n % 16 - 7.5) / 7.5
    np.testing.assert_allclose(bias, -6 + 6 * (n / 63) + 0.5 + 2.5 * z * abs(z), atol=1e-12)
    np.testing.assert_allclose(high.decay_bias[...], -6 + 6 * (n / 63) ** 2 + 0.5 + 2.5 * z * abs(z), atol=1e-12)
    np.testing.assert_allclose(low.mix[0], 1 - (n / 64) ** 0.2, atol=1e-12)
    np.testing.assert_allclose(high.mix[1], 1 - (n / 64) ** (0.9 / 12), atol=1e-12)
    np.testing.assert_allclose(low.rate_bias[...], -0.19 + 0.3 * z * abs(z) + 0.4 * (n / 63 - 0.5), atol=1e-12)
    np.testing.assert_allclose(low.norm.scale[...], 12**-0.7, atol=1e-12)
    np.testing.assert_allclose(high.norm.scale[...], 1, atol=1e-12)
    assert 0.08 < low.k.kernel[...].std() * 8 < 0.12 and 0.9 < low.r.kernel[...].std() * 8 < 1.1


def test_ranks():
    """Those of released code at its widths; what cannot be is refused."""
    assert RWKV7Config().ranks(1024) == (64, 64, 160, 32) and RWKV7Config().ranks(64) == (32,) * 4
    assert RWKV7Config(decay_rank=1, rate_rank=2, gate_rank=3, residual_rank=4).ranks(1024) == (1, 2, 3, 4)
    assert RWKV7Config(value_residual=False).ranks(64)[3] == 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer": 12, "layers": 12}, r"layer = 12 .*less than layers \(12\)"),
        ({"layer": 1}, "layer = 1 .*none where layers is"),
        ({"residual_rank": 8, "value_residual": False}, "residual_rank = 8 .*none where value_residual is false"),
    ],
)
def test_impossible_configs(fields, message):
    """What has no place in its stack, and a rank of what is not there."""
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "rwkv7", **fields})


def test_a_later_layer_by_itself_is_refused():
    """Said to be the fourth of its stack, it finds no first values; without these, or as the first, it runs. In a stack
    it finds them."""
    x, seq = cases.inputs(jnp.float64)
    run = lambda **fields: jax.eval_shape(lambda x: make(layers=4, **fields)(x, seq).y, x)
    with pytest.raises(ConfigError, match="layer = 3 .*0 or none of a layer by itself"):
        run(layer=3)
    assert run(layer=3, value_residual=False).shape == run(layer=0).shape == x.shape
    stack = nnx.eval_shape(lambda: stack_of("R", layers=2, R={"layer": 3, "layers": 4}))
    assert jax.eval_shape(lambda x: stack(x, seq).y, x).shape == x.shape


SMALL = {"name": "rwkv7", "heads": 2, "decay_rank": 2, "rate_rank": 3, "gate_rank": 4, "residual_rank": 2}


def stack_of(pattern, *, layers=6, mlp_width=0, R=None):
    """A stack of this layer (R), of this one inside of another (M) and of one that is told nothing (S)."""
    nodes = {
        "S": {"name": "softmax", "heads": 2},
        "R": SMALL | (R or {}),
        "M": {"name": "moh", "heads": 2, "core": SMALL},
    }
    table = mixer_table({letter: node for letter, node in nodes.items() if letter in pattern}, "m")
    shape = dict(width=cases.WIDTH, layers=layers, pattern=pattern, mlp_width=mlp_width, dtype="float64")
    return Transformer(StackConfig(mixers=table, **shape), rngs=nnx.Rngs(0))


def begun(layer):
    """First values of what is not drawn, by name."""
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {".".join(path): v[...] for path, v in flat if v.get_metadata()["draw"] is None}


def alone(**fields):
    make = lambda: mixers.build(SMALL | fields, width=cases.WIDTH, rngs=nnx.Rngs(0), dtype=jnp.float64)
    return jax.jit(lambda: begun(make()))()


def layers_of(pattern, **fields):
    """(number of its block, first values) of each of these layers in a stack."""

    def found(stack):
        blocks = [block for period in stack.unstacked() for block in period.blocks]
        for number, block in enumerate(blocks):
            branches = [sublayer.branch for sublayer in block.sublayers if sublayer.mixes]
            layers = [branch.core if branch.name == "moh" else branch for branch in branches]
            yield from ((number, begun(layer)) for layer in layers if layer.name == "rwkv7")

    return jax.jit(lambda: list(found(stack_of(pattern, **fields))))()


def same(found, expected):
    assert {"mix", "decay_bias", "norm.scale"} < expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    "pattern, mlp_width, numbers",
    [("R", 0, range(6)), ("SR", 8, (1, 3, 5)), ("R+SS", 0, (0, 2, 4)), ("MR", 8, range(6))],
)
def test_layers_begin_by_their_place_in_the_stack(pattern, mlp_width, numbers):
    """Layer l of L has the first values of a layer by itself whose knobs say so: in every repeat and block of the
    pattern, beside other sublayers, inside of a layer around it; l is what `Sequence.layer` would be."""
    found = layers_of(pattern, mlp_width=mlp_width)
    assert [number for number, _ in found] == list(numbers)
    for number, values in found:
        same(values, alone(layer=int(number), layers=6))


def test_knobs_win_over_the_place_in_the_stack():
    """With both set each layer begins alike; of `layers` alone l is still the stack's, which must be no longer."""
    for given, places in (({"layer": 2, "layers": 9}, [2, 2, 2]), ({"layers": 9}, [0, 1, 2])):
        for (_, values), place in zip(layers_of("R", layers=3, R=given), places, strict=True):
            same(values, alone(layer=place, layers=9))
    with pytest.raises(ConfigError, match=r"model.mixers.R .*layers = 2 .*the stack's 3 or more where layer is none"):
        stack_of("R", layers=3, R={"layers": 2})


def test_a_place_changes_values_alone():
    """Parameters of a stack are those of a layer by itself with one axis more: names, shapes, dtypes, roles, axes."""
    build = lambda: mixers.build(SMALL, width=cases.WIDTH, rngs=nnx.Rngs(0))
    one = nnx.to_flat_state(nnx.state(nnx.eval_shape(build), nnx.Param))
    table = mixer_table({"R": SMALL}, "m")
    shape = dict(width=cases.WIDTH, layers=3, pattern="R", mlp_width=0)
    made = nnx.eval_shape(lambda: Transformer(StackConfig(mixers=table, **shape), rngs=nnx.Rngs(0)))
    stacked = nnx.to_flat_state(nnx.state(made.periods.blocks[0].sublayers[0].branch, nnx.Param))
    facts = lambda v: [v.get_metadata().get(key) for key in ("axes", "role", "fused", "draw", "keep")]
    assert [path for path, _ in stacked] == [path for path, _ in one]
    for (path, a), (_, b) in zip(stacked, one, strict=True):
        assert (a.shape, a.dtype, facts(a)) == ((3, *b.shape), b.dtype, facts(b)), path
