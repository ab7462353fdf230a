"""How long until something happens: `attnlab train` to its first step, `import attnlab`, `attnlab --help`.

Each figure is the median of processes started one after the other. A run's time counts from the start of its process to
the end of its first step, as its goodput.jsonl tells it: cold where nothing was compiled before, warm where another
workdir's run had; and of a run that was killed and goes on from a checkpoint of its first step. Python keeps the byte
code of modules, as it does of an installed package.

    python -m benchmarks.startup
    python -m benchmarks.startup --rounds 5 --require
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import harness

_SHORT = ["train.steps=3", "train.save_every=2", "train.eval_every=0", "train.sample_tokens=0"]


def main() -> int:
    """0, or 1 where `--require` is given and a warm run takes more than a third of a cold one's time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/lm.py:mixer=gated,size=nano", help="of the run")
    parser.add_argument("--rounds", type=int, default=5, help="of each (5)")
    parser.add_argument("--require", action="store_true", help="exit with 1 where the bar is missed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    facts = harness.machine()
    with tempfile.TemporaryDirectory() as directory:
        found = _measure(pathlib.Path(directory), args.config, args.rounds)
    result = {
        "machine": facts,
        "median": {name: statistics.median(times) for name, times in found.items()},
        "all": found,
    }
    median = result["median"]
    if args.json:
        print(json.dumps(result))
    else:
        rows = [
            [name, f"{median[name]:.2f}", f"{min(times):.2f} to {max(times):.2f}", _share(median, name)]
            for name, times in found.items()
        ]
        harness.print_table(["", "s", "low to high", "to cold"], rows, f"seconds, median of {args.rounds}")
        harness.print_machine(facts, True)
    worst = max(median["train, warm"], median["train, goes on, warm"])
    return int(args.require and worst > median["train, cold"] / 3)


def _share(median: dict[str, float], name: str) -> str:
    return f"{median[name] / median['train, cold']:.2f}" if name.startswith("train") else ""


def _measure(directory: pathlib.Path, config: str, rounds: int) -> dict[str, list[float]]:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(directory / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    plain: dict[str, Sequence[str]] = {
        "import attnlab": ["-c", "import attnlab"],
        "attnlab --help": ["-m", "attnlab", "--help"],
    }

    def wall(arguments: Sequence[str]) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    def train(name: str, cache: str) -> float:
        """Seconds to the first step of the run in the workdir `name`."""
        workdir = directory / name
        command = ["-m", "attnlab", "train", "--config", config, "--workdir", str(workdir)]
        command += [f"--config.{key}" for key in _SHORT]
        own = {**environment, "JAX_COMPILATION_CACHE_DIR": str(directory / cache)}
        own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
        subprocess.run([sys.executable, *command], env=own, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(text) for text in (workdir / "goodput.jsonl").read_text().splitlines()]
        return lines[-1]["to_first_step"]

    train("first", "cache-first")  # writes byte code and tokens of the data
    found: dict[str, Any] = {name: [] for name in ("train, cold", "train, warm", "train, goes on, warm", *plain)}
    for i in range(rounds):
        cache = f"cache{i}"
        found["train, cold"].append(train(f"cold{i}", cache))
        found["train, warm"].append(train(f"warm{i}", cache))
        _forget_after(directory / f"warm{i}", 2)
        found["train, goes on, warm"].append(train(f"warm{i}", cache))
        for name, arguments in plain.items():
            found[name].append(wall(arguments))
    return found


def _forget_after(workdir: pathlib.Path, step: int) -> None:
    """The run as it was when this step was saved and it was killed."""
    for saved in (workdir / "checkpoints").iterdir():
        if int(saved.name) > step:
            saved.rename(workdir / f"gone{saved.name}")


if __name__ == "__main__":
    sys.exit(main())
