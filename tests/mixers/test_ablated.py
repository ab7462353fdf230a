"""The identities of ablated attention (Xue et al. 2025), in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UnsupportedPattern, UserError
from attnlab.mixers.ablated import AblatedConfig
from attnlab.models.cost import model_cost, stack_cost
from attnlab.models.lm import LanguageModelConfig
from attnlab.models.transformer import StackConfig, Transformer, extend, mixer_table
from attnlab.ops.running_softmax import running_softmax
from tests import tiers
from tests.mixers import cases, devices, flops
from tests.models import drawn

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out gate up", "scale": "embedding_norm"}
BIASED = [({}, "q k v", "out"), ({"weights": "none"}, "gate up", "out")]
BESIDE = {"chunk": {"impl": "chunked"}}  # short rows of taylor are attended to by pairs, unless it is asked for
NUMBERS_OF = "based"
WRITTEN_OUT = True

B, T, H, E = 2, 11, 2, 3
op = jax.jit(running_softmax, static_argnames=("chunk", "impl"))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def whole():
    x, _ = cases.inputs(jnp.float64)
    return x, mixers.Sequence.whole(*x.shape[:2])


def naive(module, x, embedding):
    """The layer on one whole sequence [T, D], whose stack began from `embedding`, position by position in numpy."""
    c, (length, _), d = module.config, x.shape, module.head_dim
    array = lambda linear: np.asarray(linear.kernel[...])
    silu = lambda z: z / (1 + np.exp(-z))
    if c.weights == "none":
        return (silu(x @ array(module.gate)) * (x @ array(module.up))) @ array(module.out)
    e = x
    if c.weights == "static":
        e = embedding / np.sqrt((embedding**2).mean(-1, keepdims=True) + 1e-6)
        e = e * np.asarray(module.embedding_norm.scale[...])
    rows = ((e, module.q), (e, module.k), (x, module.v))
    q, k, v = ((z @ array(y)).reshape(length, c.heads, d) for z, y in rows)
    if c.weights in ("taylor", "static") and c.rope_base is not None:
        q, k = (turned(y, c.rope_base) for y in (q, k))
    o = np.zeros_like(v)
    for t in range(length):
        for h in range(c.heads):
            if c.weights == "taylor":
                s = k[: t + 1, h] @ q[t, h] / np.sqrt(d)
                w = 1 + s + s**2 / 2
            elif c.weights == "static":
                w = np.exp(k[: t + 1, h] @ q[t, h] / np.sqrt(d))
            else:
                w = np.exp((silu(q[: t + 1, h]) * k[: t + 1, h]).sum(-1) / np.sqrt(d))
            o[t, h] = w @ v[: t + 1, h] / w.sum()
    return o.reshape(length, -1) @ array(module.out)


@tiers.often("taylor-chunked", "key_score-chunked", "static-chunked", "none-chunked")
@pytest.mark.parametrize("impl", ["definition", "chunked"])
@pytest.mark.parametrize("weights", ["taylor", "key_score", "static", "none"])
def test_layer_is_the_formula(weights, impl):
    """The whole layer written out, in chunks that do not divide the length."""
    module = cases.module(AblatedConfig(weights=weights, impl=impl, chunk=4, rope_base=50.0), jnp.float64)
    x, seq = whole()
    began = 2 * np.random.default_rng(5).standard_normal(x.shape)
    run = jax.jit(lambda x, e: module(x, dataclasses.replace(seq, embedding=e)).y)
    y, alone = run(x, jnp.asarray(began)), run(x, None)
    for row in range(2):
        np.testing.assert_allclose(y[row], naive(module, np.asarray(x[row]), began[row]), atol=1e-12)
        np.testing.assert_allclose(alone[row], naive(module, np.asarray(x[row]), np.asarray(x[row])), atol=1e-12)


def test_static_reads_embeddings_of_another_width():
    """The layer written out, of embeddings narrower than x; others, and x itself where there are none, are refused."""
    module = cases.module(AblatedConfig(weights="static", embedding_width=5, rope_base=50.0), jnp.float64)
    x, seq = whole()
    e = np.random.default_rng(5).standard_normal((*x.shape[:2], 5))
    y = jax.jit(lambda x, e: module(x, dataclasses.replace(seq, embedding=e)).y)(x, jnp.asarray(e))
    for row in range(2):
        np.testing.assert_allclose(y[row], naive(module, np.asarray(x[row]), e[row]), atol=1e-12)
    with pytest.raises(UnsupportedPattern, match="reads embeddings 5 wide, these are 16"):
        module(x, seq)
    with pytest.raises(ConfigError, match="embedding_width = 5.*none where weights is not static"):
        AblatedConfig(embedding_width=5)


def test_key_score_without_queries_is_the_running_mean():
    """W_Q = 0: the mean of the values of the document so far."""
    module = cases.module(AblatedConfig(weights="key_score", heads=2), jnp.float64)
    module.q.kernel[...] = 0 * module.q.kernel[...]
    x, seq = cases.inputs(jnp.float64)
    y = np.asarray(jax.jit(module)(x, seq).y)
    v, out = np.asarray(x) @ np.asarray(module.v.kernel[...]), np.asarray(module.out.kernel[...])
    for row, first, end in cases.DOCUMENTS:
        mean = np.cumsum(v[row, first:end], axis=0) / np.arange(1, end - first + 1)[:, None]
        np.testing.assert_allclose(y[row, first:end], mean @ out, atol=1e-12)


@tiers.often("100000.0")
@pytest.mark.parametrize("shift", [0.0, 1e5, -1e5])
def test_scores_count_by_their_differences(shift):
    """A number added to all scores changes nothing; scores thousands apart, rising and falling, leave all finite."""
    rng = np.random.default_rng(0)
    r, v = 1e3 * rng.standard_normal((B, T, H)), rng.standard_normal((B, T, H, E))
    r[0] = rng.standard_normal((T, H))
    want = np.stack(
        [
            np.einsum("hbs,bshe->bhe", w / w.sum(-1, keepdims=True), v[:, : t + 1])
            for t in range(T)
            for w in [np.exp(r[:, : t + 1] - r[:, : t + 1].max(1, keepdims=True)).transpose(2, 0, 1)]
        ],
        axis=1,
    )
    o, state = op(r + shift, v, chunk=4)
    np.testing.assert_allclose(o, want, atol=1e-9)
    np.testing.assert_array_equal(state.highest, (r + shift).max(1))
    slopes = jax.jit(jax.grad(lambda r: op(r, v, chunk=4)[0][..., 0].sum()))(jnp.asarray(r + shift))
    assert np.all(np.isfinite(slopes))
    np.testing.assert_allclose(slopes.sum(1), 0, atol=1e-9)  # by the same reason


def test_documents_have_maxima_of_their_own():
    """Documents whose scores are a hundred million apart are what they are alone, to the last digits, streamed too."""
    rng = np.random.default_rng(0)
    r, v = rng.standard_normal((1, T, H)), rng.standard_normal((1, T, H, E))
    r[:, 4:8] += 1e8
    documents = jnp.asarray([[1] * 4 + [2] * 4 + [3] * 3])
    o, _ = op(r, v, documents_BT=documents, chunk=4)
    first, state = op(r[:, :6], v[:, :6], documents_BT=documents[:, :6], chunk=4)
    second, _ = op(r[:, 6:], v[:, 6:], documents_BT=documents[:, 6:] - 2, state=state, chunk=4)
    for begin, end in ((0, 4), (4, 8), (8, 11)):
        w = np.exp(r[0, begin:end] - r[0, begin:end].max(0))[..., None]
        want = np.cumsum(w * v[0, begin:end], axis=0) / np.cumsum(w, axis=0)
        np.testing.assert_allclose(o[0, begin:end], want, atol=1e-13)
        np.testing.assert_allclose(np.concatenate([first, second], axis=1)[0, begin:end], want, atol=1e-13)


def test_static_weights_do_not_know_the_context():
    """With one embedding outputs are linear in x; a stream that reads it is the whole; no other variant asks for it."""
    module = cases.module(AblatedConfig(weights="static"), jnp.float64)
    (x, seq), began = whole(), jnp.asarray(np.random.default_rng(5).standard_normal((2, cases.LENGTH, cases.WIDTH)))
    run = jax.jit(lambda x: module(x, dataclasses.replace(seq, embedding=began)).y)
    np.testing.assert_allclose(run(x) + run(3 * x[::-1]), run(x + 3 * x[::-1]), atol=1e-12)

    @jax.jit
    def extend(x, e, seq, state):
        return module.extend(x, dataclasses.replace(seq, embedding=e), state)

    state, stream, parts = module.init_state(2, cases.LENGTH, jnp.float64), mixers.Stream.start(2), []
    for piece in (slice(0, 5), slice(5, 10), slice(10, 11)):
        part, stream = cases.placed(stream, mixers.Sequence(np.asarray(seq.positions)[:, piece]))
        out = extend(x[:, piece], began[:, piece], part, state)
        state, parts = out.state, [*parts, out.y]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), run(x), atol=1e-12)
    assert module.stack_reads == ("embedding",)
    assert cases.module(AblatedConfig(), jnp.float64).stack_reads == ()


def stack_of(weights, pattern="AS", layers=4, **fields):
    """A stack whose letter A reads a second stream, its config's path of a text never opened, and S does not."""
    given = {"text": "text.npy"} if weights == "text_stream" else {}
    table = {
        "A": {"name": "ablated", "weights": weights, "heads": 2, "rope_base": 50.0, "head_width": 6} | given,
        "S": {"name": "softmax", "heads": 2, "rope_base": None},
    }
    table = mixer_table({letter: table[letter] for letter in dict.fromkeys(pattern.replace("+", ""))}, "m")
    fields = {"mlp_width": 5, "dtype": "float64"} | fields
    config = StackConfig(width=cases.WIDTH, layers=layers, mixers=table, pattern=pattern, **fields)
    return drawn.apart(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def turned(y, base):
    """RoPE of y [n, H, d], at positions 0 to n - 1."""
    half = y.shape[-1] // 2
    angle = np.arange(len(y))[:, None, None] * base ** (-np.arange(half) / half)
    a, b, cos, sin = y[..., :half], y[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attended(branch, read, valued):
    """Causal softmax attention written out: weights of `read` [n, D], values of `valued`."""
    rows = ((read, branch.q), (read, branch.k), (valued, branch.v))
    q, k, v = ((y @ np.asarray(linear.kernel[...])).reshape(len(y), 2, -1) for y, linear in rows)
    if branch.config.rope_base is not None:
        q, k = (turned(y, branch.config.rope_base) for y in (q, k))
    w = np.exp(np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])) * np.tri(len(q))
    o = np.einsum("hts,shd->thd", w / w.sum(-1, keepdims=True), v)
    return o.reshape(len(o), -1) @ np.asarray(branch.out.kernel[...])


def both_streams(stack, x, z):
    """One document's x and its second stream z, [n, D], through all blocks written out."""

    def normed(y, norm):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])

    def made(branch, h, g):
        if hasattr(branch, "q"):
            return attended(branch, g if branch.name == "ablated" else h, h)
        gate, up, down = (np.asarray(linear.kernel[...]) for linear in (branch.gate, branch.up, branch.down))
        return (h @ gate / (1 + np.exp(-h @ gate)) * (h @ up)) @ down

    for block in (block for period in stack.unstacked() for block in period.blocks):
        for sublayer in block.sublayers:
            h, g = (normed(y, sublayer.norm) for y in (x, z))
            added = [made(sublayer.branch, h, g), made(sublayer.branch, g, g)]
            if sublayer.norm_after is not None:
                added = [normed(y, sublayer.norm_after) for y in added]
            if hasattr(sublayer, "gate"):
                added = [np.tanh(np.asarray(sublayer.gate[...])) * y for y in added]
            x, z = x + added[0], z + added[1]
    return x


OTHER = {"pattern": "A+SA", "gated": "S", "norm_after": True, "remat": "full"}


@tiers.often("random_stream-fields0")
@pytest.mark.parametrize("fields", [{"unroll": 1}, OTHER])
@pytest.mark.parametrize("weights", ["random_stream", "text_stream"])
def test_the_second_stream_goes_through_whole_blocks(weights, fields):
    """Stacks of it and softmax, packed, values and gradients: both streams written out, MLPs, gates and norms too. A
    stream in pieces is the whole."""
    graphdef, params = stack_of(weights, **fields)
    x, seq = cases.inputs(jnp.float64)
    rng = np.random.default_rng(7)
    text = rng.standard_normal((9, cases.WIDTH)) if weights == "text_stream" else None
    seq, scale, used = dataclasses.replace(seq, text=text), rng.standard_normal(x.shape), np.asarray(seq.segments) > 0

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def packed(given):
        params, x, text = given
        y = nnx.merge(graphdef, params)(x, dataclasses.replace(seq, text=text)).y
        return jnp.sum(jnp.where(used[..., None], scale * y, 0)), y

    first = nnx.merge(graphdef, params).periods.blocks[0].sublayers[0].branch
    noise = np.asarray(first.begin_second(9, None)[0]) if text is None else None

    def written(given):
        params, x, text = given
        stack, y = nnx.merge(graphdef, params), np.zeros_like(x)
        text = noise if text is None else text
        for row, first, end in cases.DOCUMENTS:
            y[row, first:end] = both_streams(stack, x[row, first:end], text[: end - first])
        return y

    given = jax.tree.map(np.asarray, (params, x, text))
    (_, y), slopes = packed(given)
    y = np.asarray(y)
    np.testing.assert_allclose(y[used], written(given)[used], atol=1e-11)
    way = jax.tree.map(lambda a: rng.standard_normal(a.shape) / 100, given)
    at = lambda steps: np.sum(scale * written(jax.tree.map(lambda a, d: a + 1e-3 * steps * d, given, way)))
    along = sum(np.vdot(a, d) for a, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose(along, (8 * (at(1) - at(-1)) - at(2) + at(-2)) / 12e-3, rtol=1e-8)

    begin = jax.jit(lambda params: nnx.merge(graphdef, params).init_state(2, 11, text=text))
    step = jax.jit(lambda params, *args: extend(nnx.merge(graphdef, params).unstacked(), *args))
    state, parts = begin(params), []
    size = 1 if fields is OTHER else 5  # each of one program: from the beginning, and under way
    for first in range(0, cases.LENGTH - size + 1, size):
        piece = slice(first, first + size)
        part = mixers.Sequence(np.asarray(seq.positions)[:, piece], np.asarray(seq.segments)[:, piece], text=text)
        got, state = step(params, np.asarray(x)[:, piece], part, state)
        parts.append(got)
    streamed = np.concatenate(parts, axis=1)
    seen = used[:, : streamed.shape[1]]
    np.testing.assert_allclose(streamed[seen], y[:, : streamed.shape[1]][seen], atol=1e-11)


def test_the_second_stream_on_eight_devices():
    """Rows, heads and positions of a packed stack split, between layers that read the stream: the same numbers."""
    stack = stack_of("random_stream", pattern="A", layers=2, mlp_width=0)
    devices.hold(*stack, *cases.inputs(jnp.float64), context=2)


def test_streams_know_positions_alone():
    """A layer of a given second stream is linear in x, by weights that are every document's; by itself it is a stack's
    first without norm and MLP, whose input it does not add. Noise is the same whatever the length."""
    module = cases.module(AblatedConfig(weights="random_stream", heads=2), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    side = jnp.asarray(np.random.default_rng(7).standard_normal((1, 9, cases.WIDTH)))
    run = jax.jit(lambda x, side: module(x, dataclasses.replace(seq, side=side)).y)
    used = np.asarray(seq.segments) > 0
    both = np.asarray(run(x, side) + run(3 * x[::-1], side))[used]
    np.testing.assert_allclose(both, run(x + 3 * x[::-1], side)[used], atol=1e-12)
    same = np.array(x)
    same[1, 2:6] = same[0, :4]  # documents that begin alike, at other places
    y = run(same, side)
    np.testing.assert_allclose(y[1, 2:6], y[0, :4], atol=1e-12)
    begun = jax.jit(lambda: module.begin_second(9, None))()
    assert np.any(np.asarray(begun) != np.asarray(begun).astype(np.float32))  # as wide as the model
    np.testing.assert_allclose(run(x, begun)[used], run(x, None)[used], atol=1e-12)
    np.testing.assert_array_equal(jax.jit(lambda: module.begin_second(4, None))(), begun[:, :4])
    assert 0.8 < np.std(begun) < 1.2
    quiet = cases.module(AblatedConfig(weights="random_stream", heads=2, noise=0.02), jnp.float64)
    np.testing.assert_allclose(jax.jit(lambda: quiet.begin_second(9, None))(), 0.02 * begun, rtol=1e-12)
    with pytest.raises(ConfigError, match="noise = 0.5.*1 where weights is not random_stream"):
        AblatedConfig(weights="static", noise=0.5)


def test_the_second_stream_is_counted():
    """FLOPs of the program are those per token of all rows and, once, the second stream's; bytes those of the state;
    what cannot be beside it is refused. A mixture of heads reads it as its core does."""
    graphdef, params = stack_of("random_stream", dtype="float32")
    config, x = nnx.merge(graphdef, params).config, jnp.zeros((B, T, cases.WIDTH))
    run = lambda params: nnx.merge(graphdef, params)(x, mixers.Sequence.whole(B, T)).y
    cost = stack_cost(config, T)
    pairs = sum(value for name, value in cost.flops.items() if name.endswith("attention")) * (2 * T / (T + 1) - 1)
    assert cost.second_flops == cost.total_flops
    assert flops.count(run, params) == pytest.approx((B + 1) * T * (cost.total_flops + pairs), rel=1e-6)
    state = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_state(1, T), params)
    assert cost.state_bytes == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((state.layers, state.sides)))
    seen = stack_of("random_stream", pattern="S", layers=1)
    assert nnx.merge(*seen).sides(T) is None and stack_cost(nnx.merge(*seen).config, T).second_flops == 0
    both = {x: {"name": "ablated", "weights": "random_stream", "heads": 2} for x in "AB"}
    both["B"] |= {"weights": "text_stream", "text": "text.npy"}
    with pytest.raises(ConfigError, match="model.mixers = .*one and the same second stream"):
        StackConfig(width=8, layers=2, mixers=mixer_table(both, "m"), pattern="AB")
    both["B"] = {"name": "softmax", "heads": 2, "source": "rows"}
    reader = type("Reader", (StackConfig,), {"context_names": ("rows",)})
    with pytest.raises(ConfigError, match="model.mixers.B.source = 'rows'.*none beside the second stream of A"):
        reader(width=8, layers=2, mixers=mixer_table(both, "m"), pattern="AB")
    table = mixer_table(
        {"M": {"name": "moh", "heads": 2, "core": {"name": "ablated", "weights": "random_stream"}}}, "m"
    )
    routed = nnx.eval_shape(
        lambda: Transformer(StackConfig(width=8, layers=2, mixers=table, pattern="M"), rngs=nnx.Rngs(0))
    )
    assert jax.eval_shape(lambda: routed.sides(T))[0][0].shape == (2, 1, T, 8)
    model = LanguageModelConfig(vocab=11, width=8, layers=2, mixers=table)
    parts = {rows: model_cost(model, T, rows).flops for rows in (1, 4)}
    assert parts[1].pop("second_stream") == 4 * parts[4].pop("second_stream") > 0
    assert parts[1] == parts[4]
    with pytest.raises(ConfigError, match="input_conv = 3.*1 where weights is random_stream"):
        AblatedConfig(weights="random_stream", input_conv=3)


def test_a_text_has_an_end():
    """Positions of a document behind it give NaN, whole and in a stream, and those before what they give without; there
    is none unless it is given, and only what reads it may name one."""
    module = cases.module(AblatedConfig(weights="text_stream", text="text.npy"), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    text = np.random.default_rng(7).standard_normal((9, cases.WIDTH))
    run = jax.jit(lambda text: module(x, dataclasses.replace(seq, text=text)).y)
    y, short, behind = run(text), run(text[:6]), np.asarray(seq.positions) >= 6
    assert np.isnan(short[behind]).all() and np.isfinite(y).all()
    np.testing.assert_allclose(short[~behind], y[~behind], atol=1e-12)
    part, _ = cases.placed(mixers.Stream.start(2), dataclasses.replace(seq, text=text[:6]))
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    streamed = jax.jit(lambda: module.extend(x, part, state).y)()
    np.testing.assert_array_equal(np.isnan(streamed), np.isnan(short))
    with pytest.raises(UnsupportedPattern, match="Sequence.text"):
        module(x, seq)
    for fields in ({"weights": "text_stream"}, {"weights": "static", "text": "text.npy"}):
        with pytest.raises(ConfigError, match="text = .*where weights is"):
            AblatedConfig(**fields)


def test_an_embedding_that_overflows_is_kept_in_its_document():
    """With x it is NaN at one position; other documents' outputs and gradients, through both, are what they are."""
    module = cases.module(AblatedConfig(weights="static"), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    others = ((seq.segments != 1) & (seq.segments != 0))[..., None]

    @jax.jit
    def run(x, e):
        def scalar(x, e):
            y = module(x, dataclasses.replace(seq, embedding=e)).y
            return jnp.sum(jnp.where(others, jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y, 0)), y

        (_, y), slopes = jax.value_and_grad(scalar, (0, 1), has_aux=True)(x, e)
        return [jnp.where(others, z, 0) for z in (y, *slopes)], y

    e = 2 * x[:, ::-1]
    (want, _), (got, y) = run(x, e), run(x.at[0, 1].set(jnp.nan), e.at[0, 1].set(jnp.nan))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)
    assert np.all(np.isnan(y[0, 1:4])) and np.all(np.isfinite(y[0, 0]))


def test_none_mixes_nothing():
    """Another input at other positions changes nothing at one; a stream has no state but that of the base class."""
    module = cases.module(AblatedConfig(weights="none"), jnp.float64)
    x, seq = whole()
    run = jax.jit(lambda x: module(x, seq).y)
    y, changed = run(x), run(x.at[:, :5].add(1.0).at[:, 6:].add(1.0))
    np.testing.assert_array_equal(changed[:, 5], y[:, 5])
    assert np.abs(changed - y)[:, :5].min() > 0
    assert module.init_state(2, 10).carried == ()


def test_parameters_are_those_of_softmax_attention():
    """Parameters of all three are softmax attention's, those of the MLP up to rounding of its width."""
    count = lambda name, **fields: mixers.get(name).cost(mixers.get(name).Config(**fields), 96, 10).parameters
    want = count("softmax")
    assert count("ablated") == count("ablated", weights="key_score") == want
    assert count("ablated", weights="static") == want + 96  # its norm
    assert count("ablated", weights="none") == want  # 4 / 3 of heads of 24 is an integer
    assert count("ablated", weights="none", heads=3) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weights": "random"}, "weights = 'random'"),
        ({"heads": 3}, "heads = 3 does not divide width = 16"),
        ({"chunk": 0}, "chunk = 0"),
        ({"impl": "pallas"}, "impl = 'pallas'"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.build({"name": "ablated", **fields}, width=16, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"running_softmax: scores \(2, 3\); expected \(2, 3, 1\)"):
        running_softmax(jnp.zeros((2, 3)), jnp.zeros((2, 3, 1, 4)))
