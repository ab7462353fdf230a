"""Does a run on many devices compute what it does on one? Every mixer, every kind of mesh, on eight simulated devices.

Ten steps of AdamW in float32 on packed, padded documents, each step of two micro-batches; the figure is the largest
difference of a loss to that of one device. The parameters are placed, and the positions, heads and rows split, as
`attnlab train` does it.

    python -m benchmarks.sharding
    python -m benchmarks.sharding --mixers flow,titans --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks import harness

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "tensor 4, data 2": {"data": 2, "tensor": 4},
    "context 4, data 2": {"data": 2, "context": 4},
    "fsdp 2, tensor 2, context 2": {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
}
STEPS, ROWS, LENGTH, MOST = 10, 16, 32, 1e-5
LIMIT = 1800  # seconds for one mixer


def main() -> int:
    """0, or 1 where a loss differs by more than 1e-5."""
    args = _parser().parse_args()
    if args.worker:
        print(json.dumps(losses(args.worker)))
        return 0
    os.environ["JAX_PLATFORMS"] = "cpu"
    from attnlab import mixers

    rows = []
    for name in args.mixers or [n for n in mixers.names() if mixers.get(n).capabilities.causal]:
        rows.append(_compare(name))
        if not args.json:
            cells = [f"{mesh}: {rows[-1][mesh]:.1e}" for mesh in MESHES] if "failed" not in rows[-1] else ["failed"]
            print(f"{name:15} " + "; ".join(cells), flush=True)
    good = all("failed" not in row and all(row[mesh] <= MOST for mesh in MESHES) for row in rows)
    if args.json:
        print(json.dumps({"steps": STEPS, "rows": rows, "passed": good}))
    else:
        print(
            f"\nlargest difference of a loss in {STEPS} steps to one device; "
            f"{'all' if good else 'NOT all'} within {MOST:g}"
        )
        harness.print_machine(harness.machine(), undisturbed=True)
    return int(not good)


def _compare(name: str) -> dict[str, Any]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.sharding", "--worker", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
    except subprocess.TimeoutExpired:
        return {"mixer": name, "failed": f"more than {LIMIT} s"}
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {"mixer": name, "failed": f"exit code {done.returncode}"}
    found = json.loads(done.stdout.splitlines()[-1])
    one = found.pop("one device")
    return {"mixer": name} | {mesh: max(abs(a - b) for a, b in zip(one, ours)) for mesh, ours in found.items()}


def losses(name: str) -> dict[str, list[float]]:
    """Losses of the steps on one device and under every mesh."""
    import jax

    from attnlab import config as config_lib
    from attnlab.train.config import RunConfig
    from attnlab.train.program import Program

    tree = {
        "data": {"source": "stdlib", "length": LENGTH, "batch": ROWS},
        "model": {"vocab": 264, "width": 32, "layers": 2, "mixers": {"M": {"name": name}}},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup": 2},
        "train": {"steps": STEPS, "accumulate": 2},
    }
    found = {}
    for label, sizes in {"one device": {"data": 1}, **MESHES}.items():
        program = Program(config_lib.build(RunConfig, tree | {"mesh": sizes}))
        state = program.init(0)
        found[label] = []
        for index in range(STEPS):
            state, metrics = program.train_step(state, program.put(batch(index)))
            found[label].append(float(jax.block_until_ready(metrics)["loss"]))
        jax.clear_caches()
    return found


def batch(index: int) -> dict[str, Any]:
    """Packed documents of random bytes: one to three of a row, some rows with padding behind."""
    import numpy as np

    rng = np.random.default_rng(index)
    tokens = rng.integers(0, 256, (ROWS, LENGTH + 1)).astype(np.int32)
    cuts = np.sort(rng.integers(1, LENGTH, (ROWS, 2)), axis=1)
    place = np.arange(LENGTH)
    segments = 1 + (place >= cuts[:, :1]) + (place >= cuts[:, 1:])
    starts = np.where(segments == 1, 0, np.where(segments == 2, cuts[:, :1], cuts[:, 1:]))
    ends = rng.integers(LENGTH // 2, 2 * LENGTH, (ROWS, 1))
    segments = np.where(place < ends, segments, 0).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "positions": np.where(segments > 0, place - starts, 0).astype(np.int32),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", type=lambda text: text.split(","), help="names, comma-separated (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
