"""Speed and memory of one layer of every registered mixer: forward and backward in float32, width 256.

Each mixer has its default config (four heads where it has heads). All programs are held by one process and run in turn,
round by round, so that every one meets the same machine; ratios are to softmax attention of the same shape, round by
round, and the figures are medians over the rounds.

    python -m benchmarks.layers
    python -m benchmarks.layers --mixers flow,gated --lengths 512,4096 --json
    python -m benchmarks.layers --flat --rows 1

With --flat instead: whether time per token and memory stay flat as sequences grow. Time, of the mixers whose state is
as large at any length, at the same number of tokens in ever fewer and longer rows, or with --rows in as many rows at
every length; memory, of all mixers, is what XLA sets aside for the temporaries of one row's forward and backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rich.console
import rich.table

from benchmarks import harness

WIDTH, HEADS, PEER = 256, 4, "softmax"
FLAT_LENGTHS = [1024, 2048, 4096, 8192, 16384]
LEAST_SECONDS = 0.1  # a measurement repeats a shorter program

Measured = tuple[dict, bool, Callable[[], None]]  # figures, whether nothing disturbed them, and what prints them


def main() -> int:
    """0, or 1 where a ratio is above `--require`."""
    args = _parser().parse_args()
    if args.worker:
        _work()
        return 0
    if args.rows is not None and not (args.flat and args.rows >= 1):
        raise SystemExit(f"--rows: {args.rows}; allowed: 1 or more, with --flat")
    facts = harness.machine()
    with harness.Side("benchmarks.layers", ["--worker"]) as side:
        known = side.ask(do="mixers")
        chosen = known if args.mixers is None else args.mixers
        if unknown := [name for name in chosen if name not in known]:
            raise SystemExit(f"no such mixer: {', '.join(unknown)}; registered: {', '.join(known)}")
        measure = _flat if args.flat else _speed
        result, undisturbed, show = measure(side, chosen, args)
    if args.json:
        print(json.dumps({"machine": facts, "undisturbed": undisturbed, **result}))
    else:
        show()
        harness.print_machine(facts, undisturbed)
    ratios = [ratio["median"] for row in result.get("layers", {}).values() for ratio in row["ratio"].values()]
    return int(args.require is not None and max(ratios, default=0) > args.require)


def _parser() -> argparse.ArgumentParser:
    comma = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", type=comma(str), metavar="A,B,...", help="registered mixers (all)")
    parser.add_argument("--lengths", type=comma(int), metavar="T,...",
                        help="positions of a row (512,4096; with --flat 1024 to 16384)")  # fmt: skip
    parser.add_argument("--rows", type=int, metavar="N",
                        help="with --flat: rows at every length (what the longest row's tokens fill)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="undisturbed rounds wanted (7)")
    parser.add_argument("--seconds", type=float, default=150, help="no round starts later (150)")
    parser.add_argument("--flat", action="store_true", help="time per token and memory against the length instead")
    parser.add_argument("--require", type=float, metavar="RATIO", help="exit with 1 if a layer's ratio is above")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


# --- speed ---


def _speed(side: harness.Side, chosen: list[str], args: argparse.Namespace) -> Measured:
    lengths = args.lengths or [512, 4096]
    names = list(dict.fromkeys([PEER, *chosen]))
    costs = {(name, T): side.ask(do="cost", mixer=name, length=T) for name in names for T in lengths}
    timings, refused, undisturbed = _measure(side, [(name, 1, T) for name in names for T in lengths], args)
    rows = {}
    for name in names:
        if name in refused:
            rows[name] = {"refused": refused[name], "ratio": {}}
            continue
        rows[name] = {
            "ms": {str(T): 1e3 * _median(timings[name, 1, T]) for T in lengths},
            # How many times faster the peer is: this layer's time over the peer's.
            "ratio": {str(T): harness.paired_ratio(timings[PEER, 1, T], timings[name, 1, T]) for T in lengths},
            "state_bytes": {str(T): costs[name, T]["state_bytes"] for T in lengths},
            "flops_ratio": {str(T): costs[name, T]["flops"] / costs[PEER, T]["flops"] for T in lengths},
        }
    return {"layers": rows}, undisturbed, lambda: _print_speed(rows, lengths)


def _print_speed(rows: dict[str, Any], lengths: list[int]) -> None:
    table = _table(f"one layer, forward + backward, float32, width {WIDTH}, batch 1")
    for T in lengths:
        for column in (f"ms T={T}", f"to {PEER}", "low to high", "FLOPs", "state kB"):
            table.add_column(column, justify="right")
    for name, row in rows.items():
        cells = []
        for T in () if "refused" in row else map(str, lengths):
            ratio = row["ratio"][T]
            cells += [f"{row['ms'][T]:,.1f}", f"{ratio['median']:.2f}"]
            cells += [f"{ratio['lowest']:.2f} to {ratio['highest']:.2f}"]
            cells += [f"{row['flops_ratio'][T]:.2f}", f"{row['state_bytes'][T] / 1e3:,.1f}"]
        table.add_row(name, *cells)
    _print(table, rows)
    print(f"FLOPs: declared matrix products, to {PEER}'s")


# --- flatness ---


def _flat(side: harness.Side, chosen: list[str], args: argparse.Namespace) -> Measured:
    lengths = args.lengths or FLAT_LENGTHS
    longest = max(lengths)
    if args.rows is None and any(longest % T for T in lengths):
        raise SystemExit(f"--lengths: all must divide the longest, {longest}: the tokens of every batch; or set --rows")
    batch = {T: args.rows or longest // T for T in lengths}
    fixed = [name for name in chosen if side.ask(do="fixed_state", mixer=name)]
    timings, refused, undisturbed = _measure(side, [(name, batch[T], T) for name in fixed for T in lengths], args)
    rows: dict[str, Any] = {}
    for name in chosen:
        memory = {T: side.ask(do="memory", mixer=name, length=T) for T in lengths}
        row = rows[name] = {}
        if reason := refused.get(name) or next((m["refused"] for m in memory.values() if "refused" in m), None):
            row["refused"] = reason
            continue
        row["temporary_bytes"] = {str(T): memory[T]["bytes"] for T in lengths}
        row["growth"] = _growth({T: memory[T]["bytes"] for T in lengths})
        if name in fixed:
            spent = {T: _median(timings[name, batch[T], T]) / (batch[T] * T) for T in lengths}
            row["seconds_per_token"] = {str(T): s for T, s in spent.items()}
            row["spread"] = max(spent.values()) / min(spent.values())
            row["power"] = _power({T: T * s for T, s in spent.items()})
    return {"rows": batch, "layers_flat": rows}, undisturbed, lambda: _print_flat(rows, batch)


def _growth(size_of: dict[int, float]) -> list[float]:
    """By what power of the length the size grows from each length to the next: 1 is linear, 2 quadratic."""
    lengths = sorted(size_of)
    return [math.log(size_of[b] / size_of[a]) / math.log(b / a) for a, b in itertools.pairwise(lengths)]


def _power(size_of: dict[int, float]) -> float:
    """The power of the length by which the size grows over all lengths: the slope of a line through the logarithms."""
    x, y = (np.log(list(values)) for values in (size_of.keys(), size_of.values()))
    return float(np.polynomial.Polynomial.fit(x, y, 1).convert().coef[1])


def _print_flat(rows: dict[str, Any], batch: dict[int, int]) -> None:
    lengths, of = list(batch), ", ".join(f"{count} of {T}" for T, count in batch.items())
    times = _table(f"microseconds per token, forward + backward, width {WIDTH}; rows: {of}")
    memory = _table(f"MB of temporaries, forward + backward, batch 1, width {WIDTH}")
    for table in (times, memory):
        for T in lengths:
            table.add_column(f"T={T}", justify="right")
    times.add_column("highest / lowest", justify="right")
    times.add_column("a row's grows as T to the power", justify="right")
    memory.add_column("grows as T to the power", justify="right")
    for name, row in rows.items():
        if "refused" in row:
            memory.add_row(name)
            continue
        if "spread" in row:
            spent = [f"{1e6 * s:.2f}" for s in row["seconds_per_token"].values()]
            times.add_row(name, *spent, f"{row['spread']:.2f}", f"{row['power']:.2f}")
        powers = " ".join(f"{power:.2f}" for power in row["growth"])
        memory.add_row(name, *(f"{b / 1e6:,.0f}" for b in row["temporary_bytes"].values()), powers)
    if times.row_count:
        _print(times, {})
        print()
    _print(memory, rows)


# --- both ---


def _measure(
    side: harness.Side, programs: list[tuple[str, int, int]], args: argparse.Namespace
) -> tuple[dict[tuple[str, int, int], list[harness.Timing]], dict[str, str], bool]:
    """Seconds of one run of each program (mixer, batch, length), why mixers refused, and whether nothing disturbed."""
    calls, refused = {}, {}
    for name, batch, length in programs:
        if name in refused:
            continue
        answer = side.ask(do="prepare", mixer=name, batch=batch, length=length)
        if "refused" in answer:
            refused[name] = answer["refused"]
        else:
            calls[name, batch, length] = max(1, round(LEAST_SECONDS / answer["seconds"]))
    if PEER in refused:
        raise SystemExit(f"{PEER}: {refused[PEER]}")
    calls = {key: count for key, count in calls.items() if key[0] not in refused}
    if not calls:
        return {}, refused, True

    def work(name: str, batch: int, length: int, count: int) -> harness.Timing:
        timing = side.time(do="work", mixer=name, batch=batch, length=length, calls=count)
        return dataclasses.replace(timing, seconds=timing.seconds / count)

    work_of = {key: lambda key=key, count=count: work(*key, count) for key, count in calls.items()}
    timings, undisturbed = harness.alternate(work_of, rounds=args.rounds, until=time.monotonic() + args.seconds)
    return timings, refused, undisturbed


def _median(timings: list[harness.Timing]) -> float:
    return statistics.median(t.seconds for t in timings)


def _table(title: str) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    return table


def _print(table: rich.table.Table, rows: dict[str, Any]) -> None:
    rich.console.Console(highlight=False, width=120).print(table)
    for name, row in rows.items():
        if "refused" in row:
            print(f"{name}: {row['refused']}")


# --- the worker ---


def _work() -> None:
    from attnlab.launch import runtime

    runtime.configure()
    import jax

    from attnlab import mixers

    programs: dict[tuple[str, int, int], Callable[[], Any]] = {}

    def prepare(mixer: str, batch: int, length: int) -> dict:
        compiled, arguments = compile_layer(mixer, batch, length)
        run = lambda: jax.block_until_ready(compiled(*arguments))
        run()
        started = time.perf_counter()
        run()
        programs[mixer, batch, length] = run
        return {"seconds": time.perf_counter() - started}

    def work(mixer: str, batch: int, length: int, calls: int) -> None:
        for _ in range(calls):
            programs[mixer, batch, length]()

    def memory(mixer: str, length: int) -> dict:
        return {"bytes": compile_layer(mixer, 1, length)[0].memory_analysis().temp_size_in_bytes}

    harness.answer({
        "mixers": mixers.names,
        "fixed_state": fixed_state,
        "prepare": refusing(prepare),
        "memory": refusing(memory),
        "cost": refusing(cost),
        "work": work,
    })  # fmt: skip


def refusing(handler: Callable[..., dict]) -> Callable[..., dict]:
    """The handler, or why a mixer is refused: what one cannot do must not end the measurement of the others."""
    import jax

    from attnlab.errors import UserError

    def run(**request: Any) -> dict:
        try:
            return handler(**request)
        except (UserError, MemoryError) as error:  # not with its defaults, on text, at this width; arguments too large
            return {"refused": str(error)}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"refused": str(error).splitlines()[0]}

    return run


def default_config(name: str) -> Any:
    """The mixer's default Config, with four heads where it has the knob."""
    from attnlab import mixers

    fields = {field.name for field in dataclasses.fields(mixers.get(name).Config)}
    return mixers.get(name).Config(**({"heads": HEADS} if "heads" in fields else {}))


def cost(mixer: str, length: int) -> dict:
    """What the mixer declares with its default Config."""
    from attnlab import mixers

    declared = mixers.get(mixer).cost(default_config(mixer), WIDTH, length)
    return {"flops": declared.total_flops, "state_bytes": declared.state_bytes}


def fixed_state(mixer: str) -> bool:
    """With the default knobs: `capabilities` speak of all of them. What has no stream has no state."""
    from attnlab import mixers

    sizes = {cost(mixer, T)["state_bytes"] for T in (min(FLAT_LENGTHS), max(FLAT_LENGTHS))}
    return len(sizes) == 1 and mixers.get(mixer).capabilities.streaming


def compile_layer(name: str, batch: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """One layer's forward and backward for x [batch, length, WIDTH], compiled, and its arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from attnlab import mixers

    layer = mixers.build(default_config(name), width=WIDTH, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer, nnx.Param)
    rng = np.random.default_rng(0)
    x, upstream = (jnp.asarray(rng.standard_normal((batch, length, WIDTH)), jnp.float32) for _ in range(2))
    seq = mixers.Sequence.whole(batch, length)

    def forward_and_backward(params, x, upstream):
        def scalar(params, x):
            out = nnx.merge(graphdef, params)(x, seq)
            return jnp.sum(upstream * out.y) + sum(out.losses.values())

        return jax.value_and_grad(scalar, argnums=(0, 1))(params, x)

    arguments = (params, x, upstream)
    return jax.jit(forward_and_backward).lower(*arguments).compile(), arguments


if __name__ == "__main__":
    sys.exit(main())
