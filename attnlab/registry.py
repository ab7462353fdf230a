"""Kinds of things that configs choose by name: mixers, models, data."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from attnlab import config as config_lib
from attnlab.errors import ConfigError

T = TypeVar("T")


def _undefined(cls: type) -> list[str]:
    """Names of abstract methods, which instances of most metaclasses could be made with."""
    return [name for name in dir(cls) if getattr(inspect.getattr_static(cls, name), "__isabstractmethod__", False)]


class Registry(Generic[T]):
    """Classes by name. Each has a `Config`, which knows its name as `node_name`.

    Args:
      what: they are, for messages: "mixer".
      default: the name of a node that has none; None: every node must have one.

    Attributes:
      classes: by name.
    """

    def __init__(self, what: str, default: str | None = None):
        self._what, self._default = what, default
        self.classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: makes a class known by `name`.

        Raises:
          ValueError: another module has taken the name.
          TypeError: the class or its Config leaves out what its kind must define (`abc.abstractmethod`).
        """

        def add(cls: type[T]) -> type[T]:
            if name in self.classes and self.classes[name].__module__ != cls.__module__:
                raise ValueError(f"two of the kind {self._what} are called {name!r}")
            if missing := [*_undefined(cls), *(f"Config.{method}" for method in _undefined(cls.Config))]:
                raise TypeError(f"{self._what} {name!r} does not define {', '.join(missing)}")
            cls.name = name
            cls.Config.node_name = name
            self.classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All names, in order."""
        return sorted(self.classes)

    def get(self, name: str) -> type[T]:
        """The class of a name; ConfigError if there is none."""
        if name not in self.classes:
            hint = config_lib.suggest(name, self.names())
            raise ConfigError(f"{self._what} {name!r} is unknown{hint}; allowed: {', '.join(self.names())}")
        return self.classes[name]

    def config_from_node(self, tree: Any, path: str) -> Any:
        """The typed Config of a node `{"name": ..., **fields}`; a Config passes through."""
        if dataclasses.is_dataclass(tree):
            return tree
        if self._default is not None and isinstance(tree, Mapping):
            tree = {"name": self._default, **tree}
        name, rest = config_lib.split_name(tree, path, self.names())
        return config_lib.build(self.classes[name].Config, rest, path)
