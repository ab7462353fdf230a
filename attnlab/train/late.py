"""Modules that are imported when something of them is first used, so that a first step does not wait for them."""

from __future__ import annotations

import importlib
from typing import Any


class Late:
    """Stands for a module."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


ocp: Any = Late("orbax.checkpoint")  # reading and writing checkpoints: the first save is steps away
