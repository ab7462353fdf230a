"""Models: stacks of blocks around mixers. Every module of this package is imported: adding a file registers it."""

import importlib
import pkgutil

from attnlab.models.objective import Figures, Objective, Sums, config_from_node, names, of, register

__all__ = ["Figures", "Objective", "Sums", "config_from_node", "names", "of", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
