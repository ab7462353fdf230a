"""What masks must know about a row of text and images: the kind of each position, and how far images reach.

All of it is per position, so that packing and cutting a sequence slice it like its positions.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from attnlab.ops.masks import Array

PADDING, TEXT, VISUAL, QUESTION, ANSWER = range(5)
COLUMNS = 7  # numbers of a position, as batches have them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Of every position of a batch.

    kind: int8 `[B, T]`: PADDING, TEXT, VISUAL, QUESTION (text of a question), ANSWER (text of an answer).
    cell: int32 `[B, T, 2]`, row and column in its image; -1 elsewhere.
    size: int32 `[B, T, 2]`, rows and columns of its image; 0 elsewhere.
    span: int32 `[B, T, 2]`, first position of its image, or of its question, and one past the last, counted from where
        the row or the stream begins; 0 elsewhere.
    """

    kind: Array
    cell: Array
    size: Array
    span: Array

    @classmethod
    def of_columns(cls, columns: Array) -> Layout:
        """Of int32 `[B, T, COLUMNS]`: kind, cell, size and span side by side."""
        kind, cell, size, span = columns[..., 0], columns[..., 1:3], columns[..., 3:5], columns[..., 5:7]
        return cls(kind.astype(np.int8), cell, size, span)


class RowLayout:
    """The layout of one row while it is made: text, and what is put into it.

    Attributes:
      columns: int32 `[T, COLUMNS]`, rows of `Layout.of_columns`.
    """

    def __init__(self, length: int):
        self.columns = np.tile(np.array([TEXT, -1, -1, 0, 0, 0, 0], np.int32), (length, 1))

    def image(self, start: int, size: tuple[int, int]) -> None:
        """Cells of an image of rows and columns, row by row, from position `start` on."""
        rows, columns = size
        end = start + rows * columns
        cells = np.indices(size).reshape(2, -1).T
        facts = np.tile([rows, columns, start, end], (end - start, 1))
        self.columns[start:end] = np.column_stack([np.full(end - start, VISUAL), cells, facts])

    def question(self, start: int, end: int) -> None:
        """The text of a question, that which opens the answer included."""
        self.columns[start:end] = QUESTION, -1, -1, 0, 0, start, end

    def answer(self, start: int, end: int) -> None:
        """The text of an answer."""
        self.columns[start:end] = ANSWER, -1, -1, 0, 0, 0, 0
