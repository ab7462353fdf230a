"""Time of softmax attention under block masks against that of dense attention, by the share of blocks that are seen.

    python -m benchmarks.masks [--length 8192] [--block 64] [--shares 0.05 0.1 0.25 0.5] [--rounds 7] [--json FILE]

Every block of rows sees as many blocks of keys, drawn at random; the mask is known while tracing. Dense attention is
the XLA form without a mask. Each round runs every case once, so that all meet the same machine; medians over the
rounds. A mask that costs its share of the dense time, and nothing else, has the ratio 1.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from attnlab.ops import Mask, attention
from attnlab.ops.mask_algebra import packed_bits
from attnlab.ops.masks import Groups

HEADS, WIDTH = 2, 64
DIRECTIONS = ("forward", "forward + backward")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks", description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=8192, help="T")
    parser.add_argument("--block", type=int, default=64, help="rows and keys of a block of the mask")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5], help="of blocks seen")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the median is reported")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows = measure(args.length, args.block, args.shares, args.rounds)
    title = f"attention, float32, T {args.length} H{HEADS} d{WIDTH}, blocks of {args.block}, {jax.default_backend()}"
    table = Table(title=title)
    for name in ("", "share seen", "median ms", "dense ms", "of dense", "of dense / share"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        figures = ("share", ".3f"), ("median_ms", ".1f"), ("dense_ms", ".1f"), ("of_dense", ".3f"), ("ratio", ".2f")
        table.add_row(row["direction"], *(format(row[name], spec) for name, spec in figures))
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if args.json:
        args.json.write_text(json.dumps({"versions": {"jax": jax.__version__}, "timings": rows}, indent=1))


def block_mask(length: int, block: int, share: float) -> Mask:
    """Every block of rows sees as many blocks of keys: NumPy arrays."""
    blocks = length // block
    rank = np.random.default_rng(0).random((blocks, blocks)).argsort(-1).argsort(-1)
    sees = rank < max(1, round(share * blocks))
    group = np.arange(length, dtype=np.int32)[None] // block
    return Mask(groups=Groups(group, packed_bits(sees)[None, None], rows=block, size=block))


def run(q, k, v, do, mask: Mask, impl: str, backward: bool):
    """The output, or the gradients too."""
    if not backward:
        return attention(q, k, v, mask, impl=impl)
    return jax.vjp(lambda q, k, v: attention(q, k, v, mask, impl=impl), q, k, v)[1](do)


def measure(length: int, block: int, shares: list[float], rounds: int) -> list[dict]:
    """A row for each direction and share; median milliseconds, and of the dense time a share of its share."""
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal((1, length, HEADS, WIDTH)), jnp.float32) for _ in range(4)]
    masks = {0.0: (Mask(), "xla")} | {share: (block_mask(length, block, share), "auto") for share in shares}
    calls = {}
    for direction in DIRECTIONS:
        for share, (mask, impl) in masks.items():
            backward = direction != DIRECTIONS[0]
            fn = jax.jit(lambda *x, mask=mask, impl=impl, backward=backward: run(*x, mask, impl, backward))
            calls[direction, share] = fn.lower(*inputs).compile()
    samples: dict = {key: [] for key in calls}
    for _ in range(rounds + 1):  # the first is not counted
        for key, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(*inputs))
            samples[key].append(1e3 * (time.perf_counter() - begin))
    median = {key: statistics.median(times[1:]) for key, times in samples.items()}
    rows = []
    for direction in DIRECTIONS:
        dense = median[direction, 0.0]
        for share in shares:
            seen = max(1, round(share * (length // block))) / (length // block)
            of_dense = median[direction, share] / dense
            row = {"direction": direction, "share": seen, "median_ms": median[direction, share], "dense_ms": dense}
            rows.append(row | {"of_dense": of_dense, "ratio": of_dense / seen})
    return rows


if __name__ == "__main__":
    main()
