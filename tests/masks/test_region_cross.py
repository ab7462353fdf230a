"""Words in their regions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks, mixers
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.ops.masks import Mask
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests.masks.contexts import held_to_the_laws
from tests.mixers import cases
from tests.mixers import test_contract as battery

B, T, S = 2, cases.LENGTH, 7
WORDS = np.array(
    [[0, 1, 1, 2, 0, 2, 5], [1, 1, 1, 2, 2, 2, 2]], np.int32
)  # 5 is no region; row 1 has bound words alone
PIXELS = np.arange(B * T, dtype=np.int32).reshape(B, T) % 4  # of regions 0 to 3


def sees(config, own, word):
    inside = 0 <= own < 2**config.regions if config.overlap else 0 <= own <= config.regions
    of = {r for r in range(1, config.regions + 1) if (own >> (r - 1) & 1 if config.overlap else own == r)}
    return inside and word in {0} | of


@pytest.mark.parametrize("overlap", [False, True])
def test_laws(overlap):
    held_to_the_laws("region_cross", sees, {"regions": 3, "overlap": overlap}, 9 if overlap else 4)


def test_by_hand():
    """A subject's words, 1, are seen in its region; others everywhere; a pixel of two regions sees both's words."""
    one = masks.build({"name": "region_cross", "regions": 2}).groups(np.array([[0, 1, 2]]), np.array([[0, 1, 2]]))
    two = masks.build({"name": "region_cross", "regions": 2, "overlap": True}).groups(
        np.array([[0, 1, 2, 3]]), WORDS[:1]
    )
    assert [f"{b:03b}" for b in one.bits.ravel()] == ["001", "011", "101"]
    assert [f"{b:03b}" for b in two.bits.ravel()] == ["001", "011", "101", "111"]
    assert two.group.tolist() == [[0, 1, 1, 2, 0, 2, -1]]


def test_as_many_regions_as_there_may_be():
    """Sets of 31 regions fill an int32: the last region, none and all of them are told apart, traced as by NumPy."""
    builder = masks.build({"name": "region_cross", "regions": 31, "overlap": True})
    own, words = np.array([[0, 1, 2**30, 2**31 - 1, -1, -(2**31)]], np.int32), np.arange(-1, 33, dtype=np.int32)[None]
    expected = [[sees(builder.config, int(n), int(word)) for word in words[0]] for n in own[0]]
    shown = lambda own, words: Mask(groups=builder.groups(own, words))
    for mask in (shown(own, words), jax.jit(shown)(own, words)):
        np.testing.assert_array_equal(mask.visible(6, 34)[0, 0], expected)
    with pytest.raises(ConfigError, match="regions = 32.*below 32"):
        masks.build({"name": "region_cross", "regions": 32})


def make(dtype, **fields):
    mask = {"name": "region_cross", "regions": 2}
    return cases.module(mixers.get("softmax").Config(source="text", mask=mask, **fields), dtype)


def inputs(dtype=jnp.float64):
    x, seq = cases.inputs(dtype)
    rows = np.random.default_rng(5).standard_normal((B, S, cases.WIDTH)).astype(dtype)
    segments = np.asarray([[2, 2, 2, 1, 1, 0, 0], [0, 3, 3, 3, 3, 3, 3]], np.int32)
    context = mixers.Context(rows, segments, node=WORDS)
    return x, dataclasses.replace(seq, contexts={"text": context}, node=PIXELS)


def test_in_a_layer():
    """The layer is softmax attention over the words that a position's number and segment show, 0 where there are none,
    and what nobody sees has no gradient; a stream in any cutting is the whole."""
    with jax.enable_x64(True):
        module, (x, seq) = make(jnp.float64, kv_heads=2), inputs()
        context, call = seq.contexts["text"], functools.partial(battery.call, *cases.split(module))
        seen = np.zeros((B, T, S), bool)
        for b, t, s in np.ndindex(B, T, S):
            same = seq.segments[b, t] == context.segments[b, s] != 0
            seen[b, t, s] = same and sees(module.config.mask, int(PIXELS[b, t]), int(WORDS[b, s]))
        assert not seen.any(-1)[np.asarray(seq.segments) > 0].all()

        def read(rows):
            other = {"text": dataclasses.replace(context, rows=rows)}
            reads = module.reads(x, dataclasses.replace(seq, contexts=other).derived())
            return module.attended(reads, x).y, (reads.q, reads.kv.k, reads.kv.v)

        scalar = lambda rows: (lambda heads, qkv: (jnp.sum(jnp.sin(heads)), (heads, qkv)))(*read(rows))
        d_rows, (heads, qkv) = jax.jit(jax.grad(scalar, has_aux=True))(context.rows)
        q, k, v = map(np.asarray, qkv)
        k, v = (np.repeat(y, 2, axis=2) for y in (k, v))
        weights = np.exp(np.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5) * seen[:, None]
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        np.testing.assert_allclose(heads, np.einsum("bhts,bshd->bthd", weights, v), atol=1e-12)
        np.testing.assert_array_equal(abs(np.asarray(heads)).max((2, 3)) > 0, seen.any(-1))
        np.testing.assert_array_equal(abs(np.asarray(d_rows)).max(-1) > 0, seen.any(1))
        state = jax.jit(lambda contexts: module.init_state(B, T, jnp.float64, contexts=contexts))(seq.contexts)
        x_, seq_ = jax.tree.map(np.asarray, (x, seq))

        @jax.jit
        def step(x, part, stream, state):
            part, stream = stream.extend(part)
            return battery.extend(*cases.split(module), x, part, state), stream

        parts, stream = [], mixers.Stream.start(B)
        for first, end in ((0, 5), (5, 10), (10, T)):
            at = lambda y: y[:, first:end]
            part = mixers.Sequence(at(seq_.positions), at(seq_.segments), node=at(seq_.node))
            out, stream = step(at(x_), part, stream, state)
            parts, state = [*parts, out.y], out.state
        used = np.asarray(seq.segments) > 0
        np.testing.assert_allclose(np.concatenate(parts, axis=1)[used], np.asarray(call(x, seq))[used], atol=1e-12)


def test_sharding_and_cost():
    """Eight devices, positions split or rows; the state holds the numbers of words."""
    with jax.enable_x64(True):
        module, (x, seq) = make(jnp.float64, kv_heads=2), inputs()
        graphdef, params = cases.split(module)
        x, seq = jax.tree.map(lambda a: np.concatenate([a[:, :10] if a.shape[1] == T else a] * 4), (x, seq))
        forward = lambda params, x, seq: nnx.merge(graphdef, params)(x, seq).y
        expected = jax.jit(forward)(params, x, seq)
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2), 8, length=10)
        got = jax.jit(partition.traced(forward, mesh, sharding.ACTIVATION_RULES))(params, x, seq)
        np.testing.assert_allclose(got, expected, atol=1e-11)
    config = mixers.get("softmax").Config(source="text", mask="region_cross")
    plain = mixers.get("softmax").Config(source="text")
    masked, open_ = (mixers.get("softmax").cost(c, cases.WIDTH, T) for c in (config, plain))
    assert (masked.total_flops, masked.context_flops) == (open_.total_flops, open_.context_flops)
    assert masked.state_bytes == open_.state_bytes + 4 * T


MISTAKES = [
    ({"mask": "region_cross"}, "source = None.*a context, which mask region_cross is of"),
    ({"mask": "isolation", "source": "text"}, "source = 'text'.*none where mask is set"),
]


@pytest.mark.parametrize("fields, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.get("softmax").Config(**fields)


def test_what_is_not_given():
    x, seq = inputs(jnp.float32)
    module = lambda x, seq: jax.eval_shape(lambda: make(jnp.float32)(x, seq).y)
    assert module(x, seq).shape == x.shape
    with pytest.raises(UnsupportedPattern, match="Sequence.node"):
        module(x, dataclasses.replace(seq, node=None))
    context = dataclasses.replace(seq.contexts["text"], node=None)
    with pytest.raises(UnsupportedPattern, match="Context.node"):
        module(x, dataclasses.replace(seq, contexts={"text": context}))
