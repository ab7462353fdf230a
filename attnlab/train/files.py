"""Files that a run leaves, read back: each is what it should be, or one error says what it is instead."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import stat
from typing import Any

from attnlab.errors import Damaged

_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind(mode: int) -> str:
    """What a file of this `st_mode` is, in words."""
    return next((word for test, word in _KINDS if test(mode)), "a file")


def read_bytes(path: pathlib.Path) -> bytes:
    """The content of a regular file; anything else is not even opened, as a pipe would be waited for.

    Raises:
      FileNotFoundError: it is not there.
      Damaged: it is no regular file, or cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise Damaged(f"{path} is {kind(mode)}, not a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object that a JSON file holds; raises as `read_bytes`, and Damaged where it holds no object."""
    content = read_bytes(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged (a JSON {type(value).__name__}, not an object)")
    return value


def replace(path: pathlib.Path, text: str) -> None:
    """Replaces a file in one step, so that a kill leaves the old or the new one."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with new.open("x", encoding="utf-8", errors="backslashreplace") as file:  # never through a link
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def delete(path: pathlib.Path) -> None:
    """Removes a file or link, or a directory with all that can be removed of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
