"""Masks that configs choose by name: one file each. Every module of this package is imported, so that adding a file
registers it."""

import importlib
import pkgutil

from attnlab.masks.base import MASKS, MaskBuilder, MaskConfig, build, config_from_node, get, names, register

__all__ = ["MASKS", "MaskBuilder", "MaskConfig", "build", "config_from_node", "get", "names", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
