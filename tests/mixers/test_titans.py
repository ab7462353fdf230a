"""The identities of Titans' variants (Behrouz et al. 2025), in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.ops.documents import document_index
from attnlab.ops.two_stage import two_stage
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "attention.q attention.k attention.v between gate memory.gates memory.qkv mixed.attention.q "
    "mixed.attention.k mixed.attention.v mixed.memory.gates mixed.memory.qkv mixed.query mixed.retrieved out",
    "taps": "memory.kernel mixed.memory.kernel",
    "bias": "memory.gate_bias mixed.memory.gate_bias",
    "scale": "attention_norm memory_norm",
    "tokens": "attention.persistent mixed.attention.persistent",
    "memory": "memory.layer_0 memory.layer_1 memory.norm_gain mixed.memory.layer_0",
}
FUSED = ["memory.gates", "memory.qkv", "mixed.memory.gates", "mixed.memory.qkv", "mixed.retrieved"]
BIASED = [
    ({}, "attention.k attention.q attention.v memory.qkv", "out"),
    ({"variant": "mal"}, "attention.k attention.q attention.v memory.qkv", "between out"),
    (
        {"variant": "mac"},
        "mixed.attention.k mixed.attention.q mixed.attention.v mixed.memory.qkv mixed.query mixed.retrieved",
        "out",
    ),
]
# In float32 the closed form of a chunk rounds its gates' gradients so, XLA's "chunked" too.
KERNEL_TOLERANCE = 1e-4
BFLOAT16_GRADIENTS = False
WRITTEN_OUT = True
SPLIT_GRADIENTS = False

MAC = {"variant": "mac", "depth": 1, "window": 4, "chunk": 2, "persistent": 2}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("titans").Config(**fields), jnp.float64)


def whole(length, seed=0):
    x = np.random.default_rng(seed).standard_normal((1, length, cases.WIDTH))
    return jnp.asarray(x), mixers.Sequence.whole(1, length)


def window_attention(titans, x, seq):
    """Heads of the softmax mixer with the layer's queries, keys and values."""
    softmax = cases.module(mixers.get("softmax").Config(window=titans.config.window), jnp.float64)
    for name in ("q", "k", "v"):
        getattr(softmax, name).kernel[...] = getattr(titans.attention, name).kernel[...]
    return softmax.heads(x, seq).y


def test_mal_is_attention_over_the_memory_alone():
    """mal: the layer lmm with another projection, then window attention."""
    mal, lmm = make(variant="mal", depth=1, window=3), make(variant="lmm", depth=1)
    nnx.update(lmm.memory, nnx.state(mal.memory))
    for name in ("gate", "memory_norm"):
        nnx.update(getattr(lmm, name), nnx.state(getattr(mal, name)))
    lmm.out.kernel[...] = mal.between.kernel[...]
    x, seq = whole(7)
    both = jax.jit(lambda x: (mal.heads(x, seq).y, window_attention(mal, lmm(x, seq).y, seq)))
    np.testing.assert_allclose(*both(x), atol=1e-12)


def test_mag_with_a_silent_memory_is_attention():
    """A memory of scale 0 leaves a gate of one half on the normalised heads of window attention."""
    mag = make(depth=1, window=3)
    mag.memory_norm.scale[...] = jnp.zeros(4)
    x, seq = whole(7)
    got, y = jax.jit(lambda x: (mag.heads(x, seq).y, window_attention(mag, x, seq)))(x)
    expected = 0.5 * y / np.sqrt(np.mean(np.square(y), -1, keepdims=True) + 1e-6) * mag.attention_norm.scale[...]
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_persistent_keys_are_in_the_same_softmax():
    """One softmax over the persistent rows and the window, for every query."""
    attention = make(depth=1, window=3, persistent=2).attention
    x, seq = whole(7)
    q, k, v = (np.asarray(a[0]) for a in attention.positioned(x, seq.positions))
    keys, values = np.asarray(attention.persistent[...])
    got = jax.jit(lambda x: attention(x, seq)[0][0])(x)
    for t in range(7):
        rows = slice(max(0, t - 2), t + 1)
        all_keys, all_values = np.concatenate([keys, k[rows]]), np.concatenate([values, v[rows]])
        weights = np.exp(np.einsum("hd,nhd->nh", q[t], all_keys) / 2)
        expected = np.einsum("nh,nhd->hd", weights / weights.sum(0), all_values)
        np.testing.assert_allclose(got[t], expected, atol=1e-12)


def segment_by_segment(mixed, x, positions):
    """mac position by position, as its formula says: y and m [T, H, d] of one document."""
    memory, window, chunk = mixed.memory, mixed.config.window, mixed.config.chunk
    q, k, v = (np.asarray(a[0]) for a in mixed.attention.positioned(x, positions))
    query = np.asarray(jax.nn.silu(mixed.query(x))).reshape(q.shape)
    query = query / np.sqrt(np.sum(query**2, -1, keepdims=True) + 1e-6)
    prefix_k, prefix_v = (list(p) for p in np.asarray(mixed.attention.persistent[...]))
    kernel = np.asarray(memory.kernel[...])
    w, s, projected, ys, ms = np.asarray(memory.layer_0[...]), 0.0, [], [], []
    gated, rotated = jax.jit(lambda x, taps: memory.gated(x, taps, None)), jax.jit(mixed.attention.rotated)
    qkv, retrieved = jax.jit(memory.qkv), jax.jit(mixed.retrieved)
    start = w
    for t in range(x.shape[1]):
        if t % window == 0:
            reader, keys, values = w, prefix_k.copy(), prefix_v.copy()
        start = w if t % chunk == 0 else start
        read = np.einsum("hi,hio->ho", query[t], reader)
        k_read, v_read = np.split(np.asarray(retrieved(read.reshape(1, -1))), 2, axis=-1)
        k_read = rotated(k_read.reshape(1, 1, *read.shape), np.asarray(positions)[:, t : t + 1])
        keys += [k[t], np.asarray(k_read)[0, 0]]
        values += [v[t], np.asarray(v_read).reshape(read.shape)]
        weights = np.exp(np.einsum("hd,nhd->nh", q[t], keys) / 2)
        ys.append(np.einsum("nh,nhd->hd", weights / weights.sum(0), values))
        flat = jnp.asarray(ys[-1].reshape(1, 1, -1))
        projected.append(np.asarray(qkv(flat))[0, 0])
        convolved = sum(kernel[-1 - i] * projected[t - i] for i in range(min(len(kernel), t + 1)))
        inputs = gated(flat, convolved[None, None])
        mq, mk, mv, log_keep, log_eta, theta = (np.asarray(a)[0, 0] for a in inputs)
        slope = mk[:, :, None] * (np.einsum("hi,hio->ho", mk, start) - mv)[:, None]
        wide = lambda a: np.exp(a)[:, None, None]
        s = wide(log_eta) * s - theta[:, None, None] * slope
        w = wide(log_keep) * w + s
        ms.append(np.einsum("hi,hio->ho", mq, w))
    return np.array(ys), np.array(ms)


@tiers.often("chunked")
@pytest.mark.parametrize("impl", ["chunked", "definition"])
def test_mac_is_its_formula(impl):
    """Both implementations against a loop over positions in NumPy, over three segments."""
    mixed = make(**MAC, impl=impl).mixed
    x, seq = whole(9)
    got = jax.jit(lambda x: mixed(x, seq, mixed.init_state(1, jnp.float64))[:2])(x)
    for a, b in zip(got, segment_by_segment(mixed, x, seq.positions)):
        np.testing.assert_allclose(a[0], b, atol=1e-11)


@pytest.mark.slow
def test_mac_leaks_nothing_within_a_segment():
    """Inputs after t change nothing up to t, bitwise, though they share a segment and a chunk; and all after it."""
    module, (x, seq) = make(**MAC), whole(8)
    x = np.asarray(x)
    before = cases.output(module, x, seq)
    for t in (0, 4, 5):
        changed = np.concatenate([x[:, : t + 1], 7 - 3 * x[:, t + 1 :]], axis=1)
        after = cases.output(module, changed, seq)
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
        assert np.all(after[:, t + 1 :] != before[:, t + 1 :])


@tiers.often("fields0")
@pytest.mark.parametrize("fields", [{"momentum": True}, {"momentum": False}])
def test_bound_on_a_chunk_of_steps(fields):
    """stability=bound: what a chunk's steps add up to in its last weights is theta_max at most, whatever the gates."""
    memory = make(**fields, variant="lmm", depth=1, chunk=8, theta_max=0.7, conv=0).memory
    x, _ = whole(8)
    inputs = lambda memory: jax.jit(lambda x: memory.inputs(x, None, None, None)[0])
    of, weights = inputs(memory), jax.jit(lambda keep, eta: two_stage(keep, eta, jnp.tri(8, dtype=bool)).kappa_CC)
    for scale in (1.0, 30.0):
        *_, log_keep, log_eta, theta = (None if a is None else np.asarray(a).swapaxes(1, 2) for a in of(scale * x))
        kappa = np.asarray(weights(log_keep, log_eta))
        assert np.all(np.sum(kappa[..., -1, :] * theta, -1) <= 0.7 + 1e-12)
    loose = dataclasses.replace(memory.config, stability="none")
    raw, bounded = inputs(cases.module(loose, jnp.float64).memory)(x)[-1], of(x)
    factor = 8 / (1 - np.exp(bounded[4])) if fields["momentum"] else 8
    np.testing.assert_allclose(raw, bounded[5] * factor, rtol=1e-9)


@tiers.often("fields1")
@pytest.mark.parametrize("fields", [{}, MAC, {"variant": "lmm"}, {"variant": "mal"}])
def test_state_does_not_grow(fields):
    """The state's size is independent of the length seen and of the room asked for."""
    titans = make(**fields)
    sizes = lambda state: jax.tree.map(jnp.shape, state)
    before = jax.eval_shape(lambda: titans.init_state(2, 10, jnp.float64))
    x, seq = cases.inputs(jnp.float64)
    seq, _ = cases.placed(mixers.Stream.start(2), seq)
    after = jax.eval_shape(lambda: titans.extend(x, seq, titans.init_state(2, 10**6, jnp.float64)).state)
    assert sizes(before) == sizes(after)


@tiers.exhaustive
def test_memory_that_learns_nothing_reads_its_parameters():
    """theta and alpha 0: `q + (1 + g) LN(W2 gelu(W1 q))` with the layer's own W1, W2, g, GELU and epsilon."""
    module = make(variant="lmm", activation="gelu", norm_scale=True, norm_epsilon=0.1, forgetting=False, momentum=False)
    memory = module.memory
    memory.gate_bias[...] = jnp.full_like(memory.gate_bias[...], -1e3)
    x, seq = whole(7)
    q = memory.inputs(x, None, None, None)[0][0].swapaxes(1, 2)
    z = jax.nn.gelu(q @ memory.layer_0[...], approximate=False) @ memory.layer_1[...]
    normed = (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 0.1)
    m = (q + (1 + memory.norm_gain[...]) * normed).swapaxes(1, 2)
    expected = module.memory_norm(m) * jax.nn.sigmoid(module.gate(x).reshape(m.shape))
    np.testing.assert_allclose(module.heads(x, seq).y, expected, atol=1e-12)


@tiers.exhaustive
def test_keys_have_length_one_and_values_do_not():
    q, k, v, *_ = make().memory.inputs(*whole(7)[:1], document_index(jnp.ones((1, 7), jnp.int32)), None, None)[0]
    for x in (q, k):
        np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), 1, atol=1e-3)
    assert np.ptp(np.linalg.norm(v, axis=-1)) > 0.1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"variant": "mem"}, "lmm, mal, mag, mac"),
        ({"depth": 5}, "1 to 4"),
        ({"variant": "lmm", "persistent": 4}, "0 in lmm"),
        ({"variant": "mac", "window": 20}, "multiples of chunk"),
        ({"grad_at": "decayed", "forgetting": False}, "prev without forgetting"),
        ({"head_width": 3}, "even"),
        ({"activation": "relu"}, "gelu_tanh, gelu"),
        ({"depth": 1, "norm_scale": True}, "norm_scale = True .*false without the norm"),
        ({"norm_epsilon": 0.0}, "norm_epsilon = 0.0"),
        ({"stability": "clip"}, "bound, none"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "titans", **fields})
