"""Every position of a residue: the grid that attention to frames and rows of images leaves in a sequence."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from attnlab.config import knob
from attnlab.masks.base import FAR, MaskConfig, Sequence, offsets, register
from attnlab.masks.patterns import Band, HeadMask, Pattern, Residue
from attnlab.ops.mask_algebra import either
from attnlab.ops.masks import Array, Axis, Mask


@dataclasses.dataclass(frozen=True)
class GridPatternConfig(MaskConfig):
    """Knobs of the grid."""

    stride: int = knob(
        16, "distance of neighbours in the grid: tokens of an image's row, or of a frame", other=(3,), least=1
    )
    phase: int = knob(
        0, "position i sees those that lie phase behind a multiple of stride from it", other=(1,), least=0, below=FAR
    )
    local: int = knob(
        0, "nearest positions that are seen, too, the own one included; 0: none", other=(2,), least=0, below=FAR
    )


@register("grid_pattern")
class GridPattern(HeadMask):
    """Position i sees j where (j - phase - i) is a multiple of `stride`, and the nearest `local` positions."""

    Config = GridPatternConfig
    paper = "Li et al. 2025, MMInference: Modality-Aware Permutation Sparse Attention, arXiv:2504.16083"
    extension = "the nearest positions beside the grid; a grid that counts from where a document begins"
    bidirectional = True

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        key, lo = self.coordinates(seq)[0], self._wanted(offsets(seq))
        near = None if not self.config.local else seq.mask(causal=causal, window=self.config.local)
        return self._narrowed(seq.mask(causal=causal), near, key, lo)

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return ((offsets(seq) % self.config.stride).astype(np.int32),)

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        near = None
        if self.config.local:
            near = Mask(jnp.maximum(interval.k_start, interval.k_end - self.config.local), interval.k_end)
        return self._narrowed(interval, near, stored[0], self._wanted(seq.offsets))

    def span(self, length: int, *, causal: bool) -> float:
        c, t = self.config, np.arange(length)
        residue, end = self._wanted(t), t + 1 if causal else np.full(length, length)
        below = lambda x: np.maximum(0, (x - 1 - residue) // c.stride + 1)  # of the residue, in [0, x)
        first, last = np.maximum(0, t - c.local + 1), np.minimum(end, t + max(1, c.local))
        near = (last - first - (below(last) - below(first))) * (c.local > 0)
        return float((below(end) + near).mean())

    def pattern(self) -> Pattern:
        return Pattern(Band(0, self.config.local), Residue(self.config.stride, self.config.phase))

    def _wanted(self, offset: Array) -> Array:
        return ((offset + self.config.phase) % self.config.stride).astype(np.int32)

    def _narrowed(self, interval: Mask, near: Mask | None, key: Array, lo: Array) -> Mask:
        axis = Axis(key, lo, lo + 1, name="residue")
        grid = dataclasses.replace(interval, axes=(axis,), documents=False)
        return grid if near is None else either(grid, near)
