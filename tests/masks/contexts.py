"""The laws of masks of attention to a context: which position sees which row, of the numbers that both carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.sequence import Context, Sequence
from attnlab.ops.mask_tiles import tile_kinds
from tests.masks.laws import SEGMENTS, TILINGS, sound

# Of the context's rows: documents as in `SEGMENTS`, one of which has no rows, and one of which nobody reads.
ROWS = np.array([[1] * 8 + [0] * 2 + [2] * 3, [4] * 4 + [7] * 2 + [0] * 7], np.int32)


def held_to_the_laws(name: str, sees: Callable[[Any, int, int], bool], knobs: dict[str, Any], most: int) -> None:
    """Packed pairs are the definition, tiles are sound, a cut of a stream has the same rows; what is missing is named.

    `sees(config, own, row)` says whether a position of number `own` sees a row of the context; numbers from -1 to
    `most` are tried.
    """
    builder = masks.build({"name": name, **knobs})
    (B, T), S = SEGMENTS.shape, ROWS.shape[1]
    rng = np.random.default_rng(0)
    own, node = (rng.integers(-1, most + 1, shape).astype(np.int32) for shape in ((B, T), (B, S)))
    expected = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        expected[b, t, s] = SEGMENTS[b, t] == ROWS[b, s] != 0 and sees(builder.config, own[b, t], node[b, s])
    assert 0 < expected.mean() < 0.5

    @jax.jit
    def made(segments, own, node):
        seq, context = Sequence(jnp.zeros_like(segments), segments, node=own).derived(), Context(None, ROWS, node=node)
        show = lambda seq: builder.of_context(seq, context.node, context.mask(seq, jnp.asarray(ROWS), S))
        builder.require(seq, causal=True), builder.require(seq, causal=False)
        return show(seq), show(jax.tree.map(lambda x: x[:, 7:12], seq))

    mask, cut = jax.tree.map(np.asarray, made(SEGMENTS, own, node))
    np.testing.assert_array_equal(mask.visible(T, S)[:, 0], expected)
    np.testing.assert_array_equal(cut.visible(5, S)[:, 0], expected[:, 7:12])
    for bq, bk in TILINGS:
        sound(tile_kinds(mask, T, S, bq, bk), expected[:, None], bq, bk)
    whole = Sequence(np.zeros((1, T), np.int32), node=own[:1])
    assert builder.of_context(whole, node[:1], cut.__class__()).known()
    assert builder.span(9, causal=True) == builder.span(9, causal=False) == 9
    for missing, message in (
        (lambda: builder.require(Sequence.whole(1, 4), causal=False), "Sequence.node"),
        (lambda: builder.of_context(whole, None, cut), "Context.node"),
        (lambda: builder.mask(whole, causal=False), "attention to a context"),
    ):
        with pytest.raises(UnsupportedPattern, match=f"{name}.*{message}"):
            missing()
