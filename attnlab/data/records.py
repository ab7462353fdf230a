"""Corpora tokenised ahead of time: written as array_record shards, read by random access.

A directory holds `tokens-NNNNN.array_record`, `documents.npz` (lengths, keys and text bytes of every
document) and `index.json`, written last. Document d is in shard d mod S. A record is up to RECORD_TOKENS
tokens of one document (little-endian uint16 or uint32), so that a row of a long document does not read all of
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from typing import Any

import numpy as np

from attnlab import paths
from attnlab.config import show
from attnlab.data.config import DataConfig
from attnlab.data.progress import ProgressFn, stderr_progress
from attnlab.data.sources import Source, matching_files
from attnlab.data.store import Corpus, CorpusBuilder, sha256_of, token_dtype, tokenised
from attnlab.data.tokenizers import Tokenizer, load_tokenizer
from attnlab.errors import ConfigError, UserError

RECORD_TOKENS = 1 << 13
_VERSION = 1
_INDEX, _DOCUMENTS = "index.json", "documents.npz"
_SHARD = r"tokens-\d{5}\.array_record"


class _ShardWriter:
    """One shard: the tokens of its documents in records, without any record across two documents."""

    def __init__(self, path: str, dtype: np.dtype):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path = path
        self.records = 0
        self._dtype = dtype
        self._held: list[np.ndarray] = []
        # One record per compressed group, so that reading one does not decompress its neighbours.
        self._writer = ArrayRecordWriter(path, "group_size:1")

    def add(self, ids: np.ndarray, last: bool) -> None:
        self._held.append(ids)
        held = sum(map(len, self._held))
        if held < RECORD_TOKENS and not last:
            return
        tokens = np.concatenate(self._held)
        whole = held if last else held - held % RECORD_TOKENS
        for start in range(0, whole, RECORD_TOKENS):
            self._writer.write(tokens[start : min(start + RECORD_TOKENS, whole)].astype(self._dtype).tobytes())
            self.records += 1
        self._held = [tokens[whole:]]

    def close(self) -> dict[str, Any]:
        from array_record.python.array_record_module import ArrayRecordReader

        self._writer.close()
        # The writer does not report a full disk; what is in the file does.
        reader = ArrayRecordReader(self.path)
        written = reader.num_records()
        reader.close()
        if written != self.records:
            raise UserError(f"{self.path}: {written} of {self.records} records were written; is the disk full?")
        return {
            "name": os.path.basename(self.path),
            "records": self.records,
            "size": os.path.getsize(self.path),
        }


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
    if _INDEX not in names:
        return f"it has no {_INDEX}, so is no corpus that `attnlab tokenizer apply` finished"
    others = sorted(n for n in names if n not in (_INDEX, _DOCUMENTS) and not re.fullmatch(_SHARD, n))
    return f"it also holds {others[0]!r}" if others else None


def _write(source: Source, tokenizer: Tokenizer, directory: str, shards: int, progress: ProgressFn) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    builder = CorpusBuilder()
    writers: list[_ShardWriter] = []
    document = 0
    for part in tokenised(source, tokenizer, progress):
        if document < shards and document == len(writers):
            writers.append(_ShardWriter(os.path.join(directory, f"tokens-{document:05d}.array_record"), dtype))
        writers[document % shards].add(part.ids, part.last)
        builder.add(part)
        document += part.last
    corpus = builder.finish(source)
    documents = os.path.join(directory, _DOCUMENTS)
    np.savez(documents, lengths=corpus.lengths, keys=corpus.keys, text_bytes=corpus.text_bytes)
    index = {
        "version": _VERSION,
        "source": source.config.source,
        "tokenizer": source.config.tokenizer,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": dtype.str,
        "record_tokens": RECORD_TOKENS,
        "documents": len(corpus.lengths),
        "tokens": int(corpus.lengths.sum()),
        "bytes": int(corpus.text_bytes.sum()),
        "files": corpus.files,
        "skipped": corpus.skipped,
        "empty": corpus.empty,
        "digest": corpus.digest,
        "documents_sha256": sha256_of(documents),
        "shards": [writer.close() for writer in writers],
    }
    with open(os.path.join(directory, _INDEX), "w") as out:
        json.dump(index, out, indent=1)
    return index


class RecordStore:
    """Documents of one or several directories that `apply_tokenizer` wrote."""

    def __init__(
        self,
        corpus: Corpus,
        paths: list[str],
        records: list[int],
        document_shard: np.ndarray,
        dtype: np.dtype,
        record_tokens: int,
        eod_id: int,
    ):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.corpus = corpus
        self._paths = paths
        self._dtype = dtype
        self._record_tokens = record_tokens
        self._eod = np.array([eod_id], dtype)
        self._document_shard = document_shard
        # The record at which each document begins, over all shards: documents lie in a shard in their order.
        counts = -(-corpus.lengths // record_tokens)
        order = np.argsort(document_shard, kind="stable")
        self._first = np.empty(len(counts), np.int64)
        self._first[order] = np.cumsum(counts[order]) - counts[order]
        self._source = ArrayRecordDataSource([f"{path}[0:{count}]" for path, count in zip(paths, records, strict=True)])

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Entries start to stop of `eod t1 .. tn eod`."""
        length = int(self.corpus.lengths[document])
        first, end = max(start - 1, 0), min(stop - 1, length)  # of the tokens
        parts = [self._eod] if start == 0 else []
        if first < end:
            size = self._record_tokens
            for record in range(first // size, -(-end // size)):
                tokens = self._record(document, record, min(size, length - record * size))
                parts.append(tokens[max(first - record * size, 0) : end - record * size])
        if stop == length + 2:
            parts.append(self._eod)
        return np.concatenate(parts)

    def _record(self, document: int, record: int, expected: int) -> np.ndarray:
        try:
            content = self._source[int(self._first[document]) + record]
            problem = "" if len(content) == expected * self._dtype.itemsize else f"{len(content)} bytes"
        except Exception as error:  # array_record raises whatever its C++ side reports
            problem = str(error) or type(error).__name__
        if problem:
            path = self._paths[self._document_shard[document]]
            raise UserError(
                f"{path} is damaged: record {record} of document {document} cannot be read ({problem[:120]})."
                " Write the directory again with `attnlab tokenizer apply`."
            )
        return np.frombuffer(content, self._dtype)


def open_records(config: DataConfig, tokenizer: Tokenizer) -> RecordStore:
    """The store of an `array_record:` source.

    Raises:
      UserError: shards or their index are missing, of the wrong size, or of another tokenizer.
    """
    groups: dict[str, set[str]] = {}
    for file in matching_files(config.globs):
        groups.setdefault(os.path.dirname(file.path), set()).add(os.path.basename(file.path))
    columns: dict[str, list[np.ndarray]] = {"lengths": [], "keys": [], "text_bytes": []}
    paths: list[str] = []
    records: list[int] = []
    document_shard: list[np.ndarray] = []
    indices = []
    for directory, names in sorted(groups.items()):
        index, arrays = _read_index(directory, names, tokenizer)
        indices.append(index)
        shards = len(index["shards"])
        document_shard.append(len(paths) + np.arange(index["documents"]) % shards)
        paths += [os.path.join(directory, shard["name"]) for shard in index["shards"]]
        records += [shard["records"] for shard in index["shards"]]
        for name, column in columns.items():
            column.append(arrays[name])
    if len({index["record_tokens"] for index in indices}) > 1:
        raise UserError(
            f"data.source = {config.source!r}: directories with records of different sizes; write them"
            " again with one version of `attnlab tokenizer apply`."
        )
    digests = [index["digest"] for index in indices]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    totals = (sum(index[name] for index in indices) for name in ("files", "skipped", "empty"))
    corpus = Corpus(*(np.concatenate(column) for column in columns.values()), *totals, digest)
    return RecordStore(
        corpus,
        paths,
        records,
        np.concatenate(document_shard),
        np.dtype(indices[0]["dtype"]),
        indices[0]["record_tokens"],
        tokenizer.eod_id,
    )


def _read_index(directory: str, names: set[str], tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    again = "Write the directory again with `attnlab tokenizer apply`."
    try:
        with open(os.path.join(directory, _INDEX)) as file:
            index = json.load(file)
        documents = os.path.join(directory, _DOCUMENTS)
        if sha256_of(documents) != index["documents_sha256"]:
            raise UserError(f"{documents} is damaged (not what {_INDEX} says was written). {again}")
        with np.load(documents) as loaded:
            arrays = {name: loaded[name] for name in ("lengths", "keys", "text_bytes")}
        shards = {shard["name"]: shard["size"] for shard in index["shards"]}
        fingerprint, version = index["tokenizer_fingerprint"], index["version"]
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} has no {os.path.basename(error.filename)}: not a directory that `attnlab"
            f" tokenizer apply` finished. {again}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}: {_INDEX} or {_DOCUMENTS} is damaged ({error}). {again}") from error
    if version != _VERSION:
        raise UserError(f"{directory} was written in format {version}; this attnlab reads {_VERSION}. {again}")
    if fingerprint != tokenizer.fingerprint():
        raise UserError(
            f"{directory} was tokenised with {index['tokenizer']!r}, and data.tokenizer is a different"
            f" tokenizer, {tokenizer.name!r}: give the one it was written with."
        )
    for name, size in shards.items():
        path = os.path.join(directory, name)
        if name not in names:
            there = "is not matched by data.source" if os.path.exists(path) else "is missing"
            raise UserError(f"{path} {there}: all {len(shards)} shards of a directory are read together.")
        if os.path.getsize(path) != size:
            raise UserError(
                f"{path} is {os.path.getsize(path)} bytes, and was written with {size}: truncated or damaged. {again}"
            )
    return index, arrays


def require_text(config: DataConfig) -> None:
    """Raises UserError for a source that holds tokens."""
    if config.kind == "array_record":
        raise UserError(
            f"data.source = {config.source!r} is tokens already; give the text: stdlib, text:, jsonl: or parquet:."
        )
