"""The identities of SAISA (Yuan et al. 2025), in float64, by itself and in a stack."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.batch import VISUAL
from attnlab.errors import ConfigError
from attnlab.mixers import saisa
from attnlab.models.transformer import StackConfig, Transformer, extend, mixer_table
from tests.masks.rows import ROWS, layout_of, places
from tests.mixers import cases, devices, plain

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out project_in project_out", "scale": "visual_norm"}
D = cases.WIDTH


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(name="saisa", **fields):
    return cases.module(mixers.get(name).Config(**fields), jnp.float64)


@functools.cache
def inputs():
    """x, the features, and packed rows of text and images."""
    layout, segments = layout_of([places(row) for row in ROWS[:2]])
    rng, positions = np.random.default_rng(5), np.zeros_like(segments)
    for t in range(1, segments.shape[1]):
        positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
    x, e = rng.standard_normal((2, *segments.shape, D))
    return x, mixers.Sequence(positions, segments, layout=layout, embedding=e)


def images():
    return inputs()[1].layout.kind == VISUAL


def visual_inputs(module, e):
    """norm(P(e)) in NumPy."""
    linear = lambda m, y: y @ np.asarray(m.kernel[...]) + np.asarray(m.bias[...])
    hidden = linear(module.project_in, e)
    hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    y = linear(module.project_out, hidden)
    return y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * np.asarray(module.visual_norm.scale[...])


def naive(module, x, e, of_image):
    """The layer on one document [T, D], query by query."""
    c, d = module.config, module.head_dim
    y = np.where(of_image[:, None], visual_inputs(module, e), x)
    linear = lambda m: (y @ np.asarray(m.kernel[...]) + np.asarray(m.bias[...])).reshape(len(x), -1, d)
    q, k, v = linear(module.q), linear(module.k), linear(module.v)
    q, k, o = plain.rope(q, c.rope_base), plain.rope(k, c.rope_base), np.zeros_like(q)
    for t, h in np.ndindex(len(x), c.heads):
        g = h // (c.heads // c.key_heads)
        p = np.exp(k[: t + 1, g] @ q[t, h] / np.sqrt(d))
        o[t, h] = p / p.sum() @ v[: t + 1, g]
    out = o.reshape(len(x), -1) @ np.asarray(module.out.kernel[...]) + np.asarray(module.out.bias[...])
    return np.where(of_image[:, None], 0, out)


def streamed(step, state, x, seq, cuts):
    """What `step` gives of pieces that begin at these cuts, put together again."""
    stream, parts = mixers.Stream.start(len(x)), []
    for first, end in zip(cuts, cuts[1:]):
        piece, stream = cases.placed(stream, jax.tree.map(lambda a: jnp.asarray(a[:, first:end]), seq))
        y, state = step(jnp.asarray(x[:, first:end]), piece, state)
        parts.append(y)
    return jax.tree.map(lambda *y: np.concatenate(y, axis=1), *parts)


def test_layer_is_the_formula():
    """The whole layer written out, in packed rows, in each implementation that serves; streams are cut anywhere."""
    x, seq = inputs()
    fields, T = {"kv_heads": 2, "bias": "all"}, x.shape[1]
    module = make(**fields)
    graphdef, params = cases.split(module)
    expected = np.zeros_like(x)
    for row, document in {(b, n) for b, n in np.ndindex(2, 9) if (seq.segments[b] == n).any()} - {(0, 0), (1, 0)}:
        at = seq.segments[row] == document
        expected[row, at] = naive(module, x[row, at], seq.embedding[row, at], images()[row, at])
    used = seq.segments > 0
    assert not saisa._of_text(seq.derived(), images()).documents  # kernels of packed documents would hide images
    for impl in ("definition", "xla"):
        y = cases.output(make(**fields, impl=impl), x, seq)
        np.testing.assert_allclose(y[used], expected[used], atol=1e-12)
        np.testing.assert_array_equal(y[images()], 0)

    @jax.jit
    def step(x, seq, state):
        module = nnx.merge(graphdef, params)
        out = module.extend(x, seq, state)
        return (out.y, module.heads(x, seq, state.carried).y), out.state

    for cuts in ([0, 3, *range(8, T, 5), T], [0, 5, *range(6, T, 5), T]):
        found, heads = streamed(step, module.init_state(2, T, jnp.float64), x, seq, cuts)
        np.testing.assert_allclose(found[used], expected[used], atol=1e-12)
        for y in (found, heads):  # layers around this one read the heads
            np.testing.assert_array_equal(y[images()], 0)


def test_what_depends_on_what():
    """What layers did to the positions of images moves nothing, nor does anything move these; features matter there
    alone, and only where text comes behind."""
    x, seq = inputs()
    graphdef, params = cases.split(make())

    @jax.jit
    def jacobians(x, e):
        def of(x, e):
            layer, here = nnx.merge(graphdef, params), dataclasses.replace(seq, embedding=e)
            heads = layer.heads(x, here.derived()).y.reshape(*x.shape[:2], -1)
            y = jnp.sin(layer(x, here).y + heads + 1)
            return jnp.sum(y), jnp.sum(jnp.where(images()[..., None], y, 0))

        return jax.jacrev(of, argnums=(0, 1))(x, e)

    (of_x, of_e), of_images = jax.tree.map(np.asarray, jacobians(x, seq.embedding))
    np.testing.assert_array_equal(of_x[images()], 0)
    np.testing.assert_array_equal(of_e[~images()], 0)
    assert not any(gradient.any() for gradient in of_images)
    text = (seq.segments > 0) & ~images()
    assert np.all(np.abs(of_x[text]).max(-1) > 0) and np.all(np.abs(of_e[images()]).max(-1) > 0)


def test_text_is_attention_with_images_hidden_from_themselves():
    """Under the mask no_visual_self without what lies before: text gets the same of the same inputs."""
    x, seq = inputs()
    module = make(impl="definition")
    softmax = make("softmax", mask={"name": "no_visual_self", "pre_text": False}, impl="definition")
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    given = np.where(images()[..., None], visual_inputs(module, seq.embedding), x)
    ours, theirs = cases.output(module, x, seq), cases.output(softmax, given, seq)
    text = (seq.segments > 0) & ~images()
    np.testing.assert_allclose(ours[text], theirs[text], atol=1e-12)
    assert np.abs(theirs[images()]).min() > 0


def test_text_alone_is_softmax_attention():
    """Without a layout, and with one that has no image; rows without segments are one document."""
    x, seq = inputs()
    module, softmax = make(), make("softmax")
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    texts = dataclasses.replace(seq.layout, kind=np.where(images(), 1, seq.layout.kind).astype(np.int8))
    for segments, layouts in ((seq.segments, (None, texts)), (None, (texts,))):
        here = dataclasses.replace(seq, segments=segments)
        expected = cases.output(softmax, x, here)
        for layout in layouts:
            y = cases.output(module, x, dataclasses.replace(here, layout=layout))
            np.testing.assert_allclose(y, expected, atol=1e-12)


def test_a_row_without_segments_is_one_document():
    """With an image in it."""
    x, seq = inputs()
    module, at = make(bias="all"), np.arange(x.shape[1])
    whole = dataclasses.replace(seq, positions=np.stack([at, at]), segments=None)
    y = cases.output(module, x, whole)
    for row in range(2):
        np.testing.assert_allclose(y[row], naive(module, x[row], seq.embedding[row], images()[row]), atol=1e-12)


def test_an_overflow_stays_in_its_document():
    """Features that overflow, in x too: other documents, and all gradients, are what they are without."""
    x, seq = inputs()
    graphdef, params = cases.split(make())
    lost = seq.segments[0] == 1
    assert images()[0, 1] and lost[1]

    @jax.jit
    def run(params, x, e):
        def of(params):
            y = nnx.merge(graphdef, params)(x, dataclasses.replace(seq, embedding=e)).y
            return jnp.sum(jnp.where(lost[None, :, None] & (jnp.arange(2) == 0)[:, None, None], 0, y)), y

        (_, y), gradient = jax.value_and_grad(of, has_aux=True)(params)
        return y, gradient

    wild_x, wild_e = x.copy(), seq.embedding.copy()
    wild_x[0, 1, 0], wild_e[0, 1, 2] = np.nan, np.inf
    (y, gradient), (wild, its) = run(params, x, seq.embedding), run(params, wild_x, wild_e)
    assert np.isnan(np.asarray(wild)[0, lost][-1]).all()
    np.testing.assert_array_equal(np.asarray(wild)[0, ~lost], np.asarray(y)[0, ~lost])
    np.testing.assert_array_equal(wild[1], y[1])
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(its), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(a).max()))


def a_stack():
    """Two layers, and their parameters."""
    table = mixer_table({"M": {"name": "saisa", "heads": 2}}, "m")
    config = StackConfig(width=D, layers=2, mixers=table, mlp_width=8, dtype="float64")
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(2)
    return graphdef, jax.tree.map(lambda a: rng.normal(size=a.shape, scale=0.3).astype(a.dtype), shapes)


def test_a_stack_reads_the_features_in_every_layer():
    """Whatever the blocks between make of an image's positions: text is the same with noise there, and in streams."""
    x, seq = inputs()
    seq, text = dataclasses.replace(seq, embedding=None), (seq.segments > 0) & ~images()
    graphdef, params = a_stack()
    T, noise = x.shape[1], np.random.default_rng(3).standard_normal(x.shape)

    @jax.jit
    def run(params, x):
        stack = nnx.merge(graphdef, params)
        here = dataclasses.replace(seq.derived(), embedding=x)
        first, second = (period.blocks[0] for period in stack.unstacked())
        between = jnp.where(images()[..., None], noise, first(x, here)[0])
        return stack(x, seq).y, second(between, here)[0]

    @jax.jit
    def step(x, piece, state):
        stack = nnx.merge(graphdef, params)
        return extend(stack.unstacked(), x, dataclasses.replace(piece, documents=None, offsets=None), state)

    whole, noisy = map(np.asarray, run(params, x))
    np.testing.assert_allclose(noisy[text], whole[text], atol=1e-12)
    assert np.abs(noisy - whole)[images()].max() > 1e-2
    state = nnx.merge(graphdef, params).init_state(2, T)
    np.testing.assert_allclose(streamed(step, state, x, seq, [0, 5, 11, T])[text], whole[text], atol=1e-12)


def test_a_stack_on_eight_devices():
    """Rows, heads and positions of packed text and images split: the same numbers, gradients too."""
    x, seq = inputs()
    of_x = devices.hold(*a_stack(), x, dataclasses.replace(seq, embedding=None), context=2)
    assert np.all(np.abs(of_x[images()]).max(-1) > 0)


def test_a_convolution_of_the_input_is_refused():
    with pytest.raises(ConfigError, match="input_conv = 4.*text would read"):
        mixers.get("saisa").Config(input_conv=4)
