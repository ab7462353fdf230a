"""Progress of long passes over a corpus: a callback, and the one that shows a bar on the terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from attnlab.output import Lasting

_log = logging.getLogger(__name__)

# Called with the bytes of input read so far and the bytes in all.
ProgressFn = Callable[[int, int], None]

_SHOW_AFTER_SECONDS = 1.0
_LOG_EVERY_SECONDS = 30.0


@contextlib.contextmanager
def stderr_progress(label: str) -> Iterator[ProgressFn]:
    """A callback that shows a bar on stderr once the pass has taken a second.

    Where stderr is no terminal it logs a line every half minute instead.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(file=Lasting(sys.stderr))
    bar = Progress(
        TextColumn("{task.description}", markup=False),  # paths may hold brackets
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    started = last_line = time.monotonic()
    task = None

    def report(done: int, total: int) -> None:
        nonlocal task, last_line
        now = time.monotonic()
        if not console.is_terminal:
            if now - last_line >= _LOG_EVERY_SECONDS:
                last_line = now
                _log.info("%s: %.0f of %.0f MB", label, done / 1e6, total / 1e6)
        elif task is not None:
            bar.update(task, completed=min(done, total), total=total)
        elif now - started >= _SHOW_AFTER_SECONDS:
            bar.start()
            task = bar.add_task(label, total=total)

    try:
        yield report
    finally:
        if task is not None:
            bar.stop()
