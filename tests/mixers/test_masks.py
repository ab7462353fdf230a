"""Mixers whose mask narrows what a query sees: streams, packing, MoH, and what does not go together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import config as config_lib
from attnlab import masks, mixers
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.ops import attention_tiles
from attnlab.ops.dispatch import recording
from tests import tiers
from tests.masks.rows import ROWS, layout_of, places
from tests.mixers import cases
from tests.train import runs

POWER = {"name": "power_blocks", "block": 2, "sinks": 0}
CAUSAL = {"name": "neighborhood", "window": [3], "causal_axes": [True]}
GRID = {"name": "grid_pattern", "stride": 3, "local": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = attention_tiles.Sizes(rows=4, keys=4, full=2, masked=1, group=2, pairs=12)
    monkeypatch.setattr(attention_tiles, "ON_CPU", sizes)
    with jax.enable_x64(True):
        yield


@tiers.often("moh")
@pytest.mark.parametrize(
    "node, implementations, cuts",
    [
        ({"name": "softmax", "kv_heads": 2, "sinks": True, "mask": POWER}, ["tiles"], [3, 3, 1, 3, 1]),
        ({"name": "moh", "core": {"name": "gated", "mask": GRID}}, ["dense", "tiles"], [1] * cases.LENGTH),
        ({"name": "mla", "rank": 7, "mask": POWER}, ["tiles"], [3, 3, 1, 3, 1]),
        ({"name": "diff", "mask": POWER}, ["tiles"] * 2, [3, 3, 1, 3, 1]),
        ({"name": "diff", "version": 2, "kv_heads": 1, "mask": GRID}, ["tiles"] * 2, [3, 3, 1, 3, 1]),
        ({"name": "fox", "kv_heads": 2, "shift": True, "mask": GRID}, ["chunked", "tiles"], [3, 3, 1, 3, 1]),
    ],
    ids=["softmax", "moh", "mla", "diff", "diff 2", "fox"],
)
def test_streams_and_documents(node, implementations, cuts):
    """`extend` in pieces equals the whole of packed, padded rows, in which each document gives what it gives alone."""
    config = mixers.config_from_node(node)
    module = cases.module(config, jnp.float64)
    graphdef, params = cases.split(module)
    x, seq = cases.inputs(jnp.float64)
    run = jax.jit(lambda params, x, seq: nnx.merge(graphdef, params)(x, seq).y)
    with recording() as chosen:
        whole = run(params, x, seq)
    assert [choice.implementation for choice in chosen.choices] == implementations
    step = jax.jit(lambda x, seq, state: nnx.merge(graphdef, params).extend(x, seq, state))
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    pieces, _ = cases.streamed(step, state, x, seq, cuts)
    np.testing.assert_allclose(np.where((seq.segments > 0)[..., None], pieces - whole, 0), 0, atol=1e-12)
    for documents in cases.ALONE:
        alone = run(params, *cases.alone(x, seq, documents))
        for i, (row, first, end) in enumerate(documents):
            np.testing.assert_allclose(alone[i, : end - first], whole[row, first:end], atol=1e-12)


@tiers.often("grid-mla", "by head-diff 2")
@pytest.mark.parametrize(
    "node",
    [
        {"name": "softmax"},
        {"name": "mla", "rank": 7},
        {"name": "diff"},
        {"name": "diff", "version": 2, "kv_heads": 2},
        {"name": "fox", "forget": "constant"},
    ],
    ids=["softmax", "mla", "diff", "diff 2", "fox"],
)
@pytest.mark.parametrize("mask", [GRID, {"name": "spans", "spans": (1, 3, 4, 2), "sinks": 0}], ids=["grid", "by head"])
def test_a_query_hears_what_its_mask_shows(node, mask):
    """The output at t depends on the input at s where a head of the mask shows s to t, and nowhere else."""
    config = mixers.config_from_node({**node, "heads": 4, "head_width": 4, "mask": mask})
    graphdef, params = cases.split(cases.module(config, jnp.float64))
    seq, T = mixers.Sequence.whole(1, cases.LENGTH), cases.LENGTH
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, T, cases.WIDTH)))
    slopes = jax.jit(jax.jacrev(lambda x: nnx.merge(graphdef, params)(x, seq).y))(x)[0, :, :, 0]
    shown = masks.build(config.mask).mask(seq, causal=True).visible(T, T)
    shown = np.asarray(shown).reshape(-1, T, T).any(0)
    assert (shown < np.tril(np.ones((T, T), bool))).any()
    np.testing.assert_array_equal(np.abs(slopes).max((1, 3)) > 0, shown)


@pytest.mark.parametrize("mask", ["concentric", "modality_mutual"])
def test_images_in_a_stream(mask):
    """Images that see ahead, keys that are turned by rings: a stream cut at closed cuts equals the whole."""
    layout, segments = layout_of([places(row) for row in ROWS])
    layout, segments = jax.tree.map(lambda x: jnp.asarray(x[:1]), layout), jnp.asarray(segments[:1])
    module = cases.module(mixers.config_from_node({"name": "softmax", "mask": mask}), jnp.float64)
    graphdef, params = cases.split(module)
    x = np.random.default_rng(0).standard_normal((1, segments.shape[1], cases.WIDTH))
    seq = mixers.Sequence(jnp.zeros_like(segments), segments, layout=layout)
    whole = jax.jit(lambda x, seq: nnx.merge(graphdef, params)(x, seq).y)(x, seq)
    step = jax.jit(lambda x, seq, state: nnx.merge(graphdef, params).extend(x, seq, state))
    stream, state, parts, first = mixers.Stream.start(1), module.init_state(1, 40, jnp.float64), [], 0
    for n in (12, 17, segments.shape[1] - 29):
        piece, stream = cases.placed(
            stream, jax.tree.map(lambda a, at=slice(first, first + n): np.asarray(a)[:, at], seq)
        )
        out = step(x[:, first : first + n], piece, state)
        state, first = out.state, first + n
        parts.append(out.y)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-12)


def test_what_an_image_knows_early_under_modality_mutual():
    """A question token reaches, through the image, all from the image on in two layers; an answer none before it."""
    layout, segments = layout_of([places([[("text", 1), ("image", (1, 3)), ("question", 3), ("answer", 2)]])])
    module = cases.module(mixers.config_from_node({"name": "softmax", "mask": "modality_mutual"}), jnp.float64)
    seq = mixers.Sequence(jnp.zeros_like(segments), segments, layout=jax.tree.map(jnp.asarray, layout))
    x = np.random.default_rng(0).standard_normal((1, 9, cases.WIDTH))

    @jax.jit
    def layers(x):
        once = x + module(x, seq).y
        return once, once + module(once, seq).y

    def changed(at):
        other = x.copy()
        other[0, at] += 1
        return [np.flatnonzero((a != b).any((0, 2))).tolist() for a, b in zip(*map(layers, (x, other)))]

    image, question, answers = [1, 2, 3], [4, 5, 6], [7, 8]
    for token in question:
        assert changed(token) == [[*image, *range(token, 9)], [*image, *question, *answers]]
    for token in answers:
        assert changed(token) == [list(range(token, 9))] * 2


LINE = {"window": [3]}
CELLS = {"shape": [2, 2], "window": [2], "stride": [2, 1]}  # of 4, 5 and 9 positions


@tiers.often("line-both", "cells-steps")
@pytest.mark.parametrize(
    "knobs, causal, pieces",
    [
        (LINE, False, None),
        (CELLS, False, None),
        ({**CELLS, "order": "partition", "tile": [1, 2]}, False, None),
        (LINE | {"causal_axes": [True], "dilation": [2]}, True, [1] * cases.LENGTH),
        ({**CELLS, "causal_axes": [True, False]}, True, [2, 2, 4, 1, 2]),
    ],
    ids=["line-both", "cells-both", "cells-boxes", "line-any", "cells-steps"],
)
def test_boxes_of_packed_documents(knobs, causal, pieces):
    """By tiles it is the definition, values and gradients, of packed, padded rows, in which each document gives what it
    gives alone; and so does a stream that is cut where its mask allows."""
    of = lambda impl: mixers.config_from_node(
        {"name": "softmax", "causal": causal, "impl": impl, "mask": {"name": "neighborhood", **knobs}}
    )
    x, seq = cases.inputs(jnp.float64)
    weight, used = jnp.cos(jnp.arange(x.size)).reshape(x.shape), (seq.segments > 0)[..., None]
    found, module = [], cases.module(of("tiles"), jnp.float64)
    for impl in ("tiles", "definition"):
        graphdef, params = cases.split(cases.module(of(impl), jnp.float64))
        run = jax.jit(lambda params, x, seq, g=graphdef: nnx.merge(g, params)(x, seq).y)
        scalar = lambda params, x, run=run: jnp.sum(jnp.where(used, weight * run(params, x, seq), 0))
        found.append((run(params, x, seq), jax.jit(jax.grad(scalar, argnums=(0, 1)))(params, x)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    whole = found[0][0]
    for documents in cases.ALONE:
        alone = run(params, *cases.alone(x, seq, documents))
        for i, (row, first, end) in enumerate(documents):
            np.testing.assert_allclose(alone[i, : end - first], whole[row, first:end], atol=1e-12)
    if pieces:
        step = jax.jit(lambda x, seq, state: nnx.merge(graphdef, params).extend(x, seq, state))
        state = module.init_state(2, cases.LENGTH, jnp.float64)
        streamed, _ = cases.streamed(step, state, x, seq, pieces)
        np.testing.assert_allclose(np.where(used, streamed - whole, 0), 0, atol=1e-12)


@pytest.mark.parametrize("rope_base", [100.0, None])
def test_rings_turn_what_rope_turns(rope_base):
    """Ring positions are those of RoPE and of nothing else."""
    layout, segments = layout_of([places(row) for row in ROWS])
    seq = mixers.Sequence(jnp.zeros_like(segments), segments, layout=jax.tree.map(jnp.asarray, layout))
    x, found = np.random.default_rng(0).standard_normal((*segments.shape, cases.WIDTH)), []
    for rings in (True, False):
        node = {"name": "softmax", "rope_base": rope_base, "mask": {"name": "concentric", "ring_positions": rings}}
        module = cases.module(mixers.config_from_node(node), jnp.float64)
        found.append(np.asarray(jax.jit(lambda x, module=module: module(x, seq).y)(x)))
    assert (np.abs(found[0] - found[1]).max() > 1e-3) == (rope_base is not None)


def test_biases_go_with_keys_in_another_order():
    """Box by box each key fades as it does row by row."""
    found, seq = [], mixers.Sequence.whole(2, 12)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, cases.WIDTH)))
    for order in ({}, {"order": "partition", "tile": (2, 2)}):
        mask = {"name": "neighborhood", "shape": (4, 3), "window": (3,), "causal_axes": (True,), **order}
        module = cases.module(mixers.config_from_node({"name": "fox", "mask": mask}), jnp.float64)
        found.append(jax.jit(lambda x, module=module: module(x, seq).y)(x))
    np.testing.assert_allclose(*found, atol=1e-12)


def test_a_mask_is_named_on_the_command_line():
    tree = {"name": "softmax"}
    config_lib.apply_overrides(tree, ["mask=power_blocks"])
    assert mixers.config_from_node(tree).mask.block == 64
    tree = config_lib.apply_overrides({"name": "gated"}, ["mask.name=a_shape", "mask.window=9"])
    config = mixers.config_from_node(tree)
    assert (config.mask.window, config_lib.to_dict(config)["mask"]["name"]) == (9, "a_shape")
    assert mixers.config_from_node({"name": "softmax", "mask": "none"}).mask is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mask": "power"}, "power_blocks"),
        ({"mask": {**POWER, "blocks": 3}}, "mask.blocks"),
        ({"mask": POWER, "window": 3}, "window = 3.*none where mask is set"),
        ({"mask": POWER, "source": "image"}, "source"),
        ({"mask": POWER, "qk_norm": "cosine"}, "qk_norm"),
        ({"mask": POWER, "causal": False}, "causal = False.*true: mask power_blocks"),
        ({"mask": "neighborhood"}, "causal = True.*false: mask neighborhood.*causal_axes.*begins with true"),
        ({"mask": {**CAUSAL, "stride": [2]}}, "causal = True.*false: mask neighborhood.*stride.*is 1"),
        ({"mask": {**CAUSAL, "window": [3, 3]}}, "window = .*one value where shape is none"),
        ({"mask": POWER, "impl": "xla"}, "impl = 'xla'.*tiles"),
        ({"mask": POWER, "decode_impl": "decode"}, "decode_impl"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "softmax", **fields})


@pytest.mark.parametrize(
    "node, message",
    [
        ({"name": "diff", "window": 3}, "window = 3.*none where mask is set"),
        ({"name": "mla", "causal": False}, "causal = False.*true: mask power_blocks"),
        ({"name": "fox", "window": 3}, "window = 3.*none where mask is set"),
        ({"name": "mla", "impl": "xla"}, "impl = 'xla'.*tiles"),
        ({"name": "dsa"}, "unknown key.*mask"),
        ({"name": "mla", "mask": "region_cross"}, "mask = 'region_cross'.*reads no context"),
        ({"name": "fox", "mask": "concentric"}, "mask = 'concentric'.*no position sees a later one"),
    ],
)
def test_other_layers_refuse_alike(node, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"mask": POWER} | node)


@pytest.mark.parametrize("node", [{"name": "mla"}, {"name": "moh", "core": {"name": "softmax"}}], ids=["mla", "moh"])
def test_a_loss_on_every_next_token_refuses_masks_that_show_it(node):
    """Else a model would read off what it is to predict; data that count some positions alone may have such masks."""
    steps = {"name": "neighborhood", "shape": (8, 8), "window": (3,), "causal_axes": (True, False)}
    masked = {**node, "core": {**node["core"], "mask": steps}} if "core" in node else {**node, "mask": steps}
    with pytest.raises(ConfigError, match="model.mixers.M has a mask that shows later positions"):
        runs.config("stdlib", data__length=64, model__mixers={"M": masked})


def test_what_a_mask_needs_is_said():
    module = cases.module(mixers.config_from_node({"name": "softmax", "mask": "concentric"}), jnp.float64)
    _, seq = cases.inputs(jnp.float64)
    with pytest.raises(UnsupportedPattern, match="Sequence.layout"):
        module.require(seq, causal=True)
    config = mixers.config_from_node({"name": "moh", "core": {"name": "softmax", "mask": POWER}})
    with pytest.raises(ConfigError, match="gather needs a core whose mask is none"):
        dataclasses.replace(config, impl="gather")


@tiers.often("gated")
@pytest.mark.parametrize(
    "node",
    [
        {"name": "gated", "position": "G1", "causal": False},
        {"name": "moh", "causal": False, "core": {"name": "softmax", "kv_heads": 2}},
    ],
    ids=["gated", "moh"],
)
def test_cells_taken_in_another_order(node):
    """Box by box it is what it is row by row, values and gradients, with a position before the cells."""
    x, found = jnp.asarray(np.random.default_rng(0).standard_normal((2, 13, cases.WIDTH))), []
    for order in ({}, {"order": "partition", "tile": (2, 2)}):
        mask = {"name": "neighborhood", "shape": (4, 3), "window": (3,), **order}
        inner = {**node, "core": {**node["core"], "mask": mask}} if "core" in node else {**node, "mask": mask}
        graphdef, params = cases.split(cases.module(mixers.config_from_node(inner), jnp.float64))
        seq = mixers.Sequence.whole(2, 13)
        scalar = lambda params, x, g=graphdef: jnp.sum(jnp.cos(jnp.arange(26.0))[:, None] * nnx.merge(g, params)(
            x, seq).y.reshape(26, -1))  # fmt: skip
        found.append(jax.jit(jax.value_and_grad(scalar, argnums=(0, 1)))(params, x))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
