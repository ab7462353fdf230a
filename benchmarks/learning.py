"""Does every mixer learn? Each trains a small language model on the quickstart's data, in fp32 and in bf16.

A row tells the held-out loss after the last step against that of a bigram model counted on the same training tokens,
how many steps had gradients that were not finite, and how far decoding (a prefill, then token by token) is from the
full forward pass on held-out text. Runs are kept under `--workdir`: the command goes on where it stopped.

    python -m benchmarks.learning
    python -m benchmarks.learning --mixers flow,titans --dtypes float32 --steps 100 --json
    python -m benchmarks.learning --runs runs/every/arms/*/text/seed0    # runs that are there, on data of one kind
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks import harness

HELDOUT_BATCHES = 16  # what the trainer evaluates


def main() -> int:
    """0, or 1 where a mixer did worse than the bigram model, was not finite, or decodes something else."""
    overrides = [a for a in sys.argv[1:] if a.startswith("--config.")]
    args = _parser().parse_args([a for a in sys.argv[1:] if not a.startswith("--config.")])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.runs:
        return _of_runs(args)
    from attnlab import mixers

    chosen = args.mixers or [n for n in mixers.names() if mixers.get(n).capabilities.causal]
    rows: list[dict[str, Any]] = []
    bigram = None
    for name in chosen:
        for dtype in args.dtypes:
            workdir = args.workdir / (f"{args.size}-{name}-{dtype}" + "-lm" * (args.recipe == "lm"))
            if not _train(args, name, dtype, workdir, overrides):
                rows.append({"mixer": name, "dtype": dtype, "failed": True, "passed": False})
                continue
            if bigram is None:
                bigram = bigram_loss(workdir, args.steps)
            rows.append(_judge(workdir, bigram) | {"mixer": name, "dtype": dtype})
            if not args.json:
                print(_line(rows[-1]), flush=True)
    return _told(rows, bigram, args, {"steps": args.steps, "size": args.size})


def _of_runs(args: argparse.Namespace) -> int:
    """`main` for runs that are over, each of one mixer, against a bigram model of the data that all have."""
    from attnlab.train import restore

    rows: list[dict[str, Any]] = []
    bigram = steps = data = None
    for workdir in args.runs:
        config = restore.load(workdir, "latest").config
        if bigram is None:
            steps, data = config.train.steps, config.data
            bigram = bigram_loss(workdir, steps)
        if (config.train.steps, config.data) != (steps, data):
            raise SystemExit(f"{workdir} has other data or steps than {args.runs[0]}; allowed: runs on the same ones")
        (mixer,) = {mixer.node_name for mixer in config.model.mixers.values()}
        rows.append(_judge(workdir, bigram) | {"mixer": mixer, "dtype": config.model.dtype})
        if not args.json:
            print(_line(rows[-1]), flush=True)
    return _told(rows, bigram, args, {"steps": steps, "size": "runs"})


def _told(rows: list[dict[str, Any]], bigram: float | None, args: argparse.Namespace, facts: dict[str, Any]) -> int:
    if args.json:
        print(json.dumps({"bigram_loss": bigram, **facts, "rows": rows}))
    else:
        _print(rows, bigram, facts)
    return int(not all(row["passed"] for row in rows))


def _train(args: argparse.Namespace, name: str, dtype: str, workdir: pathlib.Path, overrides: list[str]) -> bool:
    command = [
        sys.executable, "-m", "attnlab", "train",
        "--config", f"configs/lm.py:mixer={name},size={args.size},recipe={args.recipe}",
        "--workdir", str(workdir), f"--config.model.dtype={dtype}", f"--config.train.steps={args.steps}",
        f"--config.train.eval_every={args.steps}", "--config.mesh.data=1", *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{name} {dtype}: attnlab train ended with {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
    return done.returncode == 0


def bigram_loss(workdir: pathlib.Path, steps: int, weight: float = 0.1) -> float:
    """Held-out nats per token of a bigram model with additive smoothing, counted on the tokens of `steps` steps."""
    from attnlab.train import restore

    trained = restore.load(workdir, "latest")
    config, vocab = trained.config, trained.config.model.vocab
    counts = np.full((vocab, vocab), weight)
    with trained.data.training(seed=config.seed) as batches:
        for _, batch in zip(range(steps), batches, strict=False):
            used = batch["segments"] > 0
            np.add.at(counts, (batch["tokens"][used], batch["targets"][used]), 1)
    nll = -np.log(counts / counts.sum(1, keepdims=True))
    total = tokens = 0.0
    for batch in trained.data.heldout(batches=HELDOUT_BATCHES):
        used = batch["segments"] > 0
        total += nll[batch["tokens"][used], batch["targets"][used]].sum()
        tokens += used.sum()
    return float(total / tokens)


def _judge(workdir: pathlib.Path, bigram: float) -> dict[str, Any]:
    from attnlab.train import restore

    trained = restore.load(workdir, "latest")
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    loss = restore.evaluate_heldout(trained, HELDOUT_BATCHES)[0].loss
    off, scale = decode_difference(trained)
    finite = bool(np.all(np.isfinite(losses))) and logged[-1]["skipped"] == 0
    low = trained.config.model.dtype == "bfloat16"
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "heldout_loss": loss,
        "step_seconds": float(np.median([row["step_seconds"] for row in logged if row.get("step_seconds")])),
        "skipped_steps": logged[-1]["skipped"],
        "decode_difference": off / scale,
        "passed": finite and loss < bigram and off / scale < (0.1 if low else 1e-3),
    }


def decode_difference(trained: Any, length: int = 96) -> tuple[float, float]:
    """Largest difference between the logits of a stream and of the full forward pass, and the largest logit, of so many
    positions, or of a row where it has fewer."""
    import jax
    import jax.numpy as jnp

    from attnlab.mixers import Sequence

    batch = next(iter(trained.data.heldout(batches=1)))
    tokens = jnp.asarray(batch["tokens"][:2, :length])
    length = tokens.shape[1]
    model = trained.program.model.merge(trained.params)
    seq = Sequence.whole(*tokens.shape)
    full = jax.jit(lambda t: model.logits(model.hidden(t, seq).y))(tokens)
    periods = model.transformer.unstacked()

    @jax.jit
    def extend(tokens: Any, first: Any, state: Any) -> tuple[Any, Any]:
        positions = jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, state = model.extend(periods, tokens, Sequence(positions, jnp.ones_like(tokens)), state)
        return model.logits(hidden), state

    state, parts, first = model.init_state(tokens.shape[0], length), [], 0
    for n in [length // 2 + 1] + [1] * (length - length // 2 - 1):
        part, state = extend(tokens[:, first : first + n], jnp.int32(first), state)
        parts.append(part)
        first += n
    streamed = jnp.concatenate(parts, axis=1)
    return float(jnp.abs(streamed - full).max()), float(jnp.abs(full).max())


_COLUMNS = ["mixer", "dtype", "first loss", "last loss", "held-out loss", "skipped", "decode off", "s / step", "passed"]


def _cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["mixer"], row["dtype"], *["-"] * 6, "no"]
    return [
        row["mixer"], row["dtype"], f"{row['first_loss']:.3f}", f"{row['last_loss']:.3f}", f"{row['heldout_loss']:.3f}",
        str(row["skipped_steps"]), f"{row['decode_difference']:.1e}", f"{row['step_seconds']:.3f}",
        "yes" if row["passed"] else "no",
    ]  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {cell}" for name, cell in zip(_COLUMNS, _cells(row)))


def _print(rows: list[dict[str, Any]], bigram: float | None, facts: dict[str, Any]) -> None:
    if bigram is not None:
        print(
            f"\n{facts['size']}, {facts['steps']} steps; losses in nats per token; "
            f"a bigram model's held-out loss: {bigram:.3f}"
        )
    harness.print_table(_COLUMNS, [_cells(row) for row in rows])
    print(", ".join(f"{k} {v}" for k, v in harness.machine().items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: text.split(",")
    parser.add_argument("--mixers", type=names, help="names, with commas (default: all)")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"], help="of activations")
    parser.add_argument("--size", default="nano", help="of configs/lm.py (default: nano)")
    parser.add_argument("--recipe", default="paper", choices=("paper", "lm"), help="of configs/lm.py (default: paper)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (default: 300)")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/learning"), help="keeps the runs")
    parser.add_argument("--runs", type=pathlib.Path, nargs="+", metavar="DIR",
                        help="judge these workdirs of attnlab train, and train none")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
