"""Rows of text, images and questions, and the laws of masks that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import batch as kinds
from attnlab import masks
from attnlab.mixers.sequence import Sequence, Stream
from attnlab.ops.layout import Layout
from attnlab.ops.mask_algebra import closed_cuts
from attnlab.ops.mask_tiles import tile_kinds
from attnlab.ops.masks import Mask
from tests.masks.laws import TILINGS, sound

# Documents of a row: (what, positions), an image as (rows, columns). Rows are equally long.
ROWS = (
    (
        [("text", 1), ("image", (2, 3)), ("text", 1), ("question", 3), ("answer", 2)],
        [("image", (1, 2)), ("text", 2), ("image", (3, 3)), ("question", 2), ("answer", 3)],
        [("image", (1, 2)), ("answer", 1), ("question", 2)],
        [("padding", 3)],
    ),
    (
        [("padding", 7)],
        [("text", 4), ("image", (4, 4)), ("answer", 4)],
        [("question", 2), ("image", (2, 2)), ("text", 2)],
    ),
    (  # images of several rings before others in one document, side by side and apart
        [("text", 1), ("image", (3, 3)), ("question", 2), ("image", (1, 3)), ("answer", 1)],
        [("image", (3, 4)), ("image", (3, 3)), ("question", 2)],
    ),
)
NUMBERS = {"text": kinds.TEXT, "image": kinds.VISUAL, "question": kinds.QUESTION, "answer": kinds.ANSWER, "padding": 0}


@dataclasses.dataclass(frozen=True)
class Place:
    """One position, for definitions: what it is, its document, its image or question [first, end), its cell."""

    index: int
    kind: str
    document: int
    span: tuple[int, int]
    cell: tuple[int, int]
    size: tuple[int, int]


def places(row: Any) -> list[Place]:
    """All positions of a row."""
    found: list[Place] = []
    for document, parts in enumerate(row):
        for kind, count in parts:
            rows, columns = count if kind == "image" else (count, 1)
            span = len(found), len(found) + rows * columns
            for i in range(rows * columns):
                cell = divmod(i, columns) if kind == "image" else (-1, -1)
                found.append(Place(len(found), kind, document, span, cell, (rows, columns)))
    return found


def layout_of(rows: list[list[Place]]) -> tuple[Layout, np.ndarray]:
    """The layout, and segments."""
    spanning, array = ("image", "question"), lambda of, dtype: np.array([[of(p) for p in row] for row in rows], dtype)
    layout = Layout(
        array(lambda p: NUMBERS[p.kind], np.int8),
        array(lambda p: p.cell, np.int32),
        array(lambda p: p.size if p.kind == "image" else (0, 0), np.int32),
        array(lambda p: p.span if p.kind in spanning else (0, 0), np.int32),
    )
    return layout, array(lambda p: 0 if p.kind == "padding" else p.document + 1, np.int32)


def defined(rows: list[list[Place]], sees: Callable[[Place, Place, list[Place]], bool]) -> np.ndarray:
    """Every pair: positions of one document that `sees` allows."""
    out = np.zeros((len(rows), len(rows[0]), len(rows[0])), bool)
    for b, row in enumerate(rows):
        for q in row:
            for k in row:
                same = q.document == k.document and q.kind != "padding"
                out[b, q.index, k.index] = same and sees(q, k, row)
    return out


def held_to_the_laws(
    name: str, sees: Callable[..., bool], knobs: dict[str, Any], turned: Callable[..., int] | None = None
) -> masks.MaskBuilder:
    """Packed rows are the definition, tiles are sound, cuts are closed, a stream has the same rows and positions.

    `turned(place, row)` is what position encodings turn by; None: positions in the document.
    """
    builder, rows = masks.build({"name": name, **knobs}), [places(row) for row in ROWS]
    layout, segments = layout_of(rows)
    expected, T = defined(rows, lambda *pair: sees(builder.config, *pair)), segments.shape[1]

    @jax.jit
    def made(segments, layout):
        seq = Sequence(jnp.zeros_like(segments), segments, layout=layout).derived()
        seq = dataclasses.replace(seq, positions=seq.offsets)
        return builder.mask(seq, causal=True), builder.positions(seq)

    mask, positions = jax.tree.map(np.asarray, made(segments, layout))
    np.testing.assert_array_equal(np.broadcast_to(mask.visible(T, T)[:, 0], expected.shape), expected)
    for bq, bk in TILINGS:
        sound(tile_kinds(mask, T, T, bq, bk), expected[:, None], bq, bk)
    closed = closed_cuts(mask, T)
    really = np.array([[not seen[:p, p:].any() for p in range(T + 1)] for seen in expected])
    np.testing.assert_array_equal(np.broadcast_to(closed, really.shape), really)
    cuts = [0, *range(1, T, 4), T] if builder.streaming == "any" else np.flatnonzero(really.all(0)).tolist()
    streamed, stream_positions = _streamed(builder, layout, segments, cuts)
    np.testing.assert_array_equal(streamed, expected)
    turned = turned or (lambda p, row: p.index - next(x.index for x in row if x.document == p.document))
    for found in (positions, stream_positions):
        for row, of_row in zip(rows, found):
            assert [n for p, n in zip(row, of_row.tolist()) if p.kind != "padding"] == [
                turned(p, row) for p in row if p.kind != "padding"
            ]
    return builder


def _streamed(builder, layout, segments, cuts) -> tuple[np.ndarray, np.ndarray]:
    B, T = segments.shape
    slots = T + 3

    @jax.jit
    def piece(stream, segments, layout, stored, first):
        seq, stream = stream.extend(Sequence(jnp.zeros_like(segments), segments, layout=layout))
        seq = dataclasses.replace(seq, positions=seq.offsets)
        index = first + jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
        start = jnp.where(segments == 0, index + 1, index - seq.offsets)
        interval = Mask(start, jnp.broadcast_to(index + 1, start.shape))
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first, axis=1)
        stored = tuple(map(put, stored, builder.coordinates(seq)))
        return stream, stored, builder.rows(seq, stored, interval), builder.positions(seq, stored, index)

    stream, stored, seen, turned = Stream.start(B), (np.zeros((B, slots), np.int32),) * builder.stored, [], []
    for first, end in zip(cuts, cuts[1:]):
        cut = lambda x: x[:, first:end]
        stream, stored, rows, positions = piece(stream, cut(segments), jax.tree.map(cut, layout), stored, first)
        visible = jax.tree.map(np.asarray, rows).visible(end - first, slots)[:, 0]
        seen.append(np.broadcast_to(visible, (B, *visible.shape[1:])))
        turned.append(np.broadcast_to(positions, (B, end - first)))
    return np.concatenate(seen, axis=1)[..., :T], np.concatenate(turned, axis=1)


def by_hand(name: str, row: Any, **knobs: Any) -> tuple[list[str], list[int]]:
    """The matrix of one document, a string a row, and the positions, known while tracing."""
    of_row = places([row])
    layout, _ = layout_of([of_row])
    builder, n = masks.build({"name": name, **knobs}), len(of_row)
    seq = Sequence(np.arange(n, dtype=np.int32)[None], layout=layout)
    mask = builder.mask(seq, causal=True)
    assert mask.known()
    lines = ["".join("x" if seen else "." for seen in line) for line in mask.visible(n, n)[0, 0]]
    return lines, np.asarray(builder.positions(seq))[0].tolist()
