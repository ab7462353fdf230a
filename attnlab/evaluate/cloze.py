"""Last words of passages of a text, to be guessed from what is before them; and errors of what is summed over texts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

WORDS = 100  # of a passage, at most
_WORD = re.compile(r" ([^\W\d_]{4,})(?!\w)")


def passages(text: str, words: int = WORDS) -> Iterator[tuple[str, str]]:
    """Contexts and words: of every passage of `words` words the last that can be known.

    That is a word of four letters or more, after a space, which the passage has before: as in LAMBADA (Paperno et al.
    2016), where most of the words asked for are in their passages. The context ends before the space. A passage
    without such a word asks nothing.
    """
    places = [found.start() for found in re.finditer(r"\S+", text)]
    bounds = [*places[::words], len(text)]
    for first, end in zip(bounds, bounds[1:]):
        passage = text[first:end]
        for found in reversed(list(_WORD.finditer(passage))):
            if re.search(rf"(?<!\w){re.escape(found[1])}(?!\w)", passage[: found.start()]):
                yield passage[: found.start()], found[1]
                break


def first_word(text: str) -> str:
    """What a continuation's first word is; nothing if it begins with none."""
    found = re.match(r"\s*(\w+)", text)
    return found[1] if found else ""


def ratio_error(sums: Sequence[float], weights: Sequence[float]) -> float | None:
    """Standard error of `sum(sums) / sum(weights)` over texts that are draws, each with a sum and a weight.

    The error of a ratio estimator by linearisation (Cochran 1977, Sampling Techniques, section 6.4). None for fewer
    than two texts.
    """
    s, w = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
    if len(s) < 2:
        return None
    residuals = s - w * (s.sum() / w.sum())
    return math.sqrt(len(s) / (len(s) - 1) * float((residuals**2).sum())) / float(w.sum())
