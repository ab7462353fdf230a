"""Corpora tokenised ahead of time: written as array_record shards, read by random access.

A directory holds `tokens-NNNNN.array_record`, `documents.npz` (lengths, keys and text bytes of every
document) and `index.json`, written last. Document d is in shard d mod S. A record is up to RECORD_TOKENS
tokens of one document (little-endian uint16 or uint32), so that a row of a long document does not read all of
it. Where ids do not tell their bytes (see corpus.py), these follow the record's tokens, uint16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from typing import Any

import numpy as np

from attnlab import paths
from attnlab.config import show
from attnlab.data.config import DataConfig
from attnlab.data.corpus import (
    TOKEN_BYTES_DTYPE,
    Corpus,
    CorpusBuilder,
    TokenisedDocument,
    token_dtype,
    tokenised,
)
from attnlab.data.files import matching_files
from attnlab.data.progress import ProgressFn, stderr_progress
from attnlab.data.record_index import DOCUMENTS, INDEX, RecordIndex, read_index, shard_name, verify_shards, write_index
from attnlab.data.sources import Source
from attnlab.data.store import cache_directory
from attnlab.data.tokenizers import Tokenizer, load_tokenizer
from attnlab.errors import ConfigError, UserError

RECORD_TOKENS = 1 << 13
_SHARD = r"tokens-\d{5}\.array_record"


class _ShardWriter:
    """One shard: the tokens of its documents in records, without any record across two documents."""

    def __init__(self, path: str, dtype: np.dtype):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path = path
        self._records = 0
        self._dtype = dtype
        self._held: list[TokenisedDocument] = []
        # One record per compressed group, so that reading one does not decompress its neighbours.
        self._writer = ArrayRecordWriter(path, "group_size:1")

    def add(self, part: TokenisedDocument) -> None:
        self._held.append(part)
        held = sum(len(waiting.ids) for waiting in self._held)
        if held < RECORD_TOKENS and not part.last:
            return
        columns = [np.concatenate([waiting.ids for waiting in self._held]).astype(self._dtype)]
        if part.token_bytes is not None:
            columns.append(np.concatenate([waiting.token_bytes for waiting in self._held]))
        whole = held if part.last else held - held % RECORD_TOKENS
        for start in range(0, whole, RECORD_TOKENS):
            stop = min(start + RECORD_TOKENS, whole)
            self._writer.write(b"".join(column[start:stop].tobytes() for column in columns))
            self._records += 1
        rest = [column[whole:] for column in columns]
        self._held = [] if part.last else [dataclasses.replace(part, ids=rest[0], token_bytes=(*rest, None)[1])]

    def close(self) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        self._writer.close()
        # The writer does not report a full disk; what is in the file does.
        reader = ArrayRecordReader(self.path)
        written = reader.num_records()
        reader.close()
        if written != self._records:
            raise UserError(f"{self.path}: {written} of {self._records} records were written; is the disk full?")


def apply_tokenizer(
    config: DataConfig,
    out_dir: str,
    *,
    shards: int = 8,
    overwrite: bool = False,
    progress: ProgressFn | None = None,
) -> dict[str, Any]:
    """Tokenises `config.source` with `config.tokenizer` into `out_dir`.

    The result is read as `array_record:out_dir/*.array_record`. All documents are written, with the keys that
    decide which are held out: training reads the same rows from the directory as from the source itself.
    Nothing new is at `out_dir` until all of it is.

    Args:
      shards: files to write, fewer if there are fewer documents.
      overwrite: whether a directory that this function wrote, and that holds nothing else, is replaced.
      progress: called with bytes read and bytes in all; None shows a bar on stderr.

    Returns:
      `out_dir, shards, documents, tokens, bytes, skipped, empty, vocab_size, tokenizer, digest`.

    Raises:
      UserError: `out_dir` is not empty or cannot be written, or the source cannot be read.
    """
    if not isinstance(shards, int) or isinstance(shards, bool) or not 1 <= shards <= 99999:
        raise ConfigError(f"shards = {show(shards)} is not allowed: it must be an integer from 1 to 99999.")
    require_text(config)
    tokenizer = load_tokenizer(config.tokenizer)
    source = Source(config)
    out_dir = os.path.abspath(paths.expand(out_dir))
    with paths.directory_beside(out_dir, lambda: paths.require_new_directory(out_dir, overwrite, _foreign)) as partial:
        with contextlib.ExitStack() as stack:
            if progress is None:
                progress = stack.enter_context(stderr_progress(f"tokenising {config.source} with {tokenizer.name}"))
            index = _write(source, tokenizer, partial, shards, progress)
    return {
        "out_dir": out_dir,
        "shards": len(index["shards"]),
        **{
            name: index[name]
            for name in (
                "documents",
                "tokens",
                "bytes",
                "skipped",
                "empty",
                "vocab_size",
                "tokenizer",
                "digest",
            )
        },
    }


def _foreign(directory: str) -> str | None:
    """What in a directory `apply_tokenizer` did not write; None: it wrote all of it."""
    names = os.listdir(directory)
    if INDEX not in names:
        return f"it has no {INDEX}, so is no corpus that `attnlab tokenizer apply` finished"
    others = sorted(n for n in names if n not in (INDEX, DOCUMENTS) and not re.fullmatch(_SHARD, n))
    return f"it also holds {others[0]!r}" if others else None


def _write(source: Source, tokenizer: Tokenizer, directory: str, shards: int, progress: ProgressFn) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    builder = CorpusBuilder()
    writers: list[_ShardWriter] = []
    document = 0
    for part in tokenised(source, tokenizer, progress):
        if document < shards and document == len(writers):
            writers.append(_ShardWriter(os.path.join(directory, shard_name(document)), dtype))
        writers[document % shards].add(part)
        builder.add(part)
        document += part.last
    corpus = builder.finish(source)
    for writer in writers:
        writer.close()
    spec = {"source": source.config.source, "tokenizer": source.config.tokenizer}
    return write_index(directory, corpus, tokenizer, spec, [writer.path for writer in writers], RECORD_TOKENS)


class RecordStore:
    """Documents of one or several directories that `apply_tokenizer` wrote, of records of one size."""

    def __init__(self, indices: list[RecordIndex], tokenizer: Tokenizer):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.corpus = _joined([index.corpus for index in indices])
        self._record_tokens = indices[0].record_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._vocab_size = tokenizer.vocab_size
        self._eod = np.array([tokenizer.eod_id], self._dtype)
        self._paths = [path for index in indices for path in index.paths]
        self._kept = [index.token_bytes for index in indices for _ in index.paths]
        document_shard, shards = [], 0
        for index in indices:
            document_shard.append(shards + np.arange(len(index.corpus.lengths)) % len(index.paths))
            shards += len(index.paths)
        self._document_shard = np.concatenate(document_shard)
        # The record at which each document begins, over all shards: documents lie in a shard in their order.
        counts = -(-self.corpus.lengths // self._record_tokens)
        order = np.argsort(self._document_shard, kind="stable")
        self._first = np.empty(len(counts), np.int64)
        self._first[order] = np.cumsum(counts[order]) - counts[order]
        records = [count for index in indices for count in index.records]
        self._source = ArrayRecordDataSource(
            [f"{path}[0:{count}]" for path, count in zip(self._paths, records, strict=True)]
        )

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Entries start to stop of `eod t1 .. tn eod`."""
        return self._entries(document, start, stop, self._eod, 0)

    def token_bytes(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """Bytes of text of these entries; None where they are not kept."""
        if not self._kept[self._document_shard[document]]:
            return None
        return self._entries(document, start, stop, np.zeros(1, TOKEN_BYTES_DTYPE), 1)

    def _entries(self, document: int, start: int, stop: int, eod: np.ndarray, column: int) -> np.ndarray:
        length = int(self.corpus.lengths[document])
        first, end = max(start - 1, 0), min(stop - 1, length)  # of the tokens
        parts = [eod] if start == 0 else []
        if first < end:
            size = self._record_tokens
            for record in range(first // size, -(-end // size)):
                columns = self._record(document, record, min(size, length - record * size))
                parts.append(columns[column][max(first - record * size, 0) : end - record * size])
        if stop == length + 2:
            parts.append(eod)
        return np.concatenate(parts)

    def _record(self, document: int, record: int, expected: int) -> list[np.ndarray]:
        """A record's tokens, and their bytes where these are kept."""
        shard = self._document_shard[document]
        dtypes = [self._dtype, TOKEN_BYTES_DTYPE] if self._kept[shard] else [self._dtype]
        try:
            content = self._source[int(self._first[document]) + record]
            whole = len(content) == expected * sum(dtype.itemsize for dtype in dtypes)
            problem = "" if whole else f"{len(content)} bytes"
        except Exception as error:  # array_record raises whatever its C++ side reports
            problem = str(error) or type(error).__name__
        if not problem:
            columns = [np.frombuffer(content, self._dtype, expected)]
            if len(dtypes) > 1:
                columns.append(np.frombuffer(content, TOKEN_BYTES_DTYPE, expected, columns[0].nbytes))
            if (largest := int(columns[0].max())) < self._vocab_size:
                return columns
            problem = f"token {largest}, of {self._vocab_size}"
        raise UserError(
            f"{self._paths[shard]} is damaged: record {record} of document {document} cannot be read"
            f" ({problem[:120]}). Write the directory again with `attnlab tokenizer apply`."
        )


def _joined(parts: list[Corpus]) -> Corpus:
    if len(parts) == 1:
        return parts[0]
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("lengths", "keys", "text_bytes"))
    totals = (sum(getattr(part, name) for part in parts) for name in ("files", "skipped", "empty"))
    return Corpus(*columns, *totals, hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest())


def open_records(config: DataConfig, tokenizer: Tokenizer, progress: ProgressFn | None = None) -> RecordStore:
    """The store of an `array_record:` source. Shards that this machine has not read before are verified.

    Args:
      progress: called with bytes verified and bytes in all; None shows a bar on stderr.

    Raises:
      UserError: shards or their index are missing, damaged, or of another tokenizer.
    """
    groups: dict[str, set[str]] = {}
    for file in matching_files(config.globs, config.cache, beside=(INDEX, DOCUMENTS)):
        groups.setdefault(os.path.dirname(file.path), set()).add(os.path.basename(file.path))
    indices = [read_index(directory, names, tokenizer) for directory, names in sorted(groups.items())]
    if len({index.record_tokens for index in indices}) > 1:
        raise UserError(
            f"data.source = {config.source!r}: directories with records of different sizes; write them"
            " again with one version of `attnlab tokenizer apply`."
        )
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(stderr_progress(f"verifying {config.source}"))
        verify_shards(indices, os.path.join(cache_directory(config), "verified"), progress)
    return RecordStore(indices, tokenizer)


def require_text(config: DataConfig) -> None:
    """Raises UserError for a source that holds tokens."""
    if config.kind == "array_record":
        raise UserError(
            f"data.source = {config.source!r} is tokens already; give the text: stdlib, text:, jsonl: or parquet:."
        )
