"""Questions about images in a row of text: which symbol lies beside another one.

A row is text with blocks laid into it: `images` blocks `name cells ..`, in any order, then `questions` blocks
`ASK name symbol direction TELL answer`. An image is side x side symbols, all different, row by row, with a name of its
own; at TELL is to be told which symbol lies beside the one asked about, in that direction, in the image of that name.

Ids: ASK, TELL, four directions, names, symbols, text. Batches also say where images and questions lie (`layout`), for
masks that read it, and `node`: 0 of text, n of the n-th image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, buckets, other_than, place

ASK, TELL, DIRECTIONS = 0, 1, 2
BESIDE = {"right": (0, 1), "left": (0, -1), "below": (1, 0), "above": (-1, 0)}
NAMES = DIRECTIONS + len(BESIDE)
ASKED, QUESTION = 4, 6  # where TELL is in a question, and its positions, the answer included


@dataclasses.dataclass(frozen=True)
class VisualQuestionConfig(TokenTaskConfig):
    """Questions about images."""

    length: int = knob(64, "T", other=(96,), least=8)
    side: int = knob(3, "cells in a row and in a column of an image", other=(4,), least=2)
    images: int = knob(2, "images of a row", other=(3,), least=1)
    questions: int = knob(2, "questions of a row, each about any of its images", other=(1,), least=1)
    symbols: int = knob(32, "different symbols, more than cells of an image", other=(24,), least=5)
    text: int = knob(8, "different ids of text", other=(16,), least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        cells = self.side**2
        config_lib.require(self.symbols > cells, "data.symbols", self.symbols, f"more than the {cells} cells")
        least = sum(self.blocks)
        config_lib.require(self.length >= least, "data.length", self.length, f"{least} or more for images, questions")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Positions of every block."""
        return (1 + self.side**2,) * self.images + (QUESTION,) * self.questions

    @property
    def first_symbol(self) -> int:
        return NAMES + self.images

    @property
    def first_text(self) -> int:
        return self.first_symbol + self.symbols

    @property
    def ids(self) -> int:
        return self.first_text + self.text

    def batch_spec(self) -> batch_lib.Spec:
        plain = batch_lib.Field((self.length,), "int32", ("seq",))
        layout = batch_lib.Field((self.length, batch_lib.LAYOUT), "int32", ("seq", None))
        return {**super().batch_spec(), "layout": layout, "node": plain}


@register("visual_question")
class VisualQuestion(TokenTask):
    """Text, images and questions: masks that read a layout or nodes can be trained on it."""

    Config = VisualQuestionConfig
    title = "which symbol lies beside another one in an image, asked later"
    source = "ours"

    def example(self, stream: Stream, split: str) -> Arrays:
        c, cells = self.config, self.config.side**2
        starts = place(stream, c.blocks, c.length)
        tokens, targets = c.first_text + stream.integers(c.text, c.length), np.zeros(c.length, np.int64)
        names, drawn = stream.permutation(c.images), []
        for name, start in zip(names, starts):
            drawn.append(c.first_symbol + stream.distinct(cells, c.symbols))
            tokens[start : start + 1 + cells] = [NAMES + name, *drawn[-1]]
        asked = starts[c.images :] + ASKED
        for at in asked:
            image, direction = stream.integer(c.images), stream.integer(len(BESIDE))
            pairs = self._pairs(direction)
            cell, beside = pairs[stream.integer(len(pairs))]
            answer = drawn[image][beside]
            question = [ASK, NAMES + names[image], drawn[image][cell], DIRECTIONS + direction, TELL, answer]
            tokens[at - ASKED : at - ASKED + QUESTION] = question
            targets[at] = answer
        weights = np.zeros(c.length)
        weights[asked] = 1
        return {"tokens": tokens, "targets": targets, "weights": weights, **self._places(starts)}

    def _pairs(self, direction: int) -> list[tuple[int, int]]:
        """Cells that have one beside them in that direction, and that one."""
        side, (down, right) = self.config.side, list(BESIDE.values())[direction]
        inside = lambda x: 0 <= x < side
        cells = [divmod(i, side) for i in range(side**2)]
        return [
            (y * side + x, (y + down) * side + x + right) for y, x in cells if inside(y + down) and inside(x + right)
        ]

    def _places(self, starts: np.ndarray) -> Arrays:
        """`layout` and `node` of blocks that begin there."""
        c, cells = self.config, self.config.side**2
        layout = batch_lib.RowLayout(c.length)
        node = np.zeros(c.length, np.int32)
        for number, start in enumerate(starts[: c.images]):
            node[start + 1 : start + 1 + cells] = number + 1
            layout.image(start + 1, (c.side, c.side))
        for start in starts[c.images :]:
            layout.question(start, start + ASKED + 1)
            layout.answer(start + ASKED + 1, start + QUESTION)
        return {"layout": layout.columns, "node": node}

    def _found(self, tokens: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Where each question is to be answered, which direction it asks for, and where the answer's cell is.

        A question about a symbol that its image does not have is left out.
        """
        c, first = self.config, {}
        for t, token in enumerate(tokens.tolist()):
            if NAMES <= token < c.first_symbol:
                first.setdefault(token, t + 1)  # an image comes before what asks about it
        for at in np.flatnonzero(tokens == TELL).tolist():
            name, symbol, direction = tokens[at - 3 : at].tolist()
            start = first[name]
            image = tokens[start : start + c.side**2].tolist()
            direction -= DIRECTIONS
            if symbol in image:
                yield at, direction, start + dict(self._pairs(direction))[image.index(symbol)]

    def solve(self, row: Arrays) -> np.ndarray:
        tokens, out = row["tokens"], np.zeros(self.config.length, np.int64)
        for at, _, where in self._found(tokens):
            out[at] = tokens[where]
        return out

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """The cell of the first answer gets a symbol that its image does not have."""
        c, tokens = self.config, row["tokens"].copy()
        _, _, where = next(self._found(tokens))
        image = row["tokens"][row["node"] == row["node"][where]].tolist()
        symbol = tokens[where]
        while symbol in image:
            symbol = other_than(stream, symbol, c.first_symbol, c.symbols)
        tokens[where] = symbol
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return self.config.symbols

    def slices(self, rows: Arrays) -> Slices:
        """By the direction asked for, and by how far back the answer's cell is."""
        shape, c = rows["tokens"].shape, self.config
        directions, gaps = np.full(shape, -1), np.full(shape, -1)
        for row, tokens in enumerate(rows["tokens"]):
            for at, direction, where in self._found(tokens):
                directions[row, at], gaps[row, at] = direction, at - where
        return {"direction": (list(BESIDE), directions), "gap": buckets(gaps, c.length - 1, least=ASKED + 1)}
