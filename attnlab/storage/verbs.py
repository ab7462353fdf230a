"""What the command line does around a verb whose workdirs may be in buckets."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator

from attnlab.storage.names import shown
from attnlab.storage.workdir import opened


@contextlib.contextmanager
def staged(args: argparse.Namespace) -> Iterator[None]:
    """Brings here what a verb reads of workdirs in buckets."""
    with contextlib.ExitStack() as stack:
        if args.verb in ("eval", "generate", "goodput"):
            args.workdir = stack.enter_context(opened(args.workdir))
        if args.verb == "report":
            args.workdirs = [stack.enter_context(opened(place, depth=2)) for place in args.workdirs]
        yield


def log_messages() -> None:
    """To stderr, as stdout is for results; messages alone, with URLs in place of their staging directories."""
    logging.basicConfig()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("%(message)s"))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))
