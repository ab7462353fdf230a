"""The Hopper kernels of packed rows with no GPU: interpreted, against the definition, and the work that they do."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, masks
from kernels_pallas.flash_attention import gpu, gpu_backward, gpu_backward_rows, gpu_forward
from kernels_pallas.routed_attention import pack_rows, routed_attention, row_tile, unpack_rows
from tests.kernels_pallas.test_flash_gpu import needs_interpreter
from tests.kernels_pallas.test_routed_attention import TILE, TILES, K, S, inputs, is_the_definition

SMALL = gpu.Blocks(gpu_forward.Blocks(keys=64), gpu_backward.Blocks(rows=128), gpu_backward_rows.Blocks(keys=64))
# Widths, cap, and tiles.
CASES = {
    "dq added up": ((16, 24), None, SMALL),
    "wide": ((136, 24), 2.0, None),
}


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    """Values and gradients: several tiles of a head and none, tiles that see nothing, keys that fill no tile."""
    widths, cap, blocks = CASES[name]
    kernel = functools.partial(routed_attention, platform="cuda", interpret=True, blocks=blocks)
    is_the_definition(kernel, "bfloat16", cap, *inputs(*widths))


@needs_interpreter
def test_work_is_that_of_the_tiles_that_are_seen(monkeypatch):
    """In the deterministic form, which is the definition, too: products are those of tiles that rows see, a head's keys
    meeting its own rows alone, and barriers put all that is read and written in order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    products, product = [], hopper.Interpreted.wgmma

    def counted(self, *operands):
        jax.debug.callback(lambda: products.append(1))
        product(self, *operands)

    monkeypatch.setattr(hopper.Interpreted, "wgmma", counted)
    arrays, starts, ends = inputs()
    races = plgpu.InterpretGPUParams(detect_races=True)
    kernel = functools.partial(routed_attention, platform="cuda", interpret=races, blocks=SMALL, deterministic=True)
    is_the_definition(kernel, "bfloat16", None, arrays, starts, ends)
    jax.effects_barrier()
    assert not gpu_callbacks.get_races().races_found
    of_rows, of_keys = between(met(starts, ends, 64)).sum(), of_heads(met(starts, ends, 128)).sum()
    # Of two warpgroups: scores and values; scores, dp, dk and dv; scores, dp and dq.
    assert len(products) == 2 * (2 * of_rows + 4 * of_keys + 3 * of_rows)


def met(starts, ends, keys, rows=TILE):
    """Whether so many rows see any of a tile of so many keys, [B, tiles of rows, tiles of keys]."""
    seen = np.asarray(masks.visible(jnp.asarray(starts), jnp.asarray(ends), starts.shape[1], S))
    seen = np.pad(seen, ((0, 0), (0, 0), (0, -S % keys)))
    return seen.reshape(len(TILES), -1, rows, seen.shape[2] // keys, keys).any((2, 4))


def between(met):
    """From the first to the last, along the last axis."""
    return met.any(-1) * (met.shape[-1] - met[..., ::-1].argmax(-1) - met.argmax(-1))


def of_heads(met):
    """Tiles of rows of a key head from the first to the last that sees a tile of keys, [B, K, tiles of keys]."""
    heads = np.repeat(TILES, met.shape[1] // TILES.shape[1], 1)
    return np.stack([between((met & (heads == head)[..., None]).swapaxes(1, 2)) for head in range(K)], 1)


def test_ranges_are_of_what_is_seen():
    """Of a block of rows the keys that it sees, none where it sees none; of one of keys the rows of its own head."""
    _, starts, ends = inputs()
    bounds, heads = masks.intervals(jnp.asarray(starts), jnp.asarray(ends), starts.shape[1], S), jnp.asarray(TILES)
    blocks, padded = gpu_backward.Blocks(rows=64, keys=128), S + -S % 128

    @jax.jit
    def tables(bounds, heads):
        of_keys = gpu_backward.row_ranges(bounds, blocks, padded, K, heads)
        return gpu_forward.ranges(bounds, 64, 64, heads), of_keys

    of_rows, of_keys = map(np.asarray, tables(bounds, heads))
    np.testing.assert_array_equal(of_rows[..., 1] - of_rows[..., 0], between(met(starts, ends, 64)))
    np.testing.assert_array_equal(of_rows[..., -1], TILES)
    first, end = np.moveaxis(of_keys.reshape(len(TILES), K, -1, 4)[..., :2], -1, 0)
    np.testing.assert_array_equal(end - first, of_heads(met(starts, ends, 128, rows=64)))
    for b, head, block in np.argwhere(end > first):
        assert np.all(TILES[b, first[b, head, block] // 2 : (end[b, head, block] + 1) // 2] == head)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": "float32"}, "float32; allowed: bfloat16"),
        ({"width": 264}, "264 and 264; allowed: up to 256"),
        ({"blocks": gpu.Blocks(gpu_forward.Blocks(rows=128), SMALL.backward, SMALL.rows)}, "128 rows; allowed: .* 256"),
        ({"blocks": "large"}, "blocks=large; allowed: None or"),
        ({"platform": "rocm"}, "'rocm'; allowed: tpu, cuda"),
    ],
)
def test_refusals(changes, message):
    """Said before anything is compiled, with what is allowed."""
    width, dtype = changes.pop("width", 64), changes.pop("dtype", "bfloat16")
    of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    bounds, k = of(1, 256, dtype="int32"), of(1, 9, 2, width)
    run = functools.partial(routed_attention, **{"platform": "cuda"} | changes)
    with pytest.raises(ValueError, match=f"routed_attention.*{message}"):
        jax.eval_shape(run, of(1, 256, width), k, k, bounds, bounds, of(1, 2, dtype="int32"))


@pytest.mark.parametrize("move", [pack_rows, unpack_rows])
def test_rows_are_moved_by_kernels_on_tpu_alone(move):
    """Elsewhere it is said."""
    place, heads = jnp.zeros((1, 1, 8), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match=f"{move.__name__}: no kernel for platform 'cuda'; allowed: tpu"):
        move(jnp.ones((1, 1, 8, 16)), place, heads, 128, platform="cuda")


@pytest.mark.parametrize("width", [64, 128, 256])
def test_tiles_are_the_shortest_that_blocks_take(width):
    """A block of threads has its rows from one tile; more rows in a tile are more that stay empty."""
    tile = row_tile("", 2**18, 12, width, platform="cuda")
    assert tile == gpu.packed_rows(gpu.default_blocks(width, 64), width, 64) == 128
