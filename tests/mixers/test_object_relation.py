"""The identities of attention that is biased by boxes, in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import UnsupportedPattern
from tests.mixers import cases, plain

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out relation"}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(name="object_relation", **fields):
    return cases.module(mixers.get(name).Config(**fields), jnp.float64)


@functools.cache
def inputs():
    """x and packed rows of objects, some of which are none."""
    x, seq = jax.tree.map(np.asarray, cases.inputs(jnp.float64))
    boxes = np.random.default_rng(3).uniform(0.3, 4, (*x.shape[:2], 4))
    boxes[0, 1], boxes[1, 5, 2], boxes[1, 7, 3] = 0, 0, 0
    return x, dataclasses.replace(seq, boxes=boxes)


def relation(module, box, other):
    """b of a pair, [H]."""
    if min(*box[2:], *other[2:]) <= 0:
        return np.zeros(module.config.heads)
    count, base = module.config.frequencies, module.config.relation_base
    phi = [*((other[:2] - box[:2]) / box[2:]), *np.log(other[2:] / box[2:])]
    angles = [np.array([z * base ** (-f / count) for f in range(count)]) for z in phi]
    return np.concatenate([wave(z) for z in angles for wave in (np.sin, np.cos)]) @ np.asarray(
        module.relation.kernel[...]
    )


def naive(module, x, boxes):
    """The layer on one document [T, D], pair by pair."""
    c, d = module.config, module.head_dim
    q, k, v = ((x @ np.asarray(m.kernel[...])).reshape(len(x), -1, d) for m in (module.q, module.k, module.v))
    q, k, o = plain.rope(q, c.rope_base), plain.rope(k, c.rope_base), np.zeros_like(q)
    for i, h in np.ndindex(len(x), c.heads):
        g, seen = h // (c.heads // c.key_heads), i + 1 if c.causal else len(x)
        bias = np.array([relation(module, boxes[i], boxes[j])[h] for j in range(seen)])
        p = np.exp(k[:seen, g] @ q[i, h] / np.sqrt(d) + bias)
        o[i, h] = p / p.sum() @ v[:seen, g]
    return o.reshape(len(x), -1) @ np.asarray(module.out.kernel[...])


def test_layer_is_the_formula():
    """In packed rows, both ways, in chunks that rows cross; gradients of chunks are those of all pairs; streams."""
    x, seq = inputs()
    fields = {"kv_heads": 2, "frequencies": 3, "relation_base": 20.0, "chunk": 4}
    for causal in (True, False):
        module = make(causal=causal, **fields)
        y = cases.output(module, x, seq)
        for row, first, end in cases.DOCUMENTS:
            expected = naive(module, x[row, first:end], seq.boxes[row, first:end])
            np.testing.assert_allclose(y[row, first:end], expected, atol=1e-12)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(graphdef, params, x, boxes):
        def total(params, x, boxes):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x, dataclasses.replace(seq, boxes=boxes)).y))

        return jax.grad(total, argnums=(0, 1, 2))(params, x, boxes)

    of = [gradients(*cases.split(make(impl=impl, **fields)), x, seq.boxes) for impl in ("rows", "definition")]
    for a, b in zip(*map(jax.tree.leaves, of), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    assert np.abs(of[0][2][:, 2]).max() > 1e-4 and not np.asarray(of[0][2])[0, 1].any()

    module = make(**fields)
    graphdef, params = cases.split(module)
    step = jax.jit(lambda x, seq, state: nnx.merge(graphdef, params).extend(x, seq, state))
    whole, used = cases.output(module, x, seq), cases.SEGMENTS > 0
    stream, state, parts = mixers.Stream.start(2), module.init_state(2, cases.LENGTH, jnp.float64), []
    for first, end in ((0, 5), (5, 6), (6, cases.LENGTH)):
        piece, stream = cases.placed(stream, jax.tree.map(lambda a: jnp.asarray(a[:, first:end]), seq))
        out = step(jnp.asarray(x[:, first:end]), piece, state)
        state = out.state
        parts.append(np.asarray(out.y))
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[used], whole[used], atol=1e-12)


def test_boxes_count_by_their_relations():
    """Moved together, or scaled together, they give the same; one that is moved alone changes what sees it."""
    x, seq = inputs()
    module, used = make(), cases.SEGMENTS > 0
    y = cases.output(module, x, seq)
    scaled, alone = seq.boxes * 3.7, seq.boxes.copy()
    moved = np.where(seq.boxes[..., 2:].min(-1, keepdims=True) > 0, seq.boxes + np.array([5.0, -2.5, 0, 0]), seq.boxes)
    alone[0, 2, 0] += 1
    for boxes in (scaled, moved):
        again = cases.output(module, x, dataclasses.replace(seq, boxes=boxes))
        np.testing.assert_allclose(again[used], y[used], atol=1e-12)
    other = cases.output(module, x, dataclasses.replace(seq, boxes=alone))
    changed = np.abs(other - y).max(-1) > 1e-6
    assert changed[0].tolist() == [False, False, True, True] + [False] * 7 and not changed[1].any()


def test_without_boxes_it_is_softmax_attention():
    x, seq = inputs()
    module, softmax = make(), make("softmax")
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    expected, used = cases.output(softmax, x, seq), cases.SEGMENTS > 0
    for boxes in (None, np.zeros_like(seq.boxes)):
        y = cases.output(module, x, dataclasses.replace(seq, boxes=boxes))
        np.testing.assert_allclose(y[used], expected[used], atol=1e-12)


def test_many_keys_are_refused():
    """In whole rows, and in streams with room for more."""
    module, x, whole = make(), jnp.zeros((1, 1025, cases.WIDTH)), mixers.Sequence.whole(1, 1025)
    with pytest.raises(UnsupportedPattern, match="1025 keys in a row; allowed: at most 1024"):
        jax.eval_shape(lambda: module(x, whole))
    seq, _ = cases.placed(mixers.Stream.start(1), mixers.Sequence.whole(1, 1))
    with pytest.raises(UnsupportedPattern, match="2000 keys in a row; allowed: at most 1024"):
        jax.eval_shape(lambda: module.extend(x[:, :1], seq, module.init_state(1, 2000)))
