"""What a plan's arms begin as, or learn of: other runs, at the checkpoints that they had when it was announced."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from attnlab import paths, storage
from attnlab.ablation.plan import Cell
from attnlab.errors import ConfigError, UserError
from attnlab.train import beginning, source
from attnlab.train.config import RunConfig
from attnlab.train.source import Pinned, Source
from attnlab.train.state import Model


def pinned(cells: list[Cell]) -> list[Cell]:
    """Cells whose beginnings and teachers are named by step and digest; each other run is opened once.

    Raises:
      UserError: a workdir holds no run, or not one that the arm's model fits.
    """
    known: dict[tuple[str, int | None], tuple[Source, str]] = {}
    return [_pinned(cell, known) for cell in cells]


def _pinned(cell: Cell, known: dict[tuple[str, int | None], tuple[Source, str]]) -> Cell:
    config = cell.config()
    distill = config.train.distill
    if cell.begins is None and distill is None:
        return cell
    if cell.begins is not None:
        found, digest = _opened(cell, cell.begins["place"], cell.begins.get("step"), "init_from", known)
        _require_fit(cell, found, config)
        cell = dataclasses.replace(cell, begins={"place": found.place, "step": found.step, "digest": digest})
    if distill is not None:
        found, digest = _opened(cell, distill.teacher, distill.step, "train.distill.teacher", known)
        cell = dataclasses.replace(
            cell.with_values({"train.distill.step": found.step}),
            teacher={"place": found.place, "step": found.step, "digest": digest},
        )
    return cell


def _opened(
    cell: Cell, text: str, step: int | None, key: str, known: dict[tuple[str, int | None], tuple[Source, str]]
) -> tuple[Source, str]:
    if (text, step) not in known:
        try:
            with source.opened(place(text), None, lambda text: None, key=key, step=step) as found:
                known[text, step] = found, found.digest()
        except UserError as error:
            raise UserError(f"arm {cell.name!r}: {error}") from None
    return known[text, step]


def _require_fit(cell: Cell, found: Source, config: RunConfig) -> None:
    try:
        beginning.fit(found, Model.of(config.model))
    except UserError as error:
        raise ConfigError(f"arm {cell.name!r}: {error}") from None


def require_fit(cells: list[Cell]) -> None:
    """Raises ConfigError where what was solved for no longer fits what an arm begins as."""
    known: dict[tuple[str, int | None], tuple[Source, str]] = {}
    for cell in cells:
        if cell.begins is not None:
            found, _ = _opened(cell, cell.begins["place"], cell.begins["step"], "init_from", known)
            _require_fit(cell, found, cell.config())


def place(text: str) -> pathlib.Path | storage.Url:
    """A workdir as it is written in a plan."""
    return storage.Url(text) if storage.is_url(text) else pathlib.Path(paths.expand(text))


def of(begins: Mapping[str, Any] | None) -> Pinned | None:
    """What a run of a cell begins as."""
    return None if begins is None else Pinned(place(begins["place"]), begins["step"], begins["digest"])
