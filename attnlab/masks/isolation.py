"""Subjects that do not see each other: positions that carry a subject's number, before a background."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from attnlab.config import knob
from attnlab.masks.base import MaskBuilder, MaskConfig, Sequence, register
from attnlab.ops.mask_algebra import packed_bits
from attnlab.ops.masks import Array, Groups, Mask, numpy_if


@dataclasses.dataclass(frozen=True)
class IsolationConfig(MaskConfig):
    """Knobs of isolated subjects."""

    subjects: int = knob(4, "numbers of Sequence.node are below it; 0 is the background", other=(3,), least=1, below=33)
    background: bool = knob(True, "whether the background sees the subjects, and they it", other=(False,))


@register("isolation")
class Isolation(MaskBuilder):
    """A position sees those of its own subject, and the background sees all and is seen by all.

    Positions whose number is none of the subjects' see nothing, and nobody sees them.
    """

    Config = IsolationConfig
    paper = "He et al. 2024, Improving Multi-Subject Consistency ... with Isolation and Reposition Attention"
    extension = "a background that stands apart as a knob"
    needs = ("node",)
    bidirectional = True

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        return self._narrowed(seq.mask(causal=causal), seq, seq.node)

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return (seq.node,)

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        return self._narrowed(interval, seq, stored[0])

    def span(self, length: int, *, causal: bool) -> float:
        """That of a mask that hides nothing: how large subjects are is not known before."""
        return (length + 1) / 2 if causal else float(length)

    def _narrowed(self, interval: Mask, seq: Sequence, keys: Array) -> Mask:
        n = self.config.subjects
        allowed = np.eye(n, dtype=bool)
        if self.config.background:
            allowed[0], allowed[:, 0] = True, True
        table = np.concatenate([packed_bits(allowed)[:, 0], np.zeros(1, np.uint32)])  # the last: of no subject
        of = lambda node: numpy_if(isinstance(node, np.ndarray)).where((node >= 0) & (node < n), node, n)
        own = of(seq.node)
        bits = table[own] if isinstance(own, np.ndarray) else jnp.asarray(table)[own]
        group = numpy_if(isinstance(keys, np.ndarray)).where((keys >= 0) & (keys < n), keys, -1)
        return dataclasses.replace(interval, groups=Groups(group, bits[:, None, :, None]), documents=False)
