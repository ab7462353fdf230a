"""What the digests of checkpoints cost: a training loop that saves, a restore, and the digests of many gigabytes.

Saving: the same steps with and without digests, in processes that alternate. Restoring: attnlab's restore, which checks
every byte, against orbax's own of the same checkpoint, one after the other. Digests alone: written and verified over
files of `--gigabytes` in all, in the page cache where they fit. With `--hosts` nothing of that, but one state saved by
so many processes, on their own disks and in the workdir (`benchmarks.checkpoint_hosts`).

    python -m benchmarks.checkpoints
    python -m benchmarks.checkpoints --gigabytes 10 --require
    python -m benchmarks.checkpoints --hosts 1,2,4
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import checkpoint_hosts, harness

_FILE_BYTES = 1 << 31  # what orbax makes at most


def main() -> int:
    """0, or 1 where `--require` is given and saving costs more than 1 % or restoring more than 30 %."""
    args = _parser().parse_args()
    if args.worker:
        _work(args)
        return 0
    facts = harness.machine()
    if args.hosts:
        return _hosts(args, facts)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        saving, undisturbed = _saving(args, directory)
        restoring = _restoring(args, pathlib.Path(directory))
        alone = _alone(args, pathlib.Path(directory)) if args.gigabytes else None
    result = {"machine": facts, "undisturbed": undisturbed, "saving": saving, "restoring": restoring, "alone": alone}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"training that saves every {args.every} steps, speed with digests over without: "
              f"{saving['median']:.3f} ({saving['lowest']:.3f} to {saving['highest']:.3f})\n"
              f"restoring {restoring['gigabytes']:.2f} GB, time with every byte checked over orbax's own: "
              f"{restoring['median']:.2f} ({restoring['lowest']:.2f} to {restoring['highest']:.2f}); "
              f"{restoring['seconds']:.2f} s")  # fmt: skip
        if alone:
            print(f"digests of {alone['gigabytes']:.1f} GB alone: written in {alone['write_seconds']:.1f} s, "
                  f"verified in {alone['verify_seconds']:.1f} s")  # fmt: skip
        harness.print_machine(facts, undisturbed)
    return int(args.require and (saving["median"] < 0.99 or restoring["median"] > 1.3))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="undisturbed rounds wanted (7)")
    parser.add_argument("--steps", type=int, default=20, help="steps a round (20)")
    parser.add_argument("--every", type=int, default=10, help="steps between saves (10)")
    parser.add_argument("--seconds", type=float, default=240, help="no round of saving starts later (240)")
    parser.add_argument("--restore-gigabytes", type=float, default=1.0, metavar="G", help="of the state restored (1)")
    parser.add_argument("--gigabytes", type=float, default=0, metavar="G", help="of files whose digests are timed (0)")
    parser.add_argument("--hosts", type=lambda text: [int(n) for n in text.split(",")], metavar="N,N,..",
                        help="processes that save one state together, --restore-gigabytes of it")  # fmt: skip
    parser.add_argument("--directory", help="where all is written; default: the system's for temporary files")
    parser.add_argument("--require", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=("digests", "none"), help=argparse.SUPPRESS)
    return parser


def _hosts(args: argparse.Namespace, facts: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        place = pathlib.Path(directory)
        found = checkpoint_hosts.measure(args.hosts, args.restore_gigabytes, args.rounds, place)
    if args.json:
        print(json.dumps({"machine": facts, "hosts": found}))
        return 0
    columns, rows = checkpoint_hosts.table(found)
    harness.print_table(columns, rows, f"saving {args.restore_gigabytes:g} GB, all processes on this machine")
    harness.print_machine(facts, True)
    return 0


def _saving(args: argparse.Namespace, directory: str) -> tuple[dict[str, float], bool]:
    more = ["--every", str(args.every), "--directory", directory]
    with (
        harness.Side("benchmarks.checkpoints", ["--worker", "digests", *more]) as ours,
        harness.Side("benchmarks.checkpoints", ["--worker", "none", *more]) as plain,
    ):
        sides = {"digests": ours, "none": plain}
        for side in sides.values():
            side.ask(do="prepare")
        work = {name: lambda side=side: side.time(do="work", steps=args.steps) for name, side in sides.items()}
        timings, undisturbed = harness.alternate(work, rounds=args.rounds, until=time.monotonic() + args.seconds)
    return harness.paired_ratio(timings["digests"], timings["none"]), undisturbed


def _work(args: argparse.Namespace) -> None:
    from attnlab.launch import runtime

    runtime.configure()
    import jax

    from attnlab.train import config as run_config
    from attnlab.train import digests
    from attnlab.train.checkpoints import Checkpoints, Host
    from attnlab.train.program import Program

    if args.worker == "none":
        digests.write = lambda directory: (directory / digests.NAME).touch()
    c = run_config.load("configs/lm.py:size=micro", [])
    program = Program.of(c)
    state = program.init(c.seed)
    shape = (c.data.batch, c.data.length)
    row = np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)
    batch = {"tokens": row, "targets": row, "segments": np.ones(shape, np.int32), "positions": np.zeros_like(row)}
    checkpoints = Checkpoints(pathlib.Path(tempfile.mkdtemp(dir=args.directory)))
    done = 0

    def work(steps: int) -> None:
        nonlocal state, done
        for _ in range(steps):
            done += 1
            state, metrics = program.train_step(state, program.put(batch))
            jax.block_until_ready(metrics)
            checkpoints.poll()
            if done % args.every == 0:
                checkpoints.save(done, state, Host(0, {}, {}))
        checkpoints.wait()

    harness.answer({"prepare": lambda: work(args.every), "work": work})


def _restoring(args: argparse.Namespace, directory: pathlib.Path) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    from attnlab.train.checkpoints import Checkpoints, Host
    from attnlab.train.state import TrainState

    rows = int(args.restore_gigabytes * 1e9 / 4 / 1024 / 24)
    keys = jax.random.split(jax.random.key(0), 24)
    zero = lambda: jnp.zeros((), jnp.int32)
    params = {f"w{i}": jax.random.normal(keys[i], (rows, 1024)) for i in range(24)}
    state = TrainState(zero(), params, {}, jax.random.key_data(keys[0]), zero(), zero())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    plain = {name: getattr(like, name) for name in TrainState.__dataclass_fields__}
    checkpoints = Checkpoints(directory / "restoring")
    checkpoints.save(1, state, Host(0, {}, {}))
    checkpoints.wait()
    checkpoints.close()
    del state, params

    def orbax() -> Any:
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler()))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(plain))
        return reader.restore(checkpoints.directory / "1", args=args)["state"]["params"]

    def timed(run: Any) -> float:
        started = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - started

    ours = lambda: checkpoints.restore(1, like)[0].params
    timed(orbax), timed(ours)
    pairs = [(timed(ours), timed(orbax)) for _ in range(args.rounds)]
    ratios = [mine / theirs for mine, theirs in pairs]
    return {
        "gigabytes": args.restore_gigabytes, "seconds": statistics.median(mine for mine, _ in pairs),
        "median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
    }  # fmt: skip


def _alone(args: argparse.Namespace, directory: pathlib.Path) -> dict[str, float]:
    from attnlab.train import digests

    place, left, block = directory / "alone", int(args.gigabytes * 1e9), os.urandom(1 << 24)
    place.mkdir()
    while left > 0:
        size = min(left, _FILE_BYTES)
        with (place / str(left)).open("wb") as file:
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
        left -= size
    started = time.perf_counter()
    digests.write(place)
    written = time.perf_counter()
    assert digests.verifying(place)() == ""
    return {
        "gigabytes": args.gigabytes, "write_seconds": written - started,
        "verify_seconds": time.perf_counter() - written,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
