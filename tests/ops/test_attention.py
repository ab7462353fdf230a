"""Laws of softmax attention: each implementation against the formula in float64, values and gradients,
and the identities that hold for any implementation. `cpu` and `accelerator` are the two forms of the XLA
implementation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops import Mask, attention, blockwise, mask_for_extension, mask_from_segments
from attnlab.ops.attention import ATTENTION
from attnlab.parallel import partition
from tests import tiers
from tests.mixers import precision
from tests.ops import reference
from tests.ops.devices import by_default

T = 61
SEGMENTS = np.array([[1] * 20 + [2] * 3 + [3] * 31 + [0] * 7, [0] * 2 + [4] * 33 + [5] * 26])
MASKS = {
    "full": lambda: Mask(),
    "causal": lambda: Mask(causal=True),
    "causal window": lambda: Mask(causal=True, window=7),
    "wide window": lambda: Mask(causal=True, window=50),
    "window": lambda: Mask(window=5),
    "packed": lambda: mask_from_segments(jnp.asarray(SEGMENTS), T, causal=True),
    "packed both ways": lambda: mask_from_segments(jnp.asarray(SEGMENTS), T, causal=False),
    "packed window": lambda: mask_from_segments(jnp.asarray(SEGMENTS), T, causal=True, window=9),
    "packed window both ways": lambda: mask_from_segments(jnp.asarray(SEGMENTS), T, causal=False, window=9),
}
FORMS = ("cpu", "accelerator")
# "tiles" is held to the definition by test_masks.py.
EVERYWHERE = [name for name, way in ATTENTION.table.items() if way.platforms is None and name != "tiles"]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a short sequence meets every kind of block."""
    sizes = {"ROWS": 16, "BODIES": 3, "LEAST_KEYS": 8, "ALIGN": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(blockwise, name, value)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    force_form(monkeypatch, request.param)
    return request.param


def force_form(monkeypatch, form):
    if form == "accelerator":
        monkeypatch.setattr(partition, "by_platform", by_default)


def arrays(B=2, T=T, S=None, H=4, K=4, d=8, e=8, dtype=jnp.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, d), (B, S or T, K, d), (B, S or T, K, e)
    return [rng.normal(size=s).astype(jnp.dtype(dtype)) for s in shapes]


def cotangent(q, v):
    return np.random.default_rng(1).normal(size=(*q.shape[:3], v.shape[3]))


def value_and_grads(impl, q, k, v, mask, sinks=None, **kwargs):
    """Output and the gradients of q, k, v and sinks for one random cotangent, in one compile."""
    run = program(impl, tuple(kwargs.items()), blockwise.ROWS, partition.by_platform)
    return [np.asarray(x) for x in jax.tree.leaves(run(q, k, v, sinks, mask, cotangent(q, v).astype(q.dtype)))]


@functools.lru_cache
def program(impl, options, rows, form):
    """One for all of the same shapes. rows, form: what tests patch, and is in it."""

    def run(q, k, v, sinks, mask, do):
        f = lambda q, k, v, s: attention(q, k, v, mask, sinks_H=s, impl=impl, **dict(options))
        o, vjp = jax.vjp(f, q, k, v, sinks)
        return o, *vjp(do)

    return jax.jit(run)


def expected(q, k, v, mask, sinks=None, **kwargs):
    """The same by the formula."""
    return reference.attention(q, k, v, mask, cotangent(q, v), sinks=sinks, **kwargs)


def assert_close(actual, expected, tolerance=1e-12):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# The definition, against the formula written once more as loops.


def test_definition_is_the_formula():
    q, k, v = arrays(B=1, T=5, S=7, H=4, K=2, d=3, e=2)
    sinks, cap, scale = np.array([0.3, -1.0, 2.0, 0.0]), 1.5, 0.7
    start, end = np.array([[0, 2, 3, 0, 6]]), np.array([[7, 5, 3, 1, 7]])
    o = np.zeros((5, 4, 2))
    for t in range(5):
        for h in range(4):
            logits = [cap * math.tanh(scale * float(q[0, t, h] @ k[0, s, h // 2]) / cap) for s in range(7)]
            weight = {s: math.exp(logits[s]) for s in range(start[0, t], end[0, t])}
            total = sum(weight.values()) + math.exp(sinks[h])
            for s, w in weight.items():
                o[t, h] += w / total * v[0, s, h // 2]
    mask, options = Mask(start, end), {"scale": scale, "soft_cap": cap}
    actual = value_and_grads("definition", q, k, v, mask, sinks, **options)
    assert_close([actual[0][0]], [o])
    assert_close(actual, expected(q, k, v, mask, sinks, **options))


# The implementations against the definition.


@tiers.parametrize(
    "name, kind",
    [(name, "grouped") for name in MASKS]
    + [("causal", "plain"), ("packed", "plain")]
    + [("window", "one kv head"), ("packed both ways", "one kv head"), ("packed window", "no sinks")],
    often=[("packed window", "no sinks"), ("causal", "plain")],
)
def test_cpu_form_equals_definition(name, kind, small_tiles):
    check_against_definition(name, kind)


@tiers.parametrize(
    "name, kind",
    [("causal", "grouped"), ("packed window", "grouped"), ("causal window", "plain"), ("full", "plain")],
    often=[("packed window", "grouped"), ("full", "plain")],
)
def test_accelerator_form_equals_definition(name, kind, small_tiles, monkeypatch):
    force_form(monkeypatch, "accelerator")
    check_against_definition(name, kind)


def check_against_definition(name, kind):
    q, k, v, sinks, cap = of_kind(kind)
    mask = MASKS[name]()
    actual = value_and_grads("xla", q, k, v, mask, sinks, soft_cap=cap)
    assert_close(actual, expected(q, k, v, mask, sinks, soft_cap=cap))


def of_kind(kind):
    kinds = {"plain": (4, None, None), "grouped": (2, 2.0, True), "no sinks": (2, 2.0, None)}
    K, cap, sinks = (kinds | {"one kv head": (1, None, True)})[kind]
    return *arrays(K=K, e=6), np.asarray([0.5, -2.0, 0.0, 3.0]) if sinks else None, cap


def test_many_blocks_share_few_bodies(small_tiles):
    q, k, v = arrays(B=1, T=333, H=2, K=1)
    for mask in (Mask(causal=True), Mask(causal=True, window=21), Mask()):
        assert_close(value_and_grads("xla", q, k, v, mask), expected(q, k, v, mask))


def test_lengths_of_queries_and_keys_may_differ(small_tiles, form):
    given = *arrays(T=19, S=45), Mask()
    assert_close(value_and_grads("xla", *given), expected(*given))


@tiers.exhaustive
def test_default_tiles_equal_definition():
    q, k, v = arrays(B=1, T=700, H=2, K=1)
    packed = mask_from_segments(jnp.asarray([[1] * 300 + [2] * 400]), 700, causal=True)
    for given in ((q, k, v, Mask(causal=True)), (q, k, v, packed)):
        assert_close(value_and_grads("xla", *given), expected(*given))


def test_plan_covers_every_row_once_and_every_visible_key():
    rng = np.random.default_rng(0)
    for _ in range(300):
        length, rows, groups = rng.integers(1, 400), rng.integers(1, 70), rng.integers(1, 9)
        mask = Mask(causal=bool(rng.integers(2)), window=[None, int(rng.integers(1, 300))][rng.integers(2)])
        keys = int(length if mask.causal or mask.window else rng.integers(1, 400))
        plan = blockwise.plan_blocks(int(length), keys, mask, int(rows), int(groups))
        assert len(plan) <= groups + 1
        seen = []
        for blocks in plan:
            for i in range(blocks.count):
                first = blocks.first + i * blocks.rows
                low = min(max(blocks.origin + i * blocks.step, 0), keys - blocks.keys)
                need = mask.static_range(first, first + blocks.rows, keys)
                assert 0 <= low <= need[0] and need[1] <= low + blocks.keys <= keys
                seen += range(first, first + blocks.rows)
        assert seen == list(range(length))


# Identities.


@tiers.often("False-xla")
@tiers.parametrize("impl", EVERYWHERE, often=["xla"])
@pytest.mark.parametrize("causal", [True, False])
def test_window_is_exact(impl, causal, small_tiles):
    # With equal logits and one-hot values the output row is the row of weights.
    q, k, _ = arrays(B=1, H=1, K=1)
    v = np.eye(T)[None, :, None]
    windows = (1, 2, 7, 60, 61, 100)
    run = lambda *qkv: [attention(*qkv, Mask(causal=causal, window=n), impl=impl)[0, :, 0] for n in windows]
    distance = np.arange(T)[:, None] - np.arange(T)
    for window, weights in zip(windows, map(np.asarray, jax.jit(run)(0 * q, k, v)), strict=True):
        seen = (np.abs(distance) < window) & ((distance >= 0) | (not causal))
        np.testing.assert_array_equal(weights > 0, seen)
        assert_close([weights.sum(-1)], [np.ones(T)])


@tiers.parametrize(
    "causal, form",
    [(True, "cpu"), (False, "cpu"), (True, "accelerator")],
    often=[(True, "accelerator")],
)
def test_packed_documents_give_what_each_gives_alone(causal, form, small_tiles, monkeypatch):
    force_form(monkeypatch, form)
    q, k, v = arrays(B=1)
    packed = value_and_grads("xla", q, k, v, mask_from_segments(jnp.asarray(SEGMENTS[:1]), T, causal=causal))
    do = cotangent(q, v)
    for segment in (1, 2, 3):
        at = np.flatnonzero(SEGMENTS[0] == segment)
        alone = reference.attention(q[:, at], k[:, at], v[:, at], Mask(causal=causal), do[:, at])
        assert_close([x[:, at] for x in packed], alone)
    for x in packed:
        assert not np.any(x[:, SEGMENTS[0] == 0])


def test_same_id_twice_is_two_documents():
    mask = mask_from_segments(jnp.asarray([[1, 1, 2, 1, 0, 1]]), 6, causal=False)
    start, end = mask.bounds(6, 6)
    np.testing.assert_array_equal(start, [[0, 0, 2, 3, 5, 5]])
    np.testing.assert_array_equal(end, [[2, 2, 3, 4, 5, 6]])


@tiers.often("False-xla")
@tiers.parametrize("impl", EVERYWHERE, often=["xla"])
@pytest.mark.parametrize("with_sinks", [True, False])
def test_rows_that_see_nothing_are_zero_with_zero_gradients(impl, with_sinks, small_tiles):
    *qkv, sinks, cap = of_kind("grouped" if with_sinks else "no sinks")
    mask = MASKS["packed window"]()
    start = np.where(np.arange(T) % 3 == 0, T, np.maximum(np.arange(T) - 20, 0)).astype(np.int32)
    of = lambda start: dataclasses.replace(mask, k_start=np.stack([start] * 2))
    run = lambda start: value_and_grads(impl, *qkv, of(start), sinks, soft_cap=cap)
    o, dq, *rest = run(start)
    assert not np.any(o[:, ::3]) and not np.any(dq[:, ::3])
    assert np.all(np.any(o[:, 1::3], axis=-1))
    none = run(np.full(T, T, np.int32))
    assert not any(np.any(x) for x in none)
    assert all(np.all(np.isfinite(x)) for x in (o, dq, *rest))


@tiers.parametrize(
    "lengths, window", CUTS := [([1, 1, 1, 3, 29, 26], None), ([30, 1, 30], 9), ([61], None)], often=CUTS[1:2]
)
def test_extension_of_a_cache_equals_the_whole(lengths, window, small_tiles):
    q, k, v = arrays(K=2)
    sinks = np.asarray([0.5, -1.0, 0.0, 1.0])
    segments = np.stack([SEGMENTS[0], [1] * 30 + [2] * 31])
    start = np.asarray(mask_from_segments(segments, T, causal=True).k_start)
    whole = expected(q, k, v, Mask(start, causal=True, window=window), sinks)[0]
    cache = T  # not a multiple of a chunk; what lies beyond the filled part must not matter

    @jax.jit
    def extend(q, k, v, start, first):
        mask = mask_for_extension(first, q.shape[1], start, window=window)
        return attention(q, k, v, mask, sinks_H=sinks, soft_cap=None)

    first = 0
    for n in lengths:
        at = slice(first, first + n)
        pad = ((0, 0), (0, cache - at.stop), (0, 0), (0, 0))
        filled = [np.pad(x[:, : at.stop], pad, constant_values=1e3) for x in (k, v)]
        assert_close([extend(q[:, at], *filled, start[:, at], first)], [whole[:, at]])
        first += n


def test_few_queries_have_gradients(small_tiles):
    given = *arrays(T=3, S=50, K=2), mask_for_extension(np.asarray([47, 20]), 3), np.asarray([0.5, -1.0, 0.0, 1.0])
    assert_close(value_and_grads("xla", *given, soft_cap=3.0), expected(*given, soft_cap=3.0))


@tiers.often("cpu-packed window", "accelerator-causal")
@tiers.parametrize("name", ["causal", "causal window", "packed", "packed window"], often=["causal", "packed window"])
def test_the_past_is_bitwise_the_same_whatever_the_future(name, form):
    length = 545
    segments = jnp.asarray([[1] * 200 + [2] * 300 + [0] * 45])
    q, k, v = arrays(B=1, T=length, K=2, dtype=jnp.float32)
    window = 90 if "window" in name else None
    mask = mask_from_segments(segments if "packed" in name else None, length, causal=True, window=window)
    jitted = jax.jit(lambda q, k, v: attention(q, k, v, mask))
    run = lambda *qkv: np.asarray(jitted(*qkv))
    before = run(q, k, v)
    for t in (0, 1, 255, 256, 300, 543):
        later = (np.arange(length) > t)[None, :, None, None]
        after = run(*(np.where(later, 50 * x + 3, x) for x in (q, k, v)))
        np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
        if name == "causal":
            assert np.any(before[:, t + 1 :] != after[:, t + 1 :])


def test_the_past_is_bitwise_the_same_in_few_queries():
    q, k, v = arrays(B=1, T=4, S=700, K=2, dtype=jnp.float32)
    jitted = jax.jit(lambda q, k, v: attention(q, k, v, mask_for_extension(600, 4)))
    run = lambda *qkv: np.asarray(jitted(*qkv))
    before = run(q, k, v)
    later = (np.arange(700) > 601)[None, :, None, None]
    q[:, 2:] += 1
    after = run(q, *(np.where(later, 50 * x + 3, x) for x in (k, v)))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])


def test_bfloat16_is_near_float32(form):
    q, k, v = arrays(T=130, dtype=jnp.bfloat16, K=2, d=32, e=32)
    mask, sinks = Mask(causal=True), np.zeros(4, np.float32)
    low = value_and_grads("xla", q, k, v, mask, sinks)
    exact = expected(q, k, v, mask, sinks)
    eager = value_and_grads("definition", q, k, v, mask, sinks)
    assert low[0].dtype == jnp.bfloat16 and low[4].dtype == jnp.float32
    for a, b, c in zip(low, exact, eager, strict=True):
        error, scale = np.abs(np.asarray(a, np.float64) - b).max(), np.abs(b).max()
        assert error < 2 * np.abs(np.asarray(c, np.float64) - b).max() + 0.01 * scale


def test_large_logits_stay_finite(small_tiles, form):
    q, k, v = arrays(dtype=jnp.float32)
    for x in value_and_grads("xla", 1e4 * q, 1e4 * k, v, Mask(causal=True), np.full(4, 1e4, np.float32)):
        assert np.all(np.isfinite(x))


# What it costs.


def sizes(jaxpr):
    """Every array size in a jaxpr and the jaxprs inside it."""
    return (math.prod(getattr(x.aval, "shape", ())) for eqn in precision.equations(jaxpr) for x in eqn.outvars)


@tiers.often("cpu-packed", "accelerator-causal")
@pytest.mark.parametrize("name", ["full", "causal", "packed"])
def test_no_array_of_queries_by_keys(name, form):
    length = 2048
    segments = jnp.ones((1, length), jnp.int32)
    packed = mask_from_segments(segments, length, causal=True)
    mask = {"full": Mask(), "causal": Mask(causal=True), "packed": packed}[name]
    q, k, v = arrays(B=1, T=length, H=1, K=1, dtype=jnp.float32)

    def largest(impl):
        f = lambda q, k, v: jax.vjp(lambda *x: attention(*x, mask, impl=impl), q, k, v)[1](q)
        return max(sizes(jax.make_jaxpr(f)(q, k, v).jaxpr))

    assert largest("definition") >= length**2  # the measure can see it
    assert largest("xla") <= length**2 // 4


def test_static_masks_emit_less_work():
    def flops(mask):
        q, k, v = arrays(B=1, T=2048, H=1, K=1, d=64, e=64, dtype=jnp.float32)
        plan = blockwise.plan_blocks(2048, 2048, mask, 256, 8)
        return sum(b.count * b.rows * b.keys for b in plan)

    assert flops(Mask(causal=True)) < 0.6 * flops(Mask())
    assert flops(Mask(causal=True, window=128)) < 0.2 * flops(Mask())


def test_saved_output_spares_the_second_forward():
    q, k, v = arrays(B=1, H=1, K=1)

    def products(policy):
        f = jax.checkpoint(lambda q, k, v: attention(q, k, v, Mask(causal=True)), policy=policy)
        text = jax.jit(jax.value_and_grad(lambda *x: f(*x).sum(), (0, 1, 2))).lower(q, k, v).as_text()
        return text.count("stablehlo.dot_general")

    named = jax.checkpoint_policies.save_only_these_names("attention_o", "attention_lse")
    assert products(named) < products(jax.checkpoint_policies.nothing_saveable)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    q, k, v = arrays(B=1, T=300, K=2, dtype=jnp.bfloat16)
    mask = mask_from_segments(jnp.ones((1, 300), jnp.int32), 300, causal=True)
    f = jax.jit(lambda q, k, v: jax.vjp(lambda *x: attention(*x, mask), q, k, v)[1](q))
    assert jax.export.export(f, platforms=[platform])(q, k, v).platforms == (platform,)


def test_under_vmap_equals_a_loop():
    q, k, v = arrays(B=2, T=9)
    f = jax.jit(lambda q, k, v: attention(q, k, v, Mask(causal=True)))
    stacked = jax.jit(jax.vmap(f))(*(np.stack([x, 2 * x]) for x in (q, k, v)))
    assert_close(stacked, [f(q, k, v), f(2 * q, 2 * k, 2 * v)])


def test_under_shard_map_equals_one_device(form):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for length in (10, 70):
        q, k, v = arrays(T=length, K=2)
        sinks = np.asarray([0.5, -1.0, 0.0, 1.0])
        mask = mask_from_segments(np.ones((2, length), np.int32), length, causal=True)

        def run(q, k, v, sinks, mask):
            o, vjp = jax.vjp(lambda q, k, v, s: attention(q, k, v, mask, sinks_H=s), q, k, v, sinks)
            return o, *vjp(o)

        heads = P("data", None, "tensor")
        specs = (heads, heads, heads, P("tensor"), P("data"))
        sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(heads, *specs[:4]))
        o, *gradients = jax.jit(sharded)(q, k, v, sinks, mask)
        assert_close([o, *gradients], reference.attention(q, k, v, mask, o, sinks=sinks))


def test_few_queries_under_a_static_mask():
    q, k, v = arrays(T=9, K=2)
    for mask in (Mask(causal=True, window=3), Mask(window=2), Mask()):
        assert_close(value_and_grads("xla", q, k, v, mask), expected(q, k, v, mask))


# Messages.


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q, k, v: attention(q, k, v, Mask(), impl="fast"), "'fast'; allowed: auto, definition, xla, flash"),
        (lambda q, k, v: attention(q[:, :, :3], k[:, :, :2], v[:, :, :2], Mask()), "3 query heads over 2"),
        (lambda q, k, v: attention(q, k[..., :2], v, Mask()), "do not fit"),
        (lambda q, k, v: attention(q[0], k, v, Mask()), "must be"),
        (lambda q, k, v: attention(q, k, v.astype(jnp.float32), Mask()), "one dtype"),
        (lambda q, k, v: attention(q, k, v, Mask(), sinks_H=jnp.zeros(3)), "sinks"),
        (lambda q, k, v: attention(q, k, v, Mask(), soft_cap=0.0), "soft_cap=0.0"),
        (lambda q, k, v: attention(q, k, v, Mask(jnp.zeros((2, 4), int))), "k_start"),
        (lambda q, k, v: Mask(window=0), "window: 0"),
        (lambda q, k, v: mask_from_segments(jnp.ones((2, 4), int), 5, causal=True), "segments"),
        (lambda q, k, v: mask_for_extension(0, 5, jnp.ones((2, 4), int)), "document start"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call(*arrays(T=5))
