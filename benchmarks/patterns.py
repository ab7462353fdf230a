"""The four patterns of attention: every mixer trained on the task of each, or why it is not.

    python -m benchmarks.patterns [--mixers softmax,gated] [--steps 500] [--json FILE]

The patterns are causal or not, to the sequence itself or to a context (Zhang et al. 2023, CAB, arXiv:2210.07661), with
a task of configs/tasks.py each. A mixer that a pattern is not for is refused by its config, whose reason is printed.
The index of a mixer is the mean over its patterns of how many standard deviations its accuracy lies above the mean of
all mixers compared: it depends on who is compared, so compare indices of one table alone, and look at the accuracies.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import rich.console
import rich.table

from attnlab import config as config_lib
from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.train.config import RunConfig
from attnlab.train.loop import train

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs/tasks.py"
PATTERNS = {
    "causal self": "mqar",
    "noncausal self": "match2",
    "causal cross": "transcribe",
    "noncausal cross": "retrieve",
}


def cell(mixer: str, task: str, steps: int) -> dict[str, Any]:
    """`accuracy` and `chance` of a trained model, or the `reason` for none."""
    overrides = [f"train.steps={steps}", f"train.eval_every={steps}", "train.sample_tokens=0"]
    try:
        config = config_lib.load(RunConfig, f"{CONFIG}:task={task},mixer={mixer}", overrides)
    except ConfigError as error:
        return {"reason": " ".join(str(error).split())}
    with tempfile.TemporaryDirectory() as workdir:
        summary = train(config, pathlib.Path(workdir)).evaluation.summary()
    return {"accuracy": summary["accuracy"], "chance": summary["chance"]["accuracy"]}


def indices(table: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float | None]:
    """Mean z-score of each mixer over the patterns that it has; None where no two mixers differ."""
    scores: dict[str, list[float]] = {name: [] for name in table}
    for pattern in PATTERNS:
        found = {name: row[pattern]["accuracy"] for name, row in table.items() if "accuracy" in row.get(pattern, {})}
        if len(found) > 1 and (spread := statistics.stdev(found.values())) > 0:
            mean = statistics.fmean(found.values())
            for name, accuracy in found.items():
                scores[name].append((accuracy - mean) / spread)
    return {name: statistics.fmean(z) if z else None for name, z in scores.items()}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patterns", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--mixers", default=",".join(mixers.names()), help="names with commas between them; default: all"
    )
    parser.add_argument("--steps", type=int, default=500, help="of every run (500)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = parser.parse_args()
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name in args.mixers.split(","):
        mixers.get(name)
        table[name] = {}
        for pattern, task in PATTERNS.items():
            table[name][pattern] = found = cell(name, task, args.steps)
            print(f"{name}, {pattern} ({task}): {found.get('accuracy', found.get('reason'))}", file=sys.stderr)
    index = indices(table)
    shown = rich.table.Table(title=f"accuracy after {args.steps} steps")
    for column in ("mixer", *(f"{pattern} ({task})" for pattern, task in PATTERNS.items()), "index"):
        shown.add_column(column)
    for name, row in table.items():
        cells = [f"{row[pattern]['accuracy']:.3f}" if "accuracy" in row[pattern] else "no" for pattern in PATTERNS]
        shown.add_row(name, *cells, "-" if index[name] is None else f"{index[name]:+.2f}")
    rich.console.Console(width=120).print(shown)
    if args.json:
        args.json.write_text(json.dumps({"steps": args.steps, "index": index, "table": table}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
