"""Generated tasks, one file a family; adding it registers its tasks (attnlab/registry.py)."""

from attnlab.tasks.base import Task, TaskConfig, get, names, register

__all__ = ["Task", "TaskConfig", "get", "names", "register"]
