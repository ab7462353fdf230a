"""Losses of every mixer's first steps, to see that a change of the code changes no number.

Each mixer trains twice in float32, by the command line: nano on one device, and a packed, accumulated run over eight
simulated devices (data 2 x context 2 x tensor 2). The corpus is drawn from a seed. Losses depend on processor and
versions by rounding: write them on the machine that will compare.

    python -m benchmarks.golden --write golden.json     # before the change
    python -m benchmarks.golden --compare golden.json   # after it: 1 where a loss differs by more than 1e-6
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

from benchmarks import harness

STEPS = 50
RUNS = {
    "nano": (1, ["data.batch=4", "mesh.data=1"]),
    "sharded": (8, ["data.batch=8", "data.length=64", "train.accumulate=2", "mesh.data=2", "mesh.context=2",
                    "mesh.tensor=2"]),
}  # fmt: skip
_COMMON = [f"train.steps={STEPS}", "optimizer.warmup=20", "train.log_every=1", "train.eval_every=0",
           "train.save_every=0", "train.sample_tokens=0", "data.cache=CACHE", "data.source=jsonl:CORPUS"]  # fmt: skip


def main() -> int:
    """0, or 1 where a loss differs from those compared with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--write", metavar="FILE", help="writes the losses")
    where.add_argument("--compare", metavar="FILE", help="compares with losses written before")
    parser.add_argument("--mixers", type=lambda s: s.split(","), help="some of them; default: all")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="largest difference of two losses (1e-6)")
    args = parser.parse_args()
    from attnlab import mixers

    before = json.loads(pathlib.Path(args.compare).read_text())["losses"] if args.compare else {}
    losses: dict[str, dict[str, list[float]]] = {}
    worst = 0.0
    with tempfile.TemporaryDirectory() as directory:
        home = pathlib.Path(directory)
        _write_corpus(home / "corpus.jsonl")
        for name in args.mixers or [n for n in mixers.names() if mixers.get(n).capabilities.causal]:
            losses[name] = {run: _losses(home, name, run) for run in RUNS}
            for run, found in losses[name].items():
                line = f"{name} {run}: {found[0]:.6f} to {found[-1]:.6f}"
                if args.compare:
                    differences = [abs(a - b) for a, b in zip(found, before[name][run], strict=True)]
                    worst = max(worst, *differences)
                    line += f", differs by at most {max(differences):.2e}"
                print(line, flush=True)
            if args.write:  # after each mixer: what was computed is not lost
                facts = {"machine": harness.machine(), "losses": losses}
                pathlib.Path(args.write).write_text(json.dumps(facts, indent=1) + "\n")
    return int(worst > args.tolerance)


def _write_corpus(path: pathlib.Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 6))) for _ in range(200)]
    with path.open("w") as file:
        for _ in range(600):
            text = " ".join(draw.choices(words, k=draw.randint(3, 120)))
            file.write(json.dumps({"text": text}) + "\n")


def _losses(home: pathlib.Path, mixer: str, run: str) -> list[float]:
    devices, overrides = RUNS[run]
    workdir = home / f"{mixer}-{run}"
    common = [o.replace("CACHE", str(home / "cache")).replace("CORPUS", str(home / "corpus.jsonl")) for o in _COMMON]
    command = [sys.executable, "-m", "attnlab", "train", "--config", f"configs/lm.py:mixer={mixer},size=nano"]
    command += ["--workdir", str(workdir), *(f"--config.{o}" for o in (*common, *overrides))]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{mixer} {run} failed:\n{done.stderr[-2000:]}")
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
