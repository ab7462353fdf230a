"""Language models with weights: losses and right answers where these say, in slices; the kinds of model beside it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import models, tasks  # noqa: F401  (tasks registers its data)
from attnlab.batch import require_match
from attnlab.data import DataConfig, config_from_node
from attnlab.errors import ConfigError
from attnlab.models.classifier import ClassifierConfig
from attnlab.models.compressor import CompressorConfig
from attnlab.models.cost import model_cost
from attnlab.models.lm import LanguageModel, LanguageModelConfig
from attnlab.models.reader import ReaderConfig
from attnlab.models.scores import Scores, sums_of_scores
from attnlab.models.transformer import mixer_table
from attnlab.models.vectors import VectorModelConfig
from attnlab.ops.cross_entropy import likeliest
from tests import tiers
from tests.models import drawn

OPTIONS = {"z_loss": 0.0, "loss_chunk": 7, "loss_impl": "auto"}
B, T, V, D, N = 3, 6, 11, 8, 3


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def table(**fields):
    return mixer_table({"M": {"name": "softmax", "heads": 2, **fields}}, "m")


SHAPE = {"vocab": V, "width": D, "layers": 1, "dtype": "float64"}
KINDS = {
    "lm": LanguageModelConfig(**SHAPE, mixers=table()),
    "lm without mlp": LanguageModelConfig(**SHAPE, mixers=table(), mlp_width=0, gated="M"),
    "classifier": ClassifierConfig(**SHAPE, mixers=table(causal=False)),
    "vectors": VectorModelConfig(**SHAPE, mixers=table(), inputs=4),
    "reader": ReaderConfig(**SHAPE, mixers=table(source="context")),
    "compressor": CompressorConfig(**SHAPE, mixers=table()),
}


def batch(slices=True):
    rng = np.random.default_rng(0)
    weights = (rng.uniform(size=(B, T)) < 0.5).astype(np.float32)
    weights[0] = 0  # a row that fills the last batch up
    arrays = {
        "tokens": rng.integers(0, V, (B, T)), "targets": rng.integers(0, V, (B, T)), "segments": np.ones((B, T), int),
        "positions": np.tile(np.arange(T), (B, 1)), "context": rng.integers(0, V, (B, 5, 2)),
    }  # fmt: skip
    arrays["segments"][1, -2:] = 0
    made = {name: array.astype(np.int32) for name, array in arrays.items()}
    made |= {"weights": weights, "inputs": rng.normal(size=(B, T, 4)).astype(np.float32)}
    member = rng.integers(0, 2, (B, T, N))
    return made | ({"slices": member.astype(np.int8)} if slices else {})


def moved_at(tokens, *place):
    """Tokens with another one at a place, or at a position of all rows."""
    other = tokens.copy()
    other[place if len(place) == 2 else (slice(None), *place)] += 1
    return other % V


@functools.cache
def built(kind):
    config = KINDS[kind]
    return drawn.module(lambda: models.of(config)(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_scores_are_the_formulas(kind):
    """Of log-softmax and argmax by the weights, over the whole batch, by position, by row and by slice."""
    model, b = built(kind), batch()

    @jax.jit
    def run(b):
        hidden = model.encoded(model.embedded(b), model.sequence(b), None).y
        return model.loss(b, None, OPTIONS), model.evaluate(b, OPTIONS), model.logits(hidden)

    sums, scores, logits = run(b)
    used = np.asarray(b["weights"] * (b["segments"] > 0), np.float64)
    logits, targets = np.asarray(logits), np.asarray(b["targets"])
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    right = logits.argmax(-1) == targets
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9)
    close([sums.total, sums.weight, sums.tokens], [(nll * used).sum(), used.sum(), B * T - 2])
    close([scores["nll"], scores["tokens"], scores["correct"]], [(x * used).sum(0) for x in (nll, 1, right)])
    rows = used.any(1)
    close([scores["rows"], scores["exact"]], [rows.sum(), (rows & (right | (used == 0)).all(1)).sum()])
    member = np.asarray(b["slices"], float)
    for name, value in {"slice_nll": nll, "slice_correct": right, "slice_tokens": 1}.items():
        close(scores[name], np.einsum("bt,btn->n", value * used, member))


def test_whole_rows_are_those_with_every_answer_right():
    """Positions of weight 0 do not matter, rows without answers do not count."""
    weights = jnp.array([[0.0, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]])
    right = jnp.array([[False, True, True], [True, False, True], [True, True, True], [True, False, False]])
    sums = sums_of_scores(jnp.zeros((4, 3)), weights, right, None)
    assert (float(sums["rows"]), float(sums["exact"])) == (3, 2) and sums.keys() == {"rows", "exact"}


@tiers.parametrize("kind", ["lm", "vectors", "reader"], often=["lm"])
def test_targets_of_weight_0_change_nothing(kind):
    """No loss and no gradient, whatever they are."""
    graphdef, params = nnx.split(built(kind), nnx.Param)
    loss = jax.jit(jax.value_and_grad(lambda p, b: nnx.merge(graphdef, p).loss(b, None, OPTIONS).total))
    b = batch(slices=False)
    moved = b | {"targets": np.where(b["weights"] == 0, (b["targets"] + 1) % V, b["targets"])}
    for a, c in zip(jax.tree.leaves(loss(params, b)), jax.tree.leaves(loss(params, moved)), strict=True):
        np.testing.assert_array_equal(a, c)
    assert loss(params, b | {"targets": (b["targets"] + 1) % V})[0] != loss(params, b)[0]


def test_without_weights_every_token_counts():
    """One loss: weights of 1 give that of a text."""
    model, b = built("lm"), batch(slices=False)
    without = {name: array for name, array in b.items() if name != "weights"}
    ones = without | {"weights": np.ones((B, T), np.float32)}
    both = jax.jit(lambda x: (model.loss(x, None, OPTIONS), model.evaluate(x, OPTIONS)))
    (plain, text), (weighted, scores) = map(both, (without, ones))
    np.testing.assert_allclose([plain.total, plain.weight], [weighted.total, weighted.weight], rtol=1e-15)
    np.testing.assert_allclose(text["nll"], scores["nll"], rtol=1e-15)
    assert text.keys() == {"nll", "tokens"}


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_likeliest_is_argmax(chunk):
    """In any chunks; of equal logits the first."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(9, D)), rng.normal(size=(D, V))
    kernel[:, 7] = kernel[:, 2]
    got = likeliest(jnp.asarray(hidden), jnp.asarray(kernel), chunk)
    np.testing.assert_array_equal(got, (hidden @ kernel).argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_cost_counts_the_parameters(kind):
    model = nnx.eval_shape(lambda: models.of(KINDS[kind])(KINDS[kind], rngs=nnx.Rngs(0)))
    assert model_cost(KINDS[kind], T).parameters == sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_a_classifier_sees_what_comes_after():
    """And a causal model does not: which class is told hangs on the last token, or not."""
    b = batch()
    moved = b | {"tokens": moved_at(b["tokens"], 3)}
    for kind, changes in (("lm", False), ("classifier", True)):
        model = built(kind)
        run = jax.jit(lambda b, model=model: model.hidden(b["tokens"], model.sequence(b)).y[0, :3])
        assert np.any(np.asarray(run(b)) != run(moved)) == changes


def test_a_reader_reads_items_in_any_order():
    """The answer hangs on what the context holds, not on where."""
    model, b = built("reader"), batch()
    run = jax.jit(lambda b: model.evaluate(b, OPTIONS)["nll"].sum())
    np.testing.assert_allclose(run(b), run(b | {"context": b["context"][:, ::-1, ::-1]}), rtol=1e-9)
    assert abs(run(b) - run(b | {"context": (b["context"] + 1) % V})) > 1e-3


def test_a_compressor_has_one_vector():
    """What precedes the last position reaches the answers through it alone; padding is not it."""
    model, b = built("compressor"), batch()
    jitted = jax.jit(lambda b: model.encoded(model.embedded(b), model.sequence(b), None).y)
    run = lambda b: np.asarray(jitted(b))
    moved = b | {"tokens": moved_at(b["tokens"], 1, -1)}  # padding of row 1
    np.testing.assert_array_equal(run(b)[1], run(moved)[1])
    assert (abs(run(b) - run(b | {"tokens": moved_at(b["tokens"], 1, 3)}))[1].max(-1) > 0).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClassifierConfig(**SHAPE, mixers=table()), "causal = True .* allowed: false in a token classifier"),
        (lambda: LanguageModelConfig(**SHAPE, mixers=table(causal=False)), "causal = False .* allowed: true"),
        (
            lambda: ClassifierConfig(**SHAPE, mixers=mixer_table({"M": {"name": "rat"}}, "m")),
            "'rat' lets a position see none after it, which a token classifier needs; allowed: .*softmax",
        ),
        (lambda: ReaderConfig(**SHAPE, mixers=table()), "nothing would read the context; .* can: gated, softmax"),
        (lambda: VectorModelConfig(**SHAPE, mixers=table(), inputs=4, tied=True), "tied = True"),
        (lambda: VectorModelConfig(**SHAPE, mixers=table(), inputs=0), "inputs = 0"),
        (lambda: LanguageModelConfig(**SHAPE, mixers=table(), mlp_width=-1), "mlp_width = -1"),
    ],
)
def test_impossible_configs(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("kind", ["classifier", "compressor"])
def test_text_does_not_fit_what_sees_its_targets(kind):
    """A text's targets are what comes next: a model that sees it would learn nothing."""
    taken = models.of(KINDS[kind]).batch_spec(KINDS[kind], T)
    with pytest.raises(ConfigError, match="targets int32.6. .what comes next.*own class.*do not fit"):
        require_match(taken, DataConfig(length=T).batch_spec(), "model", "text")
    require_match(LanguageModel.batch_spec(KINDS["lm"], T), DataConfig(length=T).batch_spec(), "model", "text")


def test_tasks_do_not_fit_what_reads_their_targets_otherwise():
    """What comes next is no class of a position, and the other way round."""
    for task, kind, fits in (("mqar", "lm", True), ("mqar", "classifier", False), ("match3", "lm", False)):
        data = config_from_node({"name": task, "length": 64}, "data").batch_spec()
        config = dataclasses.replace(KINDS[kind], vocab=6000)
        taken = models.of(config).batch_spec(config, 64)
        if fits:
            require_match(taken, data, "model", task)
        else:
            with pytest.raises(ConfigError, match="do not fit"):
                require_match(taken, data, "model", task)


def test_figures_from_sums():
    """Accuracy, whole rows, slices that are not empty, beside chance; every figure has a name of its own."""
    sums = {
        "nll": np.array([2.0, 4.0]), "tokens": np.array([4.0, 4.0]), "correct": np.array([4.0, 2.0]),
        "rows": np.float64(4), "exact": np.float64(2), "slice_nll": np.array([1.0, 0.0]),
        "slice_correct": np.array([3.0, 0.0]), "slice_tokens": np.array([4.0, 0.0]),
    }  # fmt: skip
    facts = {"chance": {"accuracy": 0.25}, "oracle": {"accuracy": 1.0}, "slices": ["gap=1", "gap=2-3"]}
    figures = Scores(sums, facts)
    named = {"loss": 0.75, "accuracy": 0.75, "exact": 0.5, "accuracy/gap=1": 0.75}
    assert figures.named() == named and figures.record() == {f"heldout_{k}": v for k, v in named.items()}
    assert figures.summary().items() >= {**named, "chance": {"accuracy": 0.25}, "answers": 8, "rows": 4}.items()
    assert "accuracy 0.7500 (chance 0.2500)" in figures.line() and len(figures.table()[2]) == 2
