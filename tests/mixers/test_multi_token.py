"""Multi-token attention (Golovneva et al. 2025) against its formula in NumPy, and its limits, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.multi_token import MultiTokenConfig
from attnlab.ops.multi_token_attention import multi_token_attention
from tests import tiers
from tests.mixers import cases, devices
from tests.mixers.test_softmax import rotate

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out gate", "taps": "filters after", "scale": "norm mix logit_mix"}
BLOCK = 128
NUMBERS_OF = "tensor"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def filtered(x, taps, segments):
    """x [T, T] of one document each, pair by pair."""
    T, (Q, C) = len(x), taps.shape
    out = np.zeros_like(x)
    for i, j in np.ndindex(T, T):
        for a, b in np.ndindex(Q, C):
            row, key = i - Q + 1 + a, j - C // 2 + b
            if 0 <= row and 0 <= key <= row and segments[row] == segments[i] == segments[key]:
                out[i, j] += taps[a, b] * x[row, key]
    return out


def mixed(p, mix):
    """p [H, T, T] of groups of heads: head j of one is `sum_i mix[i, j] p_i`."""
    return np.concatenate([np.einsum("irl,ij->jrl", g, m) for g, m in zip(np.split(p, len(mix)), mix)])


def layer(module, x, positions, segments):
    """The whole layer for one row, pair by pair."""
    c, d, T = module.config, module.head_dim, len(x)
    linear = lambda m, y: y @ np.asarray(m.kernel[...]) + (0 if m.bias is None else np.asarray(m.bias[...]))
    q, k, v = (linear(m, x).reshape(T, -1, d) for m in (module.q, module.k, module.v))
    turn = lambda y: y if c.rope_base is None else rotate(y, positions, c.rope_base, None)
    own = lambda h: h // (c.heads // c.key_heads)
    segments = np.where(segments == 0, -1 - np.arange(T), segments)  # padding stands alone
    seen = np.array([[s <= t and segments[s] == segments[t] for s in range(T)] for t in range(T)])
    scores = [np.where(seen, turn(q[:, h]) @ turn(k[:, own(h)]).T / np.sqrt(d), 0) for h in range(c.heads)]
    p = np.stack([filtered(x, taps, segments) for x, taps in zip(scores, np.asarray(module.filters[...]))])
    if c.logit_mix:
        p = mixed(p, np.asarray(module.logit_mix[...]))
    p = np.where(seen, np.exp(p), 0)
    p = p / p.sum(2, keepdims=True)
    if c.after:
        each = zip(p, np.asarray(module.after[...]))
        p = np.stack([np.where(seen, filtered(x, taps, segments), 0) for x, taps in each])
    if c.head_mix:
        p = mixed(p, np.asarray(module.mix[...]))
    o = np.stack([p[h] @ v[:, own(h)] for h in range(c.heads)], axis=1)
    if c.norm:
        o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-5) * np.asarray(module.norm.scale[...])
    if c.gate:
        o = o / (1 + np.exp(-linear(module.gate, o)))
    return linear(module.out, o.reshape(T, -1))


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_heads": 2, "query_span": 3, "key_span": 3, "after": True, "logit_mix": 4, "head_mix": 2, "bias": "all"},
        {"query_span": 2, "key_span": 5, "norm": False, "gate": False, "rope_base": None, "logit_mix": 2},
    ],
    ids=str,
)
def test_equals_the_formula(fields):
    """The layer as written, of packed rows."""
    module = cases.module(MultiTokenConfig(**fields), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    y = jax.jit(lambda x: module(x, seq).y)(x)
    for row in range(2):
        expected, used = (
            layer(module, np.asarray(x[row]), cases.POSITIONS[row], cases.SEGMENTS[row]),
            cases.SEGMENTS[row],
        )
        np.testing.assert_allclose(y[row][used > 0], expected[used > 0], atol=1e-10)


@tiers.exhaustive
def test_at_first_it_is_softmax_attention():
    """Filters and mixes that change nothing, without norm and gate."""
    knobs = {"norm": False, "gate": False, "after": True, "logit_mix": 4, "head_mix": 2}
    module = mixers.build({"name": "multi_token", **knobs}, width=16, rngs=nnx.Rngs(0), dtype=jnp.float64)
    softmax = cases.module(mixers.get("softmax").Config(), jnp.float64)
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    x, seq = cases.inputs(jnp.float64)
    ours, theirs = jax.jit(lambda x: (module(x, seq).y, softmax(x, seq).y))(x)
    used = np.asarray(seq.segments) > 0
    np.testing.assert_allclose(ours[used], theirs[used], atol=1e-12)


@pytest.mark.parametrize("impl", ["definition", "blocks"])
def test_filters_move_and_scale_scores(impl):
    """One tap at the next key: a key's logit is that of the key behind it, 0 for the row's own; at the row before: that
    of the query before; a single tap is a temperature."""
    rng, T = np.random.default_rng(0), 6
    q, k = (rng.normal(size=(1, T, 1, 4)) for _ in range(2))
    v = np.eye(T)[None, :, None]
    t = np.arange(T, dtype=np.int32)[None]
    scores = np.tril(np.einsum("td,sd->ts", q[0, :, 0], k[0, :, 0]) / 2)
    taps = {name: np.zeros((1, 2, 3)) for name in ("next", "before", "twice")}
    taps["next"][0, 1, 2], taps["before"][0, 0, 1], taps["twice"][0, 1, 1] = 1, 1, 2
    moved = {"next": np.pad(scores[:, 1:], ((0, 0), (0, 1))), "before": np.pad(scores[:-1], ((1, 0), (0, 0)))}
    moved["twice"] = 2 * scores
    halo = lambda x: jnp.pad(jnp.asarray(x), [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))

    @jax.jit
    def run(taps):
        rows = halo(q), jnp.asarray(k), jnp.asarray(v), taps, None, None, halo(0 * t), halo(t + 1)
        return multi_token_attention(*rows, whole=True, impl=impl)[0, :, 0]

    for name, logits in moved.items():
        p = np.tril(np.exp(logits))
        np.testing.assert_allclose(run(taps[name]), p / p.sum(1, keepdims=True), atol=1e-12)


@pytest.mark.parametrize("impl", ["definition", "blocks"])
def test_equals_sums_over_pairs_of_heads(impl):
    """Values and gradients in all seven of the op with a mix before the softmax and one after, as matrices of all heads
    that are 0 outside of groups; two documents."""
    rng, T, H = np.random.default_rng(0), 6, 4
    shapes = (T, H, 3), (T, 2, 3), (T, 2, 3), (H, 3, 3), (H, 2, 3), (1, H, H), (2, 2, 2)
    arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    segments, t = np.array([1, 1, 2, 2, 2, 2]), np.arange(T)
    seen = (t[:, None] >= t) & (segments[:, None] == segments)

    def pairs(x, taps):
        total = 0
        for a, b in np.ndindex(*taps.shape[1:]):
            row, key = t - taps.shape[1] + 1 + a, t - taps.shape[2] // 2 + b
            own = (row >= 0) & (segments[np.maximum(row, 0)] == segments)
            there = own[:, None] & ((key >= 0) & (key < T))
            total += taps[:, a, b, None, None] * jnp.where(
                there, x[:, np.clip(row, 0, T)][:, :, np.clip(key, 0, T - 1)], 0
            )
        return total

    def by_pairs(q, k, v, taps, after, logit_mix, mix):
        k, v = (jnp.repeat(x, 2, axis=1) for x in (k, v))
        of_all = lambda p, mix: jnp.einsum("ij,irl->jrl", jax.scipy.linalg.block_diag(*mix), p)
        p = pairs(jnp.where(seen, jnp.einsum("thd,shd->hts", q, k) / 3**0.5, 0), taps)
        p = jax.nn.softmax(jnp.where(seen, of_all(p, logit_mix), -jnp.inf), axis=-1)
        p = of_all(jnp.where(seen, pairs(p, after), 0), mix)
        return jnp.einsum("hts,shd->thd", p, v)

    def op(q, k, v, taps, after, logit_mix, mix):
        rows = lambda x: jnp.pad(jnp.asarray(x), [(3, 0)] + [(0, 0)] * (x.ndim - 1))[None]
        bounds = rows(np.array([0, 0, 2, 2, 2, 2], np.int32)), rows((t + 1).astype(np.int32))
        options = {"whole": True, "logit_mix_Ncc": logit_mix, "impl": impl}
        return multi_token_attention(rows(q), k[None], v[None], taps, after, mix, *bounds, **options)[0]

    def of(run):
        total = lambda *arrays: (jnp.sin(y := run(*arrays)).sum(), y)
        return jax.tree.leaves(jax.jit(jax.value_and_grad(total, range(7), has_aux=True))(*arrays))

    for a, b in zip(of(op), of(by_pairs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@tiers.exhaustive
@pytest.mark.parametrize("logit_mix, head_mix", [(2, None), (4, 2), (2, 4)])
def test_heads_that_are_mixed_share_a_device(logit_mix, head_mix):
    """Values and gradients are the same on eight devices, of which two share the heads where no mix needs them all."""
    fields = {"query_span": 2, "key_span": 3, "after": True, "logit_mix": logit_mix, "head_mix": head_mix}
    module = cases.module(MultiTokenConfig(**fields), jnp.float64)
    devices.hold(*cases.split(module), *cases.inputs(jnp.float64), data=2)


def test_the_state_keeps_as_many_queries_as_are_reached():
    for fields, reach in (({}, 5), ({"after": True}, 10), ({"query_span": 1, "after": True}, 0)):
        cost = mixers.get("multi_token").cost(MultiTokenConfig(**fields), 16, 100)
        assert cost.state_bytes == (2 * 100 + reach) * 16 * 4 + 4 + 1


def test_what_does_not_fit_is_refused():
    x, taps, t = jnp.ones((1, 3, 2, 4)), jnp.ones((2, 2, 3)), jnp.zeros((1, 3), jnp.int32)
    for filters in (jnp.ones((2, 2, 4)), jnp.ones((1, 2, 3)), jnp.ones((2, 4, 3))):
        with pytest.raises(UserError, match="expected H a multiple of K, filters"):
            multi_token_attention(x, x, x, filters, None, None, t, t, whole=True)
    for mix in (jnp.ones((1, 2, 1)), jnp.ones((2, 2, 2)), jnp.ones((1, 3, 3))):
        for mixes in ((mix, None), (None, mix)):
            with pytest.raises(UserError, match=r"mixes .*expected \[H / c, c, c\]"):
                multi_token_attention(x, x, x, taps, None, mixes[0], t, t, whole=True, logit_mix_Ncc=mixes[1])
    served = jax.eval_shape(lambda x: multi_token_attention(x, x, x, taps, None, None, t, t, whole=False), x)
    assert served.shape == (1, 2, 2, 4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"key_span": 4}, "key_span = 4 .*odd"),
        ({"head_mix": 3}, r"head_mix = 3 .*divisors of heads \(4\)"),
        ({"logit_mix": 3}, r"logit_mix = 3 .*divisors of heads \(4\)"),
        ({"causal": False}, "unknown key 'mixer.causal'"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "multi_token", **fields})


def test_a_stream_in_bfloat16():
    """A piece of a stream over its cache gives what the whole gives, as far as bfloat16 tells: a program of it runs."""
    T, cut = 96, 49
    config = mixers.get("multi_token").Config(heads=4, head_width=16)
    with jax.enable_x64(False):
        module = cases.module(config, jnp.bfloat16)
        graphdef, params = cases.split(module)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, T, cases.WIDTH)), jnp.bfloat16)
        whole = cases.call(graphdef, params, x, mixers.Sequence.whole(2, T))
        state = module.init_state(2, T, jnp.bfloat16)
        positions = jnp.broadcast_to(jnp.arange(cut), (2, cut))
        seq, _ = mixers.Stream.start(2).extend(mixers.Sequence(positions))
        y = jax.jit(lambda p, x, state: nnx.merge(graphdef, p).extend(x, seq, state).y)(params, x[:, :cut], state)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(whole, np.float32)[:, :cut], atol=0.05)
