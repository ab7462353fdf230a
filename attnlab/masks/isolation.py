"""Subjects that do not see each other: positions that carry a subject's number, before a background."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab.config import knob
from attnlab.masks.base import MaskConfig, NodeMask, register


@dataclasses.dataclass(frozen=True)
class IsolationConfig(MaskConfig):
    """Knobs of isolated subjects."""

    subjects: int = knob(4, "numbers of Sequence.node are below it; 0 is the background", other=(3,), least=1, below=33)
    background: bool = knob(True, "whether the background sees the subjects, and they it", other=(False,))


@register("isolation")
class Isolation(NodeMask):
    """A position sees those of its own subject, and the background sees all and is seen by all.

    Positions whose number is none of the subjects' see nothing, and nobody sees them.
    """

    Config = IsolationConfig
    paper = "He et al. 2024, Improving Multi-Subject Consistency ... with Isolation and Reposition Attention"
    extension = "a background that stands apart as a knob"

    def table(self) -> np.ndarray:
        allowed = np.eye(self.config.subjects, dtype=bool)
        if self.config.background:
            allowed[0], allowed[:, 0] = True, True
        return allowed
