"""Digests of a directory's files, written with it: whether they are still what was written."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import stat
from collections.abc import Callable, Collection

from attnlab.data.digests import sha256_of, sha256_of_each, without_checksum, write_json
from attnlab.errors import Damaged
from attnlab.train import files

NAME = "digests.json"
# orbax writes these when all else is done; nothing is restored from them.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_THREADS = min(8, os.cpu_count() or 1)  # hashlib lets go of the interpreter


def write(directory: pathlib.Path) -> None:
    """Writes `digests.json` into a directory: of every file below it the size and the SHA-256."""
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    names = [name for name in names if name not in _LATER]
    paths = [str(directory / name) for name in names]
    written = zip(map(os.path.getsize, paths), sha256_of_each(paths), strict=True)
    write_listed(directory, dict(zip(names, written, strict=True)))


def write_listed(directory: pathlib.Path, listed: dict[str, tuple[int, str]]) -> None:
    """Writes `digests.json` of files that may lie elsewhere."""
    write_json(str(directory / NAME), {"files": listed})


def read(directory: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file, as written.

    Raises:
      Damaged: `digests.json` is missing or is not one.
    """
    try:
        content = without_checksum(files.read_json(directory / NAME))
        listed = {name: (size, digest) for name, (size, digest) in content["files"].items()}
        if not all(isinstance(size, int) and isinstance(digest, str) for size, digest in listed.values()):
            raise ValueError("it lists something else than sizes and digests")
        return listed
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{NAME} is damaged ({error})") from None


def check_sizes(directory: pathlib.Path, sizes: dict[str, int] | None = None) -> None:
    """Raises Damaged unless every file is there with the size it was written with.

    Args:
      sizes: of the files, where they lie elsewhere.
    """
    for name, (size, _) in read(directory).items():
        found = _size(directory, name) if sizes is None else sizes.get(name)
        if found != size:
            raise Damaged(f"{name} has {found if found is not None else 'no'} bytes instead of {size}")


def _size(directory: pathlib.Path, name: str) -> int | None:
    try:
        status = os.stat(directory / name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Damaged(f"{name} cannot be read: {error.strerror}") from None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def check_file(directory: pathlib.Path, name: str) -> None:
    """Raises Damaged unless one file has the content it was written with."""
    listed = read(directory)
    if name not in listed:
        raise Damaged(f"{NAME} does not know {name}")
    if reason := _difference(directory, name, *listed[name]):
        raise Damaged(reason)


def verifying(
    directory: pathlib.Path, share: slice = slice(None), *, names: Collection[str] | None = None
) -> Callable[[], str]:
    """Starts to compare the content of files with their digests, in threads.

    Args:
      directory: of `write`.
      share: of the files, largest first; several processes take one each.
      names: of the files that are here; None: all.

    Returns:
      A function that waits for the outcome: which file differs and how; empty if none does.

    Raises:
      Damaged: as `check_sizes`, at once.
    """
    listed = read(directory)
    if names is None:
        check_sizes(directory)
    else:
        listed = {name: listed[name] for name in names}
    largest = sorted(listed.items(), key=lambda item: (-item[1][0], item[0]))[share]
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
    outcomes = [pool.submit(_difference, directory, name, *written) for name, written in largest]
    pool.shutdown(wait=False)
    return lambda: next((reason for outcome in outcomes if (reason := outcome.result())), "")


def _difference(directory: pathlib.Path, name: str, size: int, digest: str) -> str:
    try:
        if os.path.getsize(directory / name) == size and sha256_of(str(directory / name)) == digest:
            return ""
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return f"the content of {name} is not what was written"
