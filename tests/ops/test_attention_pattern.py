"""Flash attention's TPU kernels under masks beyond intervals, and with biases, interpreted: against the definition."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops import Mask, attention_pattern, dispatch
from attnlab.ops.attention import attention_with_lse
from attnlab.ops.attention_gated import gated_attention
from attnlab.ops.mask_algebra import either, packed_bits
from attnlab.ops.mask_tiles import EMPTY, PARTIAL
from attnlab.ops.masks import Axis, Groups
from kernels_pallas import tuning
from kernels_pallas.flash_attention import flash_attention
from tests import tiers
from tests.ops import reference
from tests.ops.test_masks import integers, random_term

B, T, S, H, K = 2, 300, 520, 4, 2
TERM = functools.partial(random_term, length=T, keys=S)


def blocks(rng, size=64):
    """Causal, and whole blocks of keys by chance: tiles of all kinds."""
    n = -(-S // size)
    group = (np.arange(S, dtype=np.int32) // size)[None]
    bits = packed_bits(rng.random((B, H, -(-T // 32), n)) < 0.4)
    return Mask(causal=True, groups=Groups(group, bits, 32, size))


def apart(size=64):
    """Two documents, each a tile's rows: the second sees nothing of the first tile of keys."""
    start = np.where(np.arange(T) < 256, 0, 256)[None].astype(np.int32)
    group = (np.arange(S, dtype=np.int32) // size)[None]
    bits = packed_bits(np.ones((1, 1, T, -(-S // size)), bool))
    return Mask(start, causal=True, groups=Groups(group, bits, 1, size))


def wide(rng, heads):
    """Of an axis alone, so that tiles are full, empty and neither."""
    key = np.sort(integers(rng, 0, 40, 1, heads, S), -1)
    lo = np.sort(integers(rng, 0, 20, B, heads, T), -1)
    return Mask(axes=(Axis(key, lo, lo + 15),))


@functools.cache
def masks():
    rng = np.random.default_rng(0)
    runs = TERM(rng, size=3, rows=5)
    return {
        "few groups": TERM(rng, groups=30),
        "key heads, union": either(TERM(rng, K, groups=20, rows=16), Mask(causal=True, window=70)),
        "query heads, blocks": blocks(rng),
        "axis": wide(rng, K),
        "documents": apart(),
        "two terms, two groupings": either(dataclasses.replace(runs, axes=()), TERM(rng, H, groups=32)),
        "interval": Mask(integers(rng, 0, 90, B, T), integers(rng, 80, S, B, T)),
    }


def inputs(mask, dtype):
    rng = np.random.default_rng(5)
    own = mask.heads()
    shapes = (B, T, H, 40), (B, S, K, 40), (B, S, K, 24), (1, S, K if own > 1 else 1), (B, T, own)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def waves(x):
    return np.cos(np.arange(x.size)).reshape(x.shape)


def results(mask, known, cap=None):
    """o, the log-sum-exp, and gradients of q, k, v and both biases; of a mask that is known, or given to a program."""

    def all_of_it(given, *arrays):
        def run(q, k, v, key_bias, query_bias):
            options = {"key_bias_BSh": key_bias, "query_bias_BTh": query_bias, "soft_cap": cap}
            return attention_with_lse(q, k, v, mask if known else given, impl="flash", **options)

        out, vjp = jax.vjp(run, *arrays)
        return *out, *vjp(jax.tree.map(lambda x: jnp.asarray(waves(x), x.dtype), out))

    with dispatch.interpreted():
        return jax.jit(all_of_it)(None if known else mask, *inputs(mask, np.float32))


def assert_near(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        some = b > -1e18  # of the log-sum-exp
        np.testing.assert_array_equal(a > -1e18, some)
        np.testing.assert_allclose(a[some], b[some], rtol=0, atol=tolerance * np.abs(b[some]).max())


CASES = [(n, k) for n in ("few groups", "key heads, union", "query heads, blocks", "axis") for k in (True, False)]
CASES += [("two terms, two groupings", False), ("interval", True)]
OFTEN = [("key heads, union", True)]  # of a mask that is not known: below, with keys in blocks


@functools.cache
def exact(name, cap):
    """The same by the formula."""
    mask = masks()[name]
    q, k, v, key_bias, query_bias = inputs(mask, np.float64)
    do, dlse = waves(np.empty((B, T, H, 24))), waves(np.empty((B, T, H)))
    biases = {"key_bias": key_bias, "query_bias": query_bias}
    o, *gradients, lse = reference.attention(q, k, v, mask, do, dlse=dlse, soft_cap=cap, **biases)
    return o, lse, *gradients


@tiers.parametrize("name, known", CASES, often=OFTEN)
def test_equals_the_definition(name, known):
    """Values and gradients, float32 beside float64; heads' own masks, unions, rows that see nothing, odd lengths."""
    cap = 3.0 if name == "axis" else None
    assert_near(results(masks()[name], known, cap), exact(name, cap), 2e-5)


@tiers.often("query heads, blocks")
@pytest.mark.parametrize("name", ["query heads, blocks", "documents"])
def test_keys_in_blocks(name, monkeypatch):
    """More keys than fast memory holds: each block by its own lists, the same numbers."""
    monkeypatch.setattr(tuning, "resident_keys", lambda kind, each, keys, tile, rest: 3 * tile)
    assert_near(results(masks()[name], False), exact(name, None), 2e-5)


def test_sinks_and_gates():
    """A sink takes weight, also where a row sees nothing; the kernel multiplies by the gate before it writes."""
    mask = dataclasses.replace(masks()["key heads, union"], either=None)
    q, k, v, *_ = inputs(mask, jnp.float32)
    rng = np.random.default_rng(3)
    gate, sinks = rng.standard_normal((B, T, H, 24)), rng.standard_normal(H)

    def run(impl, dtype):
        def loss(q, k, v, gate, sinks):
            o = gated_attention(q, k, v, mask, gate, sinks_H=sinks, impl=impl)
            return jnp.sum(o * jnp.cos(jnp.arange(o.size, dtype=o.dtype)).reshape(o.shape)), o

        arrays = [x.astype(dtype) for x in (q, k, v, gate, sinks)]
        with dispatch.interpreted():
            return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(5)), has_aux=True))(*arrays)

    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, run("definition", jnp.float64))
    nothing = ~np.asarray(mask.visible(T, S)).any(-1)
    assert nothing.any() and not np.any(np.asarray(expected[0][1]).swapaxes(1, 2)[np.repeat(nothing, H // K, 1)])
    assert_near(run("flash", jnp.float32), expected, 2e-5)


def test_rows_that_see_nothing_by_the_kernel_itself():
    """o = 0 and an lse of -inf; whoever calls it from here puts a finite number there."""
    mask = Mask(causal=True, axes=(Axis(np.zeros((1, 256), np.int32), np.arange(256, dtype=np.int32)[None] % 2),))
    pattern, exact = attention_pattern.pattern_of(mask, 256, 256)
    q = np.ones((1, 256, 1, 16), np.float32)
    o, lse = map(np.asarray, jax.jit(functools.partial(flash_attention, pattern=pattern, interpret=True))(q, q, q))
    assert exact is True and np.all(lse[:, 1::2] == -np.inf) and not np.any(o[:, 1::2])
    assert np.all(np.isfinite(lse[:, ::2])) and np.all(o[:, ::2] > 0.99)


def short_documents(length):
    """Runs of keys that begin anew with every document, of which many stand in a tile."""
    document = np.arange(length, dtype=np.int32) // 3
    return Groups(document[None], packed_bits(np.eye(document[-1] + 1, dtype=bool)[document])[None, None], size=3)


def test_more_groups_than_a_word_has_bits():
    """Documents so short that a tile holds more than 32 of them: by tiles of XLA, and right."""
    mask = Mask(causal=True, groups=short_documents(300))
    assert attention_pattern.pattern_of(mask, 300, 300)[1] is False
    longer = dataclasses.replace(mask, groups=dataclasses.replace(mask.groups, group=mask.groups.group // 4))
    assert attention_pattern.pattern_of(longer, 300, 300)[1] is True
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 300, 2, 16)).astype(np.float32) for _ in range(3))
    run = lambda impl, m: attention_with_lse(q, k, v, m, impl=impl)
    with dispatch.interpreted():
        *_, lse = expected = reference.attention(q, k, v, mask, v, dlse=np.zeros((1, 300, 2)))
        of_both = jax.jit(lambda m: (run("flash", m), run("flash", mask)))(mask)
    for found in of_both:
        assert_near(found, (expected[0], lse), 1e-5)


def test_tiles_are_chosen_by_work_where_the_mask_is_known():
    """Fine ones for blocks that are far apart, wide ones where most is seen; lists always fit scalar memory."""
    n = 4096

    def of(size, batch=1, heads=1):
        group = (np.arange(n, dtype=np.int32) // size)[None]
        bits = np.broadcast_to(
            packed_bits(np.eye(n // size, dtype=bool)), (batch, heads, n // size, n // size // 32 or 1)
        )
        return Mask(groups=Groups(group, bits, size, size))

    tile, kinds = attention_pattern.tile_of(of(128), n, n)
    assert tile == (256, 256) and (kinds == PARTIAL).sum() == 16 and (kinds == EMPTY).sum() == 16 * 15
    assert attention_pattern.tile_of(Mask(causal=True), n, n)[0] == (1024, 512)

    def unknown(mask):
        chosen = []
        jax.eval_shape(lambda mask: chosen.append(attention_pattern.tile_of(mask, n, n)[0]), mask)
        return chosen[0]

    assert unknown(of(128)) == (256, 256) and unknown(of(512)) == (512, 512) == unknown(wide_axis(n))
    assert unknown(of(128, 64, 16)) == (512, 512) and unknown(of(128, 64, 64)) == (1024, 512)


def wide_axis(n):
    return Mask(axes=(Axis(np.arange(n, dtype=np.int32)[None], np.zeros((1, n), np.int32)),))


def test_refusals():
    """By name: groups in no order, lists that scalar memory does not hold, biases of heads that share keys."""
    q = jax.ShapeDtypeStruct((1, 300, 4, 16), jnp.float32)
    few = jax.ShapeDtypeStruct((1, 300, 2, 16), jnp.float32)
    many = Mask(groups=Groups(np.zeros((1, 300), np.int32), np.zeros((1, 1, 300, 2), np.uint32)))
    ask = lambda mask, q, k, **more: jax.eval_shape(
        lambda q, k, more: attention_with_lse(q, k, k, mask, impl="flash", **more), q, k, more
    )
    with dispatch.interpreted():
        with pytest.raises(UserError, match="32 groups of keys in no promised order"):
            ask(many, q, q)
        with pytest.raises(UserError, match="of 4 query heads over 2 key heads"):
            ask(Mask(causal=True), q, few, key_bias_BSh=jax.ShapeDtypeStruct((1, 300, 4), jnp.float32))
        long = jax.ShapeDtypeStruct((1, 2**19, 4, 16), jnp.float32)
        with pytest.raises(UserError, match="scalar memory does not hold"):
            ask(Mask(axes=(Axis(np.zeros((1, 2**19), np.int32), name="x"),)), long, long)
