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
from tests.models import drawn


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
        graphdef, params = drawn.apart(lambda: LanguageModel(config(), rngs=nnx.Rngs(0)))
        value = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))(params, graphdef, config(unroll=1))
    return graphdef, params, value


def test_cross_entropy_is_the_formula():
    """Any chunk of the vocabulary gives log-softmax's value and gradients, of capped logits, too; weight 0 gives none,
    NaN or not."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(9, 6)), rng.normal(size=(6, 23))
    targets = rng.integers(0, 23, 9).astype(np.int32)
    weights = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1.0])

    def ours(hidden, kernel, chunk, cap):
        hidden = hidden.at[2].set(jnp.nan)
        nll, lse = cross_entropy(hidden, kernel, jnp.asarray(targets), jnp.asarray(weights), chunk, cap=cap)
        return jnp.sum(nll * jnp.arange(9)) + jnp.sum(lse**2)

    def formula(hidden, kernel, cap):
        logits = hidden @ kernel
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        lse = jax.nn.logsumexp(logits, axis=1)
        nll = lse - logits[jnp.arange(9), targets]
        return jnp.sum(weights * nll * jnp.arange(9)) + jnp.sum((weights * lse) ** 2)

    @jax.jit
    def run(*args):
        slope = lambda of, *knobs: jax.value_and_grad(of, (0, 1))(*args, *knobs)
        chunks = (None, (1, 23)), (1.5, (5, 100))
        return [[slope(formula, cap), *(slope(ours, n, cap) for n in each)] for cap, each in chunks]

    for wanted, *found in run(hidden, kernel):
        for got in found:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), got, wanted)


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


def test_scan_and_stream_are_the_loop(reference):
    """The scanned stack is the blocks one after the other, in the order of the pattern; prefill, decode and chunked
    prefill through `extend` give the whole sequence's hidden states."""
    graphdef, params, _ = reference
    names = []

    @jax.jit
    def run(params, data):
        model, seq = nnx.merge(graphdef, params), mixers.Sequence(data["positions"], data["segments"])
        x = model.embed(data["tokens"])
        whole = model.transformer(x, seq).y
        periods = model.transformer.unstacked()
        for period in periods:
            for block in period.blocks:
                names.append(block.sublayers[0].branch.name)
                x, _ = block(x, seq)
        hidden, state, parts, first = model.hidden(data["tokens"], seq).y, model.init_state(2, 11), [], 0
        for n in (4, 1, 6):
            cut = {k: v[:, first : first + n] for k, v in data.items()}
            seq = mixers.Sequence(cut["positions"], cut["segments"])
            part, state = model.extend(periods, cut["tokens"], seq, state)
            parts.append(part)
            first += n
        return x, whole, jnp.concatenate(parts, axis=1), hidden

    x, whole, stream, hidden = run(params, batch())
    np.testing.assert_allclose(x, whole, atol=1e-12)
    assert names == ["softmax", "gated"] * 2
    used = np.asarray(batch()["segments"]) > 0
    np.testing.assert_allclose(np.asarray(stream)[used], np.asarray(hidden)[used], atol=1e-10)


@pytest.mark.slow
def test_a_states_arrays_are_buffers_of_their_own():
    """A state made outside of jit can be donated: layers that begin with equal keys and values share no array."""
    table = {letter: {"name": name, "heads": 2} for letter, name in zip("SRT", ("softmax", "rat", "titans"))}
    config = StackConfig(width=16, layers=3, pattern="SRT", mixers=mixer_table(table, "mixers"))
    state = drawn.module(lambda: Transformer(config, rngs=nnx.Rngs(0))).init_state(2, 8)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
    assert len(set(places)) == len(places) > 10


def test_tied_embedding_serves_both_ends():
    """With tied weights there is one matrix, and its gradient has both parts."""
    configs = [config(tied=t, layers=2) for t in (False, True)]
    (untied, apart), (tied, params) = (drawn.apart(lambda c=c: LanguageModel(c, rngs=nnx.Rngs(0))) for c in configs)
    count = lambda state: sum(p.size for p in jax.tree.leaves(state))
    assert count(apart) - count(params) == 23 * 8
    table = params["embedding"][...]
    apart = nnx.State({**params, "head": {"kernel": nnx.Param(table.T)}})

    @jax.jit
    def grads(one, other):
        slope = jax.grad(loss)
        return slope(one, untied, configs[0]), slope(other, tied, configs[1])

    two, one = grads(apart, params)
    both = two["embedding"][...] + two["head"]["kernel"][...].T
    np.testing.assert_allclose(one["embedding"][...], both, atol=1e-10)


def test_dropout_is_a_function_of_the_key():
    """Same key, same masks; another key, others; no key or no rate, no dropout."""

    def model(rate):
        graphdef, params = drawn.apart(lambda: LanguageModel(config(dropout=rate, layers=2), rngs=nnx.Rngs(0)))
        return lambda key: nnx.merge(graphdef, params).token_losses(batch(), key)[0].sum()

    half, none, keys = model(0.5), model(0.0), [jax.random.key(seed) for seed in (0, 1)]
    run = jax.jit(half)
    assert run(keys[0]) == run(keys[0]) != run(keys[1])
    drawing = [
        str(jax.make_jaxpr(of)(key)).count("random_bits")
        for of, key in zip((half, half, none), (keys[0], None, keys[0]))
    ]
    assert drawing[0] and drawing[1:] == [0, 0]


@tiers.often("mlp")
@pytest.mark.parametrize("silent", ["mixer", "mlp"])
def test_dropout_keeps_the_expectation(silent):
    """What mixer and MLP add is kept with 1 - p, each entry by itself, and is then 1 / (1 - p) of what it was."""
    c, p = config(dropout=0.3), 0.3
    block = drawn.module(lambda: Block(c, "A", rngs=nnx.Rngs(0)))
    mixer, mlp = (sublayer.branch for sublayer in block.sublayers)
    kernel = (mixer.out if silent == "mixer" else mlp.down).kernel
    kernel[...] = 0 * kernel[...]
    x = np.random.default_rng(1).normal(size=(16, 64, 8))

    @jax.jit
    def added(key):
        seq = mixers.Sequence.whole(16, 64)
        return block(x, seq)[0] - x, block(x, seq, key=key)[0] - x

    plain, dropped = map(np.asarray, added(jax.random.key(2)))
    kept = np.abs(dropped) > 1e-9 * np.abs(plain)
    np.testing.assert_allclose(dropped[kept], plain[kept] / (1 - p), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(kept.mean((0, 1)), 1 - p, atol=4 * np.sqrt(p * (1 - p) / (16 * 64)))
    np.testing.assert_allclose(kept.mean(-1).std(), np.sqrt(p * (1 - p) / 8), rtol=0.1)


def test_float64_model_is_float64_throughout():
    """Losses, metrics, gradients and all between, of mixers that have losses and metrics of their own."""
    table = mixer_table({"A": {"name": "moh", "heads": 4}, "B": {"name": "flow", "heads": 2}}, "m")
    graphdef, params = drawn.apart(lambda: LanguageModel(config(mixers=table), rngs=nnx.Rngs(0)))

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
    model = drawn.module(lambda: LanguageModel(c, rngs=nnx.Rngs(0)))
    blocks = [block for period in model.transformer.unstacked() for block in period.blocks]
    seq, values = mixers.Sequence.whole(2, 11), lambda p: np.asarray(p[...])
    rms = lambda x, norm: x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * values(norm.scale)
    linear = lambda x, m: x @ values(m.kernel) + values(m.bias)
    x = 3 * values(model.embedding)[np.asarray(batch()["tokens"])]
    attend = jax.jit(lambda branch, x: branch(x, seq).y)
    for block in blocks:
        mixing, mlp = block.sublayers
        x = x + rms(np.asarray(attend(mixing.branch, rms(x, mixing.norm))), mixing.norm_after)
        h = rms(x, mlp.norm)
        z = linear(h, mlp.branch.gate)
        gate = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        x = x + rms(linear(gate * linear(h, mlp.branch.up), mlp.branch.down), mlp.norm_after)
    logits = 0.7 * np.tanh(rms(x, model.norm) @ values(model.head.kernel) / 0.7)
    got = jax.jit(lambda: model.logits(model.hidden(batch()["tokens"], seq).y))()
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
        make = lambda dtype: drawn.module(lambda: LanguageModel(config(dtype=dtype), rngs=nnx.Rngs(0)))
        low, high = make("bfloat16"), make("float32")
        assert {p.dtype for p in jax.tree.leaves(nnx.state(low, nnx.Param))} == {jnp.dtype("float32")}
        a, b = jax.jit(lambda b: (low.token_losses(b)[0], high.token_losses(b)[0]))(batch())
        assert a.dtype == jnp.float32
        assert abs(float(a.sum() - b.sum())) < 0.02 * float(b.sum())
        hidden = jax.eval_shape(lambda b: low.hidden(b["tokens"], mixers.Sequence(b["positions"])).y, batch())
        assert hidden.dtype == jnp.bfloat16


def streamed(model, data):
    """Of a batch as a whole and in two pieces: what the stack makes of it."""
    seq, state, parts = mixers.Sequence(data["positions"], data["segments"]), model.init_state(2, 11), []
    for first in (0, 6):
        cut = lambda x: x[:, first : first + 6]
        y, state = model.extend(model.transformer.unstacked(), cut(data["tokens"]), jax.tree.map(cut, seq), state)
        parts.append(y)
    whole = model.encoded(model.embed(data["tokens"]), model.sequence(data), None).y
    return whole, jnp.concatenate(parts, axis=1)


def test_a_fixed_text(tmp_path):
    """Layers find its embeddings, to which gradients go, also where they are the core of another; a stream is the
    whole. What does not fit is refused: ids, lengths, files, two texts."""
    ids, other = tmp_path / "ids.npy", tmp_path / "other.npy"
    np.save(ids, np.array([20, 21, 20, *range(9), 3], np.uint8)), np.save(other, np.arange(12))
    node = lambda path: {"name": "ablated", "weights": "text_stream", "text": str(path)}
    table = lambda *paths: mixer_table({x: node(p) | {"heads": 2} for x, p in zip("AB", paths, strict=False)}, "m")
    routed = lambda path: mixer_table({"B": {"name": "moh", "heads": 2, "shared": 1, "core": node(path)}}, "m")
    both = {**table(ids), **routed(ids)}
    graphdef, params = drawn.apart(lambda: LanguageModel(config(mixers=both, pattern="AB", layers=2), rngs=nnx.Rngs(0)))
    model = nnx.merge(graphdef, params)
    small = batch() | {"tokens": batch()["tokens"] % 20}  # of a text's ids 20 and 21 the text alone has some
    np.testing.assert_array_equal(model.sequence(small).text, model.embedding[...][np.load(ids)])

    @jax.jit
    def run(params):
        value = lambda params: jnp.sum(nnx.merge(graphdef, params).token_losses(small)[0])
        return jax.grad(value)(params)["embedding"][...], *streamed(nnx.merge(graphdef, params), small)

    slopes, whole, stream = run(params)
    slopes = np.abs(slopes).max(-1)
    assert (slopes[20:22] > 1e-9).all() and slopes[22] == 0
    np.testing.assert_allclose(stream[SEGMENTS > 0], whole[SEGMENTS > 0], atol=1e-12)
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
    with pytest.raises(ConfigError, match="model.vocab = 23.*24 or more"):
        config(mixers=routed(tmp_path / "large.npy"), pattern="B", layers=1)
    with pytest.raises(ConfigError, match="where inputs are vectors"):
        options = {"width": 8, "layers": 1, "vocab": 23, "inputs": 4, "pattern": "A"}
        VectorModelConfig(mixers=table(ids), **options)


def test_decoupled_embeddings():
    """With the table of the embedding it is the model without it; values give the attention's table no gradient, and
    where weights are even, nothing does; a stream is the whole; a table that nobody would read is refused."""
    table = mixer_table({"A": {"name": "ablated", "weights": "static", "heads": 2}}, "m")
    own = config(mixers=table, pattern="A", layers=2, decoupled=True)
    graphdef, params = drawn.apart(lambda: LanguageModel(own, rngs=nnx.Rngs(0)))
    plain = nnx.eval_shape(lambda: LanguageModel(config(mixers=table, pattern="A", layers=2), rngs=nnx.Rngs(0)))
    without, rest = nnx.split(plain, nnx.Param)
    count = lambda state: sum(x.size for x in jax.tree.leaves(state))
    assert (
        count(params) - count(rest)
        == 23 * 8
        == model_cost(own, 11).parameters - model_cost(plain.config, 11).parameters
    )
    seq = lambda: mixers.Sequence(batch()["positions"], batch()["segments"])

    @jax.jit
    def run(params):
        value = lambda params: jnp.sum(nnx.merge(graphdef, params).token_losses(batch())[0])
        model = nnx.merge(graphdef, params)
        rest = nnx.State({k: v for k, v in params.items() if k != "attention_embedding"})
        want = nnx.merge(without, rest).token_losses(batch())[0]
        losses, slopes = model.token_losses(batch())[0], jax.grad(value)(params)["attention_embedding"][...]
        return losses, slopes, want, model.hidden(batch()["tokens"], seq()).y, *streamed(model, batch())

    losses, slopes, want, hidden, whole, stream = run(params)
    assert np.abs(losses - want).max() > 1e-3 and np.abs(slopes).max() > 1e-6
    tied = jax.tree.map(np.copy, params)
    tied["attention_embedding"][...] = tied["embedding"][...]
    same, _, want, *_ = run(tied)
    np.testing.assert_allclose(same, want, atol=1e-12)
    tied["transformer"]["periods"]["blocks"][0]["sublayers"][0]["branch"]["q"]["kernel"][...] *= 0.0
    assert not np.asarray(run(tied)[1]).any()  # even weights, whatever keys are: all that is left are values
    np.testing.assert_array_equal(hidden, whole)
    np.testing.assert_allclose(stream[SEGMENTS > 0], whole[SEGMENTS > 0], atol=1e-12)
    with pytest.raises(ConfigError, match="model.decoupled = True.*false where no mixer reads the embedding"):
        config(decoupled=True)


def test_a_decoupled_table_has_a_width_of_its_own():
    """Another width changes FLOPs of queries' and keys' projections alone, and parameters of theirs, their norm and the
    table; a stream is the whole; values give the table no gradient; what has no table of its own has the model's width.
    """
    static = lambda width=None: {"name": "ablated", "weights": "static", "heads": 2, "embedding_width": width}
    of = lambda *widths, **fields: config(
        mixers=mixer_table(dict(zip("AB", map(static, widths))), "m"), pattern="AB"[: len(widths)], layers=2, **fields
    )
    costs = {width: model_cost(of(width, decoupled=True), 11) for width in (None, 8, 3)}
    assert costs[None] == costs[8]
    changed = {k: v - costs[3].flops[k] for k, v in costs[8].flops.items() if v != costs[3].flops[k]}
    assert list(changed.values()) == [2 * 4.0 * 8 * (8 - 3)] and "projections" in next(iter(changed))
    assert costs[3].state_bytes == costs[8].state_bytes
    assert costs[8].parameters - costs[3].parameters == (8 - 3) * (23 + 2 * (2 * 8 + 1))

    graphdef, params = drawn.apart(lambda: LanguageModel(of(3, decoupled=True), rngs=nnx.Rngs(0)))
    assert params["attention_embedding"].shape == (23, 3)
    assert sum(x.size for x in jax.tree.leaves(params)) == costs[3].parameters

    @jax.jit
    def run(params):
        value = lambda params: jnp.sum(nnx.merge(graphdef, params).token_losses(batch())[0])
        return jax.grad(value)(params)["attention_embedding"][...], *streamed(nnx.merge(graphdef, params), batch())

    slopes, whole, stream = run(params)
    np.testing.assert_allclose(stream[SEGMENTS > 0], whole[SEGMENTS > 0], atol=1e-12)
    assert np.abs(slopes).max() > 1e-6
    params["transformer"]["periods"]["blocks"][0]["sublayers"][0]["branch"]["q"]["kernel"][...] *= 0.0
    assert not np.asarray(run(params)[0]).any()
    with pytest.raises(ConfigError, match="mixers.A.embedding_width = 3.*none, or 8, the model's width, without a tab"):
        of(3)
    with pytest.raises(ConfigError, match="embedding_width = .*3, 8.*one for all mixers that read the embedding"):
        of(3, None, decoupled=True)
