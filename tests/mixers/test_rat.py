"""The identities of RAT (Wei et al. 2025), in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.rat import RATConfig
from attnlab.ops.attention import attention
from attnlab.ops.masks import Mask
from attnlab.ops.rope import rope
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out g z", "bias": "gate_bias"}
WRITTEN_OUT = True


def keys_seen(config, t):
    """The complete chunks before, and its own."""
    return t // config.chunk + 1


T = cases.LENGTH


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(RATConfig(**fields), jnp.float64)


@functools.partial(jax.jit, static_argnums=0)
def compiled(graphdef, params, x, seq):
    return nnx.merge(graphdef, params)(x, seq).y


def call(module, x, seq):
    return compiled(*cases.split(module), x, seq)


def parts(module, x):
    """z, v, g [B, T, H * d] and q, k [B, T, H, d] of x, in jax."""
    c = module.config
    weight = lambda name: getattr(module, name).kernel[...]
    tiled = lambda y: jnp.concatenate([y] * (c.heads // c.groups), axis=-1).reshape(*x.shape[:2], c.heads, -1)
    g = jax.nn.sigmoid(x @ weight("g") + module.gate_bias[...])
    return jax.nn.sigmoid(x @ weight("z")), x @ weight("v"), g, tiled(x @ weight("q")), tiled(x @ weight("k"))


def naive(module, x):
    """The layer on one whole sequence [T, D], position by position in numpy."""
    c, length = module.config, len(x)
    z, v, g, q, k = (np.asarray(y[0]) for y in parts(module, x[None]))
    k = k.reshape(length, -1)
    turn = lambda y, chunk: np.asarray(rope(jnp.asarray(y)[None, None], jnp.full((1, 1), chunk), c.rope_base))[0, 0]
    done, y = [], np.zeros_like(v)
    for t in range(length):
        if t % c.chunk == 0:
            v_run, k_run = np.zeros_like(v[0]), np.zeros_like(v[0])
        v_run, k_run = (g[t] * r + (1 - g[t]) * new[t] for r, new in ((v_run, v), (k_run, k)))
        entry = turn(k_run.reshape(c.heads, -1), t // c.chunk), v_run.reshape(c.heads, -1)
        seen = [*done, entry]
        assert len(seen) == t // c.chunk + 1
        query = turn(q[t], t // c.chunk)
        for h in range(c.heads):
            weights = np.exp([query[h] @ key[h] * query.shape[-1] ** -0.5 for key, _ in seen])
            o = sum(w * value[h] for w, (_, value) in zip(weights, seen)) / weights.sum()
            y[t].reshape(c.heads, -1)[h] = o
        if t % c.chunk == c.chunk - 1:
            done.append(entry)
    return (z * y) @ np.asarray(module.out.kernel[...])


@pytest.mark.parametrize("chunk, impl", [(3, "definition"), (3, "chunked"), (1, "chunked"), (16, "chunked")])
def test_layer_is_the_formula(chunk, impl):
    """The whole layer written out: L = 1, an L that does not divide the length, an L beyond it."""
    module = make(chunk=chunk, impl=impl)
    x, _ = cases.inputs(jnp.float64)
    y = call(module, x[:1], mixers.Sequence.whole(1, T))
    np.testing.assert_allclose(y[0], naive(module, np.asarray(x[0])), atol=1e-12)


@tiers.exhaustive
@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_one_chunk_is_a_gated_linear_rnn(impl):
    """L = n: z times the running average of v; queries and keys play no part."""
    module = make(chunk=T, impl=impl)
    x, _ = cases.inputs(jnp.float64)
    z, v, g, *_ = parts(module, x)
    h, rows = jnp.zeros_like(v[:, 0]), []
    for t in range(T):
        h = g[:, t] * h + (1 - g[:, t]) * v[:, t]
        rows.append(h)
    module.q.kernel[...] = 5 * module.q.kernel[...]
    want = (z * jnp.stack(rows, axis=1)) @ module.out.kernel[...]
    np.testing.assert_allclose(call(module, x, mixers.Sequence.whole(2, T)), want, atol=1e-12)


@tiers.exhaustive
@pytest.mark.parametrize("groups", [2, 4])
def test_chunks_of_one_are_softmax_attention(groups):
    """L = 1: causal softmax attention over (1 - g) k and (1 - g) v, queries and keys shared; over k and v if g = 0."""
    module = make(chunk=1, groups=groups)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(2, T)

    def softmax(kept):
        z, v, _, q, k = parts(module, x)
        k, v = kept.reshape(k.shape) * k, (kept * v).reshape(k.shape)
        q, k = (rope(y, seq.positions, module.config.rope_base) for y in (q, k))
        o = attention(q, k, v, Mask(causal=True), impl="definition")
        return (z * o.reshape(*x.shape[:2], -1)) @ module.out.kernel[...]

    y = call(module, x, seq)
    g = parts(module, x)[2]
    np.testing.assert_allclose(y, softmax(1 - g), atol=1e-12)
    assert np.abs(y - softmax(jnp.ones_like(g))).max() > 0.01  # the factor stays, though nothing is averaged
    module.gate_bias[...] = jnp.full_like(module.gate_bias[...], -800.0)
    np.testing.assert_allclose(call(module, x, seq), softmax(jnp.ones_like(g)), atol=1e-12)


@tiers.exhaustive
def test_equal_scores_average_the_entries():
    """Queries of 0: y is the mean of the t // L + 1 entries."""
    module = make(chunk=4)
    module.q.kernel[...] = jnp.zeros_like(module.q.kernel[...])
    x, _ = cases.inputs(jnp.float64)
    z, v, g, *_ = parts(module, x)
    h, means = [], []
    for t in range(T):
        before = h[-1] if t % 4 else jnp.zeros_like(v[:, 0])
        h.append(g[:, t] * before + (1 - g[:, t]) * v[:, t])
        means.append(sum([*h[3:t:4], h[t]]) / (t // 4 + 1))
    want = (z * jnp.stack(means, axis=1)) @ module.out.kernel[...]
    np.testing.assert_allclose(call(module, x, mixers.Sequence.whole(2, T)), want, atol=1e-12)


@tiers.exhaustive
def test_step_equals_parallel():
    """One position at a time, over documents that leave chunks unfinished, into a state of the promised size."""
    module = make(chunk=2)
    x, seq = cases.inputs(jnp.float64)
    want = call(module, x, seq)
    step = jax.jit(module.extend)
    state = module.init_state(2, T, jnp.float64)
    assert state.carried.k.shape == state.carried.v.shape == (2 * 4, -(-T // 2), 4)
    y, state = cases.streamed(step, state, x, seq, [1] * T)
    used = np.asarray(seq.segments) > 0
    np.testing.assert_allclose(y[used], want[used], atol=1e-12)
    y, _ = cases.streamed(step, state, x[:, :7], mixers.Sequence.whole(2, 7), [1] * 7)
    assert np.all(np.isnan(y[:, -1])), "chunks beyond the room of the state must show"


@tiers.exhaustive
@pytest.mark.parametrize("impl", ["definition", "chunked"])
def test_chunks_begin_with_each_document(impl):
    """Packed documents give what each gives alone, whatever `positions` says and wherever they begin in the row."""
    module = make(chunk=2, impl=impl)
    x, seq = cases.inputs(jnp.float64)
    y = call(module, x, mixers.Sequence(jnp.zeros_like(seq.positions), seq.segments))
    for row, first, end in cases.DOCUMENTS:
        np.testing.assert_allclose(y[row, first:end], naive(module, np.asarray(x[row, first:end])), atol=1e-12)


@tiers.exhaustive
def test_causality_across_the_boundary_of_a_chunk():
    """The last position of a chunk reaches all later positions and no earlier one; bitwise, in fp32."""
    module = cases.module(RATConfig(chunk=4), jnp.float32)
    x, _ = cases.inputs(jnp.float32)
    run = lambda x: call(module, x, mixers.Sequence.whole(2, T))
    before = np.asarray(run(x))
    for t in (3, 4, 7):
        after = np.asarray(run(x.at[:, t].add(1.0)))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.all(np.any(after[:, t:] != before[:, t:], axis=-1))


def test_initial_gates():
    """exp(b) is uniform in [1, L - 1]; 1 where L is 1 or 2."""
    bias = lambda L: np.exp(mixers.build(RATConfig(chunk=L, head_width=64), width=16, rngs=nnx.Rngs(0)).gate_bias[...])
    longest = bias(16)
    assert 1 <= longest.min() < 1.5 and 14.5 < longest.max() <= 15.001 and longest.mean() == pytest.approx(8, abs=1)
    np.testing.assert_array_equal([bias(1), bias(2)], 1.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"groups": 3}, "divisors of heads"),
        ({"chunk": 0}, "chunk = 0"),
        ({"heads": 8, "groups": 2, "head_width": 3}, "head_width = 3"),
        ({"heads": 16}, "does not divide width = 16 into even"),
        ({"impl": "xla"}, "impl = 'xla'"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.build({"name": "rat", **fields}, width=16, rngs=nnx.Rngs(0))
