"""Base of masks that read where images and questions lie (`attnlab.ops.layout`)."""

from __future__ import annotations

import abc
from types import ModuleType

import numpy as np

from attnlab.batch import VISUAL
from attnlab.masks.base import MaskBuilder, Sequence, offsets
from attnlab.ops.masks import Array, Mask, numpy_if


class LayoutMask(MaskBuilder):
    """Text is causal; what images see, and who sees them, differs.

    Positions of an image may see later ones, so that mixing is causal for text alone, and what is asked of a stream is
    that it is cut where its `streaming` says. `span` is that of text.
    """

    needs = ("layout",)
    streaming = "closed"
    span_note = "counted as causal attention: images see other positions, later ones among them"

    @abc.abstractmethod
    def terms(self, seq: Sequence, keys: tuple[Array, ...], document: Array, index: Array, xp: ModuleType) -> Mask:
        """The mask of rows.

        Args:
          seq: the rows; a padding row is no visual one.
          keys: `coordinates` of all keys.
          document: [B, T], index of the first position of each row's document; of padding rows one past the row's own.
          index: [B or 1, T], index of each row in the whole row or the stream.
          xp: NumPy where all of it is known while tracing, else jax's.
        """

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        offset = offsets(seq)
        index = np.arange(offset.shape[1], dtype=np.int32)[None]
        return self._terms(seq, self.coordinates(seq), index - offset, index)

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        index = interval.k_end - 1
        return self._terms(seq, stored, index - seq.offsets, index)

    def span(self, length: int, *, causal: bool) -> float:
        return (length + 1) / 2

    def _terms(self, seq: Sequence, keys: tuple[Array, ...], document: Array, index: Array) -> Mask:
        if seq.padding is not None:
            document = numpy_if(False).where(seq.padding, index + 1, document)
        known = all(isinstance(x, np.ndarray) for x in (document, index, seq.layout.kind))
        return self.terms(seq, keys, document, index, numpy_if(known))


def visual(seq: Sequence) -> Array:
    """Which positions are of an image, bool [B, T]."""
    return seq.layout.kind == VISUAL
