"""Published families of models, a file each. Adding one is adding its file: see `attnlab.interchange.families.base`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from attnlab.config import show
from attnlab.errors import UserError
from attnlab.interchange.families.base import Family


def families() -> list[Family]:
    """One of each, those whose code is in transformers first."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Family) and value.__module__.endswith(f".{module.name}"):
                found += [value()] if value.name else []
    return sorted(found, key=lambda family: (family.own_code, family.name))


def family_of(tree: Mapping[str, Any], where: str) -> tuple[Family, Mapping[str, Any]]:
    """The family of a config.json, and the part of it that says what the text model is.

    Raises:
      UserError: none that is known.
    """
    known = families()
    for part in (tree, tree.get("text_config")):
        if isinstance(part, Mapping):
            for family in known:
                if family.claims(part):
                    return family, part
    kinds = ", ".join(dict.fromkeys(family.model_type for family in known))
    raise UserError(f"{where}: model_type = {show(tree.get('model_type'))} is not read; allowed: {kinds}")
