"""Does a model train by a kernel as by XLA's form? Interpreted, on any machine; nothing is timed.

A language model of nano size, bfloat16, by the op's XLA form with several seeds, whose spread is the noise, and by the
kernel with the same seeds, data and initial values. It passes where the mean held-out loss of the kernel's runs is at
most two standard deviations of XLA's above theirs.

    python -m benchmarks.kernel_training --mixer gated_deltanet --xla chunked --kernel pallas --json FILE
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from attnlab import config as config_lib
from attnlab.ops.dispatch import interpreted
from attnlab.train.config import RunConfig
from attnlab.train.loop import train

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs/lm.py"


def run(mixer: str, impl: str, seed: int, steps: int, overrides: list[str]) -> float:
    """The held-out loss after the last step."""
    chosen = [f"train.steps={steps}", f"train.eval_every={steps}", "train.sample_tokens=0", "model.dtype=bfloat16",
              f"model.mixers.M.impl={impl}", f"seed={seed}", "mesh.data=1", *overrides]  # fmt: skip
    config = config_lib.load(RunConfig, f"{CONFIG}:mixer={mixer},size=nano", chosen)
    with tempfile.TemporaryDirectory() as workdir, interpreted():
        return train(config, pathlib.Path(workdir)).evaluation.loss


def main() -> int:
    """0, or 1 where the kernel's runs are worse than noise explains."""
    overrides = [a.removeprefix("--config.") for a in sys.argv[1:] if a.startswith("--config.")]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--xla", default="chunked", help="implementation (chunked)")
    parser.add_argument("--kernel", default="pallas", help="implementation (pallas)")
    parser.add_argument("--steps", type=int, default=300, help="of every run (300)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (3; at least 2)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = parser.parse_args([a for a in sys.argv[1:] if not a.startswith("--config.")])
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}; allowed: 2 or more, as one run has no spread")
    losses: dict[str, list[float]] = {args.xla: [], args.kernel: []}
    for seed in range(args.seeds):
        for impl, found in losses.items():
            found.append(run(args.mixer, impl, seed, args.steps, overrides))
            print(f"{args.mixer} {impl} seed {seed}: {found[-1]:.4f}", flush=True)
    noise = statistics.stdev(losses[args.xla])
    above = statistics.fmean(losses[args.kernel]) - statistics.fmean(losses[args.xla])
    facts: dict[str, Any] = {"mixer": args.mixer, "steps": args.steps, "overrides": overrides, "losses": losses,
                             "noise": noise, "above": above}  # fmt: skip
    print(f"{args.kernel} is {above:+.4f} from {args.xla}; deviation over seeds {noise:.4f}")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))
    return int(above > 2 * noise)


if __name__ == "__main__":
    sys.exit(main())
