"""Paths that people type, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator

from attnlab.errors import UserError


def expand(text: str) -> str:
    """A typed path with `~` or `~user` at its start replaced by the home directory.

    Raises:
      UserError: there is no such user, or no home directory is known.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):  # left as it was
        name = path[1:].partition("/")[0]
        missing = f"there is no user {name!r}" if name else "no home directory is known; set HOME"
        raise UserError(f"{text!r}: {missing}; a path that begins with ~ itself is written ./{text}")
    return path


def require_new_file(path: str, overwrite: bool) -> None:
    """Raises UserError unless a file may be written at `path`: nothing is there, or a regular file to be replaced."""
    found = _kind(path)
    if found is None or (found == "file" and overwrite):
        return
    if found == "file":
        raise UserError(f"{path} exists; name another, or replace it with --overwrite.")
    raise UserError(f"{path} is a {found}, which is never replaced; name a file.")


def require_new_directory(path: str, overwrite: bool, ours: Callable[[str], str | None]) -> None:
    """Raises UserError unless a directory may be made at `path`: nothing is there, or one that is empty or replaced.

    Args:
      overwrite: whether a directory with files is replaced.
      ours: says what in a directory is not of the kind that may be replaced; None: all of it is.
    """
    found = _kind(path)
    if found is None:
        return
    if found != "directory":
        raise UserError(f"{path} is a {found}, which is never replaced by a directory; name another.")
    if not os.listdir(path):
        return
    if not overwrite:
        raise UserError(f"{path} exists and is not an empty directory; name another, or replace it with --overwrite.")
    if foreign := ours(path):
        raise UserError(f"{path} is not replaced: {foreign}; name another, or remove it.")


def _kind(path: str) -> str | None:
    """What a path leads to, links followed; None: nothing."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):  # what is above it is for the making of directories to say
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


@contextlib.contextmanager
def file_beside(path: str, check: Callable[[], None]) -> Iterator[str]:
    """Gives the path of a file beside `path` to write, and renames it to `path` at the end.

    Where `path` is a link, what it leads to is replaced, and the link stays. If what runs inside raises, whatever it
    is, nothing is left: neither the file nor the directories that were made for it.

    Args:
      check: raises UserError where `path` may not be written; called before, and again before it is replaced.
    """
    with _beside(path, check) as (make, final):
        handle, name = make(tempfile.mkstemp)
        os.close(handle)
        try:
            yield name
            os.chmod(name, _mode(final, 0o666))
            check()
            os.replace(name, final)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(name)
            raise


def _mode(replaced: str, new: int) -> int:
    """The permissions of what is replaced; where nothing is, those that the umask leaves of `new`."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(os.stat(replaced).st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return new & ~mask


@contextlib.contextmanager
def directory_beside(path: str, check: Callable[[], None]) -> Iterator[str]:
    """`file_beside` for a directory."""
    with _beside(path, check) as (make, final):
        name = make(tempfile.mkdtemp)
        old = f"{name}.old"
        try:
            yield name
            os.chmod(name, _mode(final, 0o777))
            check()
            if os.path.isdir(final):
                os.rename(final, old)
            try:
                os.rename(name, final)
            except BaseException:
                if os.path.isdir(old):
                    os.rename(old, final)
                raise
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(name, ignore_errors=True)
            raise


@contextlib.contextmanager
def _beside(path: str, check: Callable[[], None]) -> Iterator[tuple[Callable, str]]:
    check()
    final = os.path.realpath(path)
    above = pathlib.Path(final).parent
    made = [p for p in (above, *above.parents) if not os.path.exists(p)]
    try:
        os.makedirs(above, exist_ok=True)
        yield lambda make: make(prefix=f"{os.path.basename(final)[:100]}.partial-", dir=above), final
    except BaseException as error:
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
        raise
