"""Subjects that do not see each other: positions that carry a subject's number, before a background."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.masks.base import MaskConfig, NodeMask, register


@dataclasses.dataclass(frozen=True)
class IsolationConfig(MaskConfig):
    """Knobs of isolated subjects."""

    subjects: int = knob(4, "numbers of Sequence.node are below it; 0 is the background", other=(3,), least=1, below=33)
    background: bool = knob(True, "whether the background sees the subjects, and they it", other=(False,))
    allowed: tuple[tuple[bool, ...], ...] | None = knob(
        None,
        "which number (rows) sees which, in place of what background says; one may see another that does not see it",
        other=(((True, True, False, True), (False, True, False, False), (True,) * 4, (False, False, False, True)),),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allowed is None:
            return
        n = self.subjects
        square = len(self.allowed) == n and all(len(row) == n for row in self.allowed)
        config_lib.require(square, "allowed", self.allowed, f"{n} rows of {n} truth values (subjects = {n}), or none")
        config_lib.require(self.background, "background", self.background, "true, the default, where allowed is set")


@register("isolation")
class Isolation(NodeMask):
    """A position sees those of its own subject, and the background sees all and is seen by all; or what `allowed` says.

    Positions whose number is none of the subjects' see nothing, and nobody sees them.
    """

    Config = IsolationConfig
    paper = "He et al. 2024, Improving Multi-Subject Consistency ... with Isolation and Reposition Attention"
    extension = "a background that stands apart, and any other rule of who sees whom, as knobs"

    def table(self) -> np.ndarray:
        if self.config.allowed is not None:
            return np.array(self.config.allowed, bool)
        allowed = np.eye(self.config.subjects, dtype=bool)
        if self.config.background:
            allowed[0], allowed[:, 0] = True, True
        return allowed
