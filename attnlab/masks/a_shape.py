"""A window, and the first positions of each document: the shape of an A."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from attnlab.config import knob
from attnlab.masks.base import FAR, MaskConfig, Sequence, offsets, register
from attnlab.masks.patterns import Band, First, HeadMask, Pattern
from attnlab.ops.mask_algebra import both, either
from attnlab.ops.masks import Array, Mask


@dataclasses.dataclass(frozen=True)
class AShapeConfig(MaskConfig):
    """Knobs of a window with sinks."""

    window: int = knob(256, "nearest positions that are seen, the own one included", other=(3,), least=1, below=FAR)
    sinks: int = knob(4, "first positions of a document that all its positions see", other=(1,), least=0, below=FAR)


@register("a_shape")
class AShape(HeadMask):
    """A position sees the nearest `window` positions and its document's first `sinks`."""

    Config = AShapeConfig
    paper = "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453"
    extension = (
        "packed documents have their own sinks; all keys are kept in a stream, and positions are those of the text"
    )

    stored = 0

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        offset = offsets(seq)
        t = np.arange(offset.shape[1], dtype=np.int32)
        near = seq.mask(causal=True, window=self.config.window)
        return either(near, both(seq.mask(causal=True), Mask(None, t - offset + self.config.sinks)))

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return ()

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        index = interval.k_end - 1
        near = jnp.maximum(interval.k_start, index - (self.config.window - 1))
        first = jnp.minimum(interval.k_end, index - seq.offsets + self.config.sinks)
        return either(Mask(near, interval.k_end), Mask(interval.k_start, first))

    def span(self, length: int, *, causal: bool) -> float:
        return self.pattern().span(length)

    def pattern(self) -> Pattern:
        return Pattern(Band(0, self.config.window), First(self.config.sinks))
