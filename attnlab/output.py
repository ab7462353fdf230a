"""What the command line prints: results on stdout, all else on stderr, and what happens where these cannot be written.

A stream may be closed, full, a pipe that nobody reads, a terminal that went away, or one that knows ASCII alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from attnlab import storage
from attnlab.errors import UserError


class Unwritable(UserError):
    """Stdout cannot take a result."""


class ReaderGone(Exception):
    """Stdout is a pipe whose reader went away, as `head` does: there is nothing more to do."""


def prepare() -> None:
    """Makes the standard streams safe to use; call it before anything is opened.

    A descriptor that is closed goes to nowhere, so that no file that is opened later becomes it. A character that a
    stream's encoding does not have is written as its escape.
    """
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def require() -> None:
    """Raises Unwritable where stdout is closed."""
    if sys.stdout is None:
        raise Unwritable("stdout is closed")


def write(text: str) -> None:
    """Writes a result and its line end to stdout at once.

    Raises:
      Unwritable: stdout is closed or full.
      ReaderGone: it is a pipe that nobody reads.
    """
    require()
    try:
        sys.stdout.write(storage.shown(text) + "\n")
        sys.stdout.flush()
    except OSError as error:
        fail(error)


def fail(error: OSError) -> NoReturn:
    """Raises what `write` raises for an error of stdout."""
    if isinstance(error, BrokenPipeError):
        raise ReaderGone from None
    raise Unwritable(f"stdout cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def after(done: str) -> Iterator[None]:
    """Where what runs inside cannot be written, says also what is done and not lost."""
    try:
        yield
    except Unwritable as error:
        raise UserError(f"{error}; {done}") from None


def note(text: str) -> None:
    """Writes a line to stderr, if that can be written."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(storage.shown(str(text)), file=sys.stderr, flush=True)


def settle() -> None:
    """Drops what stdout and stderr still hold and cannot write: Python would complain, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            with contextlib.suppress(OSError):
                stream.flush()


class Lasting:
    """A text stream that goes on when it cannot be written: what is written then is dropped, and `error` says why."""

    def __init__(self, stream: IO[str] | None):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes, or drops, `text`."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes what is written."""
        self._try(lambda: self._stream.flush())

    def _try(self, action: Any) -> None:
        if self._stream is None or self.error is not None:
            return
        try:
            action()
        except OSError as error:
            self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_json(value: Any) -> None:
    """Writes a value as one line of JSON; numbers that are not finite, which JSON has not, are null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write(json.dumps(clean(value)))


def write_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Writes a table; in a pipe a row is a line, however long."""
    import rich.console
    import rich.table
    from rich.text import Text  # a Text, as [B, T] in a string would be markup

    require()
    table = rich.table.Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if i == 0 or not rows or not rows[0][i][:1].isdigit() else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    terminal = sys.stdout.isatty()
    text = io.StringIO()
    rich.console.Console(file=text, force_terminal=terminal, width=None if terminal else 1000).print(table)
    write("\n".join([title, *(line.rstrip() for line in text.getvalue().splitlines())]))
