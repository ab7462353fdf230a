"""Blocks by a table that is given: whatever was found elsewhere, radial attention's tables among them."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab.config import knob
from attnlab.errors import UserError
from attnlab.masks.base import BlockMask, MaskConfig, register, relation, require_relation


@dataclasses.dataclass(frozen=True)
class StaticBlocksConfig(MaskConfig):
    """Knobs of a table of blocks."""

    path: str = knob("", "a .npy file, bool [n, n]: which blocks (rows) see which", other=("blocks.npy",))
    block: int = knob(64, "positions of a block, counted from where the document begins", other=(2,), least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_relation(self.path)


@register("static_blocks")
class StaticBlocks(BlockMask):
    """Block i sees block j where the file says so; in causal mixing the earlier ones of these.

    Raises UserError for a document of more blocks than the table has, where that is known before a run. Else what lies
    behind the last block gives NaN, as jit can raise nothing; where mixing is not causal, all of the document does.
    """

    Config = StaticBlocksConfig
    paper = "Li et al. 2025, Radial Attention: O(n log n) Sparse Attention, arXiv:2506.19852 (as one such table)"
    extension = "tables come from a file; they begin anew with each packed document"
    bidirectional = True

    def __init__(self, config: StaticBlocksConfig):
        super().__init__(config)
        self.sees = relation(self.name, config.path)

    def block(self) -> int:
        return self.config.block

    def most_blocks(self) -> int:
        return len(self.sees)

    def table(self, blocks: int) -> np.ndarray:
        if blocks > len(self.sees):
            raise UserError(
                f"mask static_blocks: {blocks} blocks of {self.config.block} positions, the table of "
                f"{self.config.path!r} has {len(self.sees)}; allowed: shorter documents, or a larger block"
            )
        return self.sees[:blocks, :blocks]
