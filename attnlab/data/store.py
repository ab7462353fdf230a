"""Token stores: every document of a corpus as ids, read by index; and the cache that keeps them on disk.

A flat store is one array, `eod d0 eod d1 eod ... dN eod`, with the place of every document in it. So the
inputs of a document of n tokens (end-of-document, then its tokens) and its targets (its tokens, then
end-of-document) are two views of the same n + 2 entries.
"""

from __future__ import annotations

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
from collections.abc import Callable
from typing import IO, Any, Protocol

import numpy as np

from attnlab import storage
from attnlab.data.config import DataConfig
from attnlab.data.corpus import TOKEN_BYTES_DTYPE, Corpus, CorpusBuilder, token_dtype, tokenised
from attnlab.data.digests import read_json, sha256_of, without_checksum, write_json
from attnlab.data.progress import ProgressFn, stderr_progress
from attnlab.data.sources import Source
from attnlab.data.tokenizers import Tokenizer
from attnlab.errors import UserError

_log = logging.getLogger(__name__)

# Part of every cache's name: raised when what is written changes.
_VERSION = 2
_MEMORY_LIMIT_BYTES = 64_000_000
_STALE_SECONDS = 24 * 3600
_FILES = ("tokens.bin", "lengths.npy", "keys.npy", "text_bytes.npy")
_TOKEN_BYTES, _META = "token_bytes.bin", "meta.json"


class Store(Protocol):
    """Documents as ids, by index."""

    corpus: Corpus

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Entries start to stop of `eod t1 .. tn eod` of a document of n tokens."""

    def token_bytes(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """Bytes of text of these entries, integers [stop - start], 0 for `eod`; None where they are not kept."""


class FlatStore:
    """A flat store in memory, or in the files of a directory that are mapped into memory."""

    def __init__(
        self, tokens: np.ndarray, corpus: Corpus, path: str | None = None, token_bytes: np.ndarray | None = None
    ):
        self.corpus = corpus
        self.path = path
        self._tokens = tokens
        self._token_bytes = token_bytes
        self.signature = self.current_signature()
        self._starts = np.zeros(len(corpus.lengths), np.int64)
        np.cumsum(corpus.lengths[:-1] + 1, out=self._starts[1:])

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        first = self._starts[document]
        return self._tokens[first + start : first + stop]

    def token_bytes(self, document: int, start: int, stop: int) -> np.ndarray | None:
        first = self._starts[document]
        return None if self._token_bytes is None else self._token_bytes[first + start : first + stop]

    def current_signature(self) -> list[tuple[int, int, int]] | None:
        """What changes when a cache on disk is replaced or damaged; None for a store in memory."""
        if self.path is None:
            return None
        try:
            stats = [os.stat(os.path.join(self.path, name)) for name in (*_files(self._token_bytes is not None), _META)]
        except OSError:
            return []
        return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files again; a pickled memory map would be a copy of the corpus.
        state = dict(self.__dict__)
        if self.path is not None:
            state["_tokens"] = self._tokens.dtype.str
            state["_token_bytes"] = self._token_bytes is not None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self._tokens, self._token_bytes = _mapped(self.path, np.dtype(state["_tokens"]), state["_token_bytes"])


def _files(kept: bool) -> tuple[str, ...]:
    """Files of a cache beside its description; `kept`: with the bytes of every token."""
    return (*_FILES, _TOKEN_BYTES) if kept else _FILES


def _mapped(path: str, dtype: np.dtype, kept: bool) -> tuple[np.ndarray, np.ndarray | None]:
    # Plain arrays: slices of np.memmap are slow.
    tokens = np.asarray(np.memmap(os.path.join(path, _FILES[0]), dtype=dtype, mode="r"))
    if not kept:
        return tokens, None
    return tokens, np.asarray(np.memmap(os.path.join(path, _TOKEN_BYTES), dtype=TOKEN_BYTES_DTYPE, mode="r"))


def build(
    source: Source, tokenizer: Tokenizer, out: IO[bytes], bytes_out: IO[bytes] | None, progress: ProgressFn
) -> Corpus:
    """Tokenises a source into `out`, as a flat store's array; the bytes of every token, if any, into `bytes_out`."""
    dtype = token_dtype(tokenizer.vocab_size)
    eod = np.array([tokenizer.eod_id], dtype).tobytes()
    eod_bytes = np.zeros(1, TOKEN_BYTES_DTYPE).tobytes()
    builder = CorpusBuilder()

    def end() -> None:
        out.write(eod)
        if bytes_out is not None:
            bytes_out.write(eod_bytes)

    end()
    for part in tokenised(source, tokenizer, progress):
        builder.add(part)
        out.write(part.ids.astype(dtype).tobytes())
        if bytes_out is not None:
            bytes_out.write(part.token_bytes.tobytes())
        if part.last:
            end()
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
    if store is None or store.signature != store.current_signature():
        store = _load_or_build(source, tokenizer, root, name, progress)
        _open[root, name] = store
    return store


def cache_directory(config: DataConfig) -> str:
    """Where tokenised corpora are kept."""
    return storage.cache_directory(config.cache)


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
    if os.path.lexists(path):
        try:
            return _load(path, tokenizer)
        except (OSError, ValueError) as error:
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
        return _build_in_memory(source, tokenizer, progress)


def _build_in_memory(source: Source, tokenizer: Tokenizer, progress: ProgressFn) -> FlatStore:
    out = io.BytesIO()
    bytes_out = io.BytesIO() if tokenizer.byte_lengths() is None else None
    corpus = build(source, tokenizer, out, bytes_out, progress)
    tokens = np.frombuffer(out.getvalue(), token_dtype(tokenizer.vocab_size))
    token_bytes = None if bytes_out is None else np.frombuffer(bytes_out.getvalue(), TOKEN_BYTES_DTYPE)
    return FlatStore(tokens, corpus, token_bytes=token_bytes)


def _build_on_disk(source: Source, tokenizer: Tokenizer, root: str, path: str, progress: ProgressFn) -> FlatStore:
    os.makedirs(root, exist_ok=True)
    _remove_stale(root)
    files = _files(tokenizer.byte_lengths() is None)
    partial = tempfile.mkdtemp(prefix="partial-", dir=root)
    try:
        with contextlib.ExitStack() as stack:
            out, bytes_out = (
                stack.enter_context(open(os.path.join(partial, name), "wb")) if name in files else None
                for name in (_FILES[0], _TOKEN_BYTES)
            )
            corpus = build(source, tokenizer, out, bytes_out, progress)
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
            "sha256": {name: sha256_of(os.path.join(partial, name)) for name in files},
        }
        write_json(os.path.join(partial, _META), meta)
        _put_in_place(partial, path, tokenizer)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _load(path, tokenizer)


def _put_in_place(partial: str, path: str, tokenizer: Tokenizer) -> None:
    """Renames a finished cache to its name. Another process may do the same at the same moment."""
    for _ in range(3):
        try:
            os.rename(partial, path)
            return
        except OSError:
            if not os.path.lexists(path):
                raise
        try:
            _load(path, tokenizer)  # the other process was first, and its work is good
            return
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                damaged = tempfile.mkdtemp(prefix="partial-damaged-", dir=os.path.dirname(path))
                os.rename(path, os.path.join(damaged, "cache"))
                shutil.rmtree(damaged, ignore_errors=True)
    raise OSError(f"{path} cannot be replaced")


def _load(path: str, tokenizer: Tokenizer) -> FlatStore:
    """Maps a cache. Every byte of it is checked, so that a damaged one is never used.

    Raises:
      OSError, ValueError: it is damaged.
    """
    dtype, kept = token_dtype(tokenizer.vocab_size), tokenizer.byte_lengths() is None
    meta = without_checksum(read_json(os.path.join(path, _META)))
    written = meta.get("sha256")
    for name in _files(kept):
        if not isinstance(written, dict) or sha256_of(os.path.join(path, name)) != written.get(name):
            raise ValueError(f"{name} is not what was written")
    columns = read_arrays(lambda: [np.load(os.path.join(path, name)) for name in _FILES[1:]])
    corpus = Corpus(*columns, *(meta.get(name) for name in ("files", "skipped", "empty", "digest")))
    tokens, token_bytes = _mapped(path, dtype, kept)
    entries = int(corpus.lengths.sum()) + len(corpus.lengths) + 1
    if len(tokens) != entries or (kept and len(token_bytes) != entries) or tokens.max() >= tokenizer.vocab_size:
        raise ValueError("its files do not fit together")
    return FlatStore(tokens, corpus, path, token_bytes)


def read_arrays(load: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    """What `load` gives with NumPy, of which a damaged file makes whatever it makes of it: ValueError."""
    try:
        arrays = load()
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise ValueError("not arrays")
    return arrays


def _remove_stale(root: str) -> None:
    """Removes what killed processes left behind: unfinished caches in which nothing was written for a day."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        with contextlib.suppress(OSError):
            if name.startswith("partial-"):
                written = max(os.path.getmtime(inside) for inside in (path, *(e.path for e in os.scandir(path))))
                if time.time() - written > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
