"""Sequential pixels: drawn digits, read grey level by grey level, row by row, and named at the end.

Digits of seven segments in 54 styles (two sizes, three angles, nine places), with a random brightness and noise. Ids:
0 to 255 grey levels, then the classes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, other_than

GREYS = 256
_DIM, _BRIGHT = 128, 255  # of the strokes
_CORNERS = {"a": (-1, -1, 1, -1), "b": (1, -1, 1, 0), "c": (1, 0, 1, 1), "d": (-1, 1, 1, 1), "e": (-1, 0, -1, 1),
            "f": (-1, -1, -1, 0), "g": (-1, 0, 1, 0)}  # fmt: skip
_DIGITS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


@functools.cache
def templates(side: int) -> np.ndarray:
    """[10, 54, side^2], every digit in every style: how much of each pixel is stroke, 0 to 1."""
    pixel = 2 / side
    y, x = (np.mgrid[:side, :side] + 0.5) * pixel - 1
    drawn = []
    for digit in _DIGITS:
        for size, angle, dx, dy in itertools.product((0.62, 0.75), (-0.15, 0.0, 0.15), (-1, 0, 1), (-1, 0, 1)):
            cos, sin = math.cos(angle) / size, math.sin(angle) / size
            px, py = x - 0.125 * dx, y - 0.125 * dy
            u, v = (cos * px + sin * py) / 0.6, cos * py - sin * px
            distance = np.min([_to_segment(u * 0.6, v, _CORNERS[s]) for s in digit], axis=0) * size
            drawn.append(np.clip((0.5 * max(pixel, 0.12) - distance) / pixel + 0.5, 0, 1).ravel())
    return np.array(drawn).reshape(len(_DIGITS), -1, side * side)


def _to_segment(x: np.ndarray, y: np.ndarray, corners: tuple[int, ...]) -> np.ndarray:
    """Distance of points to a segment whose corners are in boxes of 0.6 x 1."""
    x0, y0, x1, y1 = corners[0] * 0.6, corners[1], corners[2] * 0.6, corners[3]
    along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
    return np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))


@dataclasses.dataclass(frozen=True)
class PixelsConfig(TokenTaskConfig):
    """Sequential pixels. Longer examples are larger images, at multiples that are squares."""

    side: int = knob(8, "of an image; T is its square", other=(12,), least=8, below=65)
    classes: int = knob(10, "digits that are drawn", other=(4,), least=2, below=11)
    permuted: bool = knob(False, "whether pixels are read in a fixed random order", other=(True,))
    noise: float = knob(
        0.05, "deviation of what is added to every pixel, as a share of white", other=(0.0,), least=0, below=0.2
    )

    @property
    def length(self) -> int:
        return self.side**2

    @property
    def ids(self) -> int:
        return GREYS + self.classes

    def longer(self, multiple: int) -> PixelsConfig:
        root = math.isqrt(multiple)
        config_lib.require(root**2 == multiple, "multiple", multiple, "1, 4 or 16: images are squares")
        return dataclasses.replace(self, side=root * self.side)


@register("pixels")
class Pixels(TokenTask):
    """A drawn digit as a row of grey levels; which digit it is, is to be told at its last pixel."""

    Config = PixelsConfig
    title = "images as sequences of pixels"
    source = "after Le et al. 2015 (sequential MNIST), arXiv:1504.00941; the images are drawn here"

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        digit = stream.integer(c.classes)
        drawn = templates(c.side)[digit]
        bright = _DIM + stream.integer(_BRIGHT - _DIM + 1)
        return self._told(drawn[stream.integer(len(drawn))], bright, digit, 255 * c.noise * stream.normal(c.length))

    def _told(self, drawn: np.ndarray, bright: int, digit: int, noise: np.ndarray) -> Arrays:
        c = self.config
        grey = np.clip(np.rint(bright * drawn + noise), 0, GREYS - 1).astype(np.int64)
        targets, weights = np.zeros((2, c.length), np.int64)
        targets[-1], weights[-1] = GREYS + digit, 1
        return {"tokens": grey[self._order()], "targets": targets, "weights": weights}

    def _order(self) -> np.ndarray:
        c = self.config
        return Stream(["the order of pixels", c.side], 0).permutation(c.length) if c.permuted else np.arange(c.length)

    def solve(self, row: Arrays) -> np.ndarray:
        """The digit of the style that fits best, at the brightness at which it does."""
        c = self.config
        image = np.zeros(c.length)
        image[self._order()] = row["tokens"]
        drawn = templates(c.side)[: c.classes]
        fit = (drawn @ image) ** 2 / (drawn**2).sum(-1)
        return np.full(c.length, GREYS + fit.max(1).argmax())

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """Another digit in its place."""
        digit = other_than(stream, row["targets"][-1] - GREYS, 0, self.config.classes)
        other = self._told(templates(self.config.side)[digit][0], _BRIGHT, digit, 0.0)
        return {**row, "tokens": other["tokens"]}

    def answers(self) -> int:
        return self.config.classes

    def slices(self, rows: Arrays) -> Slices:
        """By digit."""
        c = self.config
        return {"digit": ([str(i) for i in range(c.classes)], rows["targets"][:, -1] - GREYS)}
