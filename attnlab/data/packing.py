"""Packing: the documents of a split, one after another, cut into rows of fixed length.

A document `t1 .. tn` takes n + 1 positions: inputs `eod t1 .. tn`, targets `t1 .. tn eod`. So its first token
is predicted from end-of-document alone, its end is learned, and no target belongs to another document than
its input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnlab.data.base import Arrays
from attnlab.data.config import DataConfig
from attnlab.data.corpus import Corpus
from attnlab.data.store import Store
from attnlab.errors import UserError

_CHUNK_TOKENS = 1 << 20


def split_documents(corpus: Corpus, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the held-out documents, int64, in the order in which they are read.

    A document is held out if its key, a stable hash, is among the lowest `heldout` of all 64-bit numbers; of
    two documents or more at least one is on either side (unless `heldout` is 0). With `shuffle` the order is
    that of the keys, which is as good as random and moves little when documents are added; else the source's.
    """
    by_key = np.argsort(corpus.keys, kind="stable")
    count = 0
    if config.heldout > 0:
        limit = np.uint64(int(config.heldout * 2.0**64))
        count = int(np.searchsorted(corpus.keys[by_key], limit))
        # Documents of equal keys (equal names under two globs) stay on one side wherever possible.
        if len(by_key) >= 2:
            count = min(max(count, 1), len(by_key) - 1)
    heldout, train = by_key[:count], by_key[count:]
    return (train, heldout) if config.shuffle else (np.sort(train), np.sort(heldout))


class PackedRows:
    """The rows of a split, by index. Row r holds positions r T to (r + 1) T of the stream of its documents.

    Each row is a dict of int32 [T]: `tokens`, `targets`; `segments`, 1, 2, .. for the documents in the row,
    and 0 for the padding at the end of the very last row; `positions`, from 0 in every fragment of a
    document.
    """

    def __init__(self, store: Store, documents: np.ndarray, length: int, eod_id: int):
        self._store = store
        self._documents = documents
        self.length = length
        self._eod_id = eod_id
        self._count = np.arange(length, dtype=np.int32)
        # Stream position at which each document ends.
        self._ends = np.cumsum(store.corpus.lengths[documents] + 1)
        self.positions = int(self._ends[-1]) if len(documents) else 0

    def __len__(self) -> int:
        return -(-self.positions // self.length)

    def __getitem__(self, index: int) -> Arrays:
        return {name: array[0] for name, array in self.pack([index]).items()}

    def text_bytes(self, count: int, table: np.ndarray | None) -> int:
        """UTF-8 bytes of the text that the targets of the first `count` rows stand for.

        Of whole documents it is the corpus's number; of one that the last row cuts, the bytes up to the end of its
        last token there.

        Args:
          table: bytes by id, where the tokenizer's ids tell them.
        """
        positions = min(count * self.length, self.positions)
        whole = int(np.searchsorted(self._ends, positions, side="right"))
        total = int(self._store.corpus.text_bytes[self._documents[:whole]].sum())
        if whole < len(self._documents):
            tokens = positions - (int(self._ends[whole - 1]) if whole else 0)
            total += _part_bytes(self._store, int(self._documents[whole]), tokens, table)
        return total

    def pack(self, indices: Sequence[int]) -> Arrays:
        """The rows of `indices`, [len(indices), T]; an index past the last row gives a row of padding."""
        shape = (len(indices), self.length)
        batch = {
            "tokens": np.full(shape, self._eod_id, np.int32),
            "targets": np.full(shape, self._eod_id, np.int32),
            "segments": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
        }
        for row, index in enumerate(indices):
            self._fill(index, *(array[row] for array in batch.values()))
        return batch

    def _fill(
        self,
        index: int,
        tokens_T: np.ndarray,
        targets_T: np.ndarray,
        segments_T: np.ndarray,
        positions_T: np.ndarray,
    ) -> None:
        at = int(index) * self.length
        row_end = min(at + self.length, self.positions)
        place = int(np.searchsorted(self._ends, at, side="right"))
        filled, segment = 0, 0
        while at < row_end:
            document, end = int(self._documents[place]), int(self._ends[place])
            start = at - (end - int(self._store.corpus.lengths[document]) - 1)
            count = min(end, row_end) - at
            entries = self._store.read(document, start, start + count + 1)
            here = slice(filled, filled + count)
            segment += 1
            tokens_T[here] = entries[:-1]
            targets_T[here] = entries[1:]
            segments_T[here] = segment
            positions_T[here] = self._count[:count]
            at += count
            filled += count
            place += 1


def _part_bytes(store: Store, document: int, tokens: int, table: np.ndarray | None) -> int:
    """Bytes of a document's first `tokens` tokens."""
    length, text_bytes = int(store.corpus.lengths[document]), int(store.corpus.text_bytes[document])
    part = total = 0
    for start in range(1, length + 1, _CHUNK_TOKENS):
        stop = min(start + _CHUNK_TOKENS, length + 1)
        sizes = store.token_bytes(document, start, stop)
        if sizes is None and table is not None:
            sizes = table[store.read(document, start, stop)]
        if sizes is None:
            break
        total += int(sizes.sum(dtype=np.int64))
        part += int(sizes[: max(tokens + 1 - start, 0)].sum(dtype=np.int64))
    else:
        # Kept bytes leave what is behind the last token to end-of-document; a table leaves nothing.
        if total == text_bytes or (table is None and total < text_bytes):
            return part
    # A corpus tokenised before bytes were kept, or ids that do not add up to their text.
    return text_bytes * tokens // max(length, 1)


def require_rows(rows: PackedRows, config: DataConfig, split: str, documents: int) -> None:
    """Raises UserError if a split has too little to train or to evaluate on."""
    if split == "heldout" and not len(rows):
        reason = "data.heldout is 0" if config.heldout == 0 else f"{documents} document cannot be split"
        raise UserError(
            f"data.source = {config.source!r}: nothing is held out for evaluation ({reason}).\n"
            "Set data.heldout above 0 and give at least two documents."
        )
    if split == "train" and len(rows) < config.batch:
        raise UserError(
            f"data.source = {config.source!r} fills {len(rows)} row(s) of data.length {config.length}"
            f" ({rows.positions} tokens to train on), less than one batch of {config.batch}.\n"
            "Give more text, or lower data.batch, data.length or data.heldout."
        )
