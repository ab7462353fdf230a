"""Power-of-two blocks: near blocks, and those at distances 1, 2, 4, 8, ..."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab.config import knob
from attnlab.masks.base import BlockMask, MaskConfig, register


@dataclasses.dataclass(frozen=True)
class PowerBlocksConfig(MaskConfig):
    """Knobs of power-of-two blocks."""

    block: int = knob(64, "positions of a block, counted from where the document begins", other=(2,), least=1)
    local: int = knob(1, "nearest blocks that are seen, the own one included", other=(2,), least=1)
    sinks: int = knob(1, "first blocks of a document that all its positions see", other=(0,), least=0)


@register("power_blocks")
class PowerBlocks(BlockMask):
    """Block i sees block j <= i where i - j is below `local` or a power of two, and where j is below `sinks`.

    After L layers every block has heard of the 2^L before it, while one layer reads O(log n) blocks. No key can be left
    out of a cache: any may come to lie a power of two back.
    """

    Config = PowerBlocksConfig
    paper = "Chen et al. 2025, PowerAttention: Exponentially Scaling of Receptive Fields, arXiv:2503.03588"
    extension = "the size of a block, the number of near ones and of sinks as knobs"

    def block(self) -> int:
        return self.config.block

    def table(self, blocks: int) -> np.ndarray:
        c, i = self.config, np.arange(blocks)
        distance = i[:, None] - i
        power = (distance > 0) & (distance & (distance - 1) == 0)
        return (distance >= 0) & ((distance < c.local) | power | (i < c.sinks))
