"""Images whose positions attend to near ones of their image only."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import numpy as np

from attnlab.config import knob
from attnlab.masks.base import FAR, MaskConfig, Sequence, register
from attnlab.masks.layouts import LayoutMask, visual
from attnlab.ops.mask_algebra import either
from attnlab.ops.masks import NEVER, Array, Axis, Mask, numpy_if


@dataclasses.dataclass(frozen=True)
class VisualNeighboursConfig(MaskConfig):
    """Knobs of near cells."""

    radius: int = knob(
        3, "rows and columns between a cell and the farthest that it sees", other=(1,), least=0, below=FAR
    )


@register("visual_neighbours")
class VisualNeighbours(LayoutMask):
    """Causal, but of its image a cell sees only those before it that lie within `radius` rows and columns."""

    Config = VisualNeighboursConfig
    paper = "Zhang et al. 2024, Treat Visual Tokens as Text? ..., arXiv:2410.06169"
    extension = "the distance is the larger of that in rows and that in columns"
    streaming, stored = "any", 2
    span_note = "counted as causal attention: images see less"

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        xp = numpy_if(isinstance(seq.layout.cell, np.ndarray))
        return tuple(seq.layout.cell[..., i].astype(xp.int32) for i in range(2))

    def terms(self, seq: Sequence, keys: tuple[Array, ...], document: Array, index: Array, xp: ModuleType) -> Mask:
        of_image, first, radius = visual(seq), seq.layout.span[..., 0], self.config.radius

        def near(key: Array, cell: Array, name: str) -> Axis:
            low, high = xp.where(of_image, cell - radius, -1), xp.where(of_image, cell + radius + 1, NEVER)
            return Axis(key, low, high, name=name)

        axes = tuple(map(near, keys, self.coordinates(seq), ("row", "column")))
        own = Mask(xp.where(of_image, first, document), xp.broadcast_to(index + 1, document.shape), axes=axes)
        return either(own, Mask(document, xp.where(of_image, first, 0)))
