"""Modality-mutual attention: images see the question that is asked about them."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import jax
import numpy as np

from attnlab.batch import QUESTION
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
    """Causal, and an image sees the next question of its document, too.

    With two layers or more, positions of the question see later ones through the image: a loss may count answers only.
    A stream is cut outside of what reaches from an image to the end of its question.
    """

    Config = ModalityMutualConfig
    paper = "Wang et al. 2025, Seeing is Understanding: ... Modality-Mutual Attention ..., arXiv:2503.02597"
    extension = "several images before one question, which do not see each other's future"
    stored = 0

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return ()

    def terms(self, seq: Sequence, keys: tuple[Array, ...], document: Array, index: Array, xp: ModuleType) -> Mask:
        causal = Mask(document, xp.broadcast_to(index + 1, document.shape))
        place = np.arange(document.shape[1], dtype=np.int32)
        at = xp.where(seq.layout.kind == QUESTION, place, NEVER)
        if xp is np:
            following = np.minimum.accumulate(at[:, ::-1], axis=1)[:, ::-1]
        else:
            following = jax.lax.cummin(at, axis=1, reverse=True)
        asked = following != NEVER
        of = lambda x: xp.take_along_axis(x, xp.where(asked, following, 0), axis=1)
        asked = visual(seq) & asked & (of(document) == document)
        begin, end = of(seq.layout.span[..., 0]), of(seq.layout.span[..., 1])
        if self.config.begin == "image":
            begin = seq.layout.span[..., 1]
        return either(causal, Mask(xp.where(asked, begin, 0), xp.where(asked, end, 0)))
