"""Kinds of things that configs choose by name: mixers, models, data.

A kind's files are imported when they are asked for: a run takes the one that its config names, which spares it a
hundred others; whoever asks for all names takes them all.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
      packages: whose modules register them, one or more each. What a config names is looked for in the module of the
        same name first.
      default: the name of a node that has none; None: every node must have one.
    """

    def __init__(self, what: str, packages: Sequence[str] = (), default: str | None = None):
        self._what, self._packages, self._default = what, packages, default
        self._known: dict[str, type[T]] = {}
        self._all = False

    @property
    def classes(self) -> dict[str, type[T]]:
        """By name, of every module of the packages."""
        if not self._all:
            self._all = True  # modules that ask meanwhile get what is there
            try:
                for package in map(importlib.import_module, self._packages):
                    for module in pkgutil.iter_modules(package.__path__):
                        importlib.import_module(f"{package.__name__}.{module.name}")
            except BaseException:
                self._all = False  # whoever asks next is told, too, instead of being given a part
                raise
        return self._known

    def _find(self, name: Any) -> type[T] | None:
        """The class of a name, or None; imports no more than it must."""
        if not isinstance(name, str):
            return None
        for module in (f"{package}.{name}" for package in self._packages if name.isidentifier()):
            if name not in self._known and importlib.util.find_spec(module):
                importlib.import_module(module)
        return self._known[name] if name in self._known else self.classes.get(name)

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: makes a class known by `name`.

        Raises:
          ValueError: another module has taken the name.
          TypeError: the class or its Config leaves out what its kind must define (`abc.abstractmethod`).
        """

        def add(cls: type[T]) -> type[T]:
            if name in self._known and self._known[name].__module__ != cls.__module__:
                raise ValueError(f"two of the kind {self._what} are called {name!r}")
            if missing := [*_undefined(cls), *(f"Config.{method}" for method in _undefined(cls.Config))]:
                raise TypeError(f"{self._what} {name!r} does not define {', '.join(missing)}")
            cls.name = name
            cls.Config.node_name = name
            self._known[name] = cls
            return cls

        return add

    def __contains__(self, name: Any) -> bool:
        return self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """All names, in order."""
        return sorted(self.classes)

    def get(self, name: str) -> type[T]:
        """The class of a name; ConfigError if there is none."""
        found = self._find(name)
        if found is None:
            hint = config_lib.suggest(name, self.names())
            raise ConfigError(f"{self._what} {name!r} is unknown{hint}; allowed: {', '.join(self.names())}")
        return found

    def config_from_node(self, tree: Any, path: str) -> Any:
        """The typed Config of a node `{"name": ..., **fields}`; a Config passes through."""
        if dataclasses.is_dataclass(tree):
            return tree
        if self._default is not None and isinstance(tree, Mapping):
            tree = {"name": self._default, **tree}
        name, rest = config_lib.split_name(tree, path, self)
        return config_lib.build(self.get(name).Config, rest, path)
