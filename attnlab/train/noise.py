"""What orbax and asyncio print of failures that the loop tells."""

from __future__ import annotations

import logging
import sys
from typing import Any

_CLOSED = "Event loop is closed"  # says tensorstore, in threads of its own, where orbax has given up


def keep_out() -> None:
    """Keeps to the loop what matters to people: orbax reports each failure with its whole stack, and asyncio, through
    its logger and as exceptions that nobody can catch, what orbax did not wait for."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if getattr(sys.unraisablehook, "__name__", "") == "unraisable_unless_closed":
        return
    unraisable, exception = sys.unraisablehook, sys.excepthook

    def unraisable_unless_closed(what: Any) -> None:
        if str(what.exc_value) != _CLOSED:
            unraisable(what)

    def exception_unless_closed(kind: Any, value: Any, trace: Any) -> None:
        if str(value) != _CLOSED:
            exception(kind, value, trace)

    sys.unraisablehook, sys.excepthook = unraisable_unless_closed, exception_unless_closed
