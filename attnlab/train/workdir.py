"""The directory of a run: made, checked and held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from attnlab.errors import UserError


@contextlib.contextmanager
def hold(path: pathlib.Path) -> Iterator[None]:
    """Makes the directory and keeps other runs out of it.

    If what runs inside raises UserError before it wrote anything, the directories that were made go again.

    Raises:
      UserError: it cannot be made or written (read-only, full, a file), another run holds it, or the disk is full
        while it is held.
    """
    made = [p for p in (path, *path.parents) if not os.path.exists(p)]
    try:
        with _locked(path):
            yield
    except Exception as error:
        if isinstance(error, UserError):
            _remove_empty(made)
        elif reason := _disk_trouble(error):
            raise UserError(f"--workdir {path}: {reason}; the last complete checkpoint is kept") from None
        raise


def _remove_empty(directories: list[pathlib.Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):  # it is not empty
            directory.rmdir()


def _disk_trouble(error: BaseException | None) -> str | None:
    """What the disk refused, if that is what an exception comes from; orbax hides it in the text of others."""
    while error is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if getattr(error, "errno", None) == number or f"os_error_code='{number}'" in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("a+")
    except (FileExistsError, NotADirectoryError):
        file = next((p for p in (path, *path.parents) if os.path.exists(p)), path)
        raise UserError(f"--workdir {path}: {file} is a file, not a directory") from None
    except OSError as error:
        raise _unusable(path, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"--workdir {path} is in use by another run (process {lock.read().strip() or 'unknown'}); "
                "wait for it or use another --workdir"
            ) from None
        except OSError as error:
            raise UserError(f"--workdir {path} cannot be locked: {error.strerror}; use another filesystem") from None
        try:
            try:
                os.ftruncate(lock.fileno(), 0)
                os.write(lock.fileno(), str(os.getpid()).encode())
                _probe(path)
            except OSError as error:
                raise _unusable(path, error) from None
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(path) == ["lock"]:  # nothing was written
                    (path / "lock").unlink()


def _probe(path: pathlib.Path) -> None:
    """Raises OSError unless a block can be written."""
    probe = path / "probe"
    try:
        probe.write_bytes(b"x" * 4096)
    finally:
        probe.unlink(missing_ok=True)


def _unusable(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"--workdir {path} cannot be written: {error.strerror}; choose another or free it")


def require_space(path: pathlib.Path, needed: int) -> None:
    """Raises UserError unless `needed` bytes are free where `path` lies."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"--workdir {path} has {free / 1e6:,.1f} MB free; the checkpoints of this run need {needed / 1e6:,.1f} MB\n"
            "free some, use another --workdir, or keep fewer with --config.train.keep"
        )
