"""Does a softmax model become a hybrid of linear layers by distillation, and better than by training alone?

A small model of softmax attention is trained on the quickstart's data. Hybrids of it, the same but for a linear mixer
in three layers of four (configs/distill.py), then train on one budget, a share of the teacher's tokens:

- `distilled`: first its layers by themselves, each fed what the teacher's is, then the whole by the teacher's logits
- `logits`: by the teacher's logits alone
- `no teacher`: from the same beginning, the teacher's parameters, by cross-entropy alone
- `drawn`: from drawn parameters, by cross-entropy alone
- `no teacher full rate`, `drawn full rate`: the same at the teacher's peak learning rate, not a quarter of it

A row tells the held-out loss, and how much of the gap to the teacher's it closes: from the hybrid before anything is
trained, which has the teacher's parameters where they fit, and from a drawn one. The command fails where `distilled`
closes less than `--bar` of the first. Runs are kept under `--workdir`: the command goes on where it stopped.

    python -m benchmarks.distillation
    python -m benchmarks.distillation --mixer gated_deltanet --pattern L --steps 800 --json
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from benchmarks import harness

HELDOUT_BATCHES = 16  # what the trainer evaluates
ARMS = ("distilled", "logits", "no teacher", "drawn", "no teacher full rate", "drawn full rate")


def main() -> int:
    """0, or 1 where the distilled hybrid closes too little of the gap, or a run failed."""
    overrides = [a for a in sys.argv[1:] if a.startswith("--config.")]
    args = _parser().parse_args([a for a in sys.argv[1:] if not a.startswith("--config.")])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    runs = _Runs(args, overrides)
    teacher = runs.train("teacher", f"configs/lm.py:mixer=softmax,size={args.size}", [f"train.steps={args.steps}"])
    hybrid = f"configs/distill.py:teacher={teacher},mixer={args.mixer},pattern={args.pattern}"
    first, rest = f"{args.budget * args.layers_share:g}", f"{args.budget * (1 - args.layers_share):g}"
    layers = f"{hybrid},stage=layers,share={first}"
    rows = [runs.row("teacher", teacher), *runs.untrained(layers, teacher)]
    for arm in args.arms:
        if arm == "distilled":
            begun = runs.train("layers", layers, [], teacher)
            made = [begun, runs.train(arm, f"{hybrid},stage=logits,share={rest}", [], begun)]
        elif arm == "logits":
            made = [runs.train(arm, f"{hybrid},stage=logits,share={args.budget:g}", [], teacher)]
        else:
            rate = runs.rate(teacher) / (1 if arm.endswith("full rate") else 4)
            values = ["train.distill=none", f"optimizer.learning_rate={rate}"]
            begun = teacher if arm.startswith("no teacher") else None
            name = arm.replace(" ", "_")
            made = [runs.train(name, f"{hybrid},stage=logits,share={args.budget:g}", values, begun)]
        rows.append(runs.row(arm, *made))
        if not args.json:
            print(f"{arm}: held-out loss {rows[-1]['loss']:.4f}", flush=True)
    losses = {row["arm"]: row["loss"] for row in rows}
    for row in rows:
        for name in ("begun", "drawn untrained"):
            gap = losses[name] - losses["teacher"]
            row[f"closed from {name}"] = (losses[name] - row["loss"]) / gap
        row["share of tokens"] = row["tokens"] / rows[0]["tokens"]
    passed = all(row["closed from begun"] >= args.bar for row in rows if row["arm"] == "distilled")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()} | {"overrides": overrides}
        print(json.dumps({"rows": rows, "settings": settings, "passed": passed, **harness.machine()}))
    else:
        _print(rows, args)
    return int(not passed)


class _Runs:
    """Runs that are trained where they have not been, and their figures."""

    def __init__(self, args: argparse.Namespace, overrides: list[str]):
        self.args, self.overrides = args, overrides

    def train(self, name: str, config: str, values: list[str], begun: pathlib.Path | None = None) -> pathlib.Path:
        """The workdir of a run, trained to its end."""
        workdir = self.args.workdir / name
        command = [
            sys.executable, "-m", "attnlab", "train", "--config", config, "--workdir", str(workdir),
            "--config.train.eval_every=0", "--config.train.sample_tokens=0", "--config.mesh.data=1",
            *(["--init-from", str(begun)] if begun and not (workdir / "checkpoints").is_dir() else []),
            *(f"--config.{value}" for value in values), *self.overrides,
        ]  # fmt: skip
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: attnlab train ended with {done.returncode}\n{done.stderr[-2000:]}")
        return workdir

    def rate(self, workdir: pathlib.Path) -> float:
        """Peak learning rate of a run; configs/distill.py gives the whole model a quarter of it."""
        return json.loads((workdir / "config.json").read_text())["config"]["optimizer"]["learning_rate"]

    def row(self, arm: str, *workdirs: pathlib.Path) -> dict[str, Any]:
        """Held-out loss of the last of an arm's runs, and what all of them took."""
        from attnlab.train import restore

        last = [json.loads((path / "metrics.jsonl").read_text().splitlines()[-1]) for path in workdirs]
        trained = restore.load(workdirs[-1], "latest")
        return {
            "arm": arm,
            "loss": restore.evaluate_heldout(trained, HELDOUT_BATCHES)[0].loss,
            "tokens": sum(line["tokens"] for line in last),
            "step seconds": [line["step_seconds"] for line in last],
        }

    def untrained(self, spec: str, teacher: pathlib.Path) -> list[dict[str, Any]]:
        """The hybrid before any step: with the teacher's parameters where they fit, and drawn."""
        from attnlab.evaluate.heldout import evaluate
        from attnlab.train import beginning, source
        from attnlab.train import config as run_config
        from attnlab.train.program import Program, open_data

        texts = [text.removeprefix("--config.") for text in self.overrides]
        config = run_config.load(spec, ["mesh.data=1", *texts])
        program, data = Program.of(config), open_data(config)
        with source.opened(teacher, None, print) as found:
            begun = beginning.fit(found, program.model).params(program, config.seed, print)
        rows = []
        for arm, params in (("begun", begun), ("drawn untrained", program.init(config.seed).params)):
            heldout = data.heldout(batches=HELDOUT_BATCHES)
            step = lambda batch, params=params: program.eval_step(params, batch)
            placed = (program.put(batch) for batch in heldout)
            loss = evaluate(program.model.objective, step, placed, heldout.facts()).loss
            rows.append({"arm": arm, "loss": loss, "tokens": 0, "step seconds": []})
        return rows


def _print(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    percent = lambda x: f"{100 * x:.1f} %"
    print(f"\n{args.size}, {args.steps} steps of the teacher; {args.mixer} in {args.pattern}; nats per token, held out")
    harness.print_table(
        ["arm", "tokens", "of the teacher's", "loss", "gap closed", "gap closed from drawn", "s / step"],
        [
            [row["arm"], f"{row['tokens']:,}", percent(row["share of tokens"]), f"{row['loss']:.4f}",
             percent(row["closed from begun"]), percent(row["closed from drawn untrained"]),
             ", ".join(f"{s:.3f}" for s in row["step seconds"] if s)]
            for row in rows
        ],
    )  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in harness.machine().items()))


def _arms(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(ARMS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is no arm; allowed: {', '.join(ARMS)}")
    return text.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    share = lambda text: float(text)
    parser.add_argument("--mixer", default="gla", help="what takes softmax attention's place (default: gla)")
    parser.add_argument("--pattern", default="LLLT", help="L: the mixer, T: the teacher's (default: LLLT)")
    parser.add_argument("--size", default="nano", help="of configs/lm.py (default: nano)")
    parser.add_argument("--steps", type=int, default=800, help="of the teacher (default: 800)")
    parser.add_argument("--budget", type=share, default=0.2, help="steps of each arm, of the teacher's (default: 0.2)")
    parser.add_argument(
        "--layers-share", type=share, default=0.5, help="of them, on layers by themselves (default: 0.5)"
    )
    parser.add_argument("--arms", type=_arms, default=ARMS, help=f"of {', '.join(ARMS)}")
    parser.add_argument("--bar", type=share, default=0.8, help="what `distilled` must close (default: 0.8)")
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("runs/distillation"), help="keeps the runs"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
