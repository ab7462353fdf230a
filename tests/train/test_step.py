"""The training step: what the loss is a mean over, accumulation, non-finite gradients, sharding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.mixers.softmax import Softmax
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from attnlab.train.program import Program
from tests import tiers
from tests.train import runs


def make(**overrides):
    return Program.of(runs.config("stdlib", **{"optimizer__clip": 0.5, "model__mlp_width": 64, **overrides}))


def ragged_batch():
    """Rows of very different numbers of tokens, one of padding only."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 257, (8, 33)).astype(np.int32)
    segments = (np.arange(32)[None] < np.array([32, 1, 30, 0, 5, 32, 2, 17])[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32)) * segments
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions}


def run(steps=3, **overrides):
    program = make(**overrides)
    state, metrics = runs.first(program), []
    for _ in range(steps):
        state, m = program.train_step(state, program.put(ragged_batch()))
        metrics.append(jax.device_get(m))
    return state, metrics


@functools.cache
def params_and_losses():
    """First parameters, and the losses by token of these: nll and log-partitions [8, 32]."""
    program = make()
    params = runs.drawn(program.model)
    run = jax.jit(lambda params: program.model.merge(params).token_losses(ragged_batch())[:2])
    return params, *map(np.asarray, run(params))


@pytest.fixture(scope="module")
def whole():
    return run()


def assert_same(a, b, tolerance=1e-5):
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(p, q, atol=tolerance, rtol=tolerance)


def test_loss_is_the_mean_over_tokens(whole):
    """The loss is the sum of the tokens' losses over the number of tokens, not a mean of rows' means."""
    _, nll, _ = params_and_losses()
    tokens = ragged_batch()["segments"].sum()
    assert whole[1][0]["step_tokens"] == tokens
    np.testing.assert_allclose(whole[1][0]["loss"], float(nll.sum()) / tokens, rtol=1e-5)


MESHES = (
    ({"data": 1}, 8),
    ({"data": 8}, 1),
    ({"data": 1, "fsdp": 8}, 1),
    ({"data": 2, "context": 4}, 2),
    ({"data": 1, "fsdp": 2, "context": 2, "tensor": 2}, 4),
)


@tiers.parametrize("mesh, parts", MESHES, often=MESHES[4:], ids=str)
def test_meshes_and_accumulation_change_nothing(whole, mesh, parts):
    """Law 6 for the whole step: losses of three steps on 8 devices are those of one. So are they, and the parameters,
    in micro-batches of very different token counts."""
    state, metrics = run(mesh=mesh, train__accumulate=parts)
    assert_same([m["loss"] for m in metrics], [m["loss"] for m in whole[1]])
    assert_same(metrics[0]["grad_norm"], whole[1][0]["grad_norm"])
    # Adam divides by the gradients' size: where it is near 0, rounding decides the sign of an update.
    assert_same(state.params, whole[0].params, 2e-3)
    moment = state.opt_state[1][0].mu["embedding"]
    assert moment.sharding.is_equivalent_to(state.params["embedding"].sharding, 2)


def test_micro_batches_weigh_by_tokens():
    """The test above can fail: a mean of the micro-batches' means is another number here."""
    _, nll, _ = params_and_losses()
    used = ragged_batch()["segments"]
    halves = [nll[i::2].sum() / used[i::2].sum() for i in (0, 1)]
    assert abs(float(np.mean(halves)) - float(nll.sum() / used.sum())) > 5e-4


def test_non_finite_gradients_update_nothing(whole):
    """A poisoned parameter gives NaN gradients: nothing moves, the steps are counted; finite ones reset the count."""
    program = make()
    step = lambda state: program.train_step(jax.device_put(state, program.shardings), program.put(ragged_batch()))
    poisoned = jax.device_get(runs.first(program))
    finite = poisoned.params["norm"]["scale"].copy()
    poisoned.params["norm"]["scale"] = np.where(np.arange(16) == 0, np.nan, finite).astype(np.float32)
    after, metrics = step(poisoned)
    after, metrics = step(jax.device_get(after))
    after = jax.device_get(after)
    assert metrics["nonfinite"] == 2 and after.skipped == 2 and after.step == 2
    assert_same((after.params, after.opt_state), (poisoned.params, poisoned.opt_state), 0)
    after.params["norm"]["scale"] = finite
    healed, metrics = step(after)
    assert metrics["nonfinite"] == 0 and healed.skipped == 2
    assert metrics["learning_rate"] == whole[1][0]["learning_rate"]  # it is the optimizer's first step


def test_dropout_draws_anew_each_step():
    """Masks follow from key and step: repeated steps agree, and a step is not the last one's."""
    program = make(model__dropout=0.3)
    begun = jax.device_get(runs.first(program))

    def loss(step):
        state = jax.device_put(dataclasses.replace(begun, step=np.int32(step)), program.shardings)
        return float(program.train_step(state, program.put(ragged_batch()))[1]["loss"])

    assert loss(0) == loss(0) != loss(1)


def test_eval_step_sums_by_position():
    """Sums by position add up to the batch's."""
    params, nll, _ = params_and_losses()
    program = make()
    sums = jax.device_get(program.eval_step(params, program.put(ragged_batch())))
    b = ragged_batch()
    np.testing.assert_allclose(sums["nll"].sum(), nll.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["nll"][0], nll[:, 0].sum(), rtol=1e-5)
    np.testing.assert_array_equal(sums["tokens"], b["segments"].sum(0))


@pytest.mark.parametrize(
    "mesh, batch, message",
    [
        ({"data": 16}, 16, "mesh.data = 16, .* ask for 16 of 8 devices; allowed: a product of at most 8"),
        ({"data": -1, "fsdp": 3}, 8, "allowed: a product of a divisor of 8"),
        ({"data": 8}, 12, "multiples of 8"),
    ],
)
def test_impossible_meshes(mesh, batch, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(MeshConfig(**mesh), batch)


def test_smaller_mesh_takes_the_first_devices():
    """Sizes that are all given may leave devices unused."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=1), 8)
    assert list(mesh.devices.flat) == jax.devices()[:4]


def test_mesh_that_does_not_divide_a_parameter():
    """The parameter, its axis and the mesh axis are named."""
    program = make(model__vocab=259, mesh={"data": 4, "tensor": 2})
    with pytest.raises(ConfigError, match="mesh.tensor = 2 does not divide 259, the axis 'vocab' of parameter"):
        program.init(0)


def test_a_frozen_part_keeps_its_bits(whole):
    """Three steps change every parameter but those, whose gradients are not computed; the loss is at first the same."""
    rates = ("embedding*=0", "*.norm.scale=0")
    program = make(optimizer__rates=rates)
    before = runs.drawn(program.model)
    state, metrics = run(optimizer__rates=rates)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), before, jax.device_get(state.params))
    paths = {
        jax.tree_util.keystr(p, simple=True, separator="."): s for p, s in jax.tree_util.tree_leaves_with_path(same)
    }
    frozen = {path for path, kept in paths.items() if kept}
    assert frozen == {path for path in paths if path.startswith("embedding") or path.endswith(".norm.scale")} and frozen
    assert len(frozen) < len(paths)
    assert metrics[0]["loss"] == whole[1][0]["loss"] and metrics[0]["grad_norm"] < whole[1][0]["grad_norm"]


@pytest.mark.parametrize(
    "reported", [{"losses": {"balance": 1.0}, "metrics": {"balance": 3.0}}, {"metrics": {"loss": 3.0}}]
)
def test_mixers_names_are_their_own(monkeypatch, reported):
    """A mixer cannot report under a name that something else has."""
    call = Softmax.__call__
    fields = {k: {name: jnp.float32(v) for name, v in group.items()} for k, group in reported.items()}
    monkeypatch.setattr(Softmax, "__call__", lambda *a: dataclasses.replace(call(*a), **fields))
    program = make(model__layers=1)
    with pytest.raises(ValueError, match="names of their own; taken: (balance|loss)"):
        program.train_step.trace(program.state, program.batch)


def test_losses_that_are_added(monkeypatch, whole):
    """`loss` stays cross-entropy. The z-loss is its coefficient times the mean squared log-partition; what a mixer
    reports as a loss is logged as it is. Both move the gradients: of the last norm, which no mixer knows, the first."""
    call = Softmax.__call__

    def with_loss(self, x, seq):
        return dataclasses.replace(call(self, x, seq), losses={"size": 30 * jnp.mean(x**2)})

    def of_the_norm(state, metrics):  # from AdamW's first moment after a step
        return 10 * state.opt_state[1][0].mu["norm"]["scale"] * max(metrics[0]["grad_norm"] / 0.5, 1)

    (_, _, lse), (state, plain) = params_and_losses(), run(steps=1)
    monkeypatch.setattr(Softmax, "__call__", with_loss)
    added, metrics = run(steps=1, train__z_loss=0.1)
    expected = 0.1 * float((lse**2).sum()) / ragged_batch()["segments"].sum()
    np.testing.assert_allclose(metrics[0]["z_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["size"], 30, rtol=0.2)  # the input is normalised
    np.testing.assert_allclose(metrics[0]["loss"], plain[0]["loss"], rtol=1e-6)
    assert metrics[0]["grad_norm"] > 3 * plain[0]["grad_norm"]
    assert np.abs(of_the_norm(added, metrics) - of_the_norm(state, plain)).max() > 1e-3


def test_moving_averages_learn_what_is_seen():
    """A step makes of a parameter of role `average` its share `keep` and the rest of what the batch's layers saw, over
    the batch's weight: clipped, decayed and scaled by nothing, in micro-batches as in one; and no norm has it."""
    routing = {"name": "routing", "heads": 2, "clusters": 3, "window": 4, "centroid_decay": 0.75}
    found = []
    for parts in (1, 4):
        program = make(model__mixers={"M": routing}, optimizer__clip=1e-3, train__accumulate=parts)
        first = runs.first(program)
        before = jax.device_get(first.params)
        state, metrics = program.train_step(first, program.put(ragged_batch()))
        found.append((before, *jax.device_get((state.params, metrics["grad_norm"]))))
    (before, after, norm), (_, twice, norm_of_parts) = found
    batch = ragged_batch()
    options = {name: getattr(program.config.train, name) for name in program.model.objective.options}
    seen = jax.jit(jax.grad(lambda p: program.model.merge(p).loss(batch, None, options).total))(before)
    layer = lambda params: params["transformer"]["periods"]["blocks"][0]["sublayers"][0]["branch"]
    tokens = (batch["segments"] > 0).sum()
    for name in ("total", "count", "steps"):
        was, sums = (np.asarray(layer(tree).pop(name)) for tree in (before, seen))
        assert name != "count" or np.allclose(sums.sum(-1), tokens)  # every position is of one cluster, in each layer
        for moved, parts in ((after, 1), (twice, 4 if name == "steps" else 1)):  # a micro-batch is a step of its own
            np.testing.assert_allclose(layer(moved)[name], 0.75 * was + 0.25 * parts * sums / tokens, atol=1e-5)
    others = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(seen))) / tokens
    np.testing.assert_allclose([norm, norm_of_parts], others, rtol=1e-4)
