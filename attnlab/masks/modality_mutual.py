"""Modality-mutual attention: images see the question that is asked about them."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import jax
import numpy as np

from attnlab.batch import ANSWER, QUESTION
from attnlab.config import knob
from attnlab.masks.base import MaskConfig, Sequence, register
from attnlab.masks.layouts import LayoutMask, visual
from attnlab.ops.mask_algebra import either
from attnlab.ops.masks import NEVER, Array, Mask


@dataclasses.dataclass(frozen=True)
class ModalityMutualConfig(MaskConfig):
    """Knobs of modality-mutual attention."""

    begin: str = knob(
        "question",
        "where that which an image sees later begins: question; image: right behind the image, other images included",
        other=("image",),
        choices=("question", "image"),
    )


@register("modality_mutual")
class ModalityMutual(LayoutMask):
    """Causal, and an image sees the next question of its document, too, where no answer lies before that.

    With two layers or more, what lies between an image and the end of its question is known before it comes, through
    the image: images, text and the question itself. A loss may count answers, and text that lies elsewhere; as an image
    with an answer before the next question is causal, no answer is known early. A stream is cut outside of what reaches
    from an image to the end of its question.
    """

    Config = ModalityMutualConfig
    paper = "Wang et al. 2025, Seeing is Understanding: ... Modality-Mutual Attention ..., arXiv:2503.02597"
    extension = (
        "several images before one question, which do not see each other's future; several questions: an image is "
        "given the first, and none that an answer comes before"
    )
    stored = 0

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return ()

    def terms(self, seq: Sequence, keys: tuple[Array, ...], document: Array, index: Array, xp: ModuleType) -> Mask:
        causal = Mask(document, xp.broadcast_to(index + 1, document.shape))
        place = np.arange(document.shape[1], dtype=np.int32)
        following, answered = (_next(seq.layout.kind == kind, place, xp) for kind in (QUESTION, ANSWER))
        asked = following < answered
        of = lambda x: xp.take_along_axis(x, xp.where(asked, following, 0), axis=1)
        asked = visual(seq) & asked & (of(document) == document)
        begin, end = of(seq.layout.span[..., 0]), of(seq.layout.span[..., 1])
        if self.config.begin == "image":
            begin = seq.layout.span[..., 1]
        return either(causal, Mask(xp.where(asked, begin, 0), xp.where(asked, end, 0)))


def _next(which: Array, place: np.ndarray, xp: ModuleType) -> Array:
    """The place of the next such position at or behind each, [B, T]; NEVER: there is none."""
    at = xp.where(which, place, NEVER)
    return np.minimum.accumulate(at[:, ::-1], axis=1)[:, ::-1] if xp is np else jax.lax.cummin(at, axis=1, reverse=True)
