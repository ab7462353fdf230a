"""The directory of a run: made, checked and held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from attnlab.errors import UserError


@contextlib.contextmanager
def hold(path: pathlib.Path) -> Iterator[None]:
    """Makes the directory and keeps other runs out of it.

    Raises:
      UserError: it cannot be made or written (read-only, full, a file), or another run holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("a+")
        probe = path / "probe"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir {path} cannot be written: {error.strerror}; choose another or free it") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(
                f"--workdir {path} is in use by another run (process {lock.read().strip() or 'unknown'}); "
                "wait for it or use another --workdir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def require_space(path: pathlib.Path, needed: int) -> None:
    """Raises UserError unless `needed` bytes are free where `path` lies."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"--workdir {path} has {free / 1e6:,.0f} MB free; the checkpoints of this run need {needed / 1e6:,.0f} MB\n"
            "free some, use another --workdir, or keep fewer with --config.train.keep"
        )
