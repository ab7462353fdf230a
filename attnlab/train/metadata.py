"""config.json: what a run is, and on what it ran."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax

from attnlab import config as config_lib
from attnlab import ops
from attnlab.errors import UserError
from attnlab.train.config import FREE_KEYS, RunConfig

_PACKAGES = ("attnlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def git_state() -> dict[str, Any]:
    """Commit of attnlab's checkout and whether it was modified; nulls where it is not a checkout."""
    here = pathlib.Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "modified": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_run(config: RunConfig, **more: Any) -> dict[str, Any]:
    """The object that config.json holds; `more` adds keys."""
    return {
        "config": config_lib.to_dict(config),
        "git": git_state(),
        "versions": versions(),
        "devices": {"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "implementations": ops.choices(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **more,
    }


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file in one step, so that a kill leaves the old or the new one."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The resolved config of the run in a workdir; None if there is no run.

    Raises:
      UserError: config.json is there and is not one.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it or use another --workdir") from None


def check_same(workdir: pathlib.Path, old: dict[str, Any], new: RunConfig) -> None:
    """Raises UserError if the workdir's run has another config, unless the config says to continue."""
    changed = [
        f"{key}: {a!r} -> {b!r}"
        for key, a, b in config_lib.difference(old, config_lib.to_dict(new))
        if key not in FREE_KEYS
    ]
    if changed and new.train.on_config_change == "stop":
        shown = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
        raise UserError(
            f"{workdir} holds a run of another config: {shown}\n"
            "use another --workdir, or go on under the new config with --config.train.on_config_change=continue"
        )
