"""The laws of cross-attention, for every mixer that reads a context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.models.transformer import StackConfig, Transformer, extend, mixer_table
from tests import tiers
from tests.mixers import cases, devices, flops
from tests.mixers import test_contract as battery

B, T, S, D_C = 2, cases.LENGTH, 7, 6
NAMES = [name for name in mixers.names() if mixers.get(name).capabilities.cross]
FIELDS = [
    {},
    {"kv_heads": 2, "qk_norm": True, "sinks": True, "soft_cap": 3.0, "rope_context": True},
    {"kv_heads": 1, "qk_norm": "cosine", "bias": "all"},
]
GATES = [{"position": p} for p in ("G2", "G3", "G4", "G5")]
CASES = [(name, fields) for name in NAMES for fields in FIELDS] + [("gated", fields) for fields in GATES]
every_case = tiers.parametrize(
    "name, fields", CASES, often=CASES[1:2] + CASES[-1:], ids=lambda v: v if isinstance(v, str) else str(v)[:40]
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(name, **fields):
    config = mixers.get(name).Config(**({"source": "image", "context_width": D_C} | fields))
    return cases.module(config, jnp.float64)


def rows(seed=5, size=S, width=D_C):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, size, width)))


def inputs(**fields):
    """x and a sequence of whole rows that reads `rows()`, or what is given in their place."""
    x, _ = cases.inputs(jnp.float64)
    context = mixers.Context(**({"rows": rows()} | fields))
    return x, dataclasses.replace(mixers.Sequence.whole(B, T), contexts={"image": context})


def run(module, x, seq):
    return battery.call(*cases.split(module), x, seq)


@every_case
def test_definition_and_gradients(name, fields):
    """Every implementation that serves gives the definition, values and gradients for x, parameters and the context."""
    x, seq = inputs(starts=jnp.zeros((B, T), jnp.int32).at[:, 4:].set(2), ends=jnp.full((B, T), 5).at[:, 8].set(0))
    results = []
    for impl in ("definition", "auto"):
        graphdef, params = cases.split(make(name, impl=impl, **fields))
        loss = lambda p, x, seq, graphdef=graphdef: jnp.sum(jnp.sin(3 * nnx.merge(graphdef, p)(x, seq).y))
        grad = jax.value_and_grad(loss, argnums=(0, 1, 2), allow_int=True)
        value, (of_params, of_x, of_seq) = jax.jit(grad)(params, x, seq)
        results.append((value, of_params, of_x, of_seq.contexts["image"].rows))
        hidden = np.asarray(results[-1][3])[:, 5:]
        np.testing.assert_array_equal(hidden, 0)  # rows that no query sees have no gradient at all
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


@every_case
def test_one_row_is_the_same_for_every_query(name, fields):
    """S = 1: heads' outputs, before a gate, do not depend on the query (a gate, and a sink's share, do)."""
    module = make(name, **(fields | {"sinks": False}))
    x, seq = inputs(rows=rows(size=1))

    @jax.jit
    def before_the_gate(x, seq):
        reads = module.reads(x, seq)
        o, gate = module.attend(reads.q, reads.kv, reads.mask, x).y, module.output_gate(x)
        return o if gate is None else o / jax.nn.sigmoid(gate)

    o = np.asarray(before_the_gate(x, seq))
    np.testing.assert_allclose(o, np.broadcast_to(o[:, :1], o.shape), atol=1e-12)


@every_case
def test_order_and_repetition_of_rows(name, fields):
    """Without positions rows may be permuted, or each repeated, with their segments; nothing changes."""
    module = make(name, **(fields | {"rope_context": False, "sinks": False}))
    x, seq = inputs()
    y, order = run(module, x, seq), np.random.default_rng(0).permutation(S)
    permuted = inputs(rows=rows()[:, order])[1]
    np.testing.assert_allclose(run(module, x, permuted), y, atol=1e-12)
    if fields.get("qk_norm") != "cosine":  # whose scale grows with the number of keys
        np.testing.assert_allclose(run(module, x, inputs(rows=jnp.repeat(rows(), 3, axis=1))[1]), y, atol=1e-12)


@every_case
def test_a_row_that_sees_nothing_gives_zero(name, fields):
    """An empty interval: heads' outputs are exactly 0, and no gradient flows."""
    module = make(name, **fields)
    ends = jnp.full((B, T), S).at[:, 3].set(0)
    x, seq = inputs(ends=ends)
    context = seq.contexts["image"]

    def of_row(r):
        read = dataclasses.replace(seq, contexts={"image": dataclasses.replace(context, rows=r)})
        o = module.heads(x, read).y[:, 3]
        return jnp.sum(o), o

    (_, o), gradient = jax.jit(jax.value_and_grad(of_row, has_aux=True))(context.rows)
    if module.config.node_name != "gated" or module.config.position != "G1":
        np.testing.assert_array_equal(o, 0)
    np.testing.assert_array_equal(gradient, 0)


@every_case
def test_stream_and_packing(name, fields):
    """Packed documents see their own rows only; a stream in any cutting, keys made once, gives the whole."""
    module = make(name, **fields)
    x, packed = cases.inputs(jnp.float64)
    segments = jnp.asarray([[2, 2, 2, 1, 1, 0, 0], [0, 3, 3, 3, 3, 3, 3]], jnp.int32)
    context = mixers.Context(rows(), segments)
    seq = dataclasses.replace(packed, contexts={"image": context})
    y = run(module, x, seq)
    for row, first, end in cases.DOCUMENTS[1:2]:  # behind another; each is compiled
        own = np.flatnonzero(segments[row] == packed.segments[row, first])
        positions = None if not module.config.rope_context else jnp.asarray(own)[None].astype(jnp.int32)
        alone = mixers.Context(rows()[row : row + 1, own], positions=positions)
        _, part = cases.inputs(jnp.float64)
        part = mixers.Sequence(part.positions[row : row + 1, first:end], contexts={"image": alone})
        np.testing.assert_allclose(y[row, first:end], run(module, x[row : row + 1, first:end], part)[0], atol=1e-11)
    loud = dataclasses.replace(context, rows=jnp.where((segments == 0)[..., None], jnp.nan, rows()))
    used = np.asarray(packed.segments) > 0
    quiet = run(module, x, dataclasses.replace(seq, contexts={"image": loud}))
    np.testing.assert_array_equal(np.asarray(quiet)[used], np.asarray(y)[used])
    state = jax.jit(lambda contexts: module.init_state(B, T, jnp.float64, contexts=contexts))(seq.contexts)
    step = functools.partial(battery.extend, *cases.split(module))
    for cut in battery.CUTS:
        streamed, after = cases.streamed(step, state, x, packed, cut)
        np.testing.assert_allclose(np.asarray(streamed)[used], np.asarray(y)[used], atol=1e-11)
        np.testing.assert_array_equal(after.carried.k, state.carried.k)


@pytest.mark.parametrize("name", NAMES)
def test_reading_itself_is_self_attention(name):
    """The context is x, each query sees the rows up to its own: self-attention with the same weights."""
    plain = cases.module(mixers.get(name).Config(), jnp.float64)
    cross = cases.module(mixers.get(name).Config(source="image", rope_context=True), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    context = mixers.Context.aligned(x, T)
    seq = dataclasses.replace(mixers.Sequence.whole(B, T), contexts={"image": context})
    np.testing.assert_array_equal(context.ends[0], np.arange(T) + 1)
    np.testing.assert_allclose(run(cross, x, seq), run(plain, x, mixers.Sequence.whole(B, T)), atol=1e-12)


@tiers.often("sizes0-gated")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [{"context": 2}, {"data": 2}])
def test_sharding(name, sizes):
    """The same numbers on eight devices; the context is whole on each where queries are split."""
    module = make(name, kv_heads=2)
    graphdef, params = cases.split(module)
    x, seq = cases.inputs(jnp.float64, behind=1)
    seq = dataclasses.replace(seq, contexts={"image": mixers.Context(rows())})
    x, seq = jax.tree.map(lambda a: jnp.concatenate([a] * 4), (x, seq))
    forward = lambda params, x, seq: nnx.merge(graphdef, params)(x, seq).y
    expected = jax.jit(forward)(params, x, seq)
    np.testing.assert_allclose(devices.split(forward, x.shape[1], **sizes)(params, x, seq), expected, atol=1e-11)


@every_case
def test_cost(name, fields):
    """Declared FLOPs, per token and per row of the context, are those of the program; the state is the cache."""
    cls = mixers.get(name)
    config = cls.Config(**({"source": "image", "context_width": D_C, "impl": "definition"} | fields))
    cost = cls.cost(config, cases.WIDTH, T)
    module = cases.module(config, jnp.float32)
    graphdef, params = cases.split(module)
    x, seq = inputs(rows=rows(size=T))
    counted = flops.count(lambda p, x: nnx.merge(graphdef, p)(x, seq).y, params, x) / (B * T)
    assert counted == pytest.approx(cost.total_flops + cost.context_flops, rel=1e-6)
    begin = lambda: module.init_state(1, T, contexts=cls.blank_contexts(config, cases.WIDTH, T))
    assert cost.state_bytes == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(begin)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionStack(StackConfig):
    """A stack that is given an image."""

    context_names = ("image",)


def stack(**fields):
    table = {"S": {"name": "softmax"}, "X": {"name": "gated", "source": "image", "context_width": D_C}}
    options = {"width": cases.WIDTH, "layers": 2, "dtype": "float64"}
    return CaptionStack(**(options | {"mixers": mixer_table(table, "mixers"), "pattern": "S+X"} | fields))


def test_a_block_of_both():
    """`S+X`: self-attention, cross-attention, MLP; a stream equals the whole; closed gates read nothing."""
    assert stack(layers=4, pattern="SS+X").blocks == ("S", "SX")
    model = Transformer(stack(), rngs=nnx.Rngs(0))
    x, packed = cases.inputs(jnp.float64)
    x = np.asarray(x)
    seq = dataclasses.replace(
        packed, contexts={"image": mixers.Context(rows(), jnp.asarray([[1] * 3 + [2] * 4, [3] * 7]))}
    )
    y = jax.jit(lambda x, seq: model(x, seq).y)(x, seq)
    used, periods = np.asarray(packed.segments) > 0, model.unstacked()
    state, parts = jax.jit(lambda contexts: model.init_state(B, T, contexts))(seq.contexts), []
    step = jax.jit(lambda x, *at, state: extend(periods, x, mixers.Sequence(*at), state))
    for t in range(T):
        part, state = step(*(np.asarray(a)[:, t : t + 1] for a in (x, packed.positions, packed.segments)), state=state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1)[used], np.asarray(y)[used], atol=1e-11)
    closed = Transformer(stack(gated="X"), rngs=nnx.Rngs(0))
    other = dataclasses.replace(seq, contexts={"image": dataclasses.replace(seq.contexts["image"], rows=rows(seed=9))})
    of_closed = jax.jit(lambda x, seq: closed(x, seq).y)
    np.testing.assert_array_equal(of_closed(x, seq), of_closed(x, other))
    with pytest.raises(UserError, match="contexts given: none; the layers read: image"):
        model(x, packed)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: stack(mixers=mixer_table({"S": {"name": "softmax", "source": "sound"}}, "m"), pattern="S"), "sound"),
        (lambda: stack(pattern="S+"), "model.pattern"),
        (lambda: stack(pattern="SX", gated="Q"), "model.gated"),
        (lambda: mixers.get("softmax").Config(context_width=3), "context_width"),
        (lambda: mixers.get("softmax").Config(source="image", window=3), "window"),
        (lambda: mixers.get("moh").Config(core={"name": "softmax", "source": "image"}), "core.source"),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_context_that_is_not_given():
    x, seq = inputs()
    with pytest.raises(UserError, match="source = 'image'; contexts with rows: none"):
        make("softmax")(x, dataclasses.replace(seq, contexts=None))
