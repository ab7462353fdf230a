"""What masks must know about a row of text and images: the kind of each position, and how far images reach.

All of it is per position, so that packing and cutting a sequence slice it like its positions.
"""

from __future__ import annotations

import dataclasses

import jax

from attnlab.ops.masks import Array

PADDING, TEXT, VISUAL, QUESTION, ANSWER = range(5)


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
