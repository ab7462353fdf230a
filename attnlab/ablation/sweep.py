"""The sweep language: lists of flat dicts `{dotted key: value}`, made by functions that return such lists.

`prod(param("model.mixers.M.window", 32, 64), param("optimizer.name", "adamw", "muon"))` is four of them. A plan's
`arms` may be such a list: arms are then named after what differs. The language is the one of simply's sweeps
(github.com/google-deepmind/simply, utils/sweep.py), with strict zips and `where`.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from attnlab import config as config_lib
from attnlab.errors import ConfigError

Point = dict[str, Any]
Sweep = list[Point]


def param(key: str, *values: Any) -> Sweep:
    """One point for each value of a key."""
    config_lib.require(bool(values), f"param({key!r})", (), "one value or more")
    return [{key: value} for value in values]


def prod(*sweeps: Sweep) -> Sweep:
    """Every combination of the sweeps' points, the last sweep's varying fastest; ConfigError if two set one key."""
    return [_merged(points, "prod") for points in itertools.product(*sweeps)]


def zipit(*sweeps: Sweep) -> Sweep:
    """The first points together, the second ones, and so on; ConfigError unless all sweeps are of one length."""
    lengths = [len(sweep) for sweep in sweeps]
    config_lib.require(len(set(lengths)) <= 1, "zipit: lengths of the sweeps", lengths, "the same for all")
    return [_merged(points, "zipit") for points in zip(*sweeps, strict=True)]


def chain(*sweeps: Sweep) -> Sweep:
    """The points of all sweeps, one sweep after the other."""
    return [dict(point) for sweep in sweeps for point in sweep]


def prefix(path: str, sweep: Sweep) -> Sweep:
    """Every key below `path`: `prefix("model.mixers.M", param("window", 8))` sets model.mixers.M.window."""
    return [{f"{path}.{key}": value for key, value in point.items()} for point in sweep]


def subsample(count: int, sweep: Sweep, seed: int) -> Sweep:
    """`count` of the points in their order, the same for the same seed; ConfigError if there are fewer."""
    config_lib.require(0 <= count <= len(sweep), "subsample: count", count, f"0 to {len(sweep)}, the points there are")
    kept = sorted(random.Random(seed).sample(range(len(sweep)), count))
    return [dict(sweep[i]) for i in kept]


def default(values: Mapping[str, Any], sweep: Sweep) -> Sweep:
    """Every point with the values of keys that it does not set itself."""
    return [{**values, **point} for point in sweep]


def where(keep: Callable[[Point], bool], sweep: Sweep) -> Sweep:
    """The points that `keep` is true of."""
    return [dict(point) for point in sweep if keep(dict(point))]


def named(sweep: Sweep) -> dict[str, Point]:
    """The points by names made of what differs between them, e.g. `window=32,optimizer=muon`.

    A key is shortened to as many of its last parts as tell it from the other keys; one whose last part is `name` goes
    by the part before.

    Raises:
      ConfigError: two points are the same.
    """
    keys = list(dict.fromkeys(key for point in sweep for key in point))
    missing = object()
    differing = [k for k in keys if len({_shown(point.get(k, missing)) for point in sweep}) > 1]
    short = _shortened(differing or keys)
    arms: dict[str, Point] = {}
    for number, point in enumerate(sweep, 1):
        name = ",".join(f"{short[k]}={_shown(point[k])}" for k in short if k in point) or "base"
        name = re.sub(r"[^\w.=,+-]", "_", name)  # it names a directory, too
        if name in arms:
            raise ConfigError(f"points {list(arms).index(name) + 1} and {number} of the sweep are both {name!r}")
        arms[name] = dict(point)
    return arms


def _shortened(keys: Iterable[str]) -> dict[str, str]:
    parts = {key: (key.removesuffix(".name")).split(".") for key in keys}
    length = lambda key: next(
        (n for n in range(1, len(parts[key]))
         if sum(other[-n:] == parts[key][-n:] for other in parts.values()) == 1), len(parts[key]),
    )  # fmt: skip
    return {key: ".".join(parts[key][-length(key) :]) for key in parts}


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        value = value["name"]  # of a node
    return value if isinstance(value, str) else repr(value)


def _merged(points: Iterable[Mapping[str, Any]], what: str) -> Point:
    merged: Point = {}
    for point in points:
        if both := sorted(merged.keys() & point.keys()):
            raise ConfigError(f"{what}: {both[0]} is set by two of the sweeps; chain them, or leave one out")
        merged |= point
    return merged
