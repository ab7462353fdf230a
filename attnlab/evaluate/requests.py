"""What an evaluation asks of a language model, as rows of tokens: continuations of contexts, whole texts, stop strings.

A document begins with the end-of-document token (`start`), as in training, and so does every context and text here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from attnlab.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens of which the last are predicted, each from all of the row before it.

    Attributes:
      ids: int32 [n + 1]; the model reads the first n.
      scored: how many of the last are predicted, 1 to n.
    """

    ids: np.ndarray
    scored: int

    def __post_init__(self) -> None:
        if not 1 <= self.scored < len(self.ids):
            raise ValueError(f"{self.scored} of {len(self.ids)} tokens cannot be predicted; allowed: 1 to all but one")

    @property
    def length(self) -> int:
        """Positions that the model reads."""
        return len(self.ids) - 1


def started(tokenizer: Any, text: str) -> np.ndarray:
    """int32 ids of a text that begins a document."""
    return np.concatenate([np.asarray([tokenizer.eod_id], np.int32), tokenizer.encode(text)])


def boundary(tokenizer: Any, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """A context and its continuation as ids.

    Spaces at the context's end go to the continuation, where tokenizers have them. Both are encoded as one text, which
    is cut behind as many tokens as the context alone has. Where a token spans that cut, so that nothing would be left
    to predict, the last token is the continuation.

    Returns:
      int32 ids of the context, of which the first is end-of-document, and of the continuation; each has one or more.

    Raises:
      UserError: the continuation has no token.
    """
    kept = context.rstrip()
    whole = started(tokenizer, context + continuation)
    cut = min(len(started(tokenizer, kept)), len(whole) - 1)
    if cut < 1 or not continuation:
        raise UserError(f"a continuation of {context[-40:]!r} is empty; allowed: a token or more")
    return whole[:cut], whole[cut:]


def row(context: np.ndarray, continuation: np.ndarray, length: int) -> Row:
    """The row that scores a continuation; of a longer context its last tokens.

    Args:
      length: positions that the model reads at most.

    Raises:
      UserError: the continuation alone is longer.
    """
    if len(continuation) > length:
        raise UserError(
            f"a continuation has {len(continuation):,} tokens, and rows have {length:,}; allowed: at most as many "
            "(data.length says how long rows are)"
        )
    return Row(np.concatenate([context, continuation])[-(length + 1) :], len(continuation))


def windows(ids: np.ndarray, start: int, length: int) -> list[Row]:
    """Rows of at most `length` positions that together predict every token of a text once.

    The first window reads `start` and the text; each later one predicts up to `length` tokens that follow. The last is
    moved back to be full, so what it predicts has at least as much context as in a window of its own.

    Args:
      ids: the text, int32 [n]; of none there are no windows.
      start: the token that begins a document.
    """
    stream = np.concatenate([np.asarray([start], np.int32), np.asarray(ids, np.int32)])
    rows = []
    for done in range(0, len(ids), length):
        end = min(done + length, len(ids))
        rows.append(Row(stream[max(0, end - length) : end + 1], end - done))
    return rows


def bucket(length: int, shortest: int, longest: int) -> int:
    """The least of `shortest`, twice as much, and so on, or else `longest`, that holds `length` positions."""
    if length > longest:
        raise ValueError(f"{length} positions are more than {longest}")
    size = shortest
    while size < length:
        size *= 2
    return min(size, longest)


def batches(lengths: Sequence[int], budget: int, ways: int) -> Iterable[tuple[list[int], int, int]]:
    """Places of sequences in batches of few shapes, the longest first.

    Args:
      lengths: of the sequences, padded (`bucket`): a batch holds sequences of one length.
      budget: positions of a batch, about.
      ways: divides the rows of every batch.

    Yields:
      places in `lengths`, the batch's length, and its rows, of which those past the places are filling.
    """
    for length in sorted(set(lengths), reverse=True):
        places = [i for i, n in enumerate(lengths) if n == length]
        most = max(1, budget // (length * ways))
        rows = min(most, 1 << (-(-len(places) // ways) - 1).bit_length()) * ways
        for first in range(0, len(places), rows):
            yield places[first : first + rows], length, rows


def arrays(rows: Sequence[Row], length: int, count: int) -> dict[str, np.ndarray]:
    """A batch of the model, int32 and float32 [count, length]: rows padded on the right, and rows of padding."""
    out = {name: np.zeros((count, length), np.int32) for name in ("tokens", "targets", "segments", "positions")}
    out["weights"] = np.zeros((count, length), np.float32)
    for i, r in enumerate(rows):
        n = r.length
        out["tokens"][i, :n], out["targets"][i, :n] = r.ids[:-1], r.ids[1:]
        out["segments"][i, :n], out["positions"][i, :n] = 1, np.arange(n)
        out["weights"][i, n - r.scored : n] = 1
    return out


def cut(text: str, stops: Sequence[str]) -> str:
    """What is before the first of the stop strings that occurs; all of it where none does. Empty ones are none."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def stop_tokens(tokenizer: Any, stops: Sequence[str]) -> tuple[int, ...]:
    """Ids that end a generation: end-of-document, and those whose own text has a stop string in it.

    The latter are known where ids stand for bytes whatever is beside them (`Tokenizer.byte_lengths`); elsewhere, and
    where a string spans tokens, the text is cut later, by `cut`, to the same end.
    """
    ids = {tokenizer.eod_id}
    table = tokenizer.byte_lengths()
    if table is not None and (stops := [stop for stop in stops if stop]):
        least = min(len(stop.encode()) for stop in stops)
        long = np.flatnonzero(np.asarray(table) >= least)
        ids |= {int(i) for i in long if any(stop in tokenizer.decode([i]) for stop in stops)}
    return tuple(sorted(ids))
