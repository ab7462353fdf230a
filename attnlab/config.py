"""Configs: from a Python file and dotted overrides to typed, checked, frozen dataclasses.

A config file defines `get_config(arg: str) -> ml_collections.ConfigDict` (or any nested mapping). `load` reads it, lays
the overrides of the command line over it and `build` turns the tree into dataclasses. Every mistake (an unknown key, a
wrong type, an impossible value) is a `ConfigError` that names the key, the value and what is allowed.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import numbers
import operator
import os
import pathlib
import traceback
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from attnlab import paths, storage
from attnlab.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, repr=False)
class Override:
    """A value typed on the command line: a string until the field that it is for says what it must be."""

    text: str

    def __repr__(self) -> str:
        return repr(self.text)  # messages show what was typed


def node(build: Callable[[Any, str], Any], **kwargs: Any) -> Any:
    """A dataclass field built by `build(tree, path)`: how a config holds a thing chosen by name."""
    return dataclasses.field(metadata={"build": build}, **kwargs)


def suggest(key: str, allowed: Collection[str]) -> str:
    """` (did you mean 'x'?)` for the nearest allowed key, or nothing."""
    close = difflib.get_close_matches(key, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def show(value: Any) -> str:
    """A value as messages show it: on one line, shortened."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not write out integers of thousands of digits
        return f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises a ConfigError that names key, value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} = {show(value)} is not possible; allowed: {allowed}")


def require_choice(key: str, value: Any, choices: Collection[str]) -> None:
    """Raises a ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        hint = suggest(str(value), choices)
        raise ConfigError(f"{key} = {show(value)} is unknown{hint}; allowed: {', '.join(choices)}")


def knob(
    default: Any,
    doc: str,
    *,
    other: tuple[Any, ...] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Collection[str] | Callable[[], Collection[str]] | None = None,
    build: Callable[[Any, str], Any] | None = None,
) -> Any:
    """A documented field of the Config of a mixer or of a task.

    Args:
      default: the field's default.
      doc: what it does, with units; `attnlab list NAME` prints it.
      other: values that differ from the default and must make a difference; the battery of laws tries each of them.
      least, above, below: bounds of a number: `least` and more, more than `above`, less than `below`. None, where the
        field may be, passes.
      choices: the strings that are allowed, or what gives them.
      build: `(tree, path)` to the value, where a config node stands here; None: the value is of the annotated type.
    """
    metadata = {"doc": doc, "other": other, "least": least, "above": above, "below": below}
    metadata["choices"] = choices
    return dataclasses.field(default=default, metadata=metadata | ({"build": build} if build else {}))


_BOUNDS = (("least", operator.ge, "{} or more"), ("above", operator.gt, "above {}"), ("below", operator.lt, "below {}"))


def require_knobs(config: Any, prefix: str = "") -> None:
    """Raises a ConfigError, whose key is `prefix` and the field, unless every knob is what by itself it may be."""
    for field in dataclasses.fields(config):
        value, facts, key = getattr(config, field.name), field.metadata, prefix + field.name
        optional = "None" in str(field.type)
        if value is None and optional:
            continue
        bounds = [(facts[name], holds, said) for name, holds, said in _BOUNDS if facts.get(name) is not None]
        if bounds:
            finite = not isinstance(value, float) or math.isfinite(value)
            allowed = ", ".join(said.format(bound) for bound, _, said in bounds) + ", or none" * optional
            inside = finite and all(holds(value, bound) for bound, holds, _ in bounds)
            require(inside, key, value, allowed)
        if (choices := facts.get("choices")) is not None:
            require_choice(key, value, list(choices() if callable(choices) else choices))


# --- trees to dataclasses ---------------------------------------------------------------------------------------------


def build(cls: type[T], tree: Any, path: str = "") -> T:
    """Builds dataclass `cls` from a nested mapping.

    Args:
      cls: a dataclass; a field made by `node` is built by its own function, the others by their annotation.
      tree: a mapping from field names to values; an `Override` is parsed as the field's type.
      path: dotted key of `tree` in the whole config, for messages.

    Raises:
      ConfigError: unknown key, missing key, wrong type; whatever the dataclass's own checks raise.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path or 'config'} = {show(tree)} must be a group of keys: {', '.join(_names(cls))}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key, value in tree.items():
        if key not in fields:
            raise ConfigError(
                f"unknown key {_join(path, key)!r} (value {show(value)}){suggest(key, list(fields))}\n"
                f"allowed in {path or 'the config'}: {', '.join(fields)}"
            )
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        where = _join(path, name)
        if name in tree:
            if "build" in field.metadata:
                values[name] = field.metadata["build"](tree[name], where)
            else:
                values[name] = _typed(hints[name], tree[name], where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} is missing; it has no default")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(_located(str(error), path, list(fields))) from None


def _located(message: str, path: str, fields: Sequence[str]) -> str:
    """A message of a dataclass's own checks with the whole path of its key."""
    key = message.partition(" = ")[0]
    if key in fields:
        return _join(path, message)
    located = not path or message.removeprefix("in ").startswith((f"{path}.", f"{path} ", f"{path}:"))
    return message if located else f"in {path}: {message}"


def split_name(tree: Any, path: str, choices: Collection[str]) -> tuple[str, dict[str, Any]]:
    """The name of a config node and its other keys; the name must be one of `choices`."""
    if isinstance(tree, (str, Override)):
        tree = {"name": tree}
    if not isinstance(tree, Mapping) or "name" not in tree:
        raise ConfigError(f"{path} = {show(tree)} must name what to build; allowed: {path}.name = {', '.join(choices)}")
    rest = dict(tree)
    name = rest.pop("name")
    name = name.text if isinstance(name, Override) else name
    require_choice(f"{path}.name", name, choices)
    return name, rest


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]


def _describe(kind: Any) -> str:
    if kind is type(None):
        return "none"
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(k) for k in typing.get_args(kind))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    names = {
        bool: "true or false",
        int: "an integer below 2^31",
        float: "a finite number that float32 holds",
        str: "a string",
    }
    return names.get(kind, str(kind))


def _typed(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    if isinstance(value, Override):
        ok, result = _parse(kind, value.text)
    else:
        ok, result = _check(kind, value)
    if not ok:
        raise ConfigError(f"{path} = {show(value)} has the wrong type; allowed: {_describe(kind)}")
    return result


def _parse(kind: Any, text: str) -> tuple[bool, Any]:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(typing.get_args(kind), key=lambda k: k is str):
            ok, result = _parse(option, text)
            if ok:
                return True, result
        return False, None
    if kind is type(None):
        return text.lower() in ("none", "null"), None
    if kind is bool:
        return text.lower() in ("true", "false"), text.lower() == "true"
    if kind is str:
        return True, text
    if origin is typing.Literal:
        return _check(kind, text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False, None
    return _check(kind, value)


def _check(kind: Any, value: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(kind)
    if kind is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            ok, result = _check(option, value)
            if ok:
                return True, result
        return False, None
    if origin is typing.Literal:
        return value in typing.get_args(kind), value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False, None
        inner = [_check(typing.get_args(kind)[0], v) for v in value]
        return all(ok for ok, _ in inner), tuple(v for _, v in inner)
    if kind in (int, float):
        good = isinstance(value, numbers.Real) and not isinstance(value, bool)
        try:
            good = good and math.isfinite(value)
        except OverflowError:  # an integer beyond any float
            good = False
        if kind is float:
            # On the device it would be infinite, or 0.
            good = good and (value == 0 or 2.0**-126 <= abs(float(value)) < 2.0**128)
        if kind is int:
            # 1e6 is how people write a million steps; counts beyond 2^31 overflow on the device.
            good = good and value == int(value) and abs(value) < 2**31
        return good, kind(value) if good else None
    return isinstance(value, kind), value


# --- dataclasses to trees ---------------------------------------------------------------------------------------------


def to_dict(config: Any) -> Any:
    """The plain nested dict (JSON-able) that `build` would make the same config from."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        name = getattr(type(config), "node_name", None)
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
        return {"name": name, **fields} if name else fields
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(v) for v in config]
    return config


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`{'a': {'b': 1}}` as `{'a.b': 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, _join(path, key)))
        else:
            flat[_join(path, key)] = value
    return flat


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ: `(key, old value, new value)`, '-' where a side has none."""
    a, b = flatten(old), flatten(new)
    return [(k, a.get(k, "-"), b.get(k, "-")) for k in sorted(a.keys() | b.keys()) if a.get(k, "-") != b.get(k, "-")]


# --- files and overrides ----------------------------------------------------------------------------------------------


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Parses the `key=value,key=value` that follows the path of a config file, e.g. `mixer=gated,size=nano`.

    Args:
      arg: the text after the colon; None or empty gives the defaults.
      **defaults: the allowed keys; a value is parsed as the type of its default.

    Raises:
      ConfigError: an unknown key, one given twice, or a value that is not of the default's type.
    """
    values: dict[str, Any] = {}
    allowed = f"allowed: {', '.join(f'{k}={v}' for k, v in defaults.items())}"
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise ConfigError(f"unknown config argument {item!r}{suggest(key, list(defaults))}\n{allowed}")
        if not equals:
            raise ConfigError(f"config argument {item!r} must be written {key}=VALUE\n{allowed}")
        if key in values:
            raise ConfigError(f"config argument {key} is given twice: {key}={values[key]} and {item}")
        values[key] = _typed(type(defaults[key]), Override(text), key)
    return types.SimpleNamespace(**{**defaults, **values})


def read_file(spec: str) -> dict[str, Any]:
    """The tree that `get_config` of `PATH[:arg=value,...]` returns, as plain dicts.

    PATH may be a run's config.json, in a bucket, too.

    Raises:
      ConfigError: no such file, an exception in it, or something else than a tree comes out.
    """
    path_text, _, arg = spec.partition(":")
    if storage.is_url(spec) and spec.endswith(".json"):
        path_text, arg = storage.local_copy(spec), ""
    path_text = paths.expand(path_text)
    if not os.path.isfile(path_text):
        what = "is a directory, not a file" if os.path.isdir(path_text) else "is not there"
        raise ConfigError(
            f"--config: {path_text!r} {what}; expected PATH[:arg=value,...], e.g. configs/lm.py:mixer=gated,size=nano"
        )
    path = pathlib.Path(path_text)
    tree = _read_json(path, arg) if path.suffix == ".json" else _run_file(path, arg)
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: {path} gives {show(tree)}; expected a tree of keys (ConfigDict or dict)")
    return tree


def _read_json(path: pathlib.Path, arg: str) -> Any:
    if arg:
        raise ConfigError(f"--config: {path} is a run's config, which takes no arguments ({arg!r})")
    try:
        return json.loads(path.read_bytes())["config"]
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"--config: {path} is not a run's config.json") from None


def _run_file(path: pathlib.Path, arg: str) -> Any:
    if path.suffix != ".py":
        raise ConfigError(f"--config: {path} is not a Python file (.py), nor a run's config.json")
    module = types.ModuleType("attnlab_config_file")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"--config: {path} defines no function get_config(arg)")
        return _plain(module.get_config(arg or None))
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a config file is code, and may raise anything
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        message = " ".join(str(error).split())[:200]
        raise ConfigError(f"--config: {path}{where}: {type(error).__name__}: {message}") from None


def _plain(tree: Any) -> Any:
    if hasattr(tree, "to_dict"):  # ml_collections.ConfigDict
        tree = tree.to_dict()
    if isinstance(tree, Mapping):
        return {str(k): _plain(v) for k, v in tree.items()}
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lays `any.field=value` texts over a tree; whether the key exists is for `build` to say.

    Raises:
      ConfigError: not of the form key=value, given twice, or a key below something that holds no keys.
    """
    seen: dict[str, str] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        *parents, last = key.split(".")
        if not equals or not all((*parents, last)):
            raise ConfigError(f"--config.{item}: expected --config.any.field=value, e.g. --config.train.steps=200")
        if key in seen:
            raise ConfigError(f"--config.{key} is given twice: {seen[key]!r} and {text!r}")
        seen[key] = text
        put(tree, key, Override(text))
    return tree


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of a tree in place; ConfigError if it is below something that holds no keys.

    A name in the place of a thing chosen by name, `optimizer` to "lion", picks the thing and keeps its other keys.
    """
    *parents, last = key.split(".")
    here = tree
    for i, name in enumerate(parents):
        if here.get(name) is None:  # what is not there, or none, is made of its keys
            here[name] = {}
        child = here[name]
        if not isinstance(child, dict):
            where = ".".join(parents[: i + 1])
            raise ConfigError(f"unknown key {key!r} (value {show(value)}): {where} is a single value, {show(child)}")
        here = child
    if isinstance(here.get(last), dict) and "name" in here[last] and isinstance(value, (str, Override)):
        here[last]["name"] = value
    else:
        here[last] = value


def load(cls: type[T], spec: str, overrides: Sequence[str] = ()) -> T:
    """Reads `PATH[:arg=value,...]`, applies overrides and builds `cls`."""
    return build(cls, apply_overrides(read_file(spec), overrides))
