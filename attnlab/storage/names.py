"""Where staging directories and copies lie, and how messages call them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from attnlab import paths
from attnlab.errors import TrainingFailed, UserError

_YOUNG = 60.0  # seconds in which a directory may not be held yet by who made it
_places: dict[str, str] = {}  # local path of what is at a URL


def register(local: str | os.PathLike[str], url: str) -> None:
    """From now on messages call a local path by its URL."""
    _places[os.fspath(local)] = url


def forget(local: str | os.PathLike[str]) -> None:
    """Undoes `register`."""
    _places.pop(os.fspath(local), None)


def shown(text: str) -> str:
    """A text for people, in which staged files and copies have their URLs."""
    for local in sorted(_places, key=len, reverse=True):
        if local in text:
            text = text.replace(local, _places[local])
    return text


@contextlib.contextmanager
def by_urls() -> Iterator[None]:
    """Messages of errors call what is staged by its URL."""
    try:
        yield
    except (UserError, TrainingFailed) as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (shown(error.args[0]), *error.args[1:])
        raise


def cache_directory(chosen: str | None = None) -> str:
    """The directory that a config chose for copies, or $ATTNLAB_CACHE, $XDG_CACHE_HOME/attnlab, ~/.cache/attnlab."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    chosen = chosen or os.environ.get("ATTNLAB_CACHE") or os.path.join(base, "attnlab")
    return os.path.abspath(paths.expand(chosen))


@contextlib.contextmanager
def staging(name: str) -> Iterator[pathlib.Path]:
    """A new directory called `name` below $ATTNLAB_STAGING, or the system's directory of temporary files.

    It is gone at the end, and those that killed processes left go at the next beginning.
    """
    above = pathlib.Path(os.environ.get("ATTNLAB_STAGING") or tempfile.gettempdir()) / f"attnlab-{os.getuid()}"
    try:
        above.mkdir(parents=True, exist_ok=True)
        own = pathlib.Path(tempfile.mkdtemp(dir=above))
    except OSError as error:
        raise UserError(
            f"{above} cannot be written: {error.strerror}; ATTNLAB_STAGING names another directory for what is staged"
        ) from None
    for left in above.iterdir():
        with contextlib.suppress(OSError), (left / ".held").open("r") as held:
            if time.time() - left.stat().st_mtime > _YOUNG:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
    with (own / ".held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        directory = own / name
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(own, ignore_errors=True)
