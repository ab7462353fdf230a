"""Images whose positions do not attend to each other."""

from __future__ import annotations

import dataclasses
from types import ModuleType

from attnlab.config import knob
from attnlab.masks.base import MaskConfig, Sequence, register
from attnlab.masks.layouts import LayoutMask, visual
from attnlab.ops.mask_algebra import either
from attnlab.ops.masks import Array, Mask


@dataclasses.dataclass(frozen=True)
class NoVisualSelfConfig(MaskConfig):
    """Knobs of images without attention to themselves."""

    pre_text: bool = knob(True, "whether an image sees what lies before it", other=(False,))


@register("no_visual_self")
class NoVisualSelf(LayoutMask):
    """A position of an image sees itself, and what lies before the image; text sees all before it, images included."""

    Config = NoVisualSelfConfig
    paper = (
        "Yuan et al. 2025, SAISA: Towards Multimodal Large Language Models with Both Training and Inference Efficiency"
    )
    extension = "what lies before an image as a knob"
    streaming, stored = "any", 0
    span_note = "counted as causal attention: images see less"

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return ()

    def terms(self, seq: Sequence, keys: tuple[Array, ...], document: Array, index: Array, xp: ModuleType) -> Mask:
        of_image = visual(seq)
        if not self.config.pre_text:
            return Mask(xp.where(of_image, index, document), xp.broadcast_to(index + 1, document.shape))
        before = Mask(document, xp.where(of_image, seq.layout.span[..., 0], index + 1))
        return either(before, Mask(xp.where(of_image, index, index + 1), xp.broadcast_to(index + 1, document.shape)))
