"""Small runs for tests."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import rich.console

from attnlab import config as config_lib
from attnlab.train.config import RunConfig
from attnlab.train.loop import train
from attnlab.train.program import Program
from attnlab.train.state import Model, TrainState
from tests.models import drawn as drawn_lib

Program.share(12)  # of the tests of a file, which take turns
Program.once = None  # the level of all other programs is lower still (tests/flags.py)

ROOT = pathlib.Path(__file__).resolve().parents[2]


def corpus(directory: pathlib.Path) -> str:
    """Forty small files and the glob that finds them."""
    directory.mkdir(exist_ok=True)
    for i in range(40):
        text = "\n".join(f"def f{i}_{j}(x):\n    return x + {i * j}" for j in range(8))
        (directory / f"m{i:02}.py").write_text(text)
    return f"text:{directory}/*.py"


def tree(source: str, **overrides: Any) -> dict[str, Any]:
    """A config tree of a model that compiles in a second or two, once for all numbers of steps from 3; `a__b=1` sets
    a.b. It has no MLPs: of arrays compiling, checkpoints and requests to buckets are made."""
    config: dict[str, Any] = {
        "seed": 3,
        "data": {"source": source, "length": 32, "batch": 8},
        "model": {
            "vocab": 260, "width": 16, "layers": 2, "mixers": {"M": {"name": "softmax", "heads": 2}}, "mlp_width": 0,
        },
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup": 2, "schedule": "constant"},
        "train": {"steps": 12, "log_every": 1, "eval_every": 6, "eval_batches": 2, "save_every": 4, "sample_tokens": 8},
        "mesh": {"data": 1},
    }  # fmt: skip
    for key, value in overrides.items():
        *parents, last = key.split("__")
        here = config
        for name in parents:
            here = here.setdefault(name, {})
        here[last] = value
    return config


def config(source: str, **overrides: Any) -> RunConfig:
    return config_lib.build(RunConfig, tree(source, **overrides))


def drawn(model: Model, seed: int = 0) -> Any:
    """Parameters of a model, a pure dict of NumPy arrays: nothing is compiled to draw them."""
    return drawn_lib.values(model.usages, model.pure_shapes, seed)


def first(program: Program, seed: int = 0) -> TrainState:
    """A state of no steps and `drawn` parameters, on the program's mesh: what AdamW begins with, and nothing compiled
    for it. That `Program.init` is the same on every mesh, tests/models/test_initial.py holds."""
    zero = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.shapes)
    state = dataclasses.replace(zero, params=drawn(program.model, seed), key=np.array([seed, 1], np.uint32))
    return jax.device_put(state, program.shardings)


def run(config: RunConfig, workdir: pathlib.Path) -> str:
    """Trains and returns what was printed."""
    out = io.StringIO()
    train(config, workdir, rich.console.Console(file=out, width=200))
    return out.getvalue()


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without what depends on the clock."""
    timed = ("tokens_per_second", "step_seconds", "mfu", "goodput", "host_seconds_min", "host_seconds_max")
    timed += ("slowest_process",)
    read = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in read]


def write_config(path: pathlib.Path, source: str, **overrides: Any) -> str:
    """A config file for the command line."""
    path.write_text(f"def get_config(arg=None):\n    return {tree(source, **overrides)!r}\n")
    return str(path)


def attnlab(*args: str, timeout: float = 240, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    command = [sys.executable, "-m", "attnlab", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, **kwargs)
