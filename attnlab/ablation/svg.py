"""Charts as SVG text: axes, marks, and the frame that every chart has.

A chart is drawn for a column of 360 px and scales up; colours are classes (`c0` to `c7`) that the page's CSS fills in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from attnlab.ablation.markup import Markup, join, short, tag

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 44
COLOURS = SHAPES = 8


@dataclasses.dataclass(frozen=True)
class Axis:
    """A scale with its name.

    Attributes:
      label: name and unit; `log` is added where it is.
      low, high: ends.
      log: whether distances are ratios.
      names: of a scale of categories, which lie at 0, 1, ..
    """

    label: str
    low: float
    high: float
    log: bool = False
    names: tuple[str, ...] = ()

    @classmethod
    def over(cls, label: str, values: Iterable[float], *, log: bool = False) -> Axis:
        """An axis that holds all values, with a margin; `log` falls back to linear where a value is not above 0."""
        found = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(found), max(found)
        if log and low > 0:
            pad = max((high / low) ** 0.06, 1.1)
            return cls(f"{label} (log)", low / pad, high * pad, True)
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(label, low - pad, high + pad)

    @classmethod
    def of_names(cls, label: str, names: Sequence[str]) -> Axis:
        """One place per name."""
        return cls(label, -0.5, len(names) - 0.5, names=tuple(names))

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1; beyond them, at them."""
        scale = math.log if self.log else float
        if self.log and value <= 0:
            return 0.0
        return min(1.0, max(0.0, (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))))

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Round values, and how they are written."""
        if self.names:
            return [(float(i), name) for i, name in enumerate(self.names)]
        if self.log and len(values := self._decades(count)) >= 3:
            return [(value, short(value)) for value in values]
        for wanted in (count, 2 * count):
            step = _round_step((self.high - self.low) / wanted)
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            if last - first >= 2:
                break
        return [(i * step, _plain(i * step, step)) for i in range(first, last + 1)]

    def _decades(self, count: int) -> list[float]:
        """Powers of ten, with what lies between where there are fewer than three; nothing where that is few, too."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            every = max(1, round((last - first) / count)) if parts == (1,) else 1
            made = [part * 10.0**power for power in range(first, last + 1, every) for part in parts]
            kept = [value for value in made if self.low <= value <= self.high]
            if len(kept) >= 3:
                return kept
        return []


def _round_step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * part for part in (1, 2, 2.5, 5, 10) if size * part >= rough * 0.999)


def _plain(value: float, step: float) -> str:
    """A tick with as many decimals as its neighbours need to differ."""
    if abs(value) >= 1e4:
        return short(value)
    places = max(0, 1 - math.floor(math.log10(step) + 1e-9))
    text = f"{value + 0.0:.{places}f}" if places <= 7 else f"{value + 0.0:.3g}"
    if f"{step:.1e}"[2] == "0" and 0 < places <= 7:  # a step of one digit needs one decimal fewer
        text = f"{value + 0.0:.{places - 1}f}"
    return text.replace("-", "−")


@dataclasses.dataclass(frozen=True)
class Frame:
    """Two axes and where they lie in the picture."""

    x: Axis
    y: Axis
    height: float = 250
    left: float = LEFT

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        wide, high = WIDTH - self.left - RIGHT, self.height - TOP - BOTTOM
        return self.left + wide * self.x.share(x), TOP + high * (1 - self.y.share(y))

    def path(self, points: Iterable[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
        """A line through points."""
        steps = [f"{a:.1f} {b:.1f}" for a, b in (self.at(x, y) for x, y in points)]
        return tag("path", d="M" + "L".join(steps) + ("Z" if closed else ""), class_=class_) if steps else Markup()

    def mark(self, x: float, y: float, style: int, text: str, class_: str = "mark") -> Markup:
        """A marker of an arm's shape and colour; `text` is told on hover."""
        a, b = self.at(x, y)
        shape = tag("path", tag("title", text), d=_SHAPES[(style + style // COLOURS) % SHAPES])
        return tag("g", shape, transform=f"translate({a:.1f} {b:.1f})", class_=f"{class_} c{style % COLOURS}")

    def draw(self, title: str, description: str, *layers: Any) -> Markup:
        """The picture: axes first, then the layers."""
        bottom, right = self.height - BOTTOM, WIDTH - RIGHT
        parts = [tag("title", title), tag("desc", description)]
        for value, text in self.x.ticks():
            a, _ = self.at(value, 0)
            parts += [_line(a, TOP, a, bottom, "grid"), _text(a, bottom + 14, text, "tick", "middle")]
        for value, text in self.y.ticks(5 if not self.y.names else len(self.y.names)):
            _, b = self.at(0, value)
            parts += [_line(self.left, b, right, b, "grid"), _text(self.left - 5, b + 3.5, text, "tick", "end")]
        parts.append(_line(self.left, bottom, right, bottom, "edge"))
        parts.append(_line(self.left, TOP, self.left, bottom, "edge"))
        parts.append(_text((self.left + right) / 2, self.height - 8, shorten(self.x.label, 52), "axis", "middle"))
        parts.append(
            _text(0, 0, shorten(self.y.label, 36), "axis", "middle", f"translate(11 {(TOP + bottom) / 2}) rotate(-90)")
        )
        box = f"0 0 {WIDTH} {self.height:g}"
        return tag("svg", *parts, *layers, viewBox=box, role="img", aria_label=f"{title}. {description}")

    def rule(self, x: float, class_: str = "zero") -> Markup:
        """A vertical line."""
        a, _ = self.at(x, 0)
        return _line(a, TOP, a, self.height - BOTTOM, class_)

    def level(self, y: float, class_: str, text: str) -> Markup:
        """A horizontal line with a name at its right end."""
        _, b = self.at(0, y)
        line = _line(self.left, b, WIDTH - RIGHT, b, class_)
        return join([line, _text(WIDTH - RIGHT - 2, b - 3, text, "tick", "end")])

    def stripe(self, low: float, high: float, class_: str) -> Markup:
        """The part between two values of x."""
        a, b = self.at(low, 0)[0], self.at(high, 0)[0]
        return tag("rect", x=f"{a:.1f}", y=TOP, width=f"{b - a:.1f}", height=self.height - TOP - BOTTOM, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return Markup(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{class_}"/>')


def _text(x: float, y: float, text: str, class_: str, anchor: str, transform: str | None = None) -> Markup:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}"} if transform is None else {"transform": transform}
    return tag("text", text, **place, class_=class_, text_anchor=anchor)


def key(names: Sequence[tuple[int, str]]) -> Markup:
    """What the markers are: (style, name)."""
    sign = lambda style: tag("b", _SIGNS[(style + style // COLOURS) % SHAPES], aria_hidden="true")
    items = [tag("li", sign(style), " ", name, class_=f"c{style % COLOURS}") for style, name in names]
    return tag("ul", *items, class_="key")


def figure(title: str, picture: Any, caption: str, *more: Any) -> Markup:
    """A chart with its title above, its caption and what else belongs to it below."""
    return tag("figure", tag("h3", title), picture, tag("figcaption", caption), *more)


def shorten(name: str, most: int = 12) -> str:
    """A name for an axis."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


_SHAPES = (
    "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z",  # circle
    "M-3.6-3.6H3.6V3.6H-3.6Z",  # square
    "M0-4.6L4.4 3.4H-4.4Z",  # triangle
    "M0-5L4.2 0L0 5L-4.2 0Z",  # diamond
    "M0 4.6L4.4-3.4H-4.4Z",  # triangle, point down
    "M-1.4-4.4H1.4V-1.4H4.4V1.4H1.4V4.4H-1.4V1.4H-4.4V-1.4H-1.4Z",  # plus
    "M0-5L1.4-1.6L4.8-1.6L2.2 .8L3.1 4.2L0 2.2L-3.1 4.2L-2.2 .8L-4.8-1.6L-1.4-1.6Z",  # star
    "M-4.6-1.9H4.6V1.9H-4.6Z",  # bar
)
_SIGNS = "●■▲◆▼✚★▬"  # the same in text
