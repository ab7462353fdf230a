"""The identities of Gated DeltaNet (Yang et al. 2024), in float64."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.gated_deltanet import GatedDeltaNetConfig
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.norm import unit
from attnlab.train import config as run_config
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "q k v out beta gate log_decay.linear",
    "taps": "filters",
    "scale": "norm",
    "decay_rate": "log_decay.a_log log_decay.dt_bias",
}
WRITTEN_OUT = True

B, T, H, D, E = 2, 9, 3, 4, 5
LM = pathlib.Path(__file__).parents[2] / "configs" / "lm.py"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(GatedDeltaNetConfig(**fields), jnp.float64)


rule = jax.jit(delta_rule, static_argnames=("chunk", "impl"))


@functools.partial(jax.jit, static_argnums=0)
def compiled(graphdef, params, x, seq):
    return nnx.merge(graphdef, params)(x, seq).y


def call(module, x, seq):
    return compiled(*cases.split(module), x, seq)


def arrays(length=T):
    """q, k, v [B, T, H, .] with unit keys, decays a and strengths beta [B, T, H]."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    q, k, v = normal(B, length, H, D), unit(normal(B, length, H, D)), normal(B, length, H, E)
    return q, k, v, jnp.asarray(rng.random((B, length, H))), jnp.asarray(rng.random((B, length, H)))


def scan_heads(step, q, k, v, *rest):
    """Runs `S, o = step(S, q, k, v, *rest)` over the positions of every head, from S = 0 [e, d]: o [B, T, H, e]."""

    def head(q, k, v, *rest):
        _, o = jax.lax.scan(lambda S, inputs: step(S, *inputs), jnp.zeros((v.shape[-1], q.shape[-1])), (q, k, v, *rest))
        return o

    return jax.vmap(jax.vmap(head, in_axes=1, out_axes=1))(q, k, v, *rest)


@tiers.often("chunked")
@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_no_decay_is_deltanet(impl):
    """a = 1: S + beta (v - S k) k^T, the delta rule of Schlag et al. 2021."""
    q, k, v, _, beta = arrays()

    def deltanet(S, q, k, v, beta):
        S = S + beta * jnp.outer(v - S @ k, k)
        return S, S @ q

    o, _ = rule(q, k, v, jnp.zeros_like(beta), beta, chunk=4, impl=impl)
    np.testing.assert_allclose(o, scan_heads(deltanet, q, k, v, beta), atol=1e-13)


@tiers.often("chunked")
@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_gradient_at_the_decayed_state(impl):
    """Equals one step of gradient descent on |W k - v|^2 / 2, taken at the decayed memory; not at the one before it."""
    q, k, v, a, beta = arrays()
    loss = lambda W, k, v: jnp.sum((W @ k - v) ** 2) / 2

    def descent(W, q, k, v, a, beta, decayed):
        at = a * W if decayed else W
        W = a * W - beta * jax.grad(loss)(at, k, v)
        return W, W @ q

    o, _ = rule(q, k, v, jnp.log(a), beta, chunk=4, impl=impl)
    at = {which: scan_heads(lambda *xs: descent(*xs, which), q, k, v, a, beta) for which in (True, False)}
    np.testing.assert_allclose(o, at[True], atol=1e-13)
    assert np.abs(o - at[False]).max() > 0.01


@tiers.exhaustive
def test_strength_of_zero_keeps():
    """beta = 0: the memory only decays, whatever the keys and values."""
    q, k, v, a, beta = arrays()
    state = jnp.asarray(np.random.default_rng(1).standard_normal((B, H, D, E)))
    for impl in ("definition", "chunked"):
        o, end = rule(q, k, 1e3 * v, jnp.log(a), 0 * beta, state_BHde=state, chunk=4, impl=impl)
        np.testing.assert_allclose(end, state * jnp.prod(a, axis=1)[..., None, None], atol=1e-13)
        want = jnp.cumprod(a, axis=1)[..., None] * jnp.einsum("bthd,bhde->bthe", q, state)
        np.testing.assert_allclose(o, want, atol=1e-12)
        _, same = rule(q, k, v, 0 * a, 0 * beta, state_BHde=state, chunk=4, impl=impl)
        np.testing.assert_array_equal(same, state)


def test_one_write_stores_exactly():
    """a = 1, beta = 1 and one unit key again and again: each read returns the newest value, whatever stood there."""
    _, k, v, _, _ = arrays()
    k = jnp.broadcast_to(k[:, :1], k.shape)
    state = jnp.asarray(np.random.default_rng(1).standard_normal((B, H, D, E)))
    zero, one = jnp.zeros((B, T, H)), jnp.ones((B, T, H))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    for impl in ("definition", "chunked"):
        o, _ = rule(k, k, v, zero, one, state_BHde=state, chunk=4, impl=impl)
        np.testing.assert_allclose(o, v, atol=1e-12)


def silu(z):
    return z / (1 + np.exp(-z))


def inputs_of(module, x):
    """q, k [T, K, d], v [T, H, e], and decays and strengths [T, H] of the rows x [T, D], in numpy."""
    c, (length, _) = module.config, x.shape
    split = lambda y: y.reshape(length, c.heads, -1)
    weight = lambda linear: np.asarray(linear.kernel[...])
    K = c.key_heads or c.heads
    filters = np.asarray(module.filters[...]).reshape(c.conv, K, -1)
    parts = [(x @ weight(y)).reshape(length, K, -1) for y in (module.q, module.k, module.v)]
    rows = np.concatenate(parts, axis=-1)
    padded = np.concatenate([np.zeros((c.conv - 1, *rows.shape[1:])), rows])
    rows = silu(sum(filters[i] * padded[i : i + length] for i in range(c.conv)))
    d = module.head_dim
    q, k, v = rows[..., :d], rows[..., d : 2 * d], split(rows[..., 2 * d :])
    q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    q = q * (d**-0.5 if c.query_scale is None else c.query_scale)
    beta = 1 / (1 + np.exp(-x @ weight(module.beta)))
    steps = np.log1p(np.exp(x @ weight(module.log_decay.linear) + np.asarray(module.log_decay.dt_bias[...])))
    a = np.exp(-np.exp(np.asarray(module.log_decay.a_log[...])) * steps)
    return q, k, v, a, beta


def finished(module, x, o):
    """The layer's output [T, D] of what its heads read, [T, H, e]."""
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * np.asarray(module.norm.scale[...])
    gate = silu(x @ np.asarray(module.gate.kernel[...])).reshape(o.shape)
    return (o * gate).reshape(len(x), -1) @ np.asarray(module.out.kernel[...])


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in numpy."""
    q, k, v, a, beta = inputs_of(module, x)
    H, K, d = module.config.heads, *k.shape[1:]
    S, o = np.zeros((H, v.shape[-1], d)), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(H):
            kk, qq = (y[t, h * K // H] for y in (k, q))
            S[h] = a[t, h] * S[h] @ (np.eye(d) - beta[t, h] * np.outer(kk, kk)) + beta[t, h] * np.outer(v[t, h], kk)
            o[t, h] = S[h] @ qq
    return finished(module, x, o)


@tiers.often("chunked-shared0", "chunked-shared2", "definition-shared1")
@pytest.mark.parametrize("shared", [{}, {"key_heads": 2, "query_scale": None}, {"key_heads": 1, "query_scale": 0.01}])
@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_layer_is_the_formula(impl, shared):
    """The whole layer written out, with values wider than keys, chunks that do not divide the length, and heads of
    values that share queries and keys."""
    module = make(expand=2.0, chunk=4, impl=impl, **shared)
    x, _ = cases.inputs(jnp.float64)
    y = call(module, x, mixers.Sequence.whole(*x.shape[:2]))
    for row in range(2):
        np.testing.assert_allclose(y[row], naive(module, np.asarray(x[row])), atol=1e-12)


@tiers.exhaustive
def test_shared_keys_are_repeated_ones():
    """Two key heads for four heads are four with pairs of equal projections and filters: values, and the gradients for
    x and for the shared queries' kernel, which is the sum of the two."""
    few, all_heads = make(key_heads=2), make()
    nnx.update(all_heads, nnx.state(few, lambda path, _: path[0] not in ("q", "k", "filters")))
    d, e = few.head_dim, few.value_dim
    pairs = lambda w: jnp.repeat(w.reshape(*w.shape[:-1], 2, d), 2, axis=-2).reshape(*w.shape[:-1], -1)
    taps = few.filters[...].reshape(few.config.conv, 2, -1)
    of_keys = jnp.repeat(taps[..., : 2 * d], 2, axis=1)
    all_heads.filters[...] = jnp.concatenate([of_keys, taps[..., 2 * d :].reshape(-1, 4, e)], -1).reshape(len(taps), -1)
    for name in ("q", "k"):
        getattr(all_heads, name).kernel[...] = pairs(getattr(few, name).kernel[...])
    x, seq = cases.inputs(jnp.float64)
    waves = jnp.cos(jnp.arange(x.size)).reshape(x.shape) * (seq.segments > 0)[..., None]
    scalar = lambda graphdef, params, x: jnp.sum(waves * compiled(graphdef, params, x, seq))
    results = []
    for module in (few, all_heads):
        graphdef, params = cases.split(module)
        value, (of_params, of_x) = jax.value_and_grad(lambda p, x: scalar(graphdef, p, x), (0, 1))(params, x)
        results.append((value, of_x, of_params["q"]["kernel"][...]))
    (value, of_x, of_q), (want, want_of_x, wide) = results
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(of_x, want_of_x, atol=1e-12)
    np.testing.assert_allclose(of_q, wide.reshape(-1, 2, 2, d).sum(2).reshape(of_q.shape), atol=1e-12)


@tiers.exhaustive
@pytest.mark.parametrize("chunk", [3, 64])
def test_chunk_and_step_agree(chunk):
    """The training form equals one position at a time, the memory after it too."""
    module = make(chunk=chunk)
    x, seq = cases.inputs(jnp.float64)
    step = jax.jit(module.extend)
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    _, whole = cases.streamed(step, state, x, seq, [cases.LENGTH])
    y, state = cases.streamed(step, state, x, seq, [1] * cases.LENGTH)
    used = np.asarray(seq.segments) > 0
    np.testing.assert_allclose(y[used], call(module, x, seq)[used], atol=1e-11)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@tiers.exhaustive
def test_padded_batch_is_unpadded():
    """Padding before or behind a document leaves its outputs as they are: it does not enter the memory."""
    module = make(chunk=4)
    x, _ = cases.inputs(jnp.float64)
    n = 6
    want = call(module, x[:, :n], mixers.Sequence.whole(2, n))
    for first in (0, 2, 5):
        at = np.arange(cases.LENGTH)
        inside = (at >= first) & (at < first + n)
        seq = mixers.Sequence(
            jnp.broadcast_to(jnp.where(inside, at - first, 0), (2, cases.LENGTH)),
            jnp.broadcast_to(jnp.asarray(inside, jnp.int32), (2, cases.LENGTH)),
        )
        loud = jnp.full((2, cases.LENGTH, cases.WIDTH), 1e3).at[:, first : first + n].set(x[:, :n])
        np.testing.assert_allclose(call(module, loud, seq)[:, first : first + n], want, atol=1e-12)


def test_state_is_the_memory_and_the_tail():
    """H * d * e numbers in fp32, at any length, and conv - 1 inputs of the convolution."""
    begun = lambda module, length, dtype: jax.eval_shape(lambda: module.init_state(1, length, dtype)).carried
    module = make(heads=2, head_width=6, expand=1.5, conv=3)
    for length in (1, 1000):
        state = begun(module, length, jnp.float32)
        assert state.memory.shape == (1, 2, 6, 9) and state.tail.shape == (1, 2, 2 * (6 + 6 + 9))
    shared = begun(make(heads=4, key_heads=2, head_width=6, conv=3), 1, jnp.float32)
    assert shared.memory.shape == (1, 4, 6, 6) and shared.tail.shape == (1, 2, 2 * (6 + 6) + 4 * 6)
    state = begun(cases.blank(mixers.get("gated_deltanet").Config(), jnp.bfloat16), 10, jnp.bfloat16)
    assert (state.memory.dtype, state.tail.dtype) == (jnp.float32, jnp.bfloat16)
    assert state.memory.size == 4 * 4 * 4


def test_initial_decays():
    """At first, for x = 0: softplus(dt_bias) in [0.001, 0.1] and A in (0, 16]."""
    module = mixers.build({"name": "gated_deltanet", "heads": 256, "head_width": 1}, width=16, rngs=nnx.Rngs(0))
    steps = np.log1p(np.exp(np.asarray(module.log_decay.dt_bias[...])))
    assert 0.999e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.1001
    assert np.median(steps) == pytest.approx(0.01, rel=0.4)  # log-uniform
    A = np.exp(np.asarray(module.log_decay.a_log[...]))
    assert 0 < A.min() < 1 and 15 < A.max() <= 16.001


def test_hybrid_of_windows_and_memories():
    """InfiniteVL's pattern, one layer over a window and three memories, is `pattern=WMMM`, its state sizes too."""
    sizes = ["model.mixers.M.head_width=8", "model.mixers.M.expand=2"]
    config = run_config.load(f"{LM}:mixer=gated_deltanet,pattern=WMMM", sizes).model
    assert config.pattern == "WMMM"
    built = [config.mixers[letter] for letter in config.pattern]
    assert [c.node_name for c in built] == ["softmax"] + 3 * ["gated_deltanet"]
    cost = {length: [mixers.get(c.node_name).cost(c, config.width, length) for c in built] for length in (512, 4096)}
    # keys and values of 127 positions before, in 4 heads of 32, and whether the document has overflowed
    assert cost[512][0].state_bytes == cost[4096][0].state_bytes == 4 * (2 * 127 * 128) + 1
    memory, tail = 4 * 8 * 16, 3 * 4 * (8 + 8 + 16)
    assert all(c.state_bytes == 4 * (memory + tail) + 1 for length in cost for c in cost[length][1:])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 3}, "heads = 3 does not divide width = 16"),
        ({"expand": 0.3}, "multiples of 1 / 4"),
        ({"key_heads": 3}, r"key_heads = 3 .*divisors of heads \(4\)"),
        ({"query_scale": 0.0}, "query_scale = 0.0"),
        ({"expand": 0.0}, "expand = 0.0"),
        ({"conv": 0}, "conv = 0"),
        ({"chunk": 0}, "chunk = 0"),
        ({"impl": "xla"}, "impl = 'xla'"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.build({"name": "gated_deltanet", **fields}, width=16, rngs=nnx.Rngs(0))
