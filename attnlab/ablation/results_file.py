"""`results.json` and `results.csv`: an ablation's results on disk."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pathlib
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from attnlab.ablation.results import SCHEMA, Number, Results, need
from attnlab.errors import Damaged, UserError
from attnlab.train import files

# --- results.json -----------------------------------------------------------------------------------------------------


def to_json(results: Results) -> str:
    """Strict JSON: full precision, null for what is not finite."""
    return json.dumps(_plain(results), indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> Results:
    """Results from their JSON.

    Raises:
      UserError: it is not strict JSON, of another schema, or a value is missing or of a wrong type; the key is named.
    """
    try:
        tree = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"results: no strict JSON: {error}") from None
    found = tree.get("schema") if isinstance(tree, dict) else None
    need(found == SCHEMA, "schema", found, str(SCHEMA))
    return _typed(Results, tree, "results")


def write(path: pathlib.Path, results: Results) -> None:
    """Replaces `results.json` in one step."""
    files.replace(path, to_json(results))


def read(path: pathlib.Path) -> Results:
    """Reads `results.json`.

    Raises:
      UserError: it is not there, damaged, or not of this schema.
    """
    try:
        return from_json(files.read_bytes(path).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    except UnicodeDecodeError as error:
        raise Damaged(f"{path} is damaged (no UTF-8 text: {error.reason})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # a numpy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _typed(kind: Any, value: Any, path: str) -> Any:
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _typed(next(option for option in of if option is not type(None)), value, path)
    if origin is Literal:
        need(value in of, path, value, ", ".join(of))
        return value
    if dataclasses.is_dataclass(kind):
        return _built(kind, value, path)
    if origin is dict:
        need(isinstance(value, dict), path, value, "an object")
        return {key: _typed(of[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is list:
        need(isinstance(value, list), path, value, "a list")
        return [_typed(of[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    accepted = {int: int, float: (int, float)}.get(kind, kind)
    good = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    good = good and (kind is not float or abs(value) <= sys.float_info.max)  # JSON has numbers that no float holds
    need(good, path, value, {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}[kind])
    return value


def _built(kind: type, value: Any, path: str) -> Any:
    need(isinstance(value, dict), path, value, "an object")
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    for key in value:
        need(key in fields, f"{path}.{key}", value[key], f"the keys {', '.join(fields)}")
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        need(name in value or optional, f"{path}.{name}", None, "a value: it has no default")
    return kind(**{key: _typed(hints[key], item, f"{path}.{key}") for key, item in value.items()})


# --- results.csv ------------------------------------------------------------------------------------------------------

COLUMNS = ("arm", "seed", "status", "metric", "slice", "value")


def rows(results: Results) -> Iterator[tuple[str, int, str, str, str, Number]]:
    """One (arm, seed, status, metric, slice, value) per figure; of a run without any, one row without a metric."""
    for run in results.runs:
        figures = [(name, "", value) for name, value in run.final.items()]
        for task, metrics in run.tasks.items():
            for name, figure in metrics.items():
                figures.append((f"{task}/{name}", "", figure.value))
                figures += [(f"{task}/{name}", key, value) for key, value in figure.slices.items()]
        for name, part, value in figures or [("", "", None)]:
            yield run.arm, run.seed, run.status, name, part, value


def to_csv(results: Results) -> str:
    """`rows` with a header; an empty value is one that is not finite."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows(results):
        *names, value = row
        writer.writerow([*names, "" if value is None or not math.isfinite(value) else repr(float(value))])
    return out.getvalue()
