"""What the battery of laws tries: every registered task, with every field turned."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib

from attnlab import tasks
from attnlab.tasks.base import TaskConfig
from attnlab.tasks.tokens import TokenTask

GOLDEN = pathlib.Path(__file__).with_name("golden.json")
SHARED = {f.name for f in dataclasses.fields(TaskConfig)} - {"seed"}  # these change no example
NAMES = tasks.names()
TOKENS = [name for name in NAMES if issubclass(tasks.get(name), TokenTask)]


def opened(name, **fields):
    cls = tasks.get(name)
    return cls(cls.Config(**fields))


def turned(name):
    """Fields of every case, and those that it must differ from."""
    found = {}
    for field in dataclasses.fields(tasks.get(name).Config):
        for value in field.metadata["other"] if field.name not in SHARED else ():
            found[f"{field.name}={value}"] = ({field.name: value}, {})
    for variant in tasks.get(name).variants:
        *others, last = variant
        found[",".join(f"{key}={value}" for key, value in variant.items())] = (
            variant,
            {key: variant[key] for key in others},
        )
    return found


CASES = [(name, fields) for name in NAMES for fields, _ in turned(name).values()]
IDS = [f"{name}:{label}" for name in NAMES for label in turned(name)]


@functools.cache
def examples(name, count, split="valid"):
    """A task as it is by default, and examples of it."""
    task = opened(name)
    return task, task.rows(split, range(count))


def digest(name):
    """Of three examples of each split."""
    task, found = opened(name), hashlib.sha256()
    for split in ("train", "valid", "test"):
        for key, array in sorted(task.rows(split, range(3)).items()):
            # What libm rounds in its own way on each machine is not told apart.
            array = array.round(4) + 0.0 if array.dtype.kind == "f" else array
            found.update(f"{key}{array.shape}{array.dtype}".encode() + array.tobytes())
    return {"version": task.config.version, "sha256": found.hexdigest()}


if __name__ == "__main__":  # python -m tests.tasks.laws: after a task's version has changed
    GOLDEN.write_text(json.dumps({name: digest(name) for name in NAMES}, indent=1) + "\n")
