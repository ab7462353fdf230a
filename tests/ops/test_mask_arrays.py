"""What the arrays of a mask may be: groups that have no bit, and shapes, dtypes and counts that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops import Mask, attention_tiles
from attnlab.ops.attention import attention
from attnlab.ops.attention_pattern import pattern_of
from attnlab.ops.cached_attention import cached_attention
from attnlab.ops.mask_algebra import packed_bits
from attnlab.ops.mask_tiles import tile_kinds
from attnlab.ops.masks import Axis, Groups
from tests.masks.laws import sound
from tests.ops.test_masks import TILINGS, B, H, K, S, T, dense, integers


@pytest.fixture
def small(monkeypatch):
    sizes = attention_tiles.Sizes(rows=8, keys=8, full=2, masked=3, group=2, pairs=12)
    monkeypatch.setattr(attention_tiles, "ON_CPU", sizes)
    with jax.enable_x64(True):
        yield


def without_bits(kind):
    """Groups of which some have no bit, below 0 and above the words: few, many in any order, or runs."""
    rng = np.random.default_rng(9)
    if kind == "runs":
        group = np.where(rng.random(S) < 0.1, -3, np.arange(S) + 30)[None].astype(np.int32)  # to 74, bits to 63
        return Mask(causal=True, groups=Groups(group, packed_bits(rng.random((B, K, T, 64)) < 0.8), size=1))
    words = 1 if kind == "few" else 3
    group = integers(rng, -40, 32 * words + 40, 1, S)
    group[0, :8] = 32 * words  # a tile of them alone: the bit that they would share with group 0 is set
    return Mask(groups=Groups(group, packed_bits(rng.random((B, K, T, 32 * words)) < 0.8)))


@pytest.mark.parametrize("kind", ["few", "many", "runs"])
def test_keys_whose_group_has_no_bit(kind, small):
    """Nobody sees them in any form: written out, in tiles, in what kernels get, in attention; known or traced."""
    mask = without_bits(kind)
    expected = dense(mask)
    none = (mask.groups.group < 0) | (mask.groups.group >= 32 * mask.groups.bits.shape[-1])
    assert 0.1 < none.mean() < 0.9 and not expected[..., none[0]].any() and 0.05 < expected.mean()
    traced = jax.tree.map(np.asarray, jax.jit(lambda mask: mask.visible(T, S))(mask))
    np.testing.assert_array_equal(mask.visible(T, S), expected)
    np.testing.assert_array_equal(traced, expected)
    for bq, bk in TILINGS:
        for kinds in (tile_kinds(mask, T, S, bq, bk), jax.jit(lambda m, n=(bq, bk): tile_kinds(m, T, S, *n))(mask)):
            sound(kinds, expected, bq, bk)
    if kind == "few":
        pattern, exact = pattern_of(mask, T, S)
        term = pattern.terms[0]
        assert exact  # such keys are no reason to go another way
        word, local = np.asarray(term.words)[:, :, :1].swapaxes(-1, -2), np.asarray(term.local)[:, :, None]
        np.testing.assert_array_equal(
            (local >= 0) & ((word >> np.maximum(local, 0).astype(np.uint32)) & 1 == 1), expected
        )
    q, k, v = jnp.zeros((B, T, H, 4)), jnp.zeros((B, S, K, 4)), jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, K, S))
    even = np.repeat(expected / np.maximum(expected.sum(-1, keepdims=True), 1), H // K, axis=1).swapaxes(1, 2)
    for impl in ("definition", "tiles"):
        run = lambda mask, impl=impl: attention(q, k, v, mask, impl=impl)
        for got in (jax.jit(lambda run=run: run(mask))(), jax.jit(run)(mask)):
            np.testing.assert_allclose(got, even, atol=1e-12)


KEYS, BITS = np.zeros((1, 8), np.int32), np.zeros((1, 1, 8, 1), np.uint32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"axes": (Axis(np.zeros((1, 9), np.int32), None, None, "ring"),)}, r"axis 'ring' key \(1, 9\)"),
        ({"groups": Groups(np.zeros((1, 8), np.int32), np.zeros((1, 1, 3, 1), np.uint32), 4)}, r"bits \(1, 1, 3\)"),
        ({"axes": (Axis(np.zeros((1, 3, 8), np.int32)),)}, "axis '' key"),
        ({"k_end": np.zeros((1, 9), np.int32)}, "k_end"),
        ({"k_end": np.zeros((1, 8))}, "k_end is float64; allowed: integers"),
        ({"axes": (Axis(KEYS.astype(np.float32), name="ring"),)}, "axis 'ring' key is float32; allowed: int32"),
        ({"axes": (Axis(KEYS, KEYS.astype(np.int64)),)}, "axis '' lo is int64; allowed: int32"),
        ({"groups": Groups(KEYS.astype(bool), BITS)}, "group is bool; allowed: int32"),
        ({"groups": Groups(KEYS, BITS.astype(np.int32))}, "bits is int32; allowed: uint32"),
        ({"groups": Groups(KEYS, BITS[0])}, r"bits \(1, 8, 1\), expected \[1 or 1, heads \(1, 2 or 2\), 8, words"),
        ({"groups": Groups(KEYS, BITS[..., :0])}, r"bits \(1, 1, 8, 0\)"),
        ({"groups": Groups(KEYS[0], BITS)}, r"group \(8,\), expected"),
    ],
)
def test_wrong_arrays_are_refused(change, message):
    q = jnp.zeros((1, 8, 2, 4))
    for run in (attention, lambda q, k, v, mask: cached_attention(q, *(x.swapaxes(1, 2)[0] for x in (k, v)), mask)):
        with pytest.raises(UserError, match=message):
            run(q, q, q, Mask(**change))


@pytest.mark.parametrize(
    "static, message",
    [
        ({"rows": 0}, "rows: 0 is not allowed; allowed: an int >= 1"),
        ({"rows": None}, "rows: None is not allowed"),
        ({"rows": True}, "rows: True"),
        ({"size": 0}, "size: 0 is not allowed; allowed: None or an int >= 1"),
        ({"size": 2.0}, "size: 2.0"),
    ],
)
def test_groups_of_no_rows_or_keys_are_refused(static, message):
    with pytest.raises(UserError, match=f"mask groups: {message}"):
        Groups(KEYS, BITS, **static)
