"""Generated tasks, one file a family. Every module of this package is imported: adding a file registers its tasks."""

import importlib
import pkgutil

from attnlab.tasks.base import Task, TaskConfig, get, names, register

__all__ = ["Task", "TaskConfig", "get", "names", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
