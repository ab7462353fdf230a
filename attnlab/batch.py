"""What a batch is made of: stated by who yields it and by who takes it, and compared before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from attnlab.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch, told of one of its rows; the axis `batch` comes before the row's own.

    Attributes:
      shape: of a row.
      dtype: e.g. "int32".
      axes: logical axes of the row, e.g. ("seq",); None for one that is never split over devices.
      ids: its values are ids below this; None: they are not, or it is not known yet.
      said: what sets `ids`, for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    ids: int | None = None
    said: str = ""


Spec = Mapping[str, Field]


def require_match(taken: Spec, yielded: Spec, taker: str, source: str) -> None:
    """Raises ConfigError unless a source yields the batch that a model takes.

    Args:
      taken: what the model takes.
      yielded: what the source yields.
      taker, source: what they are, as a config says it, e.g. "model.name = 'lm'".
    """
    if _arrays(taken) != _arrays(yielded):
        raise ConfigError(
            f"{source} yields {', '.join(_arrays(yielded))}; {taker} takes {', '.join(_arrays(taken))}: "
            "they do not fit; allowed: data of that form, or a model for this one"
        )
    for name, field in taken.items():
        ids = yielded[name].ids
        if field.ids is not None and ids is not None and ids > field.ids:
            raise ConfigError(
                f"{field.said} = {field.ids} is smaller than {yielded[name].said}; allowed: {ids} or more"
            )


def _arrays(spec: Spec) -> list[str]:
    return sorted(f"{name} {field.dtype}{list(field.shape)}" for name, field in spec.items())
