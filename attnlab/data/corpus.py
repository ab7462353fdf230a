"""A corpus as tokens: what is known of its documents, and the pass that tokenises them.

Where a tokenizer's ids do not tell the bytes of text that they stand for, these are kept beside the tokens, uint16.
Token i has the bytes from where the one before it ends to its own end; what a token has above 65,535 goes on to the
next, and what is behind the last token is end-of-document's.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from attnlab.data.progress import ProgressFn
from attnlab.data.sources import Source
from attnlab.data.tokenizers import Tokenizer
from attnlab.errors import UserError

TOKEN_BYTES_DTYPE = np.dtype("<u2")
_MOST_BYTES = 0xFFFF
_BATCH_CHARACTERS = 1 << 20
_BATCH_TEXTS = 1024


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is known of every document, in the source's order, and of the whole.

    Raises:
      ValueError: a value is not what is said here.
    """

    lengths: np.ndarray  # int64 [documents], tokens without end-of-document
    keys: np.ndarray  # uint64 [documents], see sources.Document
    text_bytes: np.ndarray  # int64 [documents], UTF-8 bytes of text
    files: int
    skipped: int
    empty: int
    digest: str  # of tokens, lengths and keys

    def __post_init__(self) -> None:
        columns = {"lengths": np.int64, "keys": np.uint64, "text_bytes": np.int64}
        for name, dtype in columns.items():
            column = getattr(self, name)
            if column.dtype != dtype or column.ndim != 1 or column.shape != self.lengths.shape or not len(column):
                raise ValueError(f"{name} is {column.dtype} {list(column.shape)}, not {np.dtype(dtype)} [documents]")
            if column.min() < 0 or (name != "keys" and int(column.max()) > np.iinfo(np.int64).max // len(column)):
                raise ValueError(f"{name} from {column.min()} to {column.max()}")
        for name in ("files", "skipped", "empty"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= np.iinfo(np.int64).max:
                raise ValueError(f"{name} = {value!r}")
        if not isinstance(self.digest, str):
            raise ValueError(f"digest = {self.digest!r}")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclasses.dataclass
class TokenisedDocument:
    """A document, or the next part of a long one: `last` tells its end."""

    key: int
    ids: np.ndarray
    text_bytes: int
    last: bool
    token_bytes: np.ndarray | None  # uint16 [n]; None where the tokenizer's table has them


def tokenised(source: Source, tokenizer: Tokenizer, progress: ProgressFn) -> Iterator[TokenisedDocument]:
    """The documents of a source as ids, in order; texts are encoded many at a time."""
    waiting: list[tuple[int, str, bool]] = []
    characters = text_bytes = over = 0
    by_table = tokenizer.byte_lengths() is not None

    def flush() -> Iterator[TokenisedDocument]:
        nonlocal characters, text_bytes, over
        texts = [text for _, text, _ in waiting]
        if by_table:
            encoded = ((ids, None) for ids in tokenizer.encode_batch(texts))
        else:
            encoded = iter(tokenizer.encode_batch_with_ends(texts))
        for (key, text, last), (ids, ends) in zip(waiting, encoded, strict=True):
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            text_bytes += size
            token_bytes = None
            if ends is not None:
                token_bytes, over = _token_bytes(ends, size, over)
                over = 0 if last else over
            yield TokenisedDocument(key, ids, size, last, token_bytes)
        waiting.clear()
        characters = 0
        progress(source.position(text_bytes), source.bytes)

    for document in source.documents():
        pieces = iter(document.pieces)
        piece = next(pieces)
        while piece is not None:
            following = next(pieces, None)
            waiting.append((document.key, piece, following is None))
            characters += len(piece)
            if characters >= _BATCH_CHARACTERS or len(waiting) >= _BATCH_TEXTS:
                yield from flush()
            piece = following
    yield from flush()


def _token_bytes(ends: np.ndarray, size: int, over: int) -> tuple[np.ndarray, int]:
    """Bytes of every token, and those that are left.

    Args:
      ends: of the tokens, in bytes of their text.
      size: bytes of the text.
      over: bytes that were left by the text before, for the first token.
    """
    # As many bytes as have come so far, but never more than _MOST_BYTES ahead of the token before.
    steps = _MOST_BYTES * np.arange(1, len(ends) + 1)
    given = steps + np.minimum(np.minimum.accumulate(ends + over - steps), 0)
    left = size + over - (int(given[-1]) if len(given) else 0)
    return np.diff(given, prepend=0).astype(TOKEN_BYTES_DTYPE), left


class CorpusBuilder:
    """Collects what a `Corpus` holds while documents pass by."""

    def __init__(self) -> None:
        self._lengths, self._keys, self._text_bytes = array.array("q"), array.array("Q"), array.array("q")
        self._digest = hashlib.sha256()
        self._length = self._size = 0

    def add(self, part: TokenisedDocument) -> None:
        self._digest.update(part.ids.astype("<u4").tobytes())
        self._length += len(part.ids)
        self._size += part.text_bytes
        if part.last:
            self._lengths.append(self._length)
            self._keys.append(part.key)
            self._text_bytes.append(self._size)
            self._length = self._size = 0

    def finish(self, source: Source) -> Corpus:
        lengths, keys, text_bytes = (np.array(column) for column in (self._lengths, self._keys, self._text_bytes))
        self._digest.update(lengths.tobytes() + keys.tobytes())
        if not len(lengths):
            raise UserError(
                f"data.source = {source.config.source!r}: no text in its {len(source.files)} file(s),"
                f" {source.bytes} bytes ({source.empty} empty document(s), {source.skipped} skipped)."
            )
        return Corpus(
            lengths,
            keys,
            text_bytes,
            len(source.files),
            source.skipped,
            source.empty,
            self._digest.hexdigest(),
        )
