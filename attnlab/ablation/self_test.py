"""Does the machinery see differences where there are none? Plans of arms that are the same but for their seeds.

Paired arms of one config are bitwise equal, which tests nothing: here the second arm's seeds are others, so that both
draw from one distribution. If the level of 5 % holds, more than 3 of 20 such plans find a difference with probability
1.6 %.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import rich.console

from attnlab import config as config_lib
from attnlab import storage
from attnlab.ablation import plan, results_file, runner, synthetic
from attnlab.ablation.plan import PlanConfig
from attnlab.errors import TrainingFailed

PLANS, MOST = 20, 3
_RANGE = (0.045, 0.055)  # of synthetic plans of two arms


def plan_config(number: int, seeds: int = 3) -> PlanConfig:
    """The number-th plan: two arms of a tiny model that differ in their seeds alone."""
    base = {
        "data": {"source": "stdlib", "tokenizer": "bytes", "length": 32, "batch": 8},
        "model": {"vocab": 272, "width": 16, "layers": 1, "mixers": {"M": {"name": "softmax", "heads": 2}}},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup": 2},
        "train": {"steps": 20, "log_every": 20, "eval_every": 20, "eval_batches": 4, "sample_tokens": 0, "keep": 1},
        "mesh": {"data": 1},
    }
    first = 2 * seeds * number
    return config_lib.build(PlanConfig, {
        "question": "Do two arms that are the same differ?",
        "base": base,
        "arms": {"a": {}, "b": {"seed_offset": seeds}},
        "seeds": tuple(range(first, first + seeds)),
        "metrics": {"heldout_loss": {"primary": True}},
    })  # fmt: skip


def run(workdir: pathlib.Path | storage.Url, options: runner.Options, console: rich.console.Console) -> dict[str, Any]:
    """Runs the plans below a directory, and the statistics on made-up numbers; the same call goes on.

    Returns:
      `plans` that were run and how many found a `differences`, the share of `synthetic` plans that did, and whether the
      level `holds` in both.
    """
    found = []
    alone = dataclasses.replace(options, processes=options.processes or 1)  # all runs share one program
    for number in range(PLANS):
        config = plan_config(number)
        with runner.opened(workdir / f"plan{number}", alone) as where:
            code = runner.run_plan(config, plan.cells(config), where, alone, console)
            if code not in (0, runner.FAILED):
                stopped = f"plan {number} of {PLANS} was stopped"
                raise TrainingFailed(f"{stopped}; the same command goes on (exit code {code})")
            found += [c.p for c in results_file.read(where / "results.json").comparisons]
    rate = synthetic.null_rate().rejections
    differences = sum(p is not None and p < 0.05 for p in found)
    holds = differences <= MOST and _RANGE[0] <= rate <= _RANGE[1]
    return {"plans": PLANS, "differences": differences, "p": found, "synthetic": rate, "holds": holds}


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    return [
        f"{found['differences']} of {found['plans']} plans of two arms that are the same found a difference (p < 0.05);"
        f" allowed: {MOST}",
        f"{100 * found['synthetic']:.2f} % of 10,000 plans of made-up numbers did; allowed: 4.5 % to 5.5 %",
        "the level holds" if found["holds"] else "the level does not hold",
    ]
