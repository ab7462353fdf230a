"""Masks beyond intervals: their algebra, their tiles, and attention under them against the definition in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops import Mask, attention_tiles, mask_for_extension, recording
from attnlab.ops.attention import ATTENTION, attention, attention_with_lse
from attnlab.ops.attention_gated import gated_attention
from attnlab.ops.attention_tiles_plan import Config, planned
from attnlab.ops.cached_attention import cached_attention
from attnlab.ops.gathered_attention import chosen_attention
from attnlab.ops.local_linear import local_linear
from attnlab.ops.mask_algebra import both, closed_cuts, either, packed_bits, permuted
from attnlab.ops.mask_tiles import EMPTY, FULL, PARTIAL, mean_span, tile_kinds, tile_table, tile_words
from attnlab.ops.masks import Axis, Groups
from attnlab.ops.parallax import parallax
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.masks.laws import sound
from tests.ops import reference

B, T, S, H, K = 2, 37, 45, 4, 2
TILINGS = (8, 8), (16, 4), (7, 10)


def integers(rng, low, high, *shape):
    return rng.integers(low, high, shape).astype(np.int32)


def random_term(rng, heads=1, groups=70, size=None, rows=1, length=T, keys=S):
    """An interval, an axis and groups, of so many heads; rows that see nothing, keys of no group, unbounded sides."""
    start = integers(rng, 0, 20, B, length)
    axis = Axis(
        integers(rng, 0, 6, B, heads, keys), integers(rng, -1, 3, 1, length), integers(rng, 3, 7, B, heads, length)
    )
    if size is None:
        group = integers(rng, -1, groups, 1, keys)
    else:  # runs of consecutive keys with gaps between them; their numbers go over the end of a word of bits
        run = 25 + np.cumsum(rng.random(keys) < 1 / size).astype(np.int32)
        group, groups = np.where(rng.random(keys) < 0.1, -1, run)[None].astype(np.int32), int(run[-1]) + 1
    bits = packed_bits(rng.random((B, heads, -(-length // rows), groups)) < 0.6)
    return Mask(start, start + integers(rng, -2, 40, B, length), axes=(axis,), groups=Groups(group, bits, rows, size))


def dense(mask, length=T, keys=S):
    """A loop over pairs: [B, h, T, S]."""
    h = mask.heads()
    out = np.zeros((B, h, length, keys), bool)
    pick = lambda x, b, i: x[b % x.shape[0]] if x.ndim == 2 else x[b % x.shape[0], i % x.shape[1]]
    for term in mask.terms():
        for b, i, t, s in np.ndindex(out.shape):
            ok = term.k_start is None or pick(term.k_start, b, i)[t] <= s
            ok = ok and (term.k_end is None or s < pick(term.k_end, b, i)[t])
            ok = ok and (not term.causal or s <= t) and (term.window is None or abs(t - s) < term.window)
            for axis in term.axes:
                key = pick(axis.key, b, i)[s]
                ok = ok and (axis.lo is None or pick(axis.lo, b, i)[t] <= key)
                ok = ok and (axis.hi is None or key < pick(axis.hi, b, i)[t])
            if term.groups is not None:
                g = pick(term.groups.group, b, i)[s]
                if not 0 <= g < 32 * term.groups.bits.shape[-1]:
                    continue
                word = pick(term.groups.bits[..., g // 32], b, i)[t // term.groups.rows]
                ok = ok and bool(int(word) >> int(g % 32) & 1)
            out[b, i, t, s] |= bool(ok)
    return out


def blocks(sees):
    """Of blocks of 8 rows and 8 keys, as large as tiles: [h, rows, keys]."""
    group = np.tile(np.arange(S, dtype=np.int32) // 8, (B, 1))
    return Mask(groups=Groups(group, packed_bits(sees)[None], rows=8, size=8))


def masks():
    rng = np.random.default_rng(0)
    ordered = random_term(rng, size=3, rows=5)
    return {
        "one head": random_term(rng),
        "key heads, ordered": either(random_term(rng, K, size=2, rows=16), Mask(causal=True, window=3)),
        "query heads, many groups": either(random_term(rng, H, 600), dataclasses.replace(ordered, axes=())),
        "key heads, full tiles": blocks(rng.random((K, 5, 6)) < np.array([0.2, 0.8])[:, None, None]),
    }


# The algebra, all of it of NumPy.


@pytest.mark.parametrize("name", masks())
def test_visible_and_tiles(name):
    mask = masks()[name]
    expected = dense(mask)
    assert mask.known() and 0.02 < expected.mean() < 0.7
    np.testing.assert_array_equal(np.broadcast_to(mask.visible(T, S), expected.shape), expected)
    np.testing.assert_array_equal(mask.visible(T, S, slice(5, 6), slice(2, 9)), expected[:, :, 5:6, 2:9])
    for bq, bk in TILINGS:
        kinds = tile_kinds(mask, T, S, bq, bk)
        sound(kinds, expected, bq, bk)
        table = tile_table(mask, T, S, bq, bk)
        for at in np.ndindex(kinds.shape[:3]):
            wanted = np.flatnonzero(kinds[at])
            n = len(wanted)
            np.testing.assert_array_equal(table.index[at][:n], wanted)
            np.testing.assert_array_equal(table.kind[at], [*kinds[at][wanted], *[0] * (table.kind.shape[-1] - n)])
            assert table.count[at] == n and np.all(table.index[at][n:] == (wanted[-1] if n else 0))
        of_keys = tile_table(mask, T, S, bq, bk, of_keys=True)
        np.testing.assert_array_equal(of_keys.count, (kinds > EMPTY).sum(-2))
    np.testing.assert_allclose(mean_span(mask, T, S), expected.sum(-1).mean())
    traced = jax.jit(lambda mask: tile_kinds(mask, T, S, 8, 8))(mask)
    np.testing.assert_array_equal(traced, tile_kinds(mask, T, S, 8, 8))


def test_tiles_are_full_and_empty_where_they_can_be():
    """Of blocks as large as tiles every tile is one or the other, and of a causal mask only the diagonal is partial."""
    sees = np.random.default_rng(0).random((6, 6)) < 0.5
    mask = Mask(groups=Groups(np.arange(48, dtype=np.int32)[None] // 8, packed_bits(sees)[None, None], 8, 8))
    np.testing.assert_array_equal(tile_kinds(mask, 48, 48, 8, 8)[0, 0], np.where(sees, FULL, EMPTY))
    causal = tile_kinds(Mask(causal=True), 48, 48, 8, 8)[0, 0]
    np.testing.assert_array_equal(causal, np.tri(6, k=-1) * FULL + np.eye(6) * PARTIAL)
    edges = Mask(np.full((1, 48), 1, np.int32), np.full((1, 48), 47, np.int32))
    np.testing.assert_array_equal(tile_kinds(edges, 48, 48, 8, 8)[0, 0], [[PARTIAL, *[FULL] * 4, PARTIAL]] * 6)
    # A padding row, which sees nothing, leaves the others' tiles as they are but for fullness.
    axis = Axis(np.arange(48, dtype=np.int32)[None], np.full((1, 48), 16, np.int32), np.full((1, 48), 32, np.int32))
    axis.lo[0, 3] = 40
    np.testing.assert_array_equal(
        tile_kinds(Mask(axes=(axis,)), 48, 48, 8, 8)[0, 0, :2], [[0, 0, 1, 1, 0, 0], [0, 0, 2, 2, 0, 0]]
    )


def test_words_of_tiles():
    mask = random_term(np.random.default_rng(3), size=2)
    words, group = tile_words(mask, T, S, 8), mask.groups.group
    seen = dataclasses.replace(mask, k_start=None, k_end=None, axes=()).visible(T, S)
    for s in np.flatnonzero(group[0] >= 0):
        tile = group[0, s // 8 * 8 : s // 8 * 8 + 8]
        local = group[0, s] - tile[tile >= 0].min()
        np.testing.assert_array_equal((words[..., s // 8] >> local) & 1, seen[..., s])
    with pytest.raises(UserError, match="at most 32"):
        tile_words(random_term(np.random.default_rng(0)), T, S, 8)


def test_algebra():
    rng = np.random.default_rng(1)
    a, b, c = random_term(rng), random_term(rng), dataclasses.replace(random_term(rng), groups=None)
    seen = lambda m: np.broadcast_to(m.visible(T, S), (B, 1, T, S))
    np.testing.assert_array_equal(seen(either(a, b)), seen(a) | seen(b))
    np.testing.assert_array_equal(seen(both(a, c)), seen(a) & seen(c))
    np.testing.assert_array_equal(seen(both(c, either(a, b))), seen(c) & (seen(a) | seen(b)))
    windows = both(Mask(causal=True, window=9), Mask(window=4))
    assert (windows.causal, windows.window) == (True, 4)
    widest = Mask(window=2**31 - 1)  # no end of a row's interval leaves int32
    assert widest.visible(T, S).all() and np.all(widest.bounds(T, S)[1] >= S)
    documents = Mask(np.zeros((1, T), np.int32), causal=True, documents=True)
    assert both(documents, Mask(window=3)).documents and not both(documents, c).documents
    order = np.stack([rng.permutation(S) for _ in range(B)])
    free = either(*(dataclasses.replace(m, k_start=None, k_end=None) for m in (a, b)))
    moved = np.take_along_axis(seen(free), order[:, None, None], axis=3)
    np.testing.assert_array_equal(seen(permuted(free, order)), moved)
    for wrong in (lambda: both(a, b), lambda: either(either(a, b), c), lambda: permuted(a, order)):
        with pytest.raises(UserError, match="mask"):
            wrong()
    with pytest.raises(UserError, match="two"):
        both(either(a, c), either(b, c))


def test_closed_cuts():
    """Rows 3 to 11 see to 18, where the question ends: text may be cut, the question with its image may not."""
    t = np.arange(24, dtype=np.int32)
    image = np.where((3 <= t) & (t < 12), 18, 0).astype(np.int32)
    mask = either(Mask(causal=True), Mask(np.full((1, 24), 12, np.int32), image[None]))
    seen = mask.visible(24, 24)[0, 0]
    expected = [not seen[:p, p:].any() for p in range(25)]
    np.testing.assert_array_equal(closed_cuts(mask, 24)[0], expected)
    assert np.flatnonzero(expected).tolist() == [0, 1, 2, 3, *range(18, 25)]
    assert mask.reach(24, 24)[0, 5] == 18 and mask.reach(24, 24)[0, 1] == 2


# Attention.


@pytest.fixture
def small(monkeypatch):
    sizes = attention_tiles.Sizes(rows=8, keys=8, full=2, masked=3, group=2, pairs=12)
    monkeypatch.setattr(attention_tiles, "ON_CPU", sizes)
    with jax.enable_x64(True):
        yield


def inputs(heads=1, dtype=np.float64, length=T, keys=S):
    rng = np.random.default_rng(5)
    shapes = (B, length, H, 5), (B, keys, K, 5), (B, keys, K, 6), (H,), (1, keys, heads), (B, length, heads)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def value_and_gradients(mask, soft_cap):
    """o and the log-sum-exp, and gradients of q, k, v, sinks and both biases."""

    def run(q, k, v, sinks, key_bias, query_bias):
        options = {"sinks_H": sinks, "key_bias_BSh": key_bias, "query_bias_BTh": query_bias, "soft_cap": soft_cap}
        return attention_with_lse(q, k, v, mask, impl="tiles", **options)

    def all_of_it(*arrays):
        out, vjp = jax.vjp(run, *arrays)
        return out, vjp(jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), out))

    return jax.jit(all_of_it)(*inputs(mask.heads()))


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


ACCELERATOR = "query heads, many groups", "key heads, full tiles"


@tiers.often("key heads, ordered-cpu", "key heads, full tiles-cpu", *(f"{name}-accelerator" for name in ACCELERATOR))
@pytest.mark.parametrize("name, form", [(n, "cpu") for n in masks()] + [(n, "accelerator") for n in ACCELERATOR])
def test_tiles_equal_the_definition(name, form, small, monkeypatch):
    if form == "accelerator":
        monkeypatch.setattr(partition, "by_platform", lambda *args, cpu, default: default(*args))
    cap, mask = None if name == "one head" else 3.0, masks()[name]
    q, k, v, *biases = inputs(mask.heads())
    waves = lambda *shape: np.cos(np.arange(np.prod(shape))).reshape(shape)
    o, *gradients, lse = reference.attention(
        q, k, v, mask, waves(B, T, H, 6), **dict(zip(("sinks", "key_bias", "query_bias"), biases)), soft_cap=cap,
        dlse=waves(B, T, H),
    )  # fmt: skip
    assert_close(value_and_gradients(mask, cap), ((o, lse), gradients))


@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
def test_rows_that_only_fill_a_tile_add_nothing(known, small):
    """Sinks and biases whose exponentials no number holds: the log-sum-exp of a row that is none is not theirs."""
    q, k, v, sinks, key_bias, query_bias = inputs()
    sinks, key_bias = sinks + 1000, key_bias + 1000
    mask = masks()["key heads, full tiles"]

    @jax.jit
    def gradients(arrays, given):
        of = lambda q, k, v, sinks, key_bias: attention(
            q, k, v, mask if known else given, impl="tiles", sinks_H=sinks, key_bias_BSh=key_bias
        )
        return jax.vjp(of, *arrays)[1](jnp.ones((B, T, H, 6)))

    _, *expected = reference.attention(q, k, v, mask, np.ones((B, T, H, 6)), sinks=sinks, key_bias=key_bias)
    assert_close(gradients((q, k, v, sinks, key_bias), mask), expected)


def test_what_later_rows_see_changes_no_bit(small):
    """Of a mask that is traced: a tile of rows goes by its own steps, whatever others of its group have."""
    q, k, v, *_ = inputs(length=48, keys=48)
    t = np.arange(48, dtype=np.int32)[None]
    run = jax.jit(lambda start: attention(q, k, v, Mask(start, t + 1), impl="tiles"))
    one, two = (np.asarray(run(np.where(t < 40, 0, later).astype(np.int32))) for later in (0, 40))
    np.testing.assert_array_equal(one[:, :40], two[:, :40])
    assert np.any(one[:, 40:] != two[:, 40:])


def test_sinks_of_numpy_outside_of_jit(small):
    q, k, v, sinks, *_ = inputs()
    found = attention(q, k, v, masks()["one head"], impl="tiles", sinks_H=sinks)
    np.testing.assert_allclose(found, attention(q, k, v, masks()["one head"], impl="definition", sinks_H=sinks))


def test_a_mask_that_is_traced_and_rows_that_see_nothing(small):
    """What is known only at run time is served, too; rows and keys that nobody meets have zeros."""
    mask = jax.tree.map(np.copy, masks()["one head"])
    mask.k_end[:, ::3] = 0
    q, k, v, *_ = inputs()

    @jax.jit
    def run(q, k, v, mask, g):
        o, vjp = jax.vjp(lambda *a: gated_attention(*a[:3], mask, a[3]), q, k, v, g)
        return o, *vjp(jnp.ones_like(o))

    gate = 1 / (1 + np.exp(-np.ones((B, T, H, 6))))
    found = [np.asarray(x) for x in run(q, k, v, mask, np.ones((B, T, H, 6)))]
    expected = reference.attention(q, k, v, mask, gate)
    assert_close(found[:4], [expected[0] * gate, *expected[1:]])
    o, dq, dk, dv, _ = found
    assert not np.any(o[:, ::3]) and not np.any(dq[:, ::3]) and np.any(o[:, 1::3])
    unseen = ~dense(mask).any((1, 2))
    assert unseen.any() and not np.any(dk[unseen]) and not np.any(dv[unseen])


def test_tiles_of_rows_that_see_about_as_many_go_together():
    """A group computes as many tiles of keys as the one of its tiles of rows that needs most."""
    sees = np.ones((1, 64, 64), bool)
    sees[:, ::2, 1:] = False
    mask = Mask(groups=Groups(np.arange(512, dtype=np.int32)[None] // 8, packed_bits(sees)[None], rows=8, size=8))
    sizes = attention_tiles.Sizes(rows=8, keys=8, full=8, masked=3, group=8, pairs=128)
    config, plan = planned(Config(1.0, None, sizes, 512, 512), mask, 1, 1)
    count = plan.count[0, 0][plan.order[0, 0]].reshape(-1, config.sizes.group)
    assert config.sizes.group > 1 and np.all(count.min(1) == count.max(1)) and count.sum() == sees.sum()
    unlike = Config(1.0, None, dataclasses.replace(sizes, pairs=16), 512, 512)
    assert planned(unlike, mask, 4, 1)[0].sizes.group <= 4  # 4 query heads share each pair
    # Heads that run together are to have one order, whatever each sees: loops of a number of its own for each are slow.
    alone = Config(1.0, None, dataclasses.replace(sizes, group=1), T, S)
    assert planned(alone, masks()["key heads, full tiles"], H, K)[1].order.shape[:2] == (1, 1)


def test_bfloat16_is_widened_on_cpus(small):
    """As the same numbers in float32 give, rounded once."""
    mask = masks()["one head"]
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs()[:3])

    run = lambda *arrays: attention(*arrays, mask, impl="tiles")
    expected = run(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_array_equal(run(q, k, v), expected.astype(jnp.bfloat16))


def test_no_array_of_queries_by_keys():
    """Peak arrays grow with the length, not its square, forward and backward."""
    from tests.ops.test_attention import sizes

    def largest(n):
        blocks = n // 64
        near = np.abs(np.subtract.outer(np.arange(blocks), np.arange(blocks))) < 3
        group = np.arange(n, dtype=np.int32)[None] // 64
        mask = Mask(causal=True, groups=Groups(group, packed_bits(near)[None, None], 64, 64))
        x = jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)
        f = lambda q, k, v: jax.vjp(lambda *a: attention(*a, mask), q, k, v)[1](q)
        return max(sizes(jax.make_jaxpr(f)(x, x, x).jaxpr))

    assert largest(8192) <= 2.1 * largest(4096)


def test_queries_over_a_cache_see_what_the_whole_row_sees(small):
    """One query, and several, with the keys' coordinates of the whole cache."""
    rng = np.random.default_rng(7)
    key, lo = integers(rng, 0, 4, B, S), integers(rng, 0, 3, B, S)
    group, bits = integers(rng, 0, 40, B, S), packed_bits(rng.random((B, 1, S, 40)) < 0.7)
    whole = Mask(causal=True, axes=(Axis(key, lo),), groups=Groups(group, bits))
    q, k, v, *_ = inputs(length=S)

    @jax.jit
    def run(q, k, v):
        cache = [x.swapaxes(1, 2).reshape(B * K, S, -1) for x in (k, v)]
        parts = []
        for first, n in ((20, 1), (30, 6)):
            at = slice(first, first + n)
            mask = mask_for_extension(first, n, axes=(Axis(key, lo[:, at]),), groups=Groups(group, bits[:, :, at]))
            parts.append(cached_attention(q[:, at], *cache, mask))
        return attention(q, k, v, whole, impl="definition"), *parts

    with recording() as chosen:
        expected, one, six = run(q, k, v)
    assert [choice.implementation for choice in chosen.choices] == ["one_query", "tiles", "definition"]
    assert_close([one, six], [expected[:, 20:21], expected[:, 30:36]])


def test_whoever_serves_intervals_only_refuses_the_rest():
    mask = Mask(axes=(Axis(np.zeros((1, 8), np.int32), np.zeros((1, 8), np.int32)),))
    q = jnp.zeros((1, 8, 2, 4))
    for impl in set(ATTENTION.table) - {"definition", "tiles"}:
        with pytest.raises(UserError, match="interval of keys|it runs on"):
            attention(q, q, q, mask, impl=impl)
    with pytest.raises(UserError, match="no biases"):
        attention(q, q, q, Mask(), key_bias_BSh=jnp.zeros((1, 8, 1)), impl="xla")
    wanted = jnp.ones((1, 8, 1), bool)
    for refuses in (
        lambda: parallax(q, q, q, q, mask),
        lambda: local_linear(q, q, q, mask, 0.1),
        lambda: chosen_attention(q, q, q, mask, wanted, chosen=(0,), active=1),
    ):
        with pytest.raises(UserError, match="no implementation supports .* pattern"):
            refuses()
    with pytest.raises(ValueError, match="bounds"):
        mask.bounds(8, 8)


def test_eight_devices(small):
    """Rows, positions and heads split: the same numbers as on one device."""
    n, rng = 32, np.random.default_rng(2)
    mask = dataclasses.replace(
        random_term(rng, K, size=3, rows=5, length=n, keys=n), k_start=None, k_end=None, causal=True
    )
    q, k, v, _, key_bias, query_bias = inputs(K, length=n, keys=n)
    run = lambda q, k, v, kb, qb: attention(q, k, v, mask, key_bias_BSh=kb, query_bias_BTh=qb)
    both_ways = lambda *a: (lambda o, vjp: (o, *vjp(jnp.cos(o))))(*jax.vjp(run, *a))
    arrays = q, k, v, key_bias, query_bias
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, context=2), 8, length=n)
    split = jax.jit(partition.traced(both_ways, mesh, sharding.ACTIVATION_RULES))(*arrays)
    do = np.cos(np.asarray(split[0]))
    assert_close(split, reference.attention(q, k, v, mask, do, key_bias=key_bias, query_bias=query_bias))


@pytest.mark.parametrize("window", [None, 3])
def test_intervals_known_before_tracing_have_gradients(window):
    """Bounds of NumPy's are those of jax's, a row's own and all rows' alike: values and gradients are the formula's."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.normal(size=(2, 9, 2, 4)).astype(np.float32) for _ in range(4))
    start = np.where(np.arange(9) < 4, 0, 4).astype(np.int32)
    end = np.arange(1, 10, dtype=np.int32)
    for starts in (start[None], np.stack([start, 0 * start])):
        first = starts if window is None else np.maximum(starts, end - window)
        mask = Mask(first, np.broadcast_to(end, starts.shape))
        found = reference.attention(q, k, v, mask, do)
        o, pull = jax.vjp(lambda q, k, v, mask=mask: attention(q, k, v, mask, impl="xla"), q, k, v)
        for ours, theirs in zip((o, *pull(do)), found, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-6)
