"""Cases in which every two values of any two axes meet."""

from __future__ import annotations

import itertools
from typing import Any


def cases(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Greedy and in order, so that a case keeps its place; about as many as the product of the two longest axes."""
    names = list(axes)
    left = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    found = []
    while left:
        a, i, b, j = min(left, key=lambda pair: (names.index(pair[0]), pair[1], names.index(pair[2]), pair[3]))
        case = {a: i, b: j}
        for name in names:
            if name not in case:
                gain = lambda value: sum(_pair(names, name, value, other, at) in left for other, at in case.items())
                case[name] = max(range(len(axes[name])), key=lambda value: (gain(value), -value))
        left -= {_pair(names, x, case[x], y, case[y]) for x, y in itertools.combinations(names, 2)}
        found.append({name: axes[name][case[name]] for name in names})
    return found


def _pair(names: list[str], a: str, i: int, b: str, j: int) -> tuple[str, int, str, int]:
    return (a, i, b, j) if names.index(a) < names.index(b) else (b, j, a, i)
