"""The laws of masks that read `Sequence.node`: which number sees which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import masks
from attnlab.mixers.sequence import Sequence
from attnlab.ops.mask_tiles import tile_kinds
from attnlab.ops.masks import Mask
from tests.masks.laws import ODD, SEGMENTS, TILINGS, sound


def held_to_the_laws(name: str, sees: Callable[[Any, int, int], bool], knobs: dict[str, Any], numbers: int) -> None:
    """Both directions, two lengths: packed rows are the definition, tiles are sound, so is a cut of a stream.

    `sees(config, q, k)` says whether number q sees number k; numbers from -1 up to `numbers` are tried.
    """
    builder = masks.build({"name": name, **knobs})
    for segments in (SEGMENTS, ODD):
        _packed_rows(builder, sees, numbers, segments)


def _packed_rows(
    builder: masks.MaskBuilder, sees: Callable[[Any, int, int], bool], numbers: int, segments: np.ndarray
) -> None:
    B, T = segments.shape
    node = np.random.default_rng(0).integers(-1, numbers + 1, (B, T)).astype(np.int32)
    pairs = np.zeros((B, T, T), bool)
    for b, t, s in np.ndindex(B, T, T):
        pairs[b, t, s] = segments[b, t] == segments[b, s] != 0 and sees(builder.config, node[b, t], node[b, s])
    for causal in (True, False):
        expected = np.tril(pairs) if causal else pairs

        @jax.jit
        def made(segments, node, causal=causal):
            seq = Sequence(jnp.zeros_like(segments), segments, node=node).derived()
            cut = jax.tree.map(lambda x: x[:, 7:12], seq)
            index = jnp.arange(7, 12, dtype=jnp.int32)[None]
            interval = Mask(jnp.where(cut.segments == 0, index + 1, index - cut.offsets), index + 1)
            return builder.mask(seq, causal=causal), builder.rows(cut, builder.coordinates(seq), interval)

        mask, rows = jax.tree.map(np.asarray, made(segments, node))
        np.testing.assert_array_equal(mask.visible(T, T)[:, 0], expected)
        for bq, bk in TILINGS:
            sound(tile_kinds(mask, T, T, bq, bk), expected[:, None], bq, bk)
        if causal:
            np.testing.assert_array_equal(rows.visible(5, T)[:, 0], expected[:, 7:12])
        assert builder.mask(Sequence(np.zeros((1, T), np.int32), node=node[:1]), causal=causal).known()
