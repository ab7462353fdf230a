"""The index of a directory of array_record shards: `index.json` and `documents.npz`, written and read.

Both are read from disks that others wrote and that fail: whatever is in them, they are as they were written, or one
UserError says what is wrong. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import numpy as np

from attnlab.data.corpus import Corpus, token_dtype
from attnlab.data.digests import (
    CHECKSUM,
    damaged_files,
    read_json,
    sha256_of,
    sha256_of_each,
    without_checksum,
    write_json,
)
from attnlab.data.progress import ProgressFn
from attnlab.data.store import read_arrays
from attnlab.data.tokenizers import Tokenizer
from attnlab.errors import UserError

# 1 had no digests of shards, and no bytes of tokens.
_VERSION = 2
INDEX, DOCUMENTS = "index.json", "documents.npz"
_COLUMNS = ("lengths", "keys", "text_bytes")
_AGAIN = "Write the directory again with `attnlab tokenizer apply`."
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """What a directory holds.

    Attributes:
      corpus: its documents.
      paths: of the shards.
      records: of every shard.
      digests: SHA-256 of every shard; None in directories of version 1.
      record_tokens: tokens of a full record.
      token_bytes: whether records hold the bytes of their tokens.
    """

    corpus: Corpus
    paths: list[str]
    records: list[int]
    digests: list[str] | None
    record_tokens: int
    token_bytes: bool


def write_index(
    directory: str, corpus: Corpus, tokenizer: Tokenizer, spec: dict[str, str], shards: list[str], record_tokens: int
) -> dict[str, Any]:
    """Writes both files, `index.json` last; returns what is in it.

    Args:
      spec: `source` and `tokenizer`, as configured.
      shards: paths of the finished shards.
      record_tokens: tokens of a full record.
    """
    documents = os.path.join(directory, DOCUMENTS)
    np.savez(documents, **{name: getattr(corpus, name) for name in _COLUMNS})
    counts = shard_records(corpus.lengths, len(shards), record_tokens)
    index = {
        "version": _VERSION,
        **spec,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "token_bytes": tokenizer.byte_lengths() is None,
        "record_tokens": record_tokens,
        "documents": len(corpus.lengths),
        "tokens": int(corpus.lengths.sum()),
        "bytes": int(corpus.text_bytes.sum()),
        "files": corpus.files,
        "skipped": corpus.skipped,
        "empty": corpus.empty,
        "digest": corpus.digest,
        "documents_sha256": sha256_of(documents),
        "shards": [
            {"name": os.path.basename(path), "records": count, "size": os.path.getsize(path), "sha256": digest}
            for path, count, digest in zip(shards, counts, sha256_of_each(shards), strict=True)
        ],
    }
    write_json(os.path.join(directory, INDEX), index)
    return index


def shard_records(lengths: np.ndarray, shards: int, record_tokens: int) -> list[int]:
    """Records in every shard: document d is in shard d mod `shards`, and begins a record."""
    records = -(-lengths // record_tokens)
    return [int(records[shard::shards].sum()) for shard in range(shards)]


def read_index(directory: str, names: set[str], tokenizer: Tokenizer) -> RecordIndex:
    """The index of a directory.

    Args:
      names: files of the directory that the source names: all shards must be among them.

    Raises:
      UserError: it is missing or damaged, of another version or tokenizer, or shards are missing or cut.
    """
    try:
        index = _load(directory)
        _require_tokenizer(directory, index, tokenizer)
        corpus = _read_documents(directory, index)
        _check(index, corpus, tokenizer)
        _require_shards(directory, index["shards"], names)
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} has no {os.path.basename(error.filename)}: not a directory that `attnlab"
            f" tokenizer apply` finished. {_AGAIN}"
        ) from error
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:160]
        raise UserError(f"{directory}: {INDEX} or {DOCUMENTS} is damaged ({problem}). {_AGAIN}") from error
    version, shards = index["version"], index["shards"]
    return RecordIndex(
        corpus,
        [os.path.join(directory, shard["name"]) for shard in shards],
        [shard["records"] for shard in shards],
        [shard["sha256"] for shard in shards] if version > 1 else None,
        index["record_tokens"],
        version > 1 and index["token_bytes"],
    )


def _load(directory: str) -> dict[str, Any]:
    index = read_json(os.path.join(directory, INDEX))
    version = index.get("version")
    if type(version) is not int or not 1 <= version <= _VERSION:
        raise UserError(
            f"{directory} was written in format {str(version)[:20]}; this attnlab reads 1 to {_VERSION}. {_AGAIN}"
        )
    if version > 1:
        return without_checksum(index)
    if CHECKSUM in index:
        raise ValueError("version = 1 has no checksum")
    return index


def _require_shards(directory: str, shards: list[dict[str, Any]], names: set[str]) -> None:
    for shard in shards:
        path = os.path.join(directory, shard["name"])
        if shard["name"] not in names:
            there = "is not matched by data.source" if os.path.exists(path) else "is missing"
            raise UserError(f"{path} {there}: all {len(shards)} shards of a directory are read together.")
        if (size := os.path.getsize(path)) != shard["size"]:
            raise UserError(
                f"{path} is {size} bytes, and was written with {shard['size']}: truncated or damaged. {_AGAIN}"
            )


def _require_tokenizer(directory: str, index: dict[str, Any], tokenizer: Tokenizer) -> None:
    for name in ("source", "tokenizer", "tokenizer_fingerprint"):
        if not isinstance(index.get(name), str):
            raise ValueError(f"{name} = {index.get(name)!r}")
    if index["tokenizer_fingerprint"] != tokenizer.fingerprint():
        raise UserError(
            f"{directory} was tokenised with {index['tokenizer']!r}, and data.tokenizer is a different"
            f" tokenizer, {tokenizer.name!r}: give the one it was written with."
        )


def _read_documents(directory: str, index: dict[str, Any]) -> Corpus:
    path = os.path.join(directory, DOCUMENTS)
    if sha256_of(path) != index.get("documents_sha256"):
        raise ValueError(f"{DOCUMENTS} is not what {INDEX} says was written")

    def load() -> list[np.ndarray]:
        with np.load(path) as loaded:
            if sorted(loaded.files) != sorted(_COLUMNS):
                raise ValueError(f"{DOCUMENTS} holds {', '.join(loaded.files)}")
            return [loaded[name] for name in _COLUMNS]

    return Corpus(*read_arrays(load), *(index.get(name) for name in ("files", "skipped", "empty", "digest")))


def _check(index: dict[str, Any], corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Raises ValueError where an index contradicts its documents, the tokenizer or itself."""
    if not _SHA256.fullmatch(corpus.digest):
        raise ValueError(f"digest = {corpus.digest!r}")
    known = {
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "documents": len(corpus.lengths),
        "tokens": int(corpus.lengths.sum()),
        "bytes": int(corpus.text_bytes.sum()),
    }
    if index["version"] > 1:
        known["token_bytes"] = tokenizer.byte_lengths() is None
    for name, value in known.items():
        _require_equal(name, index.get(name), value)
    size, shards = index.get("record_tokens"), index.get("shards")
    if type(size) is not int or not 1 <= size < 1 << 40:
        raise ValueError(f"record_tokens = {size!r}")
    if not isinstance(shards, list) or not 1 <= len(shards) <= len(corpus.lengths):
        raise ValueError(f"shards = {str(shards)[:40]}")
    counts = shard_records(corpus.lengths, len(shards), size)
    for i, (shard, records) in enumerate(zip(shards, counts, strict=True)):
        if not isinstance(shard, dict):
            raise ValueError(f"shards[{i}] = {str(shard)[:40]}")
        _require_equal(f"shards[{i}].name", shard.get("name"), shard_name(i))
        _require_equal(f"shards[{i}].records", shard.get("records"), records)
        if type(shard.get("size")) is not int:
            raise ValueError(f"shards[{i}].size = {shard.get('size')!r}")
        digest = shard.get("sha256")
        if index["version"] > 1 and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise ValueError(f"shards[{i}].sha256 = {digest!r}")


def _require_equal(name: str, value: object, expected: object) -> None:
    if type(value) is not type(expected) or value != expected:
        raise ValueError(f"{name} = {str(value)[:60]}, not {expected!r}")


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"tokens-{shard:05d}.array_record"


def verify_shards(indices: list[RecordIndex], marks: str, progress: ProgressFn) -> None:
    """Compares shards with their SHA-256, see `damaged_files`.

    Raises:
      UserError: one is not what was written.
    """
    digests = {
        path: digest for index in indices for path, digest in zip(index.paths, index.digests or [], strict=False)
    }
    try:
        damaged = damaged_files(digests, marks, progress)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror or error}.") from error
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise UserError(f"{damaged[0]}{more} is damaged: not what {INDEX} says was written. {_AGAIN}")
