"""The identities of the mesa layer (von Oswald et al. 2025), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.mesa import MesaConfig
from attnlab.ops.linear_recurrence import linear_recurrence
from attnlab.ops.mesa import mesa
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out gate keep beta", "taps": "filters", "scale": "norm", "bias": "ridge"}
WRITTEN_OUT = True
SPLIT_GRADIENTS = False

B, T, H, D, E = 2, 9, 3, 4, 5


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


op = jax.jit(mesa, static_argnames=("chunk", "impl", "iterations", "tolerance"))


def arrays(length=T):
    """q, k [B, T, H, D] with unit keys, v, log decays, strengths, ridges, in numpy."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, length, H, n)) for n in (D, D, E))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return q, k, v, np.log(0.5 + 0.5 * rng.random((B, length, H))), rng.random((B, length, H)), 0.3 + rng.random((H, D))


@tiers.exhaustive
def test_no_decay_is_ridge_regression():
    """a = 1: q times the W that minimises sum beta |v - k W|^2 + sum ridge_i |W_i|^2, found as least squares."""
    q, k, v, _, beta, ridge = arrays()
    for impl in ("definition", "cg"):
        o, *_ = op(q, k, v, 0 * beta, beta, ridge, chunk=4, impl=impl)
        for t in (0, 3, 4, T - 1):
            for h in range(H):
                rows = np.sqrt(beta[0, : t + 1, h, None])
                left = np.concatenate([rows * k[0, : t + 1, h], np.diag(np.sqrt(ridge[h]))])
                right = np.concatenate([rows * v[0, : t + 1, h], np.zeros((D, E))])
                want = q[0, t, h] @ np.linalg.lstsq(left, right, rcond=None)[0]
                np.testing.assert_allclose(o[0, t, h], want, atol=1e-12)


def test_large_ridge_is_gated_linear_attention():
    """ridge * o goes to the linear attention of decayed keys as the ridge grows, by a power of it."""
    q, k, v, log_decay, beta, ridge = arrays()
    want, _ = jax.jit(linear_recurrence)(q, k, beta[..., None] * v, log_decay=log_decay)
    for impl in ("definition", "cg"):
        error = []
        for scale in (1e4, 1e6):
            o, *_ = op(q, k, v, log_decay, beta, scale * np.ones_like(ridge), chunk=4, impl=impl)
            error.append(np.abs(scale * np.asarray(o) - want).max())
        assert error[1] < 1e-4 and error[0] / error[1] == pytest.approx(100, rel=0.01)


def test_linear_values_are_recovered():
    """v = k W: from d positions on, reads are q W as the ridge vanishes, whatever decays and strengths are."""
    q, k, _, log_decay, beta, ridge = arrays()
    W = np.random.default_rng(1).standard_normal((D, E))
    o, *_ = op(q, k, k @ W, log_decay, 0.2 + beta, 1e-9 * ridge, chunk=4)
    np.testing.assert_allclose(o[:, D:], (q @ W)[:, D:], atol=1e-4)


def test_solves_stop_at_the_tolerance():
    """In at most d iterations systems are solved; a loose tolerance takes fewer and says what is left."""
    q, k, v, log_decay, beta, ridge = arrays()
    run = lambda **options: op(q, k, v, log_decay, beta, ridge, chunk=4, **options)
    exact, _, _ = run(impl="definition")
    o, solves, _ = run(impl="cg")
    assert solves.residual_BTH.max() < 1e-13 and solves.iterations_BTH.max() <= D + 2
    np.testing.assert_allclose(o, exact, atol=1e-12)
    o, solves, _ = run(impl="cg", tolerance=0.3)
    assert 0 < solves.residual_BTH.max() < 0.3 and solves.iterations_BTH.max() < D
    assert np.abs(o - exact).max() > 1e-3
    _, solves, _ = run(impl="cg_fixed", iterations=2)
    assert solves.iterations_BTH.max() == 2


def test_positions_over_four_devices():
    """Documents that begin on one device and end on the next but one, after a state: as on one device."""
    rows = [jnp.asarray(a) for a in arrays(length=12)[:5]]
    documents = jnp.asarray([[0] * 7 + [1] * 5, [0] * 2 + [1] * 6 + [2] * 4])
    state = jnp.asarray(np.random.default_rng(2).standard_normal((B, H, D, D + E)))
    state = state.at[..., :D].set(jnp.eye(D))
    run = lambda *rows: mesa(*rows, jnp.ones((H, D)), documents_BT=documents, state_BHdf=state, chunk=2)[::2]
    mesh = sharding.make_mesh(MeshConfig(data=1, context=4), 4, length=12)
    split = jax.jit(partition.traced(run, mesh, sharding.ACTIVATION_RULES))
    for a, b in zip(split(*rows), jax.jit(run)(*rows), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in numpy."""
    c, (length, _), d = module.config, x.shape, module.head_dim
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    array = lambda p: np.asarray(p[...])
    split = lambda y: y.reshape(length, c.heads, -1)
    rows = np.concatenate([split(x @ array(y.kernel)) for y in (module.q, module.k)], axis=-1)
    filters = array(module.filters).reshape(c.conv, c.heads, -1)
    padded = np.concatenate([np.zeros((c.conv - 1, *rows.shape[1:])), rows])
    rows = sum(filters[i] * padded[i : i + length] for i in range(c.conv))
    rows = rows * sigmoid(rows)
    q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (rows[..., :d], rows[..., d:]))
    v = split(x @ array(module.v.kernel))
    a, beta = (sigmoid(x @ array(y.kernel) + array(y.bias)) for y in (module.keep, module.beta))
    ridge = np.log1p(np.exp(array(module.ridge))) + c.ridge_min
    G, S, o = np.zeros((c.heads, d, d)), np.zeros((c.heads, d, d)), np.zeros_like(v)
    for t in range(length):
        for h in range(c.heads):
            G[h] = a[t, h] * G[h] + beta[t, h] * np.outer(k[t, h], k[t, h])
            S[h] = a[t, h] * S[h] + beta[t, h] * np.outer(k[t, h], v[t, h])
            o[t, h] = np.linalg.solve(G[h] + np.diag(ridge[h]), q[t, h]) @ S[h]
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-5) * array(module.norm.scale)
    if c.gate:
        g = split(x @ array(module.gate.kernel))
        o = o * g * sigmoid(g)
    return o.reshape(length, -1) @ array(module.out.kernel)


@pytest.mark.parametrize("impl, gate", [("definition", False), ("cg", True)])
def test_layer_is_the_formula(impl, gate):
    """The whole layer written out, in chunks that do not divide the length."""
    module = cases.module(MesaConfig(chunk=4, impl=impl, gate=gate, ridge_min=0.1), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    y = jax.jit(lambda x: module(x, mixers.Sequence.whole(*x.shape[:2])).y)(x)
    for row in range(2):
        np.testing.assert_allclose(y[row], naive(module, np.asarray(x[row])), atol=1e-12)


def test_at_first():
    """Ridges are 1; what is kept and how strongly is written is a half where x = 0. The state's size is fixed."""
    module = mixers.build(MesaConfig(ridge_min=0.4, conv=3), width=16, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.log1p(np.exp(np.asarray(module.ridge[...]))) + 0.4, np.ones((4, 4)), rtol=1e-6)
    assert not np.any(module.keep.bias[...]) and not np.any(module.beta.bias[...])
    for length in (1, 1000):
        state = module.init_state(1, length, jnp.float32).carried
        assert state.sums.shape == (1, 4, 4, 8) and state.tail.shape == (1, 2, 2 * 16)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 3}, "heads = 3 does not divide width = 16"),
        ({"conv": 0}, "conv = 0"),
        ({"ridge_min": 0.0}, "ridge_min = 0.0"),
        ({"ridge_min": 1.0}, "ridge_min = 1.0"),
        ({"iterations": 0}, "iterations = 0"),
        ({"tolerance": 0.0}, "tolerance = 0.0"),
        ({"impl": "xla"}, "impl = 'xla'"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.build({"name": "mesa", **fields}, width=16, rngs=nnx.Rngs(0))


def test_shapes_that_do_not_fit():
    q, k, v, log_decay, beta, ridge = map(jnp.asarray, arrays())
    with pytest.raises(UserError, match=r"mesa: ridge_Hd \(4,\); expected \(3, 4\)"):
        mesa(q, k, v, log_decay, beta, ridge[0])
    with pytest.raises(UserError, match=r"mesa: iterations=0 is not allowed; allowed: 1 or more"):
        mesa(q, k, v, log_decay, beta, ridge, iterations=0)
