"""config.json: what a run is, and on what it ran."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax

from attnlab import config as config_lib
from attnlab.errors import ConfigError, Damaged, UserError
from attnlab.train import files, optimizers
from attnlab.train.config import RunConfig, free_keys, placement_keys
from attnlab.train.program import Program

log = logging.getLogger(__name__)

_PACKAGES = ("attnlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def git_state() -> dict[str, Any]:
    """Commit of attnlab's checkout and whether it was modified; of a copy, what its file COMMIT says; else nulls."""
    here = pathlib.Path(__file__).resolve().parent
    copied = here.parents[1] / "COMMIT"
    if copied.is_file():
        return {"commit": copied.read_text().strip(), "modified": None}

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
        "devices": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
        },
        "processes": jax.process_count(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **more,
    }


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    files.replace(path, json.dumps(value, indent=2) + "\n")


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The resolved config of the run in a workdir; None if there is no run.

    Raises:
      UserError: config.json is there and is not one, or the workdir is a file.
    """
    path = workdir / "config.json"
    try:
        if not isinstance(tree := files.read_json(path).get("config"), dict):
            raise Damaged(f"{path} is damaged (no object 'config')")
        return tree
    except FileNotFoundError:
        return None
    except Damaged as error:
        if os.path.lexists(workdir) and not os.path.isdir(workdir):
            raise UserError(f"workdir {workdir} is a file, not a directory") from None
        raise UserError(f"{error}; restore it or use another workdir") from None


def check_same(workdir: pathlib.Path, old: dict[str, Any], new: RunConfig, *, saved: bool) -> None:
    """Raises UserError if the workdir's run has another config, unless it is told to go on, and can.

    What changes only where the run is computed (the mesh, remat) is allowed, and logged.

    Args:
      workdir: of the run.
      old: the config in its config.json.
      new: the config asked for.
      saved: whether there is a checkpoint that `new` would have to fit.
    """
    old, place = _filled(old), placement_keys(new)
    changed = [
        (key, f"{key}: {config_lib.show(a)} -> {config_lib.show(b)}")
        for key, a, b in config_lib.difference(old, config_lib.to_dict(new))
        if key not in free_keys(new) and not (key == "optimizer.warmup" and _same_warmup(a, old, new))
    ]
    moved = [text for key, text in changed if key.startswith(place)]
    changed = [(key, text) for key, text in changed if not key.startswith(place)]
    if changed and new.train.on_config_change == "stop":
        shown = "; ".join(text for _, text in changed[:6])
        shown += f"; and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise UserError(
            f"{workdir} holds a run of another config: {shown}\n"
            "use another workdir, or go on under the new config with train.on_config_change=continue"
        )
    if saved and any(key.startswith(("model.", "optimizer.", "train.ema")) for key, _ in changed):
        require_same_arrays(workdir, old, new)
    if moved and saved and jax.process_index() == 0:
        log.info("%s goes on with %s: the same examples, and losses that differ by rounding", workdir, "; ".join(moved))


def _filled(tree: dict[str, Any]) -> dict[str, Any]:
    """A config's tree with the keys that have come since it was written, at their defaults."""
    try:
        return config_lib.to_dict(config_lib.build(RunConfig, copy.deepcopy(tree)))
    except ConfigError:
        return tree


def _same_warmup(warmup: Any, old: dict[str, Any], new: RunConfig) -> bool:
    """Whether a warm-up of the old run is as many steps as the new one's, be it a share or a number."""
    steps = config_lib.flatten(old).get("train.steps")
    if not all(isinstance(value, (int, float)) for value in (warmup, steps)):
        return False
    now = optimizers.warmup_steps(new.optimizer.warmup, new.train.steps)
    return optimizers.warmup_steps(warmup, steps) == now


def require_same_arrays(
    workdir: pathlib.Path, old: dict[str, Any], new: RunConfig, *, parameters_alone: bool = False
) -> None:
    """Raises UserError unless `new` has the parameters and optimizer state that the run of config `old` saved."""
    try:
        before = _arrays(config_lib.build(RunConfig, old))
    except ConfigError as error:
        raise UserError(f"the config.json of {workdir} is of another version of attnlab: {error}") from None
    after = _arrays(new)
    kept = lambda key: key.startswith("params.") or not parameters_alone
    differing = sorted(k for k in before.keys() | after.keys() if kept(k) and before.get(k) != after.get(k))
    if differing:
        key = differing[0]
        raise UserError(
            f"the checkpoints of {workdir} do not fit this model and optimizer: "
            f"{key} was {before.get(key, 'not there')}, is {after.get(key, 'not there')} ({len(differing)} differ)\n"
            "undo the changes to model.*, optimizer.* and train.ema, or use another workdir"
        )


def _arrays(config: RunConfig) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(Program(config, batches=False).shapes)
    return {jax.tree_util.keystr(p, simple=True, separator="."): f"{x.dtype}{list(x.shape)}" for p, x in leaves}
