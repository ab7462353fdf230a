"""HTML by hand: everything that comes from results is escaped, and every number carries its full value."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any


class Markup(str):
    """Text that is HTML already."""


def escape(value: Any) -> Markup:
    """Any value as HTML text, also inside a quoted attribute."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def tag(element: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element; `_` in an attribute's name is `-` (`class_` is `class`), one that is None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if element == "input" else f"</{element}>"
    return Markup(f"<{element}{given}>{''.join(map(escape, children))}{end}")


def join(parts: Sequence[Any], separator: Any = "") -> Markup:
    """Several pieces as one."""
    return Markup(escape(separator).join(escape(part) for part in parts))


def details(summary: str, *children: Any) -> Markup:
    """What can be folded away."""
    return tag("details", tag("summary", summary), *children)


# --- numbers ----------------------------------------------------------------------------------------------------------

NONE = "–"


def number(value: float | None, digits: int = 4) -> str:
    """Four significant digits, as people write them: 1234567 is 1,235,000."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) >= 10 ** (digits - 1):
        return f"{rounded:,.0f}"
    return f"{rounded:.{digits}g}" if abs(rounded) < 1e-4 else f"{rounded:.{_places(rounded, digits)}f}"


def _places(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def beside(value: float | None, spread: float | None) -> str:
    """A value with as many decimals as two significant digits of its spread have."""
    if value is None or not spread or not math.isfinite(spread) or not math.isfinite(value):
        return number(value)
    places = max(0, 1 - math.floor(math.log10(abs(spread))))
    return f"{value:,.{places}f}" if places <= 9 else number(value)


def plus_minus(mean: float | None, sd: float | None) -> str:
    """`mean ± sd`; without a sd the mean alone."""
    return number(mean) if sd is None else f"{beside(mean, sd)} ± {beside(sd, sd)}"


def signed(value: float | None, spread: float | None) -> str:
    """A difference with its sign, see `beside`."""
    text = beside(value, spread)
    return f"+{text}" if value is not None and value > 0 else text.replace("-", "−", 1)


def probability(p: float | None) -> str:
    """A p value; `cannot` where there is none."""
    if p is None:
        return "cannot"
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.01 else f"{min(p, 1):.3f}".rstrip("0").rstrip(".")


_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """For axes and costs: 12.5M."""
    size, unit = next(((s, u) for s, u in _UNITS if abs(value) >= s), (1.0, ""))
    text = f"{value / size:.3g}"
    return (f"{value / size:.0f}" if "e+" in text else text).replace("-", "−") + unit


# --- tables -----------------------------------------------------------------------------------------------------------


def cell(text: Any, value: float | str | None = None, *, class_: str | None = None, style: str | None = None) -> Markup:
    """A table's cell; `value` is what it stands for at full precision, by which it sorts."""
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    exact = None if value is None else value if isinstance(value, str) else json.dumps(value)
    return tag("td", text, data_value=exact, class_=class_, style=style)


def table(columns: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str, *, sortable: bool = False) -> Markup:
    """A table in a box that scrolls by itself; the first cell of a row is its heading. Cells are text or `cell`s."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = []
    for first, *rest in rows:
        body.append(tag("tr", tag("th", first, scope="row"), *map(_cell, rest)))
    inner = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body),
                class_="sortable" if sortable else None)  # fmt: skip
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(item: Any) -> Markup:
    return item if isinstance(item, Markup) and item.startswith("<td") else cell(item)
