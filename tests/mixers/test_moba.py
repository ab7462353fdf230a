"""The identities of MoBA (Lu et al. 2025), in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.mixers import moba
from tests import tiers
from tests.mixers import cases, plain
from tests.mixers import test_contract as battery

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out"}
WRITTEN_OUT = True
T, D = 11, cases.WIDTH


def keys_seen(config, t):
    return moba.seen(t, config.block, config.top_k)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("moba").Config(**fields), jnp.float64)


@functools.cache
def inputs(rows=2):
    return np.random.default_rng(5).standard_normal((rows, T, D)), mixers.Sequence.whole(rows, T)


def parts(module, x):
    """q, k, v of one document [T, D] in NumPy, rotated."""
    c, d = module.config, module.head_dim
    q, k, v = ((x @ np.asarray(y.kernel[...])).reshape(len(x), -1, d) for y in (module.q, module.k, module.v))
    turn = lambda y: plain.rope(y, c.rope_base)
    return turn(q), turn(k), v


def naive(module, x):
    """The layer on one document, query by query; the margin by which each choice is one."""
    c, (q, k, v) = module.config, parts(module, x)
    H, o, gaps = c.heads, np.zeros_like(q), [np.inf]
    for t, h in np.ndindex(len(x), H):
        own, g = t // c.block, h // (H // c.key_heads)
        scores = [q[t, h] @ k[b * c.block : (b + 1) * c.block, g].mean(0) for b in range(own)]
        order = sorted(range(own), key=lambda b: -scores[b])
        chosen = order[: c.top_k - 1]
        if own > len(chosen) > 0:
            gaps.append(scores[chosen[-1]] - scores[order[len(chosen)]])
        seen = [s for s in range(t + 1) if s // c.block in (*chosen, own)]
        p = np.exp(k[seen, g] @ q[t, h] / np.sqrt(module.head_dim))
        o[t, h] = p / p.sum() @ v[seen, g]
    return o.reshape(len(x), -1) @ np.asarray(module.out.kernel[...]), min(gaps)


def test_layer_is_the_formula():
    """The whole layer written out, in packed rows; and streams, which choose alike."""
    module = make(block=2, top_k=3, kv_heads=2)
    x, seq = cases.inputs(jnp.float64)
    y, state = cases.output(module, x, seq), battery.begun(*cases.split(module))
    extend = functools.partial(battery.extend, *cases.split(module))
    stream, _ = cases.streamed(extend, state, x, seq, battery.CUTS[1])
    for row, first, end in cases.DOCUMENTS:
        want, gap = naive(module, np.asarray(x)[row, first:end])
        assert gap > 1e-4
        np.testing.assert_allclose(y[row, first:end], want, atol=1e-12)
        np.testing.assert_allclose(stream[row, first:end], want, atol=1e-12)


@tiers.exhaustive
def test_all_blocks_are_softmax_attention():
    """top_k of all blocks; and one block that holds all."""
    x, seq = inputs()
    for fields in ({"block": 3, "top_k": 5}, {"block": T, "top_k": 1}):
        module = make(**fields, impl="definition")
        softmax = cases.module(mixers.get("softmax").Config(impl="definition"), jnp.float64)
        for name in ("q", "k", "v", "out"):
            getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
        np.testing.assert_allclose(cases.output(module, x, seq), cases.output(softmax, x, seq), atol=1e-12)


def test_top_1_is_the_own_block():
    """Each block is what it is alone."""
    module, (x, seq) = make(block=4, top_k=1, rope_base=None, impl="definition"), inputs()
    segments = jnp.broadcast_to(1 + jnp.arange(T) // 4, (2, T))
    packed = mixers.Sequence(seq.positions, segments)
    np.testing.assert_allclose(cases.output(module, x, seq), cases.output(module, x, packed), atol=1e-12)


def test_order_in_a_complete_block_does_not_matter():
    """Without RoPE, to what comes later: means and attention are symmetric."""
    module, (x, seq) = make(block=3, top_k=2, rope_base=None, impl="definition"), inputs()
    swapped = x.copy()
    swapped[:, 3:6] = x[:, [5, 3, 4]]
    y, z = cases.output(module, x, seq), cases.output(module, swapped, seq)
    np.testing.assert_allclose(z[:, 6:], y[:, 6:], atol=1e-12)
    assert np.abs(z[:, 3:6] - y[:, 3:6]).max() > 1e-3


def test_longer_queries_choose_alike_and_choices_have_no_gradient():
    """Scores are linear in the query; gradients through means would reach blocks that are not chosen."""
    module, (x, seq) = make(block=2, top_k=2, impl="definition"), inputs()

    @jax.jit
    def choices(x):
        q, k, _ = module.positioned(x, seq)
        places = moba.BlockPlaces.of(seq.positions, 2)
        (means,) = moba._mean_keys(moba.blocks_of(k, places, one_document=True), None)
        return module.chosen(q, means, places), module.chosen(7 * q, means, places)

    chosen, of_longer = map(np.asarray, choices(jnp.asarray(x)))
    np.testing.assert_array_equal(chosen, of_longer)
    assert 0 < chosen.sum() == chosen.any(-1).sum()

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: module(x, seq).y[0, T - 1].sum())(x)

    seen = np.asarray(chosen)[0, T - 1].any(0)  # by any head
    unseen = [t for t in range(T - 1) if not seen[t // 2]]
    found = np.abs(gradient(jnp.asarray(x))[0]).max(-1)
    assert unseen and not found[unseen].any() and (found > 0).sum() == T - len(unseen)


def test_later_rows_change_nothing_to_the_last_bit():
    """In a tile of rows that all choose the same tiles of keys, and of which then the later ones choose others."""
    config, n, t = mixers.get("moba").Config(block=64, top_k=6, heads=1, rope_base=None), 640, 578
    graphdef, params = cases.split(cases.module(config, jnp.float32))
    x = np.random.default_rng(0).standard_normal((1, n, D)).astype(np.float32)
    seq, before = mixers.Sequence.whole(1, n), x.copy()
    before[:, 576:] = x[:, 576:577]
    after = before.copy()
    after[:, t:] = x[:, t:]
    run = lambda x: np.asarray(battery.call(graphdef, params, jnp.asarray(x), seq))
    y, z = run(before), run(after)
    np.testing.assert_array_equal(y[:, :t], z[:, :t])
    assert not np.array_equal(y, z)
