"""A window of its own for every head, and sinks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.masks.base import FAR, MaskBuilder, MaskConfig, Sequence, offsets, register
from attnlab.ops.mask_algebra import both, either
from attnlab.ops.masks import Array, Axis, Mask, numpy_if


@dataclasses.dataclass(frozen=True)
class SpansConfig(MaskConfig):
    """Knobs of spans."""

    by_head = "spans"

    spans: tuple[int, ...] = knob(
        (64, 128, 256, 512),
        "nearest positions that each query head sees, the own one included; one number: all heads",
        other=((2, 3, 1, 5),),
    )
    sinks: int = knob(64, "first positions of a document that all its positions see", other=(1,), least=0, below=FAR)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = bool(self.spans) and all(isinstance(s, int) and s >= 1 for s in self.spans)
        config_lib.require(ok, "spans", self.spans, "numbers, each 1 or more: one for each query head, or one for all")


@register("spans")
class Spans(MaskBuilder):
    """Query head h sees the nearest `spans[h]` positions, and its document's first `sinks`.

    All keys are kept in a stream, as the widest head may need them.
    """

    Config = SpansConfig
    paper = "Fu et al. 2024, MoA: Mixture of Sparse Attention for Automatic LLM Compression, arXiv:2406.14909"
    extension = "spans are given, not searched, and do not grow with the length; sinks are positions, not a block"

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        offset = offsets(seq)
        t = np.arange(offset.shape[1], dtype=np.int32)
        sinks = both(seq.mask(causal=True), Mask(None, t - offset + self.config.sinks))
        return either(self._near(seq.mask(causal=True), offset, offset), sinks)

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return (offsets(seq).astype(np.int32),)

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        first = jnp.minimum(interval.k_end, interval.k_end - 1 - seq.offsets + self.config.sinks)
        return either(self._near(interval, seq.offsets, stored[0]), Mask(interval.k_start, first))

    def span(self, length: int, *, causal: bool) -> float:
        c, t = self.config, np.arange(1, length + 1)
        seen = [np.minimum(t, np.minimum(t, w) + np.minimum(np.maximum(t - w, 0), c.sinks)).mean() for w in c.spans]
        return float(np.mean(seen))

    def _near(self, interval: Mask, rows: Array, keys: Array) -> Mask:
        xp = numpy_if(isinstance(rows, np.ndarray))
        widths = xp.asarray(self.config.spans, xp.int32)[:, None]
        axis = Axis(keys, rows[:, None] - widths + 1, name="position")
        return dataclasses.replace(interval, axes=(axis,), documents=False)
