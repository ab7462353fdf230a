"""The language model: its losses against plain formulas, its stack against a loop, its stream against the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.models.cost import model_cost
from attnlab.models.lm import LanguageModel, LanguageModelConfig
from attnlab.models.transformer import REMAT, Block, StackConfig, Transformer, mixer_table
from attnlab.models.vectors import VectorModelConfig
from attnlab.ops.cross_entropy import cross_entropy
from tests import tiers
from tests.mixers import precision
from tests.mixers.cases import POSITIONS, SEGMENTS


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def config(**fields):
    table = mixer_table({"A": {"name": "softmax", "heads": 2}, "B": {"name": "gated", "heads": 2, "window": 3}}, "m")
    base = dict(vocab=23, width=8, layers=4, mixers=table, pattern="AB", dtype="float64")
    return LanguageModelConfig(**{**base, **fields})


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 23, (2, 12)).astype(np.int32)
    names = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": SEGMENTS, "positions": POSITIONS}
    return {k: jnp.asarray(v) for k, v in names.items()}


def loss(params, graphdef, config):
    model = nnx.merge(graphdef, params)
    model.transformer.config = config
    nll, lse, _ = model.token_losses(batch(), chunk=7)
    return jnp.sum(nll) + 0.1 * jnp.sum(lse**2)


@pytest.fixture(scope="module")
def reference():
    """Config, graph, parameters, and loss and gradients without remat or scan's help."""
    with jax.enable_x64(True):
        graphdef, params = nnx.split(LanguageModel(config(), rngs=nnx.Rngs(0)), nnx.Param)
        value = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))(params, graphdef, config(unroll=1))
    return graphdef, params, value


@pytest.mark.parametrize(("chunk", "cap"), [(1, None), (5, 1.5), (23, None), (100, 1.5)])
def test_cross_entropy_is_the_formula(chunk, cap):
    """Any chunk of the vocabulary gives log-softmax's value and gradients, of capped logits, too; weight 0 gives none,
    NaN or not."""
    rng = np.random.default_rng(0)
    hidden, kernel = jnp.asarray(rng.normal(size=(9, 6))), jnp.asarray(rng.normal(size=(6, 23)))
    targets = jnp.asarray(rng.integers(0, 23, 9), jnp.int32)
    weights = jnp.asarray([1, 1, 0, 1, 1, 0, 1, 1, 1.0])

    def ours(hidden, kernel):
        hidden = hidden.at[2].set(jnp.nan)
        nll, lse = cross_entropy(hidden, kernel, targets, weights, chunk, cap=cap)
        return jnp.sum(nll * jnp.arange(9)) + jnp.sum(lse**2)

    def formula(hidden, kernel):
        logits = hidden @ kernel
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        lse = jax.nn.logsumexp(logits, axis=1)
        nll = lse - logits[jnp.arange(9), targets]
        return jnp.sum(weights * nll * jnp.arange(9)) + jnp.sum((weights * lse) ** 2)

    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, kernel)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
        got,
        jax.jit(jax.value_and_grad(formula, (0, 1)))(hidden, kernel),
    )


def test_cross_entropy_holds_no_whole_logits():
    """No fp32 array of the size rows x vocabulary is in the program of value and gradient."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    run = lambda h, k, t, w: jnp.sum(cross_entropy(h, k, t, w, 64)[0])
    text = (
        jax.jit(jax.grad(run, (0, 1)))
        .lower(spec(40, 8), spec(8, 512), jax.ShapeDtypeStruct((40,), jnp.int32), spec(40))
        .as_text()
    )
    assert "40x64x" in text and "40x512x" not in text


CHANGES = [*({"remat": name} for name in REMAT), {"unroll": 0}, {"unroll": 2}]


@tiers.often("change0")
@tiers.parametrize("change", CHANGES, often=[CHANGES[0], CHANGES[-1]])
def test_remat_and_unroll_change_no_number(reference, change):
    """Every remat policy and every unrolling gives the same loss and gradients."""
    graphdef, params, expected = reference
    changed = config(unroll=1, **change) if "unroll" not in change else config(**change)
    got = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))(params, graphdef, changed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), got, expected)


def test_scan_is_the_loop(reference):
    """The scanned stack is the blocks one after the other, in the order of the pattern."""
    graphdef, params, _ = reference
    seq = mixers.Sequence(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
    names = []

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        x = model.embed(batch()["tokens"])
        whole = model.transformer(x, seq).y
        for period in model.transformer.unstacked():
            for block in period.blocks:
                names.append(block.sublayers[0].branch.name)
                x, _ = block(x, seq)
        return x, whole

    x, whole = run(params)
    np.testing.assert_allclose(x, whole, atol=1e-12)
    assert names == ["softmax", "gated"] * 2


def test_stream_equals_whole(reference):
    """Prefill, chunked prefill and decode through `extend` give the whole sequence's hidden states."""
    graphdef, params, _ = reference

    @jax.jit
    def run(params, data):
        model = nnx.merge(graphdef, params)
        whole = model.hidden(data["tokens"], mixers.Sequence(data["positions"], data["segments"])).y
        state, parts, first = model.init_state(2, 11), [], 0
        periods = model.transformer.unstacked()
        for n in (4, 1, 1, 5):
            cut = {k: v[:, first : first + n] for k, v in data.items()}
            seq = mixers.Sequence(cut["positions"], cut["segments"])
            hidden, state = model.extend(periods, cut["tokens"], seq, state)
            parts.append(hidden)
            first += n
        return jnp.concatenate(parts, axis=1), whole

    stream, whole = run(params, batch())
    used = np.asarray(batch()["segments"]) > 0
    np.testing.assert_allclose(np.asarray(stream)[used], np.asarray(whole)[used], atol=1e-10)


@pytest.mark.slow
def test_a_states_arrays_are_buffers_of_their_own():
    """A state made outside of jit can be donated: layers that begin with equal keys and values share no array."""
    table = {letter: {"name": name, "heads": 2} for letter, name in zip("SRT", ("softmax", "rat", "titans"))}
    config = StackConfig(width=16, layers=3, pattern="SRT", mixers=mixer_table(table, "mixers"))
    state = Transformer(config, rngs=nnx.Rngs(0)).init_state(2, 8)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
    assert len(set(places)) == len(places) > 10


def test_tied_embedding_serves_both_ends():
    """With tied weights there is one matrix, and its gradient has both parts."""
    untied, tied = (LanguageModel(config(tied=t), rngs=nnx.Rngs(0)) for t in (False, True))
    count = lambda m: sum(p.size for p in jax.tree.leaves(nnx.state(m, nnx.Param)))
    assert count(untied) - count(tied) == 23 * 8
    untied.head.kernel[...] = tied.embedding[...].T
    for model in (tied, untied):
        model.embedding[...] = tied.embedding[...]
    grads = []
    for model in (tied, untied):
        nnx.update(model.transformer, nnx.state(tied.transformer))
        graphdef, params = nnx.split(model, nnx.Param)
        grads.append(jax.jit(jax.grad(loss), static_argnums=(1, 2))(params, graphdef, model.config))
    both = grads[1]["embedding"][...] + grads[1]["head"]["kernel"][...].T
    np.testing.assert_allclose(grads[0]["embedding"][...], both, atol=1e-10)


def test_dropout_is_a_function_of_the_key():
    """Same key, same masks; another key, others; no key, no dropout."""

    def model(rate):
        graphdef, params = nnx.split(LanguageModel(config(dropout=rate, layers=2), rngs=nnx.Rngs(0)), nnx.Param)
        run = jax.jit(lambda key: nnx.merge(graphdef, params).token_losses(batch(), key)[0].sum())
        return lambda seed: float(run(None if seed is None else jax.random.key(seed)))

    half, again, none = model(0.5), model(0.5), model(0.0)
    assert half(0) == again(0) != half(1)
    assert half(None) == none(None) == none(0)


@tiers.often("mlp")
@pytest.mark.parametrize("silent", ["mixer", "mlp"])
def test_dropout_keeps_the_expectation(silent):
    """What mixer and MLP add is kept with 1 - p, each entry by itself, and is then 1 / (1 - p) of what it was."""
    c, p = config(dropout=0.3), 0.3
    block = Block(c, "A", rngs=nnx.Rngs(0))
    mixer, mlp = (sublayer.branch for sublayer in block.sublayers)
    kernel = (mixer.out if silent == "mixer" else mlp.down).kernel
    kernel[...] = 0 * kernel[...]
    x, seq = jax.random.normal(jax.random.key(1), (16, 64, 8), jnp.float64), mixers.Sequence.whole(16, 64)
    plain, dropped = (np.asarray(block(x, seq, key=key)[0] - x) for key in (None, jax.random.key(2)))
    kept = np.abs(dropped) > 1e-9 * np.abs(plain)
    np.testing.assert_allclose(dropped[kept], plain[kept] / (1 - p), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(kept.mean((0, 1)), 1 - p, atol=4 * np.sqrt(p * (1 - p) / (16 * 64)))
    np.testing.assert_allclose(kept.mean(-1).std(), np.sqrt(p * (1 - p) / 8), rtol=0.1)


def test_float64_model_is_float64_throughout():
    """Losses, metrics, gradients and all between, of mixers that have losses and metrics of their own."""
    table = mixer_table({"A": {"name": "moh", "heads": 4}, "B": {"name": "flow", "heads": 2}}, "m")
    model = LanguageModel(config(mixers=table), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)

    def total(params):
        nll, lse, out = nnx.merge(graphdef, params).token_losses(batch())
        return nll.sum() + lse.sum() + sum(out.losses.values()), out.metrics

    assert precision.narrow_results(jax.grad(total, has_aux=True), params, dtype=jnp.float64) == []


@pytest.mark.parametrize(
    "fields", [{}, {"tied": True}, {"mlp_width": 20}, {"norm": "none"}, {"norm_after": True, "mlp_bias": True}]
)
def test_cost_counts_the_parameters(fields):
    """Declared parameters are those of the model."""
    c = config(**fields)
    model = nnx.eval_shape(lambda: LanguageModel(c, rngs=nnx.Rngs(0)))
    assert model_cost(c, 11).parameters == sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_knobs_of_published_models_are_the_formulas():
    """One block without attention's part: GEGLU with biases, normed again, of a scaled embedding, its logits capped."""
    c = config(
        layers=2,
        norm_after=True,
        norm_epsilon=0.1,
        mlp_gate="gelu_tanh",
        mlp_bias=True,
        embedding_scale=3.0,
        logit_cap=0.7,
    )
    model = LanguageModel(c, rngs=nnx.Rngs(0))
    rng, state = np.random.default_rng(0), nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape), state))
    blocks = [block for period in model.transformer.unstacked() for block in period.blocks]
    seq, values = mixers.Sequence.whole(2, 11), lambda p: np.asarray(p[...])
    rms = lambda x, norm: x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * values(norm.scale)
    linear = lambda x, m: x @ values(m.kernel) + values(m.bias)
    x = 3 * values(model.embedding)[np.asarray(batch()["tokens"])]
    for block in blocks:
        mixing, mlp = block.sublayers
        x = x + rms(np.asarray(mixing.branch(jnp.asarray(rms(x, mixing.norm)), seq).y), mixing.norm_after)
        h = rms(x, mlp.norm)
        z = linear(h, mlp.branch.gate)
        gate = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        x = x + rms(linear(gate * linear(h, mlp.branch.up), mlp.branch.down), mlp.norm_after)
    logits = 0.7 * np.tanh(rms(x, model.norm) @ values(model.head.kernel) / 0.7)
    got = model.logits(model.hidden(batch()["tokens"], seq).y)
    np.testing.assert_allclose(got, logits, atol=1e-10)


@pytest.mark.parametrize(
    "fields",
    [
        {"mlp_gate": "tanh"}, {"mlp_gate": "gelu", "mlp_width": 0}, {"mlp_bias": True, "mlp_width": 0},
        {"norm_after": True, "norm": "none"}, {"embedding_scale": 0.0}, {"logit_cap": -1.0},
    ],
)  # fmt: skip
def test_impossible_knobs_are_refused(fields):
    with pytest.raises(ConfigError, match=f"model.{next(iter(fields))} = .*allowed: "):
        config(**fields)


def test_bfloat16_model_keeps_fp32_parameters():
    """Activations are bf16, parameters and losses fp32, and the loss is near."""
    with jax.enable_x64(False):
        low, high = (LanguageModel(config(dtype=d), rngs=nnx.Rngs(0)) for d in ("bfloat16", "float32"))
        assert {p.dtype for p in jax.tree.leaves(nnx.state(low, nnx.Param))} == {jnp.dtype("float32")}
        run = lambda m: jax.jit(lambda b: m.token_losses(b)[0])(batch())
        a, b = run(low), run(high)
        assert a.dtype == jnp.float32
        assert abs(float(a.sum() - b.sum())) < 0.02 * float(b.sum())
        assert low.hidden(batch()["tokens"], mixers.Sequence(batch()["positions"])).y.dtype == jnp.bfloat16


def test_a_fixed_text(tmp_path):
    """Layers find its embeddings, to which gradients go; a stream is the whole. What does not fit is refused: ids,
    lengths, files, two texts."""
    ids, other = tmp_path / "ids.npy", tmp_path / "other.npy"
    np.save(ids, np.array([20, 21, 20, *range(9), 3], np.uint8)), np.save(other, np.arange(12))
    table = lambda *paths: mixer_table(
        {x: {"name": "ablated", "weights": "text_stream", "text": str(p), "heads": 2} for x, p in zip("AB", paths)}, "m"
    )
    model = LanguageModel(config(mixers=table(ids), pattern="A", layers=2), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    small = batch() | {"tokens": batch()["tokens"] % 20}  # of a text's ids 20 and 21 the text alone has some
    np.testing.assert_array_equal(model.sequence(small).text, model.embedding[...][np.load(ids)])
    value = lambda params: jnp.sum(nnx.merge(graphdef, params).token_losses(small)[0])
    slopes = np.abs(jax.jit(jax.grad(value))(params)["embedding"][...]).max(-1)
    assert (slopes[20:22] > 1e-9).all() and slopes[22] == 0
    whole = jax.jit(lambda: model.encoded(model.embed(small["tokens"]), model.sequence(small), None).y)()
    state, parts, periods = model.init_state(2, 11), [], model.transformer.unstacked()
    step = jax.jit(lambda tokens, seq, state: model.extend(periods, tokens, seq, state))
    for first in (0, 6):
        cut = lambda x: x[:, first : first + 6]
        seq = jax.tree.map(cut, mixers.Sequence(small["positions"], small["segments"]))
        y, state = step(cut(small["tokens"]), seq, state)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[SEGMENTS > 0], np.asarray(whole)[SEGMENTS > 0], atol=1e-12)
    with pytest.raises(UserError, match="14 positions; allowed: at most 13"):
        model.init_state(2, 14)
    with pytest.raises(ConfigError, match="data.length = 14.*at most 13"):
        LanguageModel.batch_spec(model.config, 14)
    np.save(tmp_path / "large.npy", np.array([23])), np.save(tmp_path / "real.npy", np.ones(3))
    for paths, message in (
        ((ids, other), "model.mixers.*one text for all"), ((tmp_path / "large.npy",), "model.vocab = 23.*24 or more"),
        ((tmp_path / "real.npy",), "float64.*ids, int"), ((tmp_path / "none.npy",), "none.npy.* cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            config(mixers=table(*paths), pattern="AB"[: len(paths)], layers=2)
    with pytest.raises(ConfigError, match="where inputs are vectors"):
        options = {"width": 8, "layers": 1, "vocab": 23, "inputs": 4, "pattern": "A"}
        VectorModelConfig(mixers=table(ids), **options)


def test_decoupled_embeddings():
    """With the table of the embedding it is the model without it; values give the attention's table no gradient, and
    where weights are even, nothing does; a stream is the whole; a table that nobody would read is refused."""
    table = mixer_table({"A": {"name": "ablated", "weights": "static", "heads": 2}}, "m")
    own = config(mixers=table, pattern="A", layers=2, decoupled=True)
    graphdef, params = nnx.split(LanguageModel(own, rngs=nnx.Rngs(0)), nnx.Param)
    plain = LanguageModel(config(mixers=table, pattern="A", layers=2), rngs=nnx.Rngs(0))
    count = lambda state: sum(x.size for x in jax.tree.leaves(state))
    assert (
        count(params) - count(nnx.state(plain, nnx.Param))
        == 23 * 8
        == model_cost(own, 11).parameters - model_cost(plain.config, 11).parameters
    )
    seq = lambda: mixers.Sequence(batch()["positions"], batch()["segments"])

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        value = lambda params: jnp.sum(nnx.merge(graphdef, params).token_losses(batch())[0])
        return model.token_losses(batch())[0], jax.grad(value)(params)["attention_embedding"][...]

    losses, slopes = run(params)
    tied = jax.tree.map(jnp.copy, params)
    tied["attention_embedding"][...] = tied["embedding"][...]
    same, _ = run(tied)
    nnx.update(plain, {k: v for k, v in tied.items() if k != "attention_embedding"})
    want = jax.jit(lambda: plain.token_losses(batch())[0])()
    np.testing.assert_allclose(same, want, atol=1e-12)
    assert np.abs(losses - want).max() > 1e-3 and np.abs(slopes).max() > 1e-6
    tied["transformer"]["periods"]["blocks"][0]["sublayers"][0]["branch"]["q"]["kernel"][...] *= 0.0
    assert not np.asarray(run(tied)[1]).any()  # even weights, whatever keys are: all that is left are values
    model = nnx.merge(graphdef, params)
    whole, hidden = jax.jit(
        lambda: (
            model.encoded(model.embed(batch()["tokens"]), model.sequence(batch()), None).y,
            model.hidden(batch()["tokens"], seq()).y,
        )
    )()
    np.testing.assert_array_equal(hidden, whole)
    state, parts, periods = model.init_state(2, 11), [], model.transformer.unstacked()
    for first in (0, 6):
        cut = lambda x: x[:, first : first + 6]
        y, state = model.extend(periods, cut(batch()["tokens"]), jax.tree.map(cut, seq()), state)
        parts.append(y)
    used = SEGMENTS > 0
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[used], np.asarray(whole)[used], atol=1e-12)
    with pytest.raises(ConfigError, match="model.decoupled = True.*false where no mixer reads the embedding"):
        config(decoupled=True)
