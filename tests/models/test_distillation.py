"""What a student learns of a teacher: the losses against their definitions, and what of them reaches whom."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.mixers import Sequence
from attnlab.models.distillation import Matching, relative_errors
from attnlab.ops.kl_divergence import kl_divergence
from attnlab.train.program import Program
from attnlab.train.state import flat
from tests import tiers
from tests.train import runs

SOFTMAX = {"name": "softmax", "heads": 2}
HYBRID = {"model__pattern": "ML", "model__mixers": {"M": SOFTMAX, "L": {"name": "lightning", "heads": 2}}}
STREAM = {
    "model__pattern": "ML",
    "model__mixers": {"M": SOFTMAX, "L": {"name": "ablated", "heads": 2, "weights": "random_stream"}},
}
LAYERS = {"match": "layers"}


def arrays(tree):
    return {name: np.asarray(leaf) for name, leaf in flat(tree).items()}


def programs(matching=None, student_overrides=HYBRID, **overrides):
    """Programs of a teacher and of a student of it, and parameters of both, float64 where asked for."""
    overrides = {"model__layers": 4, "model__mlp_width": 64, **overrides}
    teacher = Program.of(runs.config("stdlib", **overrides))
    given = {**student_overrides, **overrides}
    plain = Program.of(runs.config("stdlib", **given))
    matched = Matching(**(matching or {})).resolved(plain.config.model, teacher.config.model)
    return teacher, plain, matched, runs.drawn(teacher.model, 1), runs.drawn(plain.model, 2)


def test_divergence_is_its_definition():
    """Value and gradients in float64, by chunks and over three temperatures' worth of one, padding NaN."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        h, w, g, v = (rng.normal(size=s) for s in ((6, 5), (5, 13), (6, 7), (7, 13)))
        weights = np.array([1, 0.5, 0, 2, 1, 1.0])
        h[2], g[2] = np.nan, np.nan
        T, cap = 2.5, 1.5

        def made(h, w):
            used = weights != 0
            z, t = cap * np.tanh(h[used] @ w / cap) / T, (g[used] @ v) / T
            log = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
            p = np.exp(log(t))
            kl = (p * (log(t) - log(z))).sum(-1)
            slope = (np.exp(log(z)) - p) / T * weights[used][:, None] * (1 - np.tanh(h[used] @ w / cap) ** 2)
            d_h = np.zeros_like(h)
            d_h[used] = slope @ w.T
            return (weights[used] * kl).sum(), d_h, h[used].T @ slope

        @jax.jit
        def run(h, w, g):
            kl = lambda h, w, g, v, impl: kl_divergence(h, w, g, v, jnp.asarray(weights), T, 4, impl, cap=cap).sum()
            slopes = [jax.value_and_grad(kl, (0, 1))(h, w, g, v, impl) for impl in ("definition", "chunked")]
            same = kl_divergence(g, v, g, v, jnp.asarray(weights), T, 4)
            theirs = lambda g, v: kl_divergence(h, w, g, v, jnp.asarray(weights)).sum()
            return slopes, same, jax.grad(theirs, (0, 1))(g, jnp.asarray(v))

        both, same, theirs = run(h, w, g)
        for value, slopes in both:
            for found, wanted in zip((value, *slopes), made(h, w), strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
        assert not np.any(same) and not any(map(np.any, theirs))


def test_relative_errors_are_their_definition():
    """Each document by itself: its weight times weighted errors over weighted sizes; no padding."""
    with jax.enable_x64(True):
        segments = np.array([[1, 1, 1, 2, 2, 0], [3, 3, 4, 5, 5, 5]], np.int32)
        weights = np.array([[1, 0.5, 2, 1, 0, 0], [1, 1, 1, 3, 1, 1.0]])
        rng = np.random.default_rng(1)
        error, size = rng.uniform(0.1, 2, (2, 2, 6))
        size[1, 2] = 0  # a document of one position
        error[0, 5] = size[0, 5] = np.nan
        seq = Sequence(jnp.zeros((2, 6), jnp.int32), jnp.asarray(segments)).derived()
        run = jax.jit(jax.value_and_grad(lambda e: relative_errors(e, size, jnp.asarray(weights), seq).sum()))
        found, slopes = run(error)
        wanted, wanted_slopes = 0.0, np.zeros((2, 6))
        for row in range(2):
            for document in set(segments[row]) - {0}:
                at = segments[row] == document
                w, total = weights[row, at], (weights[row, at] * size[row, at]).sum()
                scale = w.sum() / total if total else 1.0
                wanted += scale * (w * error[row, at]).sum()
                wanted_slopes[row, at] = scale * w
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        np.testing.assert_allclose(slopes, wanted_slopes, rtol=1e-12)


def by_hand(teacher, student, batch, matching):
    """The layers' loss written out: the teacher's stack one sublayer after the other, the student's beside it."""
    x, seq = teacher.embedded(batch), teacher.sequence(batch).derived()
    blocks = lambda model: [block for period in model.transformer.unstacked() for block in period.blocks]
    total, sides = 0.0, student.transformer.sides(x.shape[1])
    for layer, (own, other) in enumerate(zip(blocks(student), blocks(teacher), strict=True)):
        mixed = x + (wanted := other.sublayers[0].added(x, seq).y)
        after = mixed + other.sublayers[1].added(mixed, seq).y
        side = (
            None
            if sides is None
            else jax.lax.stop_gradient(jax.tree.map(lambda a, i=layer // 2: a[i], sides[layer % 2]))
        )
        made = own.sublayers[0].added(x, dataclasses.replace(seq, sides=side)).y
        if matching.at == "block":
            made, wanted = made + own.sublayers[1].added(x + made, seq).y, after - x
        if layer in matching.layers:
            for row in range(x.shape[0]):
                for document in np.unique(batch["segments"][row]):
                    at = np.flatnonzero(batch["segments"][row] == document)
                    if document:
                        share = jnp.sum((made - wanted)[row, at] ** 2) / jnp.sum(wanted[row, at] ** 2)
                        total += len(at) * share / len(matching.layers)
        x = after
    return total


def packed_batch(empty=0):
    """Two rows, one of two documents and padding, one of one document; and rows of padding alone."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 257, (2, 13)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)
    positions = np.array([[*range(5), *range(4), 0, 0, 0], [*range(12)]], np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions}
    return {name: np.pad(array, ((0, empty), (0, 0))) for name, array in batch.items()}


OPTIONS = {"z_loss": 0.0, "loss_chunk": 100, "loss_impl": "auto"}


@tiers.often("mixer")
@pytest.mark.parametrize(
    "chosen, student",
    [({}, HYBRID), ({"at": "block", "layers": (0, 1, 2)}, HYBRID), ({}, STREAM)],
    ids=["mixer", "block", "second stream"],
)
def test_layers_are_fed_what_the_teachers_are(chosen, student):
    """Values and gradients in float64 of stacks of other patterns, scanned together, against the loop over layers: at
    every position of a document, whatever its own prediction weighs. Backward runs each layer by itself again."""
    with jax.enable_x64(True):
        remat = {"model__remat": "full"} if chosen else {}
        teacher, plain, matched, theirs, ours = programs({**LAYERS, **chosen}, student, model__dtype="float64", **remat)
        assert matched.layers == chosen.get("layers", (1, 3))
        batch, other = packed_batch(), teacher.model.merge(theirs)
        batch["weights"] = np.eye(2, 12, dtype=np.float32)

        def scanned(params):
            sums = plain.model.merge(params).distill(other, batch, None, OPTIONS, matched)
            return sums.total, sums

        written = jax.jit(jax.value_and_grad(lambda p: by_hand(other, plain.model.merge(p), batch, matched)))
        (value, sums), slopes = jax.jit(jax.value_and_grad(scanned, has_aux=True))(ours)
        if remat:
            assert str(jax.make_jaxpr(scanned)(ours)).count("prevent_cse=") == len(matched.layers)
        wanted, wanted_slopes = written(ours)
        np.testing.assert_allclose(value, wanted, rtol=1e-10)
        assert sums.weight == sums.tokens == 21
        each = [sums.metrics[f"distill_layer_{i}"] for i in matched.layers]
        np.testing.assert_allclose(np.mean(each), value, rtol=1e-12)
        for name, slope in arrays(wanted_slopes).items():
            np.testing.assert_allclose(arrays(slopes)[name], slope, rtol=1e-8, atol=1e-12, err_msg=name)


MOH = {"name": "moh", "core": {"name": "softmax", "heads": 4}}


@pytest.mark.parametrize(
    "mixer, layers", [(MOH, (0,)), ({"name": "residual_attention", "heads": 2}, (1,))], ids=["own loss", "handed on"]
)
def test_what_is_not_matched_learns_nothing(mixer, layers):
    """No gradient is where `learns` says none, neither by losses of a mixer's own nor by what layers hand on."""
    model = {"model__layers": 2, "model__mlp_width": 0, "model__mixers": {"M": mixer}}
    teacher, plain, matched, theirs, ours = programs({**LAYERS, "layers": layers}, {}, **model)
    merge, batch = plain.model.merge, packed_batch()

    def run(params):
        sums = merge(params).distill(merge(theirs), batch, None, OPTIONS, matched)
        return sums.total, sums.losses

    slopes, found = jax.jit(jax.grad(run, has_aux=True))(ours)
    assert (len(found) > 1) == (mixer is MOH)
    moved = set()
    for leaf, entries in plain.model.entries.items():
        rows = arrays(slopes)[leaf] if len(entries) > 1 else arrays(slopes)[leaf][None]
        moved |= {entry.name for entry, row in zip(entries, rows, strict=True) if np.any(row)}
    assert moved and all(map(matched.learns, moved)), sorted(name for name in moved if not matched.learns(name))


def test_what_a_block_adds_is_not_rounded_away():
    """Where the stream is so large that bfloat16 has no room for what is added, the loss is still that of float32."""
    made = {}
    for dtype in ("bfloat16", "float32"):
        scaled = {"model__layers": 2, "model__embedding_scale": 1e5, "model__dtype": dtype}
        _, plain, matched, theirs, ours = programs({**LAYERS, "at": "block", "layers": (0,)}, {}, **scaled)
        merge = plain.model.merge
        run = lambda p, q, merge=merge, matched=matched: merge(p).distill(
            merge(q), packed_batch(), None, OPTIONS, matched
        )
        made[dtype] = float(jax.jit(lambda p, q, run=run: run(p, q).total)(ours, theirs))
    assert made["float32"] > 1
    np.testing.assert_allclose(made["bfloat16"], made["float32"], rtol=0.05)


@functools.cache
def losses(kind):
    """A jitted `(student, teacher, batch) -> loss, metrics`, and parameters of two seeds of one model."""
    matching = {"logits": {"temperature": 2.0, "cross_entropy": 0.25}, "layers": {**LAYERS, "layers": (0, 1)}}[kind]
    program = Program.of(runs.config("stdlib", model__mlp_width=64))
    matched = Matching(**matching).resolved(program.config.model, program.config.model)

    def loss(params, theirs, batch):
        merge = program.model.merge
        sums = merge(params).distill(merge(theirs), batch, None, OPTIONS, matched)
        return sums.total, sums.metrics | {"weight": sums.weight}

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)), *map(jax.jit(program.model.init), (0, 1))


@tiers.often("logits")
@pytest.mark.parametrize("kind", ["logits", "layers"])
def test_a_student_that_is_its_teacher_has_no_loss(kind):
    """Exactly 0; of another one the loss is no 0, and no gradient goes to it."""
    run, params, others = losses(kind)
    (_, metrics), _ = run(params, params, packed_batch(1))
    parts = [value for name, value in metrics.items() if name.startswith("distill_") and "entropy" not in name]
    assert parts and not any(map(float, parts))
    (_, metrics), slopes = run(params, others, packed_batch(1))
    assert all(float(metrics[name]) > 0.01 for name in metrics if name.startswith("distill_"))
    assert any(map(np.any, jax.tree.leaves(slopes[0]))) and not any(map(np.any, jax.tree.leaves(slopes[1])))


def test_logits_are_matched_at_a_temperature():
    """(1 - a) T^2 KL + a cross-entropy over tokens, in NumPy of both models' logits."""
    run, params, others = losses("logits")
    batch, model = packed_batch(1), Program.of(runs.config("stdlib", model__mlp_width=64)).model
    used = batch["segments"] > 0

    @jax.jit
    def logits(params):
        merged = model.merge(params)
        return merged.logits(merged.encoded(merged.embedded(batch), merged.sequence(batch), None).y)

    z, t = (np.asarray(logits(p), np.float64)[used] for p in (params, others))
    log = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    kl = (np.exp(log(t / 2)) * (log(t / 2) - log(z / 2))).sum()
    nll = -np.take_along_axis(log(z), batch["targets"][used][:, None], axis=-1).sum()
    (total, metrics), _ = run(params, others, batch)
    for found, wanted in (
        (metrics["distill_kl"], 4 * kl), (metrics["distill_cross_entropy"], nll), (total, 0.75 * 4 * kl + 0.25 * nll),
        (metrics["weight"], used.sum()),
    ):  # fmt: skip
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


@tiers.often("logits")
@pytest.mark.parametrize("kind", ["logits", "layers"])
def test_documents_and_padding(kind):
    """A packed row's loss is that of its documents in rows of their own; what stands in padding is nothing."""
    run, params, others = losses(kind)
    batch = packed_batch(1)
    (packed, _), slopes = run(params, others, batch)
    alone = {name: np.zeros((3, 12), np.int32) for name in batch}
    for row, (of, at) in enumerate([(0, slice(0, 5)), (0, slice(5, 9)), (1, slice(0, 12))]):
        for name in alone:
            alone[name][row, : at.stop - at.start] = batch[name][of, at]
    (apart, _), slopes_apart = run(params, others, alone)
    np.testing.assert_allclose(packed, apart, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(slopes[0]), jax.tree.leaves(slopes_apart[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    other = {name: value.copy() for name, value in batch.items()}
    other["tokens"][0, 9:], other["targets"][0, 9:] = 7, 8
    assert run(params, others, other)[0][0] == packed
