"""Radial attention: what two frames of a video see of each other narrows with the time between them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from attnlab.config import knob
from attnlab.masks.base import BlockMask, MaskConfig, register


@dataclasses.dataclass(frozen=True)
class RadialConfig(MaskConfig):
    """Knobs of radial attention."""

    frame: int = knob(256, "positions of a frame", other=(6,), least=1)
    frames: int | None = knob(
        None, "frames that a document begins with; from the block on in which they end all is text, which sees all and "
        "is seen by all; none: there is no text",
        other=(2,), least=1,
    )  # fmt: skip
    decay: float = knob(0.5, "factor on the width of the band between two frames", other=(1.0,), above=0)
    near: str = knob(
        "whole", "what neighbouring frames see of each other: whole, or half: a band half a frame wide",
        other=("half",), choices=("whole", "half"),
    )  # fmt: skip
    block: int = knob(128, "positions of a block, counted from where the document begins", other=(2,), least=1)


@register("radial")
class Radial(BlockMask):
    """Of frames of s positions, dt apart, position i of one sees position j of the other where |i - j| is at most a
    width; the first frame is seen by all.

    The width is s for one frame (and its neighbours, see `near`), else 2^bits(s) / 2^bits(dt) decay, and at least a
    block; bits(n) is how many binary digits n has. Where 2^bits(s) / 2^bits(dt) is below a block, only each dt that is
    a multiple of how often it goes into a block has a band. A block of rows sees a block of keys where for some pair of
    frames more than 0.6 of the keys that any row sees are seen by more than a third of a block's rows.
    """

    Config = RadialConfig
    paper = "Li et al. 2025, Radial Attention: O(n log n) Sparse Attention, arXiv:2506.19852"
    extension = (
        "frames that are no whole number of blocks lose nothing at their ends; a causal form; frames begin anew with "
        "each packed document"
    )
    bidirectional = True

    def block(self) -> int:
        return self.config.block

    def table(self, blocks: int) -> np.ndarray:
        c = self.config
        count = -(-blocks * c.block // c.frame)
        sees = np.zeros((blocks, blocks), bool)
        if c.frames is not None:
            count, border = min(count, c.frames), c.frames * c.frame // c.block
            sees[border:], sees[:, border:] = True, True
        for i in range(count):
            for j in range(count):
                width = c.frame if j == 0 else self.width(abs(i - j))
                if width is None:
                    continue
                rows, columns = i * c.frame, j * c.frame
                found = shrunk(c.frame, width, rows % c.block, columns % c.block, c.block)
                r, k = rows // c.block, columns // c.block
                part = sees[r : r + len(found), k : k + found.shape[1]]
                part |= found[: part.shape[0], : part.shape[1]]
        return sees

    def width(self, apart: int) -> int | None:
        """Of the band between frames so far apart; None: there is none."""
        c = self.config
        if apart == 0 or (apart == 1 and c.near == "whole"):
            return c.frame
        if apart == 1:
            return c.frame // 2
        length = 2.0 ** (c.frame.bit_length() - apart.bit_length())
        if length < c.block and apart % int(c.block / length):
            return None
        return int(max(c.block, length * c.decay))


@functools.lru_cache(maxsize=1024)
def shrunk(frame: int, width: int, row: int, column: int, block: int) -> np.ndarray:
    """Which blocks of rows of a frame see which blocks of keys of another, bool; the frames begin `row` and `column`
    positions into a block."""
    tiles = lambda first: np.arange(-first, frame, block)  # where each block begins, counted from the frame's begin
    start = tiles(row)[:, None]
    key = np.arange(frame)
    low, high = np.maximum(start, 0), np.minimum(start + block, frame)
    seen = np.minimum(high, key + width + 1) - np.maximum(low, key - width)  # rows of the block that see each key
    at = np.maximum(tiles(column), 0)
    many, some = (np.add.reduceat(x, at, axis=1) for x in (3 * seen > block, seen > 0))
    return many > 0.6 * some
