"""PaTH attention (Yang et al. 2025) against its formula in NumPy, and its limits, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.path import PathConfig
from attnlab.ops.attention import attention
from attnlab.ops.masks import Mask
from attnlab.ops.path_attention import path_attention
from tests import tiers
from tests.mixers import cases, devices
from tests.mixers.test_softmax import rms

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out w_down w_up beta forget", "taps": "filters", "scale": "q_norm k_norm"}
NUMBERS_OF = "gated_deltanet"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def linear(m, y):
    return y @ np.asarray(m.kernel[...]) + (0 if m.bias is None else np.asarray(m.bias[...]))


def matrices(module, x, segments):
    """H [T, K, d, d] of one row."""
    c, d, T = module.config, module.head_dim, len(x)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    w = linear(module.w_up, linear(module.w_down, x))
    if c.conv > 1:
        taps = np.asarray(module.filters[...])
        near = lambda t: [i for i in range(c.conv) if t >= i and segments[t - i] == segments[t]]
        w = np.stack([sum(taps[c.conv - 1 - i] * w[t - i] for i in near(t)) for t in range(T)])
    w = (w * sigmoid(w)).reshape(T, -1, d)
    w = w / np.sqrt((w * w).sum(-1, keepdims=True) + 1e-6)
    beta = 2 * sigmoid(linear(module.beta, x))
    return np.eye(d) - beta[..., None, None] * w[..., :, None] * w[..., None, :]


def layer(module, x, segments):
    """The whole layer for one row, with a product of matrices for each pair of positions."""
    c, d, T = module.config, module.head_dim, len(x)
    q, k, v = (linear(m, x).reshape(T, -1, d) for m in (module.q, module.k, module.v))
    if c.qk_norm:
        epsilon = 1e-6 if c.qk_epsilon is None else c.qk_epsilon
        q, k = (rms(y, np.asarray(m.scale[...]), epsilon) for y, m in ((q, module.q_norm), (k, module.k_norm)))
    H, o = matrices(module, x, segments), np.zeros((T, c.heads, d))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    f = sigmoid(linear(module.forget, x)) if c.forget else np.ones((T, c.heads))
    gate_scale = d**-0.5 if c.gate_scale is None else c.gate_scale
    for h, t in np.ndindex(c.heads, T):
        if segments[t] == 0:
            continue
        own, product, left, logits, seen = h // (c.heads // c.key_heads), np.eye(d), 1.0, [], []
        for s in range(t, -1, -1):
            if segments[s] == segments[t]:
                logits.append(q[t, h] @ product @ k[s, own] / np.sqrt(d) + gate_scale * np.log(left))
                seen.append(s)
                product, left = product @ H[s, own], left * f[s, h]
        p = np.exp(logits)
        o[t, h] = (p / p.sum()) @ v[seen, own]
    return linear(module.out, o.reshape(T, -1))


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_heads": 2, "chunk": 4, "qk_norm": True, "qk_epsilon": 0.1, "bias": "all", "forget": True},
        {"rank": 3, "conv": 1, "chunk": 3},
        {"forget": True, "gate_scale": 1.0, "chunk": 3},
    ],
    ids=str,
)
def test_equals_the_formula(fields):
    """The layer as written, of packed rows, in chunks that documents begin in."""
    module = cases.module(PathConfig(**fields), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = jax.jit(lambda x: module(x, seq).y)(x)
    for row in range(2):
        used = cases.SEGMENTS[row] > 0
        np.testing.assert_allclose(
            y[row][used], layer(module, np.asarray(x[row]), cases.SEGMENTS[row])[used], atol=1e-10
        )


@tiers.exhaustive
def test_limits_of_the_matrices():
    """beta = 0 is softmax attention without positions; with beta = 2 and one w two steps cancel, so that only whether a
    distance is odd is told."""
    rng, T = np.random.default_rng(0), 19
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    q, k, v, w = normal(1, T, 4, 6), normal(1, T, 2, 6), normal(1, T, 2, 5), normal(1, 1, 2, 6)
    w = jnp.broadcast_to(w / jnp.linalg.norm(w, axis=-1, keepdims=True), k.shape)

    @jax.jit
    def run(beta):
        beta = jnp.full((1, T, 2), beta)
        return [path_attention(q, k, v, w, beta, Mask(causal=True), chunk=4, impl=i) for i in ("blocks", "definition")]

    odd = (jnp.arange(T) % 2 == 1)[:, None, None]
    reflected = lambda y, w: jnp.where(odd, y - 2 * (y * w).sum(-1, keepdims=True) * w, y)
    softmax = lambda q, k: attention(q, k, v, Mask(causal=True), impl="definition")
    twice = jnp.repeat(w, 2, axis=2)
    for o in run(0.0):
        np.testing.assert_allclose(o, softmax(q, k), atol=1e-12)
    for o in run(2.0):
        np.testing.assert_allclose(o, softmax(reflected(q, twice), reflected(k, w)), atol=1e-12)


@tiers.exhaustive
def test_limits_of_the_gate():
    """Gates of 1 are PaTH attention; without vectors w, or with beta = 0, it is forgetting attention."""
    module = cases.module(PathConfig(forget=True, gate_scale=1.0, chunk=4), jnp.float64)
    path = cases.module(PathConfig(chunk=4), jnp.float64)
    fox = cases.module(mixers.get("fox").Config(), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    used = np.asarray(seq.segments) > 0
    ours = nnx.to_pure_dict(cases.split(module)[1])
    closed = lambda name, **leaves: ours | {name: ours[name] | leaves}
    same = lambda other: cases.output(_with(other, ours), x, seq)[used]
    run = lambda tree: cases.output(_with(module, tree), x, seq)[used]
    open_gates = closed("forget", kernel=0 * ours["forget"]["kernel"], bias=ours["forget"]["bias"] * 0 + 60)
    np.testing.assert_allclose(run(open_gates), same(path), atol=1e-12)
    no_vectors = closed("w_up", kernel=0 * ours["w_up"]["kernel"])
    no_steps = closed("beta", kernel=0 * ours["beta"]["kernel"], bias=ours["beta"]["bias"] * 0 - 60)
    for tree in (no_vectors, no_steps):
        np.testing.assert_allclose(run(tree), same(fox), atol=1e-12)


def _with(module, tree):
    """The module with those of the parameters in `tree` that it has."""
    graphdef, params = cases.split(module)
    own = nnx.to_pure_dict(params)
    nnx.replace_by_pure_dict(params, {name: tree[name] for name in own})
    return nnx.merge(graphdef, params)


@pytest.mark.parametrize("impl", ["blocks", "definition"])
def test_equals_a_product_for_every_pair(impl):
    """Values and gradients in all six of the op, whose documents share no matrix and no gate."""
    rng, T, first = np.random.default_rng(0), 7, 3
    shapes = (1, T, 4, 3), (1, T, 2, 3), (1, T, 2, 2), (1, T, 2, 3), (1, T, 2), (1, T, 4)
    arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    start = jnp.asarray([[0] * first + [first] * (T - first)])
    mask = Mask(start, jnp.arange(1, T + 1)[None], causal=True)

    def parts(q, k, v, w, beta, logs):
        w = w / jnp.linalg.norm(w, axis=-1, keepdims=True)
        return q, k, v, w, 2 * jax.nn.sigmoid(beta), jax.nn.log_sigmoid(logs)

    def by_pairs(*arrays):
        q, k, v, w, beta, logs = (x[0] for x in parts(*arrays))
        k, v, w, beta = (jnp.repeat(x, 2, axis=1) for x in (k, v, w, beta))
        H, rows = jnp.eye(3) - beta[..., None, None] * w[..., :, None] * w[..., None, :], []
        for t in range(T):
            product, left, logits, begin = jnp.eye(3), 0.0, [], 0 if t < first else first
            for s in range(t, begin - 1, -1):
                turned = jnp.einsum("hd,hde,he->h", q[t], jnp.broadcast_to(product, (4, 3, 3)), k[s])
                logits.append(turned / 3**0.5 + left)
                product, left = product @ H[s], left + logs[s]
            rows.append(jnp.einsum("sh,she->he", jax.nn.softmax(jnp.stack(logits), axis=0), v[begin : t + 1][::-1]))
        return jnp.stack(rows)[None]

    def op(*arrays):
        *arrays, logs = parts(*arrays)
        left = jnp.concatenate([jnp.cumsum(logs[:, :first], axis=1), jnp.cumsum(logs[:, first:], axis=1)], axis=1)
        return path_attention(*arrays, mask, left_BTH=left, chunk=2, impl=impl)

    def of(run):
        total = lambda *arrays: (jnp.sin(y := run(*arrays)).sum(), y)
        return jax.tree.leaves(jax.jit(jax.value_and_grad(total, range(6), has_aux=True))(*arrays))

    for a, b in zip(of(op), of(by_pairs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@tiers.exhaustive
def test_gates_of_heads_on_eight_devices():
    """Each device has the gates of its own heads: values and gradients are those of one device."""
    module = cases.module(PathConfig(forget=True, kv_heads=2, chunk=4), jnp.float64)
    devices.hold(*cases.split(module), *cases.inputs(jnp.float64), data=2)


def test_a_stream_keeps_what_is_left_of_each_key():
    """After n positions, of the key at s the gates behind it, multiplied; in logarithms times the scale."""
    module = cases.module(PathConfig(forget=True, chunk=2), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    extend = jax.jit(lambda x, seq, state: module.extend(x, seq, state))
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    _, state = cases.streamed(extend, state, x, mixers.Sequence.whole(*x.shape[:2]), (5, 5))
    logs = np.log(1 / (1 + np.exp(-np.asarray(module.forget(x)))))[:, :10]
    for s in (0, 4, 9):
        expected = logs[:, s + 1 :].sum(1) / np.sqrt(module.head_dim)
        np.testing.assert_allclose(state.carried.faded[:, s], expected, atol=1e-12)


def test_a_stream_rewrites_its_keys():
    """Each key in the cache has gone through the matrices of all positions behind it."""
    module = cases.module(PathConfig(chunk=2), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    extend = jax.jit(lambda x, seq, state: module.extend(x, seq, state))
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    _, state = cases.streamed(extend, state, x, mixers.Sequence.whole(*x.shape[:2]), (5, 5, 1))
    H = matrices(module, np.asarray(x[0]), np.ones(cases.LENGTH))
    keys = linear(module.k, np.asarray(x[0])).reshape(cases.LENGTH, 4, -1)
    for h, s in ((0, 0), (3, 4), (1, cases.LENGTH - 1)):
        expected = keys[s, h]
        for t in range(s + 1, cases.LENGTH):
            expected = H[t, h] @ expected
        np.testing.assert_allclose(state.carried.keys[0, h, s], expected, atol=1e-10)


def test_what_does_not_fit_is_refused():
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(UserError, match="expected .*a causal mask of whole rows"):
        path_attention(q, q, q, q, q[..., 0], Mask())
    with pytest.raises(UserError, match="beta"):
        path_attention(q, q, q, q, q, Mask(causal=True))
    with pytest.raises(UserError, match=r"left \(1, 3, 1\)"):
        path_attention(q, q, q, q, q[..., 0], Mask(causal=True), left_BTH=q[..., :1, 0])


@pytest.mark.parametrize("fields", [{"causal": False}, {"window": 3}, {"rope_base": 100.0}, {"rope_scaling": None}])
def test_what_it_does_not_have_is_unknown(fields):
    with pytest.raises(ConfigError, match=f"unknown key 'mixer.{next(iter(fields))}'"):
        mixers.config_from_node({"name": "path", **fields})


def test_a_scale_of_no_gate_is_refused():
    with pytest.raises(ConfigError, match="gate_scale = 1.0 .*none where forget is false"):
        mixers.config_from_node({"name": "path", "gate_scale": 1.0})
