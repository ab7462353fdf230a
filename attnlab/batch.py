"""What a batch is made of: stated by who yields it and by who takes it, and compared before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from attnlab.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch, told of one of its rows; the axis `batch` comes before the row's own.

    Attributes:
      shape: of a row; None in what a model takes: any size.
      dtype: e.g. "int32".
      axes: logical axes of the row, e.g. ("seq",); None for one that is never split over devices.
      ids: its values are ids below this; None: they are not, or it is not known yet.
      said: what sets `ids`, for messages.
      about: what the values are, where arrays of one form could be taken for each other.
      optional: a model takes it where it is there, and does without it.
    """

    shape: tuple[int | None, ...]
    dtype: str
    axes: tuple[str | None, ...]
    ids: int | None = None
    said: str = ""
    about: str = ""
    optional: bool = False


Spec = Mapping[str, Field]

# What a position of a row of text and images is: nothing, text, a cell of an image, text of a question, of an answer.
PADDING, TEXT, VISUAL, QUESTION, ANSWER = range(5)
LAYOUT = 7  # numbers that `layout` has of a position

# What `targets` are.
NEXT = "what comes next"
OWN = "the position's own class"


class RowLayout:
    """The layout of one row while it is made: text, and what is put into it.

    Attributes:
      columns: int32 `[T, LAYOUT]`, rows of `attnlab.ops.layout.Layout.of_columns`.
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


def counts_every_next(spec: Spec) -> bool:
    """Whether a loss on such batches counts what comes next at every position."""
    return "weights" not in spec and "targets" in spec and spec["targets"].about == NEXT


def require_match(taken: Spec, yielded: Spec, taker: str, source: str) -> None:
    """Raises ConfigError unless a source yields the batch that a model takes.

    Args:
      taken: what the model takes.
      yielded: what the source yields.
      taker, source: what they are, as a config says it, e.g. "model.name = 'lm'".
    """
    needed = {name for name, field in taken.items() if not field.optional}
    here = needed <= yielded.keys() <= taken.keys()
    if not here or not all(_fits(taken[name], field) for name, field in yielded.items()):
        raise ConfigError(
            f"{source} yields {', '.join(_arrays(yielded))}; {taker} takes {', '.join(_arrays(taken))}: "
            "they do not fit; allowed: data of that form, or a model for this one"
        )
    for name in yielded:
        field, ids = taken[name], yielded[name].ids
        if field.ids is not None and ids is not None and ids > field.ids:
            raise ConfigError(
                f"{field.said} = {field.ids} is smaller than {yielded[name].said}; allowed: {ids} or more"
            )


def _fits(taken: Field, yielded: Field) -> bool:
    sizes = len(taken.shape) == len(yielded.shape) and all(
        a is None or a == b for a, b in zip(taken.shape, yielded.shape, strict=True)
    )
    return sizes and (taken.dtype, taken.about) == (yielded.dtype, yielded.about)


def _arrays(spec: Spec) -> list[str]:
    def shown(name: str, field: Field) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in field.shape)
        about = f" ({field.about})" if field.about else ""
        return f"{name} {field.dtype}[{sizes}]{about}{' if there' if field.optional else ''}"

    return sorted(shown(name, field) for name, field in spec.items())
