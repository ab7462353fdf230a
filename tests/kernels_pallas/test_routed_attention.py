"""Attention of packed rows, interpreted: against its definition in float64, and what nobody chose."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import tuning
from kernels_pallas.routed_attention import pack_rows, routed_attention, row_tile, unpack_rows
from kernels_pallas.tuning import BackwardBlocks, Blocks, ForwardBlocks
from tests import tiers

B, K, S, d, e, TILE = 2, 4, 300, 16, 24, 128
TILES = np.array([[0, 0, 2, 2, 3], [1, 1, 1, 3, 3]])  # key heads; nobody's: 1 and 0, 2
ROWS = TILES.shape[1] * TILE
BLOCKS = Blocks(ForwardBlocks(TILE, 256, 128, 128), BackwardBlocks(TILE, 128, 128, 128))


def definition(q, k, v, starts, ends, tile_heads, soft_cap=None):
    """Each row against the keys of its tile's head."""
    by_tile = lambda x: x.reshape(*tile_heads.shape, -1, *x.shape[2:])
    own = lambda x: jnp.take_along_axis(x.swapaxes(1, 2), tile_heads[..., None, None], axis=1)
    starts, ends = by_tile(starts), by_tile(ends)
    s = jnp.arange(S)
    seen = (s >= starts[..., None]) & (s < ends[..., None])
    logits = jnp.einsum("bnrd,bnsd->bnrs", by_tile(q), own(k), precision="highest") * q.shape[2] ** -0.5
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    some = seen.any(-1)
    lse = jnp.log(jnp.where(some, jnp.sum(jnp.where(seen, jnp.exp(logits), 0), -1), 1))  # logits are small
    p = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0)
    o, lse = jnp.einsum("bnrs,bnse->bnre", p, own(v), precision="highest"), jnp.where(some, lse, -jnp.inf)
    return o.reshape(*q.shape[:2], -1), lse.reshape(q.shape[:2])


def inputs(d=d, e=e):
    """Rows of two documents with a window, in the order of their positions; the last of each head's see nothing."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(rng.normal(size=shape))
    arrays = {"q": normal(B, ROWS, d) * 2, "k": normal(B, S, K, d), "v": normal(B, S, K, e)}
    position = np.sort(rng.integers(0, S - 20, (B, ROWS)), 1)
    starts = np.maximum(np.where(position < 100, 0, 100), position - 150)
    ends = position + 1
    nothing = np.arange(ROWS)[None] % (2 * TILE) > 2 * TILE - 30
    nothing[:, -TILE:] = True  # a whole tile of them
    return arrays, np.where(nothing, 0, starts), np.where(nothing, 0, ends)


@functools.lru_cache
def program(fn, options, parts):
    """parts: whether fast memory is patched to hold one tile of keys."""

    def loss(arrays, starts, ends, do, dlse):
        o, lse = fn(**arrays, starts=starts, ends=ends, tile_heads=jnp.asarray(TILES, jnp.int32), **dict(options))
        return jnp.sum(o.astype(lse.dtype) * do) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * dlse), (o, lse)

    return jax.jit(jax.grad(loss, has_aux=True))


def results(fn, arrays, starts, ends, parts=False, **options):
    """o, lse and gradients, for one cotangent of both."""
    rng = np.random.default_rng(1)
    do, dlse = rng.normal(size=(B, ROWS, arrays["v"].shape[3])), rng.normal(size=(B, ROWS))
    grads, (o, lse) = program(fn, tuple(options.items()), parts)(arrays, starts, ends, do, dlse)
    found = {"o": o, "lse": lse, **{f"d{name}": x for name, x in grads.items()}}
    return {name: np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for name, x in found.items()}


kernel = functools.partial(routed_attention, interpret=True, blocks=BLOCKS)
as_type = lambda arrays, dtype: {name: x.astype(jnp.dtype(dtype)) for name, x in arrays.items()}


def one_tile(monkeypatch):
    monkeypatch.setattr(tuning, "resident_keys", lambda kind, each, keys, tile, rest: tile)


@tiers.often("bfloat16-2.0-True")
@pytest.mark.parametrize("dtype, cap, parts", [("float32", None, False), ("bfloat16", 2.0, True)])
def test_equals_the_definition(dtype, cap, parts, monkeypatch):
    """Values and gradients; with all keys in fast memory and with one tile of them; a head that no tile reads."""
    if parts:
        one_tile(monkeypatch)
    is_the_definition(kernel, dtype, cap, *inputs(), parts)


def is_the_definition(kernel, dtype, cap, arrays, starts, ends, parts=False):
    """Values and gradients; what sees nothing, and key heads that nobody reads."""
    with jax.enable_x64(True):
        exact = results(definition, as_type(as_type(arrays, dtype), "float64"), starts, ends, soft_cap=cap)
    ours = results(kernel, as_type(arrays, dtype), starts, ends, parts, soft_cap=cap)
    nothing = starts >= ends
    assert nothing.sum() > 300 and np.all(ours["lse"][nothing] == -np.inf)
    for name in ("o", "dq"):
        assert not np.any(ours[name][nothing])
    for name in ("dk", "dv"):
        for b in range(B):
            for head in range(K):
                assert np.any(ours[name][b, :, head]) == (head in TILES[b] and not (b == 0 and head == 3))
    tolerance = 2e-5 if dtype == "float32" else 0.03
    for name, value in exact.items():
        finite = np.isfinite(value)
        np.testing.assert_array_equal(np.isfinite(ours[name]), finite)
        scale = np.abs(value[finite]).max()
        np.testing.assert_allclose(ours[name][finite], value[finite], atol=tolerance * scale, err_msg=name)


def test_what_no_row_sees_changes_nothing(monkeypatch):
    """NaN in such keys and values, and in the queries of rows that see nothing: all results keep their bits."""
    one_tile(monkeypatch)
    arrays, starts, ends = inputs()
    poisoned = {name: x.copy() for name, x in arrays.items()}
    for name in ("k", "v"):
        poisoned[name][:, S - 20 :] = np.nan
    poisoned["q"][starts >= ends] = np.nan
    found = (results(kernel, as_type(x, "bfloat16"), starts, ends, True, soft_cap=2.0) for x in (arrays, poisoned))
    for a, b in zip(*(x.values() for x in found), strict=True):
        np.testing.assert_array_equal(a, b)


@tiers.often("bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_moved_exactly(dtype):
    """To tiles and back, as indexing does; each one's gradient is the other."""
    rng, L, tile = np.random.default_rng(0), 700, TILE
    place = np.full((B, K, L), -1)
    for b in range(B):
        for head in set(TILES[b]):
            tiles = np.flatnonzero(TILES[b] == head)
            chosen = np.sort(rng.choice(L, len(tiles) * tile - 20, replace=False))
            place[b, head, chosen] = tiles[0] * tile + np.arange(len(chosen))
    normal = lambda *shape: rng.normal(size=shape).astype(jnp.dtype(dtype))
    of = {"place": jnp.asarray(place, jnp.int32), "tile_heads": jnp.asarray(TILES, jnp.int32), "tile": tile}
    at = (np.arange(B)[:, None, None], np.maximum(place, 0))
    on = (place >= 0)[..., None]
    to_elements = lambda rows: np.where(on, rows[at], 0)

    def to_rows(x):
        rows = np.zeros((B, ROWS, x.shape[-1]), x.dtype)
        b, head, element = np.nonzero(place >= 0)
        rows[b, place[b, head, element]] = x[b, head, element]
        return rows

    @jax.jit
    def run(x, of_rows, rows, of_x):
        packed, to_x = jax.vjp(functools.partial(pack_rows, interpret=True, **of), x)
        unpacked, to_its_rows = jax.vjp(functools.partial(unpack_rows, interpret=True, **of), rows)
        return packed, *to_x(of_rows), unpacked, *to_its_rows(of_x)

    arrays = [normal(*shape) for shape in ((B, K, L, d), (B, ROWS, d), (B, ROWS, e), (B, K, L, e))]
    expected = (f(x) for f, x in zip((to_rows, to_elements, to_elements, to_rows), arrays))
    for found, want in zip(run(*arrays), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(found).astype(np.float32), want.astype(np.float32))


def test_tiles_are_long_where_rows_are_many():
    """Few rows of many heads take short tiles, of which less is empty."""
    assert row_tile("v6e", 2**18, 12, 128) == tuning.forward_blocks("v6e", 4096, 4096).rows
    assert row_tile("v6e", 1024, 16, 128) == tuning.LANES


@pytest.mark.parametrize("change, says", [
    ({"q": (1, 256, 2, 16)}, "expected q"), ({"k": (1, 9, 2, 8)}, "do not fit"), ({"starts": (1, 9)}, "starts"),
    ({"tile_heads": (2, 2)}, "tile_heads"), ({"tile_heads": (1, 3)}, "multiple of tiles"),
    ({"tile_heads": (1, 4)}, "tiles of 64 rows"), ({"blocks": Blocks(ForwardBlocks(256))}, "tiles of 256 rows"),
    ({"soft_cap": 0.0}, "soft_cap=0.0"), ({"dtype": "float16"}, "bfloat16, or all float32"),
])  # fmt: skip
def test_refusals(change, says):
    """Each names the value and what is allowed."""
    shapes = {"q": (1, 256, 16), "k": (1, 9, 2, 16), "v": (1, 9, 2, 16), "starts": (1, 256), "ends": (1, 256),
              "tile_heads": (1, 2)} | change  # fmt: skip
    dtype = shapes.pop("dtype", "float32")
    of = lambda name: dtype if name in ("q", "k", "v") else jnp.int32
    args = {n: jnp.zeros(x, of(n)) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=says):
        routed_attention(**args, interpret=True)
