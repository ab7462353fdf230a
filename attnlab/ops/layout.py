"""What masks must know about a row of text and images: the kind of each position, and how far images reach.

All of it is per position, so that packing and cutting a sequence slice it like its positions.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from attnlab.ops.masks import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Of every position of a batch.

    kind: int8 `[B, T]`: PADDING, TEXT, VISUAL, QUESTION or ANSWER of `attnlab.batch`.
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
        """Of int32 `[B, T, LAYOUT]`: kind, cell, size and span side by side."""
        kind, cell, size, span = columns[..., 0], columns[..., 1:3], columns[..., 3:5], columns[..., 5:7]
        return cls(kind.astype(np.int8), cell, size, span)
