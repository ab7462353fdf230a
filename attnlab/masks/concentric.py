"""Concentric causal attention: an image as rings from its border to its centre."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import numpy as np

from attnlab.config import knob
from attnlab.masks.base import MaskConfig, Sequence, offsets, register
from attnlab.masks.layouts import LayoutMask, visual
from attnlab.ops.mask_algebra import either
from attnlab.ops.masks import NEVER, Array, Axis, Mask, numpy_if


@dataclasses.dataclass(frozen=True)
class ConcentricConfig(MaskConfig):
    """Knobs of concentric attention."""

    ring_positions: bool = knob(
        True, "whether position encodings turn by rings, of which an image has as many as half its shorter side",
        other=(False,),
    )  # fmt: skip


@register("concentric")
class Concentric(LayoutMask):
    """A cell in ring r, counted from the border, sees its image's rings up to r and all before the image.

    Text is causal. By `ring_positions` a cell stands r after where its image begins, and text goes on after the last
    ring, so that it is never farther from an image than the rings are many. A stream is cut outside of images.
    """

    Config = ConcentricConfig
    paper = "Xing et al. 2024, Mitigating Object Hallucination via Concentric Causal Attention, arXiv:2410.15926"
    extension = "several images in a row, of any size"
    stored = 2

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        """Ring, -1 of text; and by how much the positions behind are less for an image that ends here."""
        layout, of_image = seq.layout, visual(seq)
        xp = numpy_if(isinstance(layout.kind, np.ndarray))
        inside = xp.minimum(layout.cell, layout.size - 1 - layout.cell).min(-1)
        last = of_image & xp.all(layout.cell == layout.size - 1, axis=-1)
        rings = (layout.size.min(-1) + 1) // 2
        less = xp.where(last, layout.size[..., 0] * layout.size[..., 1] - rings, 0)
        return xp.where(of_image, inside, -1).astype(xp.int32), less.astype(xp.int32)

    def terms(self, seq: Sequence, keys: tuple[Array, ...], document: Array, index: Array, xp: ModuleType) -> Mask:
        of_image, ring = visual(seq), self.coordinates(seq)[0]
        first, end = seq.layout.span[..., 0], seq.layout.span[..., 1]
        # Rings are those of the own image alone: of images before it all is seen, whatever ring it lies in.
        rings = Axis(keys[0], None, xp.where(of_image, ring + 1, NEVER), name="ring")
        own = Mask(xp.where(of_image, first, document), xp.where(of_image, end, index + 1), axes=(rings,))
        return either(own, Mask(document, xp.where(of_image, first, 0)))

    def positions(self, seq: Sequence, keys: tuple[Array, ...] | None = None, index: Array | None = None) -> Array:
        if not self.config.ring_positions:
            return seq.positions
        own, offset = self.coordinates(seq), offsets(seq)
        if keys is None:
            keys, index = own, np.arange(offset.shape[1], dtype=np.int32)[None]
        xp = numpy_if(all(isinstance(x, np.ndarray) for x in (*keys, index, offset)))
        so_far = xp.pad(xp.cumsum(keys[1], axis=1, dtype=xp.int32), ((0, 0), (1, 0)))
        of = lambda at: xp.take_along_axis(so_far, xp.broadcast_to(at, own[0].shape), axis=1)
        less = of(index) - of(index - offset)
        begun = xp.where(visual(seq), index - seq.layout.span[..., 0] - own[0], 0)
        return (offset - less - begun).astype(xp.int32)
