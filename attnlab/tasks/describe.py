"""Tasks as tables for people and machines: what `attnlab list tasks` prints."""

from __future__ import annotations

import dataclasses
from typing import Any

from attnlab.tasks import base
from attnlab.tasks.tokens import TokenTask


def task(name: str) -> dict[str, Any]:
    """One task: what it is, what guessing scores, and its fields.

    Raises:
      ConfigError: an unknown task.
    """
    cls = base.get(name)
    fields = [
        {"key": f"data.{f.name}", "default": f.default, "doc": f.metadata["doc"]}
        for f in dataclasses.fields(cls.Config)
    ]
    return {**_facts(cls), "summary": (cls.__doc__ or "").strip().splitlines()[0], "fields": fields}


def all_tasks() -> list[dict[str, Any]]:
    """Every task with its default fields: what it tests, the model that fits, what guessing scores, its source."""
    return [_facts(base.get(name)) for name in base.names()]


def _facts(cls: type[base.Task]) -> dict[str, Any]:
    opened = cls(cls.Config())
    chance = opened.chance() if isinstance(opened, TokenTask) and opened.answers() else None
    model, length = opened.config.fitting()["name"], opened.config.length
    known = {"name": cls.name, "tests": cls.title, "model": model, "length": length}
    return known | {"chance": chance, "version": cls.Config.version, "source": cls.source}
