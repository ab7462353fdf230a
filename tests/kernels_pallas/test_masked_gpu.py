"""The Hopper kernels under masks beyond intervals with no GPU: interpreted, against the definition, and their lists."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops import Mask
from attnlab.ops.attention import definition_with_lse
from attnlab.ops.attention_pattern import pattern_of
from attnlab.ops.mask_algebra import either, packed_bits
from attnlab.ops.masks import Axis, Groups
from kernels_pallas.flash_attention import (
    Pattern,
    Term,
    flash_attention,
    gpu,
    gpu_forward,
    gpu_pattern,
)
from kernels_pallas.flash_attention.pattern import entry
from tests import tiers
from tests.kernels_pallas.test_flash_attention import plain, typed
from tests.kernels_pallas.test_flash_gpu import needs_interpreter
from tests.ops.test_masks import integers, random_term


def tiles(widths):
    """Those by default, but rings so short that they go round."""
    return dataclasses.replace(gpu.default_blocks(*widths, pattern=True), forward=gpu_forward.Blocks(keys=64, stages=2))


def blocks(rng, T, H, size=32):
    """Causal, and whole blocks of keys by chance, for each query head; packed documents, padding behind them."""
    group = (np.arange(T, dtype=np.int32) // size)[None]
    bits = packed_bits(rng.random((1, H, -(-T // 16), -(-T // size))) < 0.4)
    t = np.arange(T, dtype=np.int32)
    start = np.stack([np.where(t < cut, 0, cut) for cut in (70, T)])
    end = np.where(t < T - 40, t + 1, 0)[None].repeat(2, 0)
    return Mask(start.astype(np.int32), end.astype(np.int32), groups=Groups(group, bits, 16, size))


def sorted_axis(rng, T, S, heads):
    """Of an axis alone, so that tiles are full, empty and neither."""
    key = np.sort(integers(rng, 0, 40, 1, heads, S), -1)
    lo = np.sort(integers(rng, 0, 20, 1, heads, T), -1)
    return Mask(axes=(Axis(key, lo, lo + 18),))


def union(rng, T, S, heads):
    """Two terms, groups of each, one of key heads; rows that see nothing."""
    term = functools.partial(random_term, rng, length=T, keys=S)
    return either(term(heads, groups=20, rows=16), term(groups=32))


def mask_of(name):
    """The mask, and B, T, S, H, K: one of query heads, one of key heads, one of each head, one for all."""
    rng = np.random.default_rng(0)
    return {
        "blocks": lambda: (blocks(rng, 210, 2), (2, 210, 210, 2, 1)),
        "axis": lambda: (sorted_axis(rng, 130, 330, 2), (1, 130, 330, 4, 2)),
        "union": lambda: (union(rng, 100, 200, 2), (2, 100, 200, 2, 2)),
        "interval": lambda: (Mask(integers(rng, 0, 90, 2, 90), integers(rng, 80, 200, 2, 90)), (2, 90, 200, 2, 1)),
    }[name]()


# The mask, widths, which features, and whether gradients are to be the same bits in every run.
CASES = {
    "blocks, dq added up": ("blocks", (64, 64), "", False),
    "axis, sinks and gate": ("axis", (64, 40), "sg", False),
    "union, one order, cap and bias": ("union", (128, 128), "bc", True),
    "union, wide": ("union", (192, 64), "b", False),
    "blocks, one order": ("blocks", (16, 128), "s", True),
    "interval, all of it": ("interval", (128, 96), "sgbc", False),
}


def inputs(shape, widths, features):
    """What is differentiated, float32 that bfloat16 can say; and a cap."""
    rng, (B, T, S, H, K), (d, e) = np.random.default_rng(1), shape, widths
    normal = lambda *shape: rng.normal(size=shape).astype(jnp.bfloat16).astype(np.float32)
    arrays = {"q": normal(B, T, H, d) * 2, "k": normal(B, S, K, d), "v": normal(B, S, K, e)}
    more = {"s": ("sinks", (H,)), "g": ("gate", (B, T, H, e)), "b": ("key_bias", (B, K, S))}
    arrays |= {more[f][0]: normal(*more[f][1]) for f in features if f in more}
    return arrays, 3.0 if "c" in features else None


def exact(mask, q, k, v, *, sinks=None, gate=None, key_bias=None, soft_cap=None):
    """The op's definition, with a gate, and its bias by key heads last."""
    bias = None if key_bias is None else key_bias.swapaxes(1, 2)
    options = {"scale": q.shape[-1] ** -0.5, "soft_cap": soft_cap}
    o, lse = definition_with_lse(q, k, v, mask, sinks, bias, **options)
    return o if gate is None else o * jax.nn.sigmoid(gate), lse


def results(fn, arrays, cap):
    """o, lse and all gradients, for one cotangent of both; of rows that see nothing no lse."""
    rng, (B, T, H), e = np.random.default_rng(2), arrays["q"].shape[:3], arrays["v"].shape[3]
    do, dlse = rng.normal(size=(B, T, H, e)), rng.normal(size=(B, T, H))

    def loss(arrays):
        o, lse = fn(**arrays, soft_cap=cap)
        seen = lse > -1e18
        return jnp.sum(o.astype(lse.dtype) * do) + jnp.sum(jnp.where(seen, lse, 0) * dlse), {"o": o, "lse": lse}

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    found = out | {f"d{name}": x for name, x in grads.items()}
    return {name: np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for name, x in found.items()}


def is_the_definition(name, **options):
    mask, (B, T, S, H, K) = mask_of(CASES[name][0])
    _, widths, features, deterministic = CASES[name]
    arrays, cap = inputs((B, T, S, H, K), widths, features)
    pattern, right = pattern_of(mask, T, S, "cuda")
    assert right is True
    with jax.enable_x64(True):
        expected = results(
            functools.partial(exact, mask), {n: jnp.asarray(x, jnp.float64) for n, x in arrays.items()}, cap
        )
    seen = np.asarray(mask.visible(T, S))
    seen = np.broadcast_to(seen if seen.shape[1] == 1 else seen.repeat(H // seen.shape[1], 1), (B, H, T, S))
    xla = results(functools.partial(plain, seen=jnp.asarray(seen)), typed(arrays, "bfloat16"), cap)
    kernel = functools.partial(
        flash_attention, pattern=pattern, platform="cuda", blocks=tiles(widths), deterministic=deterministic, **options
    )
    ours = results(kernel, typed(arrays, "bfloat16"), cap)
    assert set(ours) == set(expected)
    for n, value in expected.items():
        some = value > -1e18
        np.testing.assert_array_equal(ours[n] > -1e18, some)
        off, xla_off = (np.abs(x[n][some] - value[some]) for x in (ours, xla))
        slack = float(jnp.finfo(jnp.bfloat16).eps) * np.max(np.abs(value[some]), initial=0)
        assert np.sqrt(np.mean(off**2)) <= 2 * np.sqrt(np.mean(xla_off**2)) + slack / 4, n
        assert np.max(off, initial=0) <= 3 * np.max(xla_off, initial=0) + slack, n
    nothing = ~seen.any(-1).swapaxes(1, 2)
    assert not np.any(ours["o"][nothing]) and not np.any(ours["dq"][nothing])


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    """Values and gradients err at most twice as much as XLA's form of the same dtype, and nowhere far more."""
    is_the_definition(name, interpret=True)


@needs_interpreter
@pytest.mark.parametrize("name", ["blocks, dq added up", "union, one order, cap and bias", "union, wide"])
def test_no_races(name):
    """Nothing that says the mask is overwritten while it is read."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    masked, widths, features, deterministic = CASES[name]
    mask, shape = mask_of(masked)
    arrays, cap = inputs(shape, widths, features)
    options = {"interpret": plgpu.InterpretGPUParams(detect_races=True), "deterministic": deterministic}
    pattern, _ = pattern_of(mask, *shape[1:3], "cuda")
    options |= {"blocks": tiles(widths), "pattern": pattern, "platform": "cuda"}
    kernel = functools.partial(flash_attention, **options)
    results(kernel, typed(arrays, "bfloat16"), cap)
    assert not gpu_callbacks.get_races().races_found


@tiers.often("64-128-union", "128-64-blocks", "128-64-axis")
@pytest.mark.parametrize("name", ["blocks", "axis", "union"])
@pytest.mark.parametrize("rows, keys", [(64, 128), (128, 64)])
def test_lists_hold_what_is_seen(name, rows, keys):
    """Of blocks of rows and of keys every tile with a visible pair, in order, once; full ones hide nothing."""
    mask, (_, T, S, H, K) = mask_of(name)
    pattern, _ = pattern_of(mask, T, S, "cuda")
    whole = T + -T % 128, S + -S % 128

    @jax.jit
    def listed():
        padded = pattern.padded(*whole)
        lists = gpu_pattern.of_rows(padded, rows).lists, gpu_pattern.of_keys(padded, keys, rows, H, K).lists
        return mask.visible(T, S), *lists

    seen, of_rows, of_keys = map(np.asarray, listed())
    seen = np.pad(seen, ((0, 0), (0, 0), (0, whole[0] - T), (0, whole[1] - S)))
    tiled = lambda n, m: seen.reshape(*seen.shape[:2], whole[0] // n, n, whole[1] // m, m)
    met, full = (f(tiled(rows, 64), (3, 5)) for f in (np.any, np.all))
    for at in np.ndindex(*met.shape[:3]):
        count, listed = of_rows[at][0], of_rows[at][1:]
        number, is_full = (x[:count] for x in entry(listed))
        assert count >= 1 and np.all(np.diff(number) > 0)
        assert set(np.flatnonzero(met[at])) <= set(number) and np.all(full[at][number[is_full]])
        if name == "axis":  # where one coordinate says all, nothing is listed in vain
            assert count == max(1, met[at].sum())
    met, full = (np.moveaxis(f(tiled(rows, keys), (3, 5)), 2, 3) for f in (np.any, np.all))
    group = H // K if met.shape[1] == H else 1
    met, full = (x.reshape(x.shape[0], -1, group, *x.shape[2:]) for x in (met, full))
    for b, h, j in np.ndindex(met.shape[0], met.shape[1], met.shape[3]):
        count, listed = of_keys[b, h, j, 0], of_keys[b, h, j, 1:][: of_keys[b, h, j, 0]]
        tile, head, is_full = (f(listed) for f in (gpu_pattern.tile_of, gpu_pattern.head_of, gpu_pattern.is_full))
        found = list(zip(head, tile))
        assert found == sorted(set(found)) and set(found) >= set(zip(*np.nonzero(met[b, h, :, j])))
        assert np.all(full[b, h, head[is_full], j, tile[is_full]])
        if name == "axis":
            assert count == met[b, h, :, j].sum()


@tiers.often("64-128")
@pytest.mark.parametrize("rows, keys", [(64, 128), (128, 64), (128, 128)])
def test_lists_of_blocks_of_several_tiles(rows, keys):
    """A block meets what one of its tiles meets, and is full where all of them are."""
    H, K, T, S = 4, 2, 256, 384
    kinds = np.random.default_rng(0).choice([0, 1, 2, 2], (2, H, T // 64, S // 64)).astype(np.int8)
    bounds = jnp.zeros((1, 1, 2, T), jnp.int32)
    pattern = Pattern(jnp.asarray(kinds), (Term(bounds),), S // 64, gpu_pattern.TILE)
    both = lambda: (gpu_pattern.of_rows(pattern, rows).lists, gpu_pattern.of_keys(pattern, keys, rows, H, K).lists)
    of_rows, of_keys = map(np.asarray, jax.jit(both)())
    tiled = lambda n, m: kinds.reshape(2, H, T // n, n // 64, S // m, m // 64)
    every = lambda listed: [(int(x) >> 20 & 1023, int(x) & (1 << 20) - 1, int(x) >> 30) for x in listed]
    for b, h, i in np.ndindex(2, H, T // rows):
        own = tiled(rows, 64)[b, h, i, :, :, 0]
        expected = [(0, j, int((own[:, j] == 2).all())) for j in range(S // 64) if own[:, j].any()]
        assert every(of_rows[b, h, i, 1 : 1 + of_rows[b, h, i, 0]]) == expected
    for b, k, j in np.ndindex(2, K, S // keys):
        own = tiled(rows, keys)[b, 2 * k : 2 * k + 2, :, :, j]
        expected = [(g, i, int((own[g, i] == 2).all())) for g, i in np.ndindex(2, T // rows) if own[g, i].any()]
        assert every(of_keys[b, k, j, 1 : 1 + of_keys[b, k, j, 0]]) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tile": (256, 256)}, r"tiles of \(256, 256\); allowed: a pattern in tiles of \(64, 64\)"),
        ({"blocks": gpu.default_blocks(64, 64)}, "64 keys of a tile"),
        ({"starts": jnp.zeros((1, 64), jnp.int32)}, "a pattern beside starts or ends; allowed: one of them"),
    ],
)
def test_refusals(changes, message):
    """Tiles that are not those of the lists, and two masks at once: said before anything is compiled."""
    mask = Mask(causal=True, axes=(Axis(np.zeros((1, 64), np.int32), np.zeros((1, 64), np.int32)),))
    tile = changes.pop("tile", None)
    pattern, _ = pattern_of(mask, 64, 64, "tpu" if tile else "cuda")
    q = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"flash_attention.*{message}"):
        jax.eval_shape(lambda q: flash_attention(q, q, q, pattern=pattern, platform="cuda", **changes), q)
