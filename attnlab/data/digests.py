"""What makes damage show: SHA-256 of files, JSON files that hold their own, and what was verified before."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from attnlab.data.progress import ProgressFn

CHECKSUM = "checksum"
_CHUNK_BYTES = 1 << 20
_THREADS = 8
# A file that changed this recently may change again without its time telling.
_SETTLED_SECONDS = 2.0

_verified: set[str] = set()


def open_regular(path: str) -> IO[bytes]:
    """Opens a file to read. OSError for what is no regular file: a pipe would block, a device has no end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    return open(path, "rb")


def sha256_of(path: str, read: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a regular file, in hexadecimal. `read` is called with the bytes of every chunk."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                if read is not None:
                    read(len(chunk))
    except OSError as error:
        error.filename = path  # a disk that fails does not say where
        raise
    return digest.hexdigest()


def sha256_of_each(paths: Iterable[str]) -> list[str]:
    """The SHA-256 of every file, in parallel."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(sha256_of, paths))


def write_json(path: str, values: dict[str, Any]) -> None:
    """Writes a JSON object with a checksum of its content."""
    with open(path, "w", encoding="utf-8") as out:
        json.dump({**values, CHECKSUM: _checksum(values)}, out, indent=1)


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file, not yet compared with its checksum.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, or no object.
    """
    name = os.path.basename(path)
    with open_regular(path) as file:
        try:
            values = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name}: a JSON {type(values).__name__}, not an object")
    return values


def without_checksum(values: dict[str, Any]) -> dict[str, Any]:
    """What was given to `write_json`, from what is in the file.

    Raises:
      ValueError: it has no checksum, or another one's.
    """
    rest = {name: value for name, value in values.items() if name != CHECKSUM}
    try:
        same = values.get(CHECKSUM) == _checksum(rest)
    except RecursionError:
        same = False
    if not same:
        raise ValueError(f"{CHECKSUM} is not that of what was written")
    return rest


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def damaged_files(digests: dict[str, str], marks: str, progress: ProgressFn) -> list[str]:
    """Which files differ from their SHA-256. Each is read once, in parallel, and then known by its mark.

    A file of the same path, size, times, inode and digest as one that was verified is not read again.

    Args:
      digests: SHA-256 by path.
      marks: directory of the marks, which is made; where it cannot be written, only this process remembers.
      progress: called with bytes read and bytes in all.

    Raises:
      OSError: a file cannot be read.
    """
    before = {path: os.stat(path) for path in digests}
    names = {path: _mark(path, before[path], digest) for path, digest in digests.items()}
    unread = [path for path, name in names.items() if not _is_marked(marks, name)]
    total = sum(before[path].st_size for path in unread)
    done, lock = 0, threading.Lock()

    def read(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total)

    started = time.time()
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda path: sha256_of(path, read), unread))
    damaged = []
    for path, digest in zip(unread, found, strict=True):
        if digest != digests[path]:
            damaged.append(path)
        elif _mark(path, os.stat(path), digest) == names[path] and before[path].st_ctime + _SETTLED_SECONDS < started:
            _set_mark(marks, names[path])
    return damaged


def _mark(path: str, status: os.stat_result, digest: str) -> str:
    parts = [path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, digest]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_marked(marks: str, name: str) -> bool:
    return name in _verified or os.path.isfile(os.path.join(marks, name))


def _set_mark(marks: str, name: str) -> None:
    _verified.add(name)
    with contextlib.suppress(OSError):
        os.makedirs(marks, exist_ok=True)
        open(os.path.join(marks, name), "wb").close()
