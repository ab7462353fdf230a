"""The regression model: its loss by weights, its figures from sums, its cost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.errors import ConfigError
from attnlab.mixers import MixerOutput
from attnlab.models.cost import model_cost
from attnlab.models.objective import Sums
from attnlab.models.regression import Regression, RegressionConfig
from attnlab.models.transformer import mixer_table
from tests.models import drawn


def config(**fields):
    table = mixer_table({"M": {"name": "softmax", "heads": 2}}, "m")
    return RegressionConfig(**{"inputs": 4, "outputs": 2, "width": 8, "layers": 2, "mixers": table, **fields})


@pytest.fixture(scope="module")
def model():
    return drawn.module(lambda: Regression(config(), rngs=nnx.Rngs(0)))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    made = {"inputs": (3, 5, 4), "targets": (3, 5, 2)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in made.items()}
    return arrays | {"weights": rng.integers(0, 3, (3, 5)).astype(np.float32)}


def test_loss_is_the_weighted_squared_error(model):
    """Summed over outputs and positions; targets of weight 0 change nothing; evaluation has the same sums."""
    b = batch()
    run = jax.jit(lambda b: (model.loss(b, None, {}), model(b["inputs"]).y, model.evaluate(b, {})))
    sums, y, evaluated = run(b)
    expected = (np.asarray(b["weights"]) * ((np.asarray(y) - b["targets"]) ** 2).sum(-1)).sum()
    np.testing.assert_allclose([sums.total, sums.losses["loss"]], expected, rtol=1e-5)
    assert sums.weight == b["weights"].sum() and sums.tokens == 15
    moved = b | {"targets": np.where(b["weights"][..., None] == 0, np.float32(1e3), b["targets"])}
    assert run(moved)[0].total == sums.total
    np.testing.assert_allclose(evaluated["error"].sum(), expected, rtol=1e-5)
    np.testing.assert_array_equal(evaluated["weight"], b["weights"].sum(0))


def test_positions_see_none_after_them(model):
    """It is causal: what comes later changes no prediction."""
    x = batch()["inputs"]
    run, other = jax.jit(lambda x: model(x).y[:, :3]), np.where(np.arange(5)[:, None] < 3, x, np.float32(7))
    np.testing.assert_array_equal(run(x), run(other))


def test_figures_follow_from_sums():
    """Means by weight; the way from the zero predictor to Bayes; rows by the number of examples seen."""
    sums = {"error": np.array([4.0, 0.0, 3.0, 0.0]), "weight": np.array([2.0, 0.0, 2.0, 0.0])}
    baselines = {"zero": np.array([6.0, 0.0, 6.0, 0.0]), "bayes": np.array([3.0, 0.0, 1.0, 0.0])}
    figures = Regression.summarize(sums, {"seen": np.array([0, 0, 1, 1]), "baselines": baselines})
    assert figures.loss == 7 / 4
    np.testing.assert_allclose(figures.gap_closed, (3 - 7 / 4) / (3 - 1))
    assert figures.record() == {
        "heldout_loss": 7 / 4, "heldout_gap_closed": 0.625, "heldout_zero_loss": 3.0, "heldout_bayes_loss": 1.0,
    }  # fmt: skip
    assert [(r["first"], r["last"], r["count"], r["loss"], r["bayes"]) for r in figures.by_seen()] == [
        (0, 0, 2, 2.0, 1.5), (1, 1, 2, 1.5, 0.5),
    ]  # fmt: skip


def test_cost_counts_the_parameters(model):
    there = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert model_cost(config(), 5).parameters == there


def test_a_model_without_norms():
    """norm=none: nothing is scaled, before sublayers or at the end, so that without MLPs a row's first position, which
    sees itself alone, is mapped linearly."""
    c = config(norm="none", mlp_width=0)
    model, x = drawn.module(lambda: Regression(c, rngs=nnx.Rngs(0))), batch()["inputs"]
    run = jax.jit(lambda x: model(x).y[:, 0])
    np.testing.assert_allclose(run(2 * x), 2 * np.asarray(run(x)), rtol=1e-4)
    assert model_cost(c, 5).parameters == sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    with pytest.raises(ConfigError, match="model.norm = 'layer'"):
        config(norm="layer")


def test_norm_epsilon_is_the_models():
    """It reaches every norm of the stack and the last one: one that is huge leaves nothing of a position."""
    small = drawn.module(lambda: Regression(config(norm_epsilon=1e12), rngs=nnx.Rngs(0)))
    assert jax.jit(lambda x: abs(small(x).y).max())(batch()["inputs"]) < 1e-5
    blocks = nnx.merge(*nnx.split(small.transformer.periods)).blocks
    assert {sublayer.norm.epsilon for block in blocks for sublayer in block.sublayers} == {1e12}
    with pytest.raises(ConfigError, match="model.norm_epsilon = 0"):
        config(norm_epsilon=0.0)


@pytest.mark.parametrize("fields", [{"inputs": 0}, {"outputs": 0}])
def test_impossible_fields(fields):
    with pytest.raises(ConfigError, match=f"model.{next(iter(fields))} = 0"):
        config(**fields)


@pytest.mark.parametrize("group", ["losses", "metrics"])
def test_what_layers_report_weighs_as_the_loss(group):
    """Means over positions become sums; a name that is taken is refused."""
    out = MixerOutput(None, **{group: {"size": jnp.float32(0.5)}})
    sums = Sums.of({"loss": jnp.float32(3.0)}, out, weight=jnp.float32(4.0))
    assert sums.total == (5.0 if group == "losses" else 3.0) and getattr(sums, group)["size"] == 2.0
    with pytest.raises(ValueError, match="names of their own; taken: size"):
        Sums.of({"loss": jnp.float32(3.0), "size": jnp.float32(1.0)}, out, weight=jnp.float32(4.0))
