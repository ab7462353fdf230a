"""The identities of residual attention, in float64, by itself and in a stack."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from tests import tiers
from tests.mixers import cases
from tests.mixers.test_softmax import rotate

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out gate", "scale": "opening"}
NUMBERS_OF = "softmax"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("residual_attention").Config(**fields), jnp.float64)


def parts(module, x):
    """q, k, v of one document in NumPy, rotated, each query head with its own key head; and the gate."""
    c, d = module.config, module.head_dim
    q, k, v = ((x @ np.asarray(y.kernel[...])).reshape(len(x), -1, d) for y in (module.q, module.k, module.v))
    turn = lambda y: np.stack([rotate(y[:, i], np.arange(len(x)), c.rope_base, None) for i in range(y.shape[1])], 1)
    of_heads = lambda y: np.repeat(y, c.heads // c.key_heads, axis=1)
    return (
        turn(q),
        of_heads(turn(k)),
        of_heads(v),
        np.tanh(x @ np.asarray(module.gate.kernel[...]) * np.asarray(module.opening[...])),
    )


def naive(module, x, source=None):
    """The layer on one document, with q' and k' of another layer's `parts`; None: its own."""
    q, k, v, g = parts(module, x)
    q1, k1, *_ = source or (q, k)
    o = np.zeros_like(q)
    softmax = lambda z: np.exp(z) / np.exp(z).sum()
    for t, h in np.ndindex(*q.shape[:2]):
        logits, earlier = (b[: t + 1, h] @ a[t, h] / np.sqrt(module.head_dim) for a, b in ((q, k), (q1, k1)))
        if module.config.form == "logits":
            weights = softmax(logits + g[t, h] * earlier)
        else:
            weights = softmax(logits) + g[t, h] * softmax(earlier)
        o[t, h] = weights @ v[: t + 1, h]
    return o.reshape(len(x), -1) @ np.asarray(module.out.kernel[...])


@tiers.often("weights-previous")
@pytest.mark.parametrize("form, earlier", [("weights", "previous"), ("logits", "first")])
def test_layers_of_a_stack_are_the_formula(form, earlier):
    """Three layers written out, each of which reads another's map: whole rows, and streams cut anywhere."""
    x, seq = cases.inputs(jnp.float64)
    layers = [make(form=form, earlier=earlier, kv_heads=2)] * 3
    inputs = [x, x[:, ::-1], 2 * x]  # as if blocks had made them

    def run(parts, seq, states=None, whole=True):
        shared, outs = layers[0].init_shared(*parts[0].shape[:2]), []
        for i, (layer, y) in enumerate(zip(layers, parts)):
            placed = dataclasses.replace(seq, shared=shared)
            out = layer(y, placed) if states is None else layer.extend(y, placed, states[i])
            shared = shared | out.shared
            outs.append(out)
        return [out.y for out in outs], [out.state for out in outs]

    found, _ = jax.jit(run)(inputs, seq)
    for row, first, end in cases.DOCUMENTS:
        documents = [np.asarray(y)[row, first:end] for y in inputs]
        maps = [parts(layer, y) for layer, y in zip(layers, documents)]
        for i, (layer, y) in enumerate(zip(layers, documents)):
            other = maps[0] if earlier == "first" else maps[max(i - 1, 0)]
            np.testing.assert_allclose(found[i][row, first:end], naive(layer, y, other[:2]), atol=1e-12)
    states = [layer.init_state(2, cases.LENGTH, jnp.float64) for layer in layers]
    stream, streamed = mixers.Stream.start(2), []
    step = jax.jit(lambda parts, seq, states: run(parts, seq, states))
    for first, end in ((0, 5), (5, 10), (10, cases.LENGTH)):
        cut = lambda y: np.asarray(y)[:, first:end]
        piece, stream = cases.placed(stream, jax.tree.map(cut, seq))
        ys, states = step(list(map(cut, inputs)), piece, states)
        streamed.append(ys)
    for i in range(3):
        whole = np.concatenate([ys[i] for ys in streamed], axis=1)
        used = np.asarray(seq.segments) > 0
        np.testing.assert_allclose(whole[used], np.asarray(found[i])[used], atol=1e-12)


def test_closed_gates_are_softmax_attention():
    """As it begins; in both forms."""
    x, seq = cases.inputs(jnp.float64)
    softmax, used = cases.module(mixers.get("softmax").Config(impl="definition"), jnp.float64), cases.SEGMENTS > 0
    blank = mixers.build({"name": "residual_attention"}, width=cases.WIDTH, rngs=cases.nnx.Rngs(0))
    assert not np.asarray(blank.opening[...]).any()
    for form in ("weights", "logits"):
        module = make(form=form, impl="definition")
        module.opening[...] = jnp.zeros(4)
        for name in ("q", "k", "v", "out"):
            getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
        ours, theirs = cases.output(module, x, seq), cases.output(softmax, x, seq)
        np.testing.assert_allclose(ours[used], theirs[used], atol=1e-12)


@tiers.exhaustive
def test_its_own_map_again():
    """Of weights it is attention times 1 + g, of logits attention of a temperature 1 + g."""
    x, seq = cases.inputs(jnp.float64)
    x, used = x.at[..., 0].set(1.0), cases.SEGMENTS > 0
    softmax = lambda module, **fields: cases.module(mixers.get("softmax").Config(**fields), jnp.float64)
    for form, scale in (("weights", {}), ("logits", {"query_scale": 1.5 / 2})):
        module = make(form=form, impl="definition")
        module.gate.kernel[...] = jnp.zeros((cases.WIDTH, 4)).at[0].set(np.arctanh(0.5))
        module.opening[...] = jnp.ones(4)
        other = softmax(module, impl="definition", **scale)
        for name in ("q", "k", "v", "out"):
            getattr(other, name).kernel[...] = getattr(module, name).kernel[...]
        factor = 1.5 if form == "weights" else 1.0
        ours, theirs = cases.output(module, x, seq), cases.output(other, x, seq)
        np.testing.assert_allclose(ours[used], factor * np.asarray(theirs)[used], atol=1e-12)
