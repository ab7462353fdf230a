"""The code of objects' boxes: its formula, and where a language model adds it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.models.lm import LanguageModel, LanguageModelConfig
from attnlab.models.transformer import mixer_table
from attnlab.ops.position_codes import box_code
from attnlab.train.program import open_data
from tests.models.test_cell_code import written_out
from tests.train import runs


def by_hand(box, width, base):
    """Each half is the code of a place in the plane: of the middle, and of the sides' logarithms."""
    x, y, w, h = box
    return np.concatenate([written_out(*pair, width // 2, base) for pair in ((x, y), (np.log(w), np.log(h)))])


def test_it_is_the_formula():
    """Where there is a box; else 0, with no gradient and none that is not finite."""
    boxes = np.random.default_rng(0).uniform(0.1, 9, (3, 4, 4))
    expected = np.array([[by_hand(box, 16, 20.0) for box in row] for row in boxes])
    boxes[0, 1, 2], boxes[1, 0, 3], boxes[2, 3] = 0, -1, 0
    expected[0, 1], expected[1, 0], expected[2, 3] = 0, 0, 0
    with jax.enable_x64(True):
        weights = np.arange(1.0, 17)
        run = jax.jit(jax.value_and_grad(lambda box: (box_code(box, 16, 20.0) * weights).sum()))
        np.testing.assert_allclose(box_code(boxes, 16, 20.0), expected, atol=1e-12)
        value, gradient = map(np.asarray, run(jnp.asarray(boxes)))
    there = np.abs(expected).max(-1) > 0
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert not gradient[~there].any() and (np.abs(gradient[there]) > 0).all()
    for width, base, told in ((12, 10.0, "width = 12"), (0, 10.0, "width = 0"), (8, 1.0, "base = 1.0")):
        with pytest.raises(UserError, match=told):
            box_code(boxes, width, base)


def test_a_model_adds_it_to_the_embedding_of_objects():
    """Through its MLP; other positions stay as they are embedded; a stream gives what the whole row gives; the model's
    costs are those of its arrays."""
    table = mixer_table({"A": {"name": "softmax", "heads": 2}}, "m")
    config = LanguageModelConfig(vocab=11, width=8, layers=1, mixers=table, pattern="A", box_code=30.0)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), shapes)
    assert LanguageModel.cost(config, 9).parameters == sum(a.size for a in jax.tree.leaves(params))
    without = LanguageModel.cost(dataclasses.replace(config, box_code=None), 9)
    assert LanguageModel.cost(config, 9).total_flops - without.total_flops == 4 * 8**2
    tokens, boxes = rng.integers(0, 11, (2, 9)).astype(np.int32), rng.uniform(0.2, 5, (2, 9, 4)).astype(np.float32)
    boxes[0, 2:5], boxes[1, ::2] = 0, 0

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        seq = dataclasses.replace(mixers.Sequence.whole(2, 9), boxes=jnp.asarray(boxes))
        batch = {"tokens": tokens, "boxes": seq.boxes, "positions": seq.positions, "segments": np.ones_like(tokens)}
        periods, state, parts = model.transformer.unstacked(), model.init_state(2, 9), []
        for cut in (slice(0, 3), slice(3, 9)):
            piece = mixers.Sequence(seq.positions[:, cut], boxes=seq.boxes[:, cut])
            y, state = model.extend(periods, tokens[:, cut], piece, state)
            parts.append(y)
        return model.embedded(batch) - model.embed(tokens), model.hidden(tokens, seq).y, jnp.concatenate(parts, 1)

    added, whole, streamed = map(np.asarray, run(params))
    model = nnx.merge(graphdef, params)
    linear = lambda m, y: y @ np.asarray(m.kernel[...]) + np.asarray(m.bias[...])
    for b, t in np.ndindex(2, 9):
        expected = np.zeros(8)
        if boxes[b, t].any():
            hidden = np.asarray(jax.nn.gelu(linear(model.box_in, by_hand(boxes[b, t], 8, 30.0)), approximate=False))
            expected = linear(model.box_out, hidden)
        np.testing.assert_allclose(added[b, t], expected, atol=1e-5)
    np.testing.assert_allclose(streamed, whole, atol=1e-5)


def test_what_it_cannot_do_is_refused(source):
    """Data without boxes, a width that is no multiple of 8, a base of 1: before anything is traced."""
    with pytest.raises(UserError, match="boxes"):
        open_data(runs.config(source, model__box_code=100.0))
    with pytest.raises(ConfigError, match=r"model.width = 20.*a multiple of 8 beside model.box_code"):
        runs.config(source, model__box_code=100.0, model__width=20)
    with pytest.raises(ConfigError, match=r"model.box_code = 1.0.*above 1, or none"):
        runs.config(source, model__box_code=1.0)
