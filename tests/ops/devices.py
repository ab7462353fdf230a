"""As if programs were for devices that are not here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from attnlab.parallel import partition


@contextlib.contextmanager
def on(kind: str, platform: str = "tpu") -> Iterator[None]:
    """What is traced inside is for devices of this kind."""
    tokens = partition._platform.set(platform), partition._device_kind.set(kind)
    try:
        yield
    finally:
        partition._platform.reset(tokens[0])
        partition._device_kind.reset(tokens[1])


def by_default(*args, cpu, default):
    """`partition.by_platform` as accelerators have it; one function, so that programs are kept by it."""
    return default(*args)
