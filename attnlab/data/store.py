"""Token stores: every document of a corpus as ids, read by index; and the cache that keeps them on disk.

A flat store is one array, `eod d0 eod d1 eod ... dN eod`, with the place of every document in it. So the
inputs of a document of n tokens (end-of-document, then its tokens) and its targets (its tokens, then
end-of-document) are two views of the same n + 2 entries.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from typing import IO, Any, Protocol

import numpy as np

from attnlab import paths
from attnlab.data.config import DataConfig
from attnlab.data.progress import ProgressFn, stderr_progress
from attnlab.data.sources import Source
from attnlab.data.tokenizers import Tokenizer
from attnlab.errors import UserError

_log = logging.getLogger(__name__)

# Part of every cache's name: raised when what is written changes.
_VERSION = 1
_MEMORY_LIMIT_BYTES = 64_000_000
_BATCH_CHARACTERS = 1 << 20
_BATCH_TEXTS = 1024
_STALE_SECONDS = 24 * 3600
_FILES = ("tokens.bin", "lengths.npy", "keys.npy", "text_bytes.npy")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is known of every document, in the source's order, and of the whole."""

    lengths: np.ndarray  # int64 [documents], tokens without end-of-document
    keys: np.ndarray  # uint64 [documents], see sources.Document
    text_bytes: np.ndarray  # int64 [documents], UTF-8 bytes of text
    files: int
    skipped: int
    empty: int
    digest: str  # of tokens, lengths and keys


class Store(Protocol):
    """Documents as ids, by index."""

    corpus: Corpus

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Entries start to stop of `eod t1 .. tn eod` of a document of n tokens."""


class FlatStore:
    """A flat store in memory or in a file that is mapped into memory."""

    def __init__(self, tokens: np.ndarray, corpus: Corpus, path: str | None = None):
        self.corpus = corpus
        self.path = path
        self.signature = _signature(path)
        self._tokens = tokens
        self._starts = np.zeros(len(corpus.lengths), np.int64)
        np.cumsum(corpus.lengths[:-1] + 1, out=self._starts[1:])

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        first = self._starts[document]
        return self._tokens[first + start : first + stop]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file again; a pickled memory map would be a copy of the corpus.
        state = dict(self.__dict__)
        if self.path is not None:
            state["_tokens"] = self._tokens.dtype.str
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self._tokens = _mapped(self.path, np.dtype(state["_tokens"]))


def _signature(path: str | None) -> list[tuple[int, int, int]] | None:
    """What changes when a cache on disk is replaced or damaged; None for a store in memory."""
    if path is None:
        return None
    try:
        stats = [os.stat(os.path.join(os.path.dirname(path), name)) for name in (*_FILES, "meta.json")]
    except OSError:
        return []
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


def _mapped(path: str, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # a plain array: slices of np.memmap are slow


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


def tokenised(source: Source, tokenizer: Tokenizer, progress: ProgressFn) -> Iterator[TokenisedDocument]:
    """The documents of a source as ids, in order; texts are encoded many at a time."""
    waiting: list[tuple[int, str, bool]] = []
    characters = text_bytes = 0

    def flush() -> Iterator[TokenisedDocument]:
        nonlocal characters, text_bytes
        encoded = tokenizer.encode_batch([text for _, text, _ in waiting])
        for (key, text, last), ids in zip(waiting, encoded, strict=True):
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            text_bytes += size
            yield TokenisedDocument(key, ids, size, last)
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


def build(source: Source, tokenizer: Tokenizer, out: IO[bytes], progress: ProgressFn) -> Corpus:
    """Tokenises a source into `out`, as a flat store's array."""
    dtype = token_dtype(tokenizer.vocab_size)
    eod = np.array([tokenizer.eod_id], dtype).tobytes()
    out.write(eod)
    builder = CorpusBuilder()
    for part in tokenised(source, tokenizer, progress):
        builder.add(part)
        out.write(part.ids.astype(dtype).tobytes())
        if part.last:
            out.write(eod)
    return builder.finish(source)


# Stores that are in use, so that the training and the evaluation loader of a process share one.
_open: weakref.WeakValueDictionary[tuple[str, str], FlatStore] = weakref.WeakValueDictionary()


def open_flat(config: DataConfig, tokenizer: Tokenizer, progress: ProgressFn | None = None) -> FlatStore:
    """The tokens of a config's source, from the cache or tokenised now.

    Raises:
      UserError: the source cannot be read, or a corpus of 64 MB or more cannot be cached.
    """
    source = Source(config)
    root = cache_directory(config)
    name = _cache_name(source, tokenizer)
    store = _open.get((root, name))
    if store is None or store.signature != _signature(store.path):
        store = _load_or_build(source, tokenizer, root, name, progress)
        _open[root, name] = store
    return store


def cache_directory(config: DataConfig) -> str:
    """Where tokenised corpora are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    chosen = config.cache or os.environ.get("ATTNLAB_CACHE") or os.path.join(base, "attnlab")
    return os.path.abspath(paths.expand(chosen))


def _cache_name(source: Source, tokenizer: Tokenizer) -> str:
    config = source.config
    parts = [
        _VERSION,
        config.kind,
        config.field,
        config.on_bad_record,
        tokenizer.fingerprint(),
        [dataclasses.astuple(file) for file in source.files],
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return f"tokens-{digest[:32]}"


def _load_or_build(
    source: Source, tokenizer: Tokenizer, root: str, name: str, progress: ProgressFn | None
) -> FlatStore:
    path = os.path.join(root, name)
    dtype = token_dtype(tokenizer.vocab_size)
    if os.path.isdir(path):
        try:
            return _load(path, dtype)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("data: the token cache %s is damaged (%s); tokenising again.", path, error)
    with contextlib.ExitStack() as stack:
        if progress is None:
            label = f"tokenising {source.config.source} with {tokenizer.name}"
            progress = stack.enter_context(stderr_progress(label))
        try:
            return _build_on_disk(source, tokenizer, root, path, progress)
        except OSError as error:
            problem = error
        if source.config.kind != "stdlib" and source.bytes >= _MEMORY_LIMIT_BYTES:
            raise UserError(
                f"the token cache {root} cannot be written ({problem.strerror or problem}), and"
                f" {source.bytes / 1e6:.0f} MB of text are too much to tokenise at every start.\n"
                "Choose another directory with data.cache or $ATTNLAB_CACHE."
            ) from problem
        _log.warning(
            "data: the token cache %s cannot be written (%s): tokens are kept in memory, and made again at"
            " the next start. data.cache or $ATTNLAB_CACHE chooses another directory.",
            root,
            problem.strerror or problem,
        )
        out = io.BytesIO()
        corpus = build(source, tokenizer, out, progress)
        return FlatStore(np.frombuffer(out.getvalue(), dtype), corpus)


def _build_on_disk(source: Source, tokenizer: Tokenizer, root: str, path: str, progress: ProgressFn) -> FlatStore:
    os.makedirs(root, exist_ok=True)
    _remove_stale(root)
    dtype = token_dtype(tokenizer.vocab_size)
    partial = tempfile.mkdtemp(prefix="partial-", dir=root)
    try:
        with open(os.path.join(partial, "tokens.bin"), "wb") as out:
            corpus = build(source, tokenizer, out, progress)
        for name, array in (
            ("lengths", corpus.lengths),
            ("keys", corpus.keys),
            ("text_bytes", corpus.text_bytes),
        ):
            np.save(os.path.join(partial, f"{name}.npy"), array)
        meta = {
            "version": _VERSION,
            "source": source.config.source,
            "tokenizer": tokenizer.name,
            "files": corpus.files,
            "skipped": corpus.skipped,
            "empty": corpus.empty,
            "digest": corpus.digest,
            "sha256": {name: sha256_of(os.path.join(partial, name)) for name in _FILES},
        }
        with open(os.path.join(partial, "meta.json"), "w") as out:
            json.dump(meta, out, indent=1)
        _put_in_place(partial, path, dtype)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _load(path, dtype)


def _put_in_place(partial: str, path: str, dtype: np.dtype) -> None:
    """Renames a finished cache to its name. Another process may do the same at the same moment."""
    for _ in range(3):
        try:
            os.rename(partial, path)
            return
        except OSError:
            if not os.path.isdir(path):
                raise
        try:
            _load(path, dtype)  # the other process was first, and its work is good
            return
        except (OSError, ValueError, KeyError, TypeError):
            with contextlib.suppress(OSError):
                damaged = tempfile.mkdtemp(prefix="partial-damaged-", dir=os.path.dirname(path))
                os.rename(path, os.path.join(damaged, "cache"))
                shutil.rmtree(damaged, ignore_errors=True)
    raise OSError(f"{path} cannot be replaced")


def _load(path: str, dtype: np.dtype) -> FlatStore:
    """Maps a cache. Every byte of it is checked, so that a damaged one is never used.

    Raises:
      OSError, ValueError, KeyError, TypeError: it is damaged.
    """
    with open(os.path.join(path, "meta.json")) as file:
        meta = json.load(file)
    for name in _FILES:
        if sha256_of(os.path.join(path, name)) != meta["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    lengths, keys, text_bytes = (np.load(os.path.join(path, name)) for name in _FILES[1:])
    corpus = Corpus(lengths, keys, text_bytes, *(meta[name] for name in ("files", "skipped", "empty", "digest")))
    tokens_path = os.path.join(path, "tokens.bin")
    return FlatStore(_mapped(tokens_path, dtype), corpus, tokens_path)


def sha256_of(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_stale(root: str) -> None:
    """Removes what killed processes left behind: unfinished caches in which nothing was written for a day."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        with contextlib.suppress(OSError):
            if name.startswith("partial-"):
                written = max(os.path.getmtime(inside) for inside in (path, *(e.path for e in os.scandir(path))))
                if time.time() - written > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
