"""The code of places in the plane: its formula, what its products are of, and where a language model adds it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import batch as batch_lib
from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.models.lm import LanguageModel, LanguageModelConfig
from attnlab.models.transformer import mixer_table
from attnlab.ops.layout import Layout
from attnlab.ops.position_codes import in_common_boxes, plane_code
from attnlab.train.program import open_data
from tests.train import runs


def written_out(y, x, width, base):
    code = np.zeros(width)
    for f in range(width // 4):
        w = base ** (-f / (width // 4))
        code[f :: width // 4] = np.sin(y * w), np.cos(y * w), np.sin(x * w), np.cos(x * w)
    return code


def test_it_is_the_formula():
    """At centres and between them, of any shape; products are of differences alone; it can be learned through."""
    places = np.random.default_rng(0).uniform(-3, 40, (2, 5, 2))
    with jax.enable_x64(True):
        y, x = jnp.asarray(places[..., 0]), jnp.asarray(places[..., 1])
        code = plane_code(y, x, 12, 50.0)
        expected = [[written_out(*p, 12, 50.0) for p in row] for row in places]
        np.testing.assert_allclose(code, expected, atol=1e-12)
        moved = plane_code(y + 2.5, x - 7.25, 12, 50.0)
        np.testing.assert_allclose(
            jnp.einsum("bnd,bmd->bnm", code, code), jnp.einsum("bnd,bmd->bnm", moved, moved), atol=1e-12
        )
        step = 1e-6
        ahead, behind = (plane_code(y + s, x, 12, 50.0) for s in (step, -step))
        _, slope = jax.jvp(lambda y: plane_code(y, x, 12, 50.0), (y,), (jnp.ones_like(y),))
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), atol=1e-8)
    assert plane_code(jnp.arange(3), jnp.arange(3), 8).dtype == jnp.float32
    np.testing.assert_allclose(plane_code(np.float32(2), 5, 8), written_out(2, 5, 8, 1e4), atol=1e-6)
    for width, base, told in ((6, 10.0, "width = 6"), (0, 10.0, "width = 0"), (8, 1.0, "base = 1.0")):
        with pytest.raises(UserError, match=told):
            plane_code(0.0, 0.0, width, base)


def layout(text, rows, columns, length):
    """Text, an image, and text."""
    columns_of = np.zeros((length, batch_lib.LAYOUT), np.int32)
    columns_of[:, 0] = batch_lib.TEXT
    columns_of[:, 1:3] = -1
    cells = np.stack(np.meshgrid(range(rows), range(columns), indexing="ij"), -1).reshape(-1, 2)
    image = slice(text, text + rows * columns)
    columns_of[image, 0], columns_of[image, 1:3], columns_of[image, 3:5] = batch_lib.VISUAL, cells, (rows, columns)
    columns_of[image, 5:7] = image.start, image.stop
    return columns_of


def test_a_model_adds_it_to_the_cells_of_images():
    """Text stays as it is embedded; a stream gives what the whole row gives; without a layout nothing is added."""
    table = mixer_table({"A": {"name": "softmax", "heads": 2}}, "m")
    config = LanguageModelConfig(vocab=11, width=8, layers=1, mixers=table, pattern="A", cell_code=30.0)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 11, (2, 9)).astype(np.int32)
    where = np.stack([layout(2, 2, 2, 9), layout(0, 2, 3, 9)])
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), shapes)

    @jax.jit
    def run(params):
        model, plain = nnx.merge(graphdef, params), nnx.merge(graphdef, params)
        plain.config = dataclasses.replace(config, cell_code=None)
        places = {"positions": np.zeros((2, 9), np.int32), "segments": np.ones((2, 9), np.int32)}
        batch = {"tokens": tokens, "layout": jnp.asarray(where), **places}
        seq = dataclasses.replace(mixers.Sequence.whole(2, 9), layout=Layout.of_columns(batch["layout"]))
        periods, state, parts = model.transformer.unstacked(), model.init_state(2, 9), []
        for cut in (slice(0, 3), slice(3, 9)):
            piece = mixers.Sequence(seq.positions[:, cut], layout=Layout.of_columns(batch["layout"][:, cut]))
            y, state = model.extend(periods, tokens[:, cut], piece, state)
            parts.append(y)
        embedded = model.embedded(batch), plain.embedded(batch), model.embed(tokens)
        return embedded, (model.hidden(tokens, seq).y, jnp.concatenate(parts, 1), plain.hidden(tokens, seq).y)

    (coded, bare, without), (whole, streamed, other) = jax.tree.map(np.asarray, run(params))
    for row, columns in zip(coded - bare, where, strict=True):
        for found, (kind, y, x) in zip(row, columns[:, :3], strict=True):
            expected = written_out(y, x, 8, 30.0) if kind == batch_lib.VISUAL else np.zeros(8)
            np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (without == bare).all() and abs(other - whole).max() > 1e-2
    np.testing.assert_allclose(streamed, whole, atol=1e-5)


def test_common_boxes_are_the_formula():
    """Of every subject of every image, whatever lies between; the rest keeps its cell. A box of its own side, from the
    first cell on, is where it is."""
    rng, shape = np.random.default_rng(3), (2, 40)
    cell = rng.integers(0, 9, (*shape, 2)).astype(np.int32)
    image, subject = rng.integers(0, 3, shape).astype(np.int32), rng.integers(-2, 3, shape).astype(np.int32)
    counted = rng.random(shape) < 0.7
    expected = cell.astype(np.float64)
    for b, i, g in np.ndindex(2, 3, 5):
        at = counted[b] & (image[b] == i) & (subject[b] == g - 2)
        if at.any():
            first, last = cell[b, at].min(0), cell[b, at].max(0)
            expected[b, at] = (cell[b, at] - first) / (last - first + 1) * 3.5
    with jax.enable_x64(True):
        found = jax.jit(in_common_boxes, static_argnums=4)(cell.astype(np.float64), image, subject, counted, 3.5)
        np.testing.assert_allclose(found, expected, rtol=1e-14)
    own = np.stack(np.meshgrid(range(4), range(4), indexing="ij"), -1).reshape(1, 16, 2).astype(np.int32)
    one = np.zeros((1, 16), np.int32)
    np.testing.assert_array_equal(in_common_boxes(own, one, one, one == 0, 4), own)
    with pytest.raises(UserError, match="side = 0"):
        in_common_boxes(own, one, one, one == 0, 0)


def test_a_subject_that_is_moved_or_scaled_keeps_its_codes():
    """In the model: one that is three times as large, elsewhere in a larger image, has the same codes in every third
    row and column; the background has those of its cells. Streams have them where images are whole, else NaN."""
    table = mixer_table({"A": {"name": "softmax", "heads": 2}}, "m")
    fields = {"vocab": 11, "width": 8, "layers": 1, "mixers": table, "pattern": "A", "cell_code": 30.0}
    config = LanguageModelConfig(**fields, cell_box=5.0)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), shapes)
    where, node = np.concatenate([layout(1, 3, 4, 14), layout(0, 8, 9, 73)]), np.zeros(87, np.int32)
    where[14:, 5:7] += 14 * (where[14:, :1] == batch_lib.VISUAL)
    small, large = node[1:13].reshape(3, 4), node[14:86].reshape(8, 9)
    small[1:, 2:], large[2:8, 3:9] = 7, 7  # two by two cells, and six by six
    tokens, cut = np.zeros((1, 87), np.int32), slice(0, 14)

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        batch = {"tokens": tokens, "layout": where[None], "node": node[None], "positions": tokens, "segments": tokens}
        seq = dataclasses.replace(mixers.Sequence.whole(1, 87), layout=Layout.of_columns(where[None]), node=node[None])
        code = model.embedded(batch) - model.embed(tokens)
        of = lambda cut: model.extend(
            model.transformer.unstacked(),
            tokens[:, cut],
            jax.tree.map(lambda a: a[:, cut], seq),
            model.init_state(1, 87),
        )[0]
        return code[0], model.hidden(tokens, seq).y[:, cut], of(cut), of(slice(0, 12)), of(slice(2, 14))

    code, whole, streamed, *inside = jax.tree.map(np.asarray, run(params))
    small, large = code[1:13].reshape(3, 4, 8), code[14:86].reshape(8, 9, 8)
    np.testing.assert_allclose(large[2:8:3, 3:9:3], small[1:, 2:], atol=1e-6)
    for y, x in np.ndindex(6, 6):
        np.testing.assert_allclose(large[2 + y, 3 + x], written_out(y / 6 * 5, x / 6 * 5, 8, 30.0), atol=1e-5)
    for y, x in ((0, 0), (1, 8), (7, 2)):
        np.testing.assert_allclose(large[y, x], written_out(y, x, 8, 30.0), atol=1e-5)
    np.testing.assert_array_equal(code[[0, 13, 86]], 0)
    np.testing.assert_allclose(streamed, whole, atol=1e-5)
    assert all(np.isnan(y).all() for y in inside)
    with pytest.raises(UserError, match="cell_box is set, and Sequence.node is not given"):
        nnx.merge(graphdef, params).embed(
            tokens, dataclasses.replace(mixers.Sequence.whole(1, 87), layout=Layout.of_columns(where[None]))
        )


def test_what_it_cannot_do_is_refused(source):
    """Data without layouts, a width that is no multiple of 4, a base of 1: before anything is traced."""
    assert open_data(runs.config(source, model__cell_code=None))
    with pytest.raises(UserError, match="layout"):
        open_data(runs.config(source, model__cell_code=100.0))
    with pytest.raises(ConfigError, match=r"model.width = 18.*a multiple of 4 beside model.cell_code"):
        runs.config(source, model__cell_code=100.0, model__width=18)
    with pytest.raises(ConfigError, match=r"model.cell_code = 1.0.*above 1, or none"):
        runs.config(source, model__cell_code=1.0)
    with pytest.raises(ConfigError, match=r"model.cell_box = 4.0.*none where model.cell_code is"):
        runs.config(source, model__cell_box=4.0)
    with pytest.raises(ConfigError, match=r"model.cell_box = 0.0.*above 0, or none"):
        runs.config(source, model__cell_code=100.0, model__cell_box=0.0)
