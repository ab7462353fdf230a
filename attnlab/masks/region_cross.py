"""Words that are seen in their region alone: cross-attention of an image to text, parts of which are of its parts."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab.config import knob
from attnlab.masks.base import ContextMask, MaskConfig, register
from attnlab.ops.masks import Array, Groups, numpy_if


@dataclasses.dataclass(frozen=True)
class RegionCrossConfig(MaskConfig):
    """Knobs of regions."""

    regions: int = knob(4, "numbers of regions are 1 to it; 0 is of none of them", other=(2,), least=1, below=32)
    overlap: bool = knob(
        False,
        "whether Sequence.node is a set of regions, the sum of 2^(r - 1) over those that a position is in, "
        "in place of the one region",
        other=(True,),
    )


@register("region_cross")
class RegionCross(ContextMask):
    """A position sees the words of no region, and those of the regions that it is in.

    `Context.node` is the region of a word, or 0, `Sequence.node` that of a position, or 0, or a set of regions. Words
    and positions of another number see nothing, and nobody sees them. A position that sees no word gets 0.
    """

    Config = RegionCrossConfig
    paper = "Wang et al. 2024, PrimeComposer: ... Image Composition with Attention Steering, arXiv:2403.05053"
    extension = "several regions, which may overlap, as numbers; 0 where no word is seen"

    def groups(self, own: Array, rows: Array) -> Groups:
        R, (xp, kp) = self.config.regions, (numpy_if(isinstance(x, np.ndarray)) for x in (own, rows))
        # One past the last set of 31 regions, 2^31, is no int32, and cannot be compared with.
        inside = (own >> R) == 0 if self.config.overlap else (own >= 0) & (own <= R)
        number = xp.where(inside, own, 0).astype(xp.uint32)
        one = xp.uint32(1)
        regions = number << one if self.config.overlap else one << number
        bits = xp.where(inside, regions | one, xp.uint32(0))  # bit 0: words of no region
        group = kp.where((rows >= 0) & (rows <= R), rows, -1).astype(kp.int32)
        return Groups(group, bits[:, None, :, None])
