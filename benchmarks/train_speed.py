"""Training speed on a CPU: attnlab's training step against a plain PyTorch GPT of the same sizes.

attnlab's side runs what `attnlab train` runs: the config file, the step with its clip and optimizer, batches as the
trainer places them. Rows hold one document each, as PyTorch's attention knows no other. PyTorch's side is
`benchmarks/torch_gpt.py`.

    python -m benchmarks.train_speed
    python -m benchmarks.train_speed --mixer gated --shapes 8x512 --json
    python -m benchmarks.train_speed --config.model.unroll=1
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any

import numpy as np

from benchmarks import harness


def main() -> int:
    """0, or 1 where a ratio is below `--require`."""
    overrides = [a for a in sys.argv[1:] if a.startswith("--config.")]
    args = _parser().parse_args([a for a in sys.argv[1:] if not a.startswith("--config.")])
    if args.worker:
        _work(args, [o.removeprefix("--config.") for o in overrides])
        return 0
    harness.require_torch()
    started, facts = time.monotonic(), harness.machine()
    common = ["--mixer", args.mixer, *overrides]
    with (
        harness.Side("benchmarks.train_speed", ["--worker", "attnlab", *common]) as ours,
        harness.Side("benchmarks.train_speed", ["--worker", "torch"]) as peer,
    ):
        sides = {"attnlab": ours, "torch": peer}
        prepared = {
            (shape, name): side.ask(do="prepare", shape=shape) for shape in args.shapes for name, side in sides.items()
        }
        work = {
            (shape, name): lambda side=side, shape=shape: side.time(do="work", shape=shape, steps=args.steps)
            for shape in args.shapes
            for name, side in sides.items()
        }
        timings, undisturbed = harness.alternate(work, rounds=args.rounds, until=started + args.seconds)
        memory = {name: side.ask(do="memory") for name, side in sides.items()}

    result: dict[str, Any] = {"mixer": args.mixer, "machine": facts, "undisturbed": undisturbed, "shapes": {}}
    rows = []
    for shape in args.shapes:
        batch, length = _sizes(shape)
        mine, theirs = timings[shape, "attnlab"], timings[shape, "torch"]
        rates = [harness.rate(t, batch * length * args.steps) for t in (mine, theirs)]
        ratio = harness.paired_ratio(mine, theirs)
        result["shapes"][shape] = {"attnlab": rates[0], "torch": rates[1], "ratio": ratio,
                                   "compile_seconds": prepared[shape, "attnlab"]["seconds"]}  # fmt: skip
        rows.append((shape, *rates, ratio))
    result["peak_memory_mb"] = memory
    if args.json:
        print(json.dumps(result))
    else:
        harness.print_rates(f"training, {args.mixer}, micro, batch x length", "tokens/s", rows)
        seconds = ", ".join(f"{s} {r['compile_seconds']:.1f} s" for s, r in result["shapes"].items())
        print(f"{result['shapes'][args.shapes[0]]['attnlab']['rounds']} rounds of {args.steps} steps; "
              f"attnlab's compile and first step: {seconds}; "
              f"peak memory: attnlab {memory['attnlab']:,.0f} MB, torch {memory['torch']:,.0f} MB")  # fmt: skip
        harness.print_machine(facts, undisturbed)
    lowest = min(r["ratio"]["median"] for r in result["shapes"].values())
    return int(args.require is not None and lowest < args.require)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", default="softmax", help="a registered mixer (softmax)")
    parser.add_argument("--shapes", type=lambda s: s.split(","), default=["8x512", "2x2048"], metavar="BxT,...")
    parser.add_argument("--rounds", type=int, default=7, help="undisturbed rounds wanted (7)")
    parser.add_argument("--steps", type=int, default=2, help="steps a round (2)")
    parser.add_argument("--seconds", type=float, default=150, help="no round starts later (150)")
    parser.add_argument("--require", type=float, metavar="RATIO", help="exit with 1 if any ratio is below")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=("attnlab", "torch"), help=argparse.SUPPRESS)
    return parser


def _sizes(shape: str) -> tuple[int, int]:
    batch, length = map(int, shape.split("x"))
    return batch, length


def _tokens(shape: str, vocab: int = 256) -> np.ndarray:
    batch, length = _sizes(shape)
    return np.random.default_rng(0).integers(0, vocab, (batch, length + 1)).astype(np.int32)


def _work(args: argparse.Namespace, overrides: list[str]) -> None:
    step_of: dict[str, Any] = {}
    make = _attnlab_step if args.worker == "attnlab" else _torch_step

    def prepare(shape: str) -> dict[str, float]:
        started = time.perf_counter()
        step_of[shape] = make(args.mixer, shape, overrides)
        step_of[shape]()
        seconds = time.perf_counter() - started
        step_of[shape]()  # the second still warms up: memory, threads
        return {"seconds": seconds}

    def work(shape: str, steps: int) -> None:
        for _ in range(steps):
            step_of[shape]()

    harness.answer({
        "prepare": prepare,
        "work": work,
        "memory": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    })  # fmt: skip


def _torch_step(mixer: str, shape: str, overrides: list[str]) -> Any:
    from benchmarks import torch_gpt

    trainer, tokens = torch_gpt.Trainer(torch_gpt.GPTConfig()), _tokens(shape)
    return lambda: trainer.step(tokens)


def _attnlab_step(mixer: str, shape: str, overrides: list[str]) -> Any:
    from attnlab.launch import runtime

    runtime.configure()
    from attnlab.train import config as run_config
    from attnlab.train.program import Program

    batch, length = _sizes(shape)
    sizes = [f"data.batch={batch}", f"data.length={length}"]
    c = run_config.load(f"configs/lm.py:mixer={mixer},size=micro", sizes + overrides)
    program = Program.of(c)
    state = program.init(c.seed)
    tokens = _tokens(shape)
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((batch, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
    }

    def step() -> float:
        nonlocal state
        state, metrics = program.train_step(state, program.put(arrays))
        return float(metrics["loss"])

    return step


if __name__ == "__main__":
    sys.exit(main())
