"""The laws of a mask that configs choose by name; each mask's own test file calls `held_to_the_laws`.

A mask's test gives its definition, `sees(config, n)`: bool [n, n], which positions of one document of n positions see
which, causality apart, or `sees(config, n, causal)`, of a direction. What packing, padding, directions, streams and
tiles make of it is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.sequence import Sequence, Stream
from attnlab.ops import mask_tiles
from attnlab.ops.mask_algebra import closed_cuts
from attnlab.ops.masks import Mask

# Row 0: two documents and padding behind. Row 1: padding in front, and two documents.
SEGMENTS = np.array([[1] * 20 + [2] * 3 + [0] * 7, [0] * 2 + [4] * 9 + [5] * 19], np.int32)
# The same cut to an odd length: one row ends where its document does, the other amid one.
ODD = SEGMENTS[:, :23]
PIECE = 5  # positions of a piece of a stream
TILINGS = (4, 4), (8, 16), (7, 5)

Definition = Callable[[int], np.ndarray]  # of one document, by how long it is


def held_to_the_laws(
    name: str, sees: Callable[..., np.ndarray], *knobs: dict[str, Any], directed: bool = False
) -> None:
    """Every law, for every set of knobs, in every direction that the mask declares.

    `directed`: whether the definition takes the direction, and says itself what is left of it where mixing is causal.
    """
    for fields in knobs:
        builder = masks.build({"name": name, **fields})
        for causal in (True, False):
            if builder.unserved(builder.config, causal=causal):
                with pytest.raises(UnsupportedPattern, match=name):
                    builder.require(Sequence.whole(1, 4), causal=causal)
                continue

            def law(n: int, config: Any = builder.config, causal: bool = causal) -> np.ndarray:
                seen = sees(config, n, causal) if directed else sees(config, n)
                return np.tril(seen) if causal and not directed else seen

            whole_rows(builder, law, causal)
            for segments in (SEGMENTS, ODD):
                packed_rows(builder, law, causal, segments)


def whole_rows(builder: masks.MaskBuilder, law: Definition, causal: bool, lengths: tuple[int, ...] = (23, 30)) -> None:
    """One document a row: the mask is known while tracing, is the definition, and has the span that is declared."""
    for n in lengths:
        seq = Sequence.whole(1, n)
        mask, order = builder.mask(seq, causal=causal), builder.order(seq)
        expected = law(n)
        expected = expected if order is None else expected[order][:, order]
        assert mask.known()
        np.testing.assert_array_equal(mask.visible(n, n)[0, 0], expected)
        np.testing.assert_allclose(builder.span(n, causal=causal), expected.sum(-1).mean(), rtol=1e-12)
        np.testing.assert_allclose(mask_tiles.mean_span(mask, n, n), expected.sum(-1).mean(), rtol=1e-12)
        for bq, bk in TILINGS:
            sound(mask_tiles.tile_kinds(mask, n, n, bq, bk), expected[None, None], bq, bk)


def packed_rows(builder: masks.MaskBuilder, law: Definition, causal: bool, segments: np.ndarray = SEGMENTS) -> None:
    """Documents see what each sees alone, padding nothing; tiles are sound; streams have the same rows."""
    B, T = segments.shape
    rows = by_documents(law, segments)
    mask, order = packed(builder, causal, segments), builder.order(Sequence.whole(1, T))
    expected = rows if order is None else rows[:, order][:, :, order]
    assert all(term.plain() or not term.documents for term in mask.terms())  # which promises that documents are all
    np.testing.assert_array_equal(mask.visible(T, T)[:, 0], expected)
    np.testing.assert_array_equal(mask.visible(T, T, slice(9, 11))[:, 0], expected[:, 9:11])
    for bq, bk in TILINGS:
        sound(mask_tiles.tile_kinds(mask, T, T, bq, bk), expected[:, None], bq, bk)
    really_closed = np.stack([[not expected[b, :p, p:].any() for p in range(T + 1)] for b in range(B)])
    assert not np.any(closed_cuts(mask, T) & ~really_closed)
    if causal and builder.streaming == "any":
        np.testing.assert_array_equal(streamed(builder, segments, [*range(0, T, PIECE), T]), rows)
    for row in range(
        B if causal and builder.streaming == "closed" else 0
    ):  # each cut at every other place where it may be, so that a piece has several steps, too
        cuts = [p for p in range(T + 1) if not rows[row, :p, p:].any()][:-1:2]
        np.testing.assert_array_equal(streamed(builder, segments[row : row + 1], [*cuts, T]), rows[row : row + 1])


def by_documents(sees: Definition, segments: np.ndarray = SEGMENTS) -> np.ndarray:
    """What a mask of documents, by how long they are, makes of the packed rows: bool [B, T, T]."""
    B, T = segments.shape
    expected = np.zeros((B, T, T), bool)
    for row, of_row in enumerate(segments):
        for segment in set(of_row) - {0}:
            at = np.flatnonzero(of_row == segment)
            expected[row, at[0] : at[-1] + 1, at[0] : at[-1] + 1] = sees(len(at))
    return expected


def packed(builder: masks.MaskBuilder, causal: bool, segments: np.ndarray = SEGMENTS) -> Mask:
    """The mask of the packed rows, made in a program; what is made of it is then NumPy's, and not compiled."""

    @jax.jit
    def made(segments):
        return builder.mask(Sequence(jnp.zeros_like(segments), segments).derived(), causal=causal)

    return jax.tree.map(np.asarray, made(jnp.asarray(segments)))


def streamed(builder: masks.MaskBuilder, packed: np.ndarray, cuts: list[int]) -> np.ndarray:
    """The rows that a stream of segments [B, T] sees, cut there, over a cache that is longer than it."""
    B, T = packed.shape
    slots = T + 3

    @jax.jit
    def piece(stream, segments, stored, first):
        seq, stream = stream.extend(Sequence(jnp.zeros_like(segments), segments))
        index = first + jnp.arange(segments.shape[1], dtype=jnp.int32)
        start = jnp.where(segments == 0, index + 1, index - seq.offsets)
        interval = Mask(start, jnp.broadcast_to(index + 1, start.shape))
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first, axis=1)
        stored = tuple(map(put, stored, builder.coordinates(seq)))
        return stream, stored, builder.rows(seq, stored, interval)

    state, parts = (Stream.start(B), (jnp.full((B, slots), 1, jnp.int32),) * builder.stored), []
    for first, end in zip(cuts, cuts[1:]):
        *state, rows = piece(state[0], jnp.asarray(packed[:, first:end]), state[1], first)
        seen = jax.tree.map(np.asarray, rows).visible(end - first, slots)[:, 0]
        parts.append(np.broadcast_to(seen, (B, end - first, slots)))
    rows = np.concatenate(parts, axis=1)
    assert not rows[..., T:].any()
    return rows[..., :T]


def sound(kinds: np.ndarray, visible: np.ndarray, bq: int, bk: int) -> None:
    """No visible pair stands in an empty tile, no hidden one in a full tile."""
    kinds = np.asarray(kinds)
    T, S = visible.shape[-2:]
    shape = np.broadcast_shapes(kinds.shape[:2], visible.shape[:2])
    each = np.repeat(np.repeat(kinds, bq, axis=2), bk, axis=3)[:, :, :T, :S]
    each, visible = np.broadcast_to(each, (*shape, T, S)), np.broadcast_to(visible, (*shape, T, S))
    assert not np.any(visible & (each == mask_tiles.EMPTY))
    assert not np.any(~visible & (each == mask_tiles.FULL))
    assert kinds.shape[2:] == (-(-T // bq), -(-S // bk))
