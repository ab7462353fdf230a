"""The directory of a run: made, checked and held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import IO

from attnlab import storage
from attnlab.errors import TrainingFailed, UserError
from attnlab.train import files

# What a run writes. A file's place may hold that file and nothing else, not even a link to one: it is replaced.
_FILES = (
    "lock", "config.json", "init_from.json", "distill.json", "run.json", "metrics.jsonl", "goodput.jsonl",
    "trackers.json", "log.txt", "samples.txt",
)  # fmt: skip
_DIRECTORIES = ("checkpoints", "damaged_checkpoints", "tensorboard", "profile")


class Held:
    """A workdir that this process holds."""

    def __init__(self, path: pathlib.Path, lock: IO[str]):
        self._path, self._lock = path, lock

    def require(self) -> None:
        """Raises TrainingFailed if the directory is no longer there, or no longer the one that was taken."""
        if (remote := storage.mirrored(self._path)) is not None:
            remote.require()
        try:
            same = os.path.samestat(os.stat(self._path / "lock"), os.fstat(self._lock.fileno()))
        except OSError:
            same = False
        if not same:
            raise TrainingFailed(
                f"workdir {self._path} was removed or replaced while the run wrote to it: what it had written is "
                "not there any more"
            )


@contextlib.contextmanager
def hold(path: pathlib.Path) -> Iterator[Held]:
    """Makes the directory and keeps other runs out of it.

    If what runs inside raises UserError before it wrote anything, the directories that were made go again.

    Raises:
      UserError: it cannot be made or written (read-only, full, a file), something else is where a run writes, another
        run holds it, or something in it cannot be written while it is held.
      TrainingFailed: it vanished while it was held.
    """
    made = [p for p in (path, *path.parents) if not os.path.exists(p)]
    try:
        with _locked(path) as held:
            _require_places(path)
            try:
                yield held
            except OSError:
                held.require()  # where all is gone, that is what to say
                raise
    except Exception as error:
        if isinstance(error, UserError):
            _remove_empty(made)
        elif reason := disk_trouble(error) or _trouble_below(path, error):
            raise UserError(f"workdir {path}: {reason}; the last complete checkpoint is kept") from None
        raise


@contextlib.contextmanager
def held_if_free(path: pathlib.Path) -> Iterator[bool]:
    """Keeps runs out of a workdir while its reader puts something in order; False where one is in it, or none may."""
    with contextlib.ExitStack() as stack:
        try:
            _require_kind(path / "lock")  # a pipe would be waited for
            lock = stack.enter_context((path / "lock").open("r"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.access(path, os.W_OK)
        except (OSError, UserError):
            free = False
        yield free


def _remove_empty(directories: list[pathlib.Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):  # it is not empty
            directory.rmdir()


def disk_trouble(error: BaseException | None) -> str | None:
    """What the disk refused, if that is what an exception comes from; orbax hides it in the text of others."""
    while error is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if getattr(error, "errno", None) == number or f"os_error_code='{number}'" in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _trouble_below(path: pathlib.Path, error: BaseException) -> str | None:
    """What is wrong with a file of the workdir, if that is what an exception says."""
    if not isinstance(error, OSError) or not isinstance(error.filename, (str, os.PathLike)):
        return None
    inside = pathlib.Path(os.path.abspath(error.filename)).is_relative_to(os.path.abspath(path))
    return f"{error.filename}: {error.strerror}" if inside else None


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[Held]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        _require_kind(path / "lock")
        lock = (path / "lock").open("a+", errors="replace")
    except (FileExistsError, NotADirectoryError):
        file = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
        raise UserError(f"workdir {path}: {file} is {_found(file)}, not a directory") from None
    except OSError as error:
        raise _unusable(path, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"workdir {path} is in use by another run (process {lock.read().strip() or 'unknown'}); "
                "wait for it or use another workdir"
            ) from None
        except OSError as error:
            raise UserError(f"workdir {path} cannot be locked: {error.strerror}; use another filesystem") from None
        lock.seek(0)
        if not re.fullmatch(r"\d*", lock.read(64)):
            raise UserError(f"{path / 'lock'} is not a run's file; remove it or use another workdir")
        try:
            try:
                os.ftruncate(lock.fileno(), 0)
                os.write(lock.fileno(), str(os.getpid()).encode())
                _probe(path)
            except OSError as error:
                raise _unusable(path, error) from None
            yield Held(path, lock)
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(path) == ["lock"]:  # nothing was written
                    (path / "lock").unlink()


def _require_places(path: pathlib.Path) -> None:
    """Raises UserError where something else is in the place of what a run writes, or that cannot be written."""
    for name in _FILES:
        _require_kind(path / name)
        if os.path.exists(path / name) and not os.access(path / name, os.R_OK | os.W_OK):
            raise UserError(f"{path / name} cannot be written: {os.strerror(errno.EACCES)}; use another workdir")
    for name in _DIRECTORIES:
        place = path / name
        if not os.path.lexists(place):
            continue
        if not place.is_dir():
            raise UserError(f"{place} is {_found(place)}, not a directory; remove it or use another workdir")
        try:
            _probe(place)
        except OSError as error:
            raise _unusable(place, error) from None


def _require_kind(file: pathlib.Path) -> None:
    """Raises UserError if something is there that is no regular file."""
    if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
        raise UserError(f"{file} is {_found(file)}, not a run's file; remove it or use another workdir")


def _found(path: pathlib.Path) -> str:
    return files.kind(os.lstat(path).st_mode)


def _probe(path: pathlib.Path) -> None:
    """Raises OSError unless a block can be written."""
    with tempfile.NamedTemporaryFile(dir=path, prefix="probe-") as file:
        file.write(b"x" * 4096)
        file.flush()


def _unusable(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"workdir {path} cannot be written: {error.strerror}; choose another or free it")


def require_space(path: pathlib.Path, needed: int) -> None:
    """Raises UserError unless `needed` bytes are free where `path` lies."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"workdir {path} has {free / 1e6:,.1f} MB free; the checkpoints of this run need {needed / 1e6:,.1f} MB\n"
            "free some, use another workdir, or keep fewer with train.keep"
        )
