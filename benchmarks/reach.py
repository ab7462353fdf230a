"""What a stack of layers can reach: the distances that d layers of a sparse pattern cover, at equal keys per query.

A pattern is the set of distances D >= 0 at which a query sees keys (positions, or blocks of them), 0 among them; all
layers have the same. What d layers reach are the sums of d of these: exact arithmetic, no training. `covered` is the
length of the unbroken run 0, 1, 2, .. of distances reached, `reached` how many below the length there are at all,
`farthest` the largest. Patterns of k keys per query over a row of n:

    power      powers of two 1, 2, 4, .. below n, and the nearest distances that fill k (Chen et al. 2025,
               PowerAttention, arXiv:2503.03588; its sink at the row's beginning, no distance, is left out)
    window     the k nearest
    dilated    every r-th: 0, r, .. (k - 1) r (Longformer's dilated window, Beltagy et al. 2020, arXiv:2004.05150)
    strided    the l nearest, and multiples of s beyond them (Child et al. 2019, Sparse Transformers, arXiv:1904.10509)
    growing    dilated by k^i in layer i: layers differ, as in WaveNet (van den Oord et al. 2016, arXiv:1609.03499)

`dilated` and `strided` have the stride with which the k keys just span the row, and l = k / 2; `best strided` has the l
and s that cover it in the fewest layers, found by trying all.

    python -m benchmarks.reach [--length 256] [--layers 8] [--keys K] [--json FILE]

K is by default that of the powers of two alone. The claim: d layers of power reach every distance below 2^d, and cover
a row in fewer layers than the other patterns whose layers are alike. What is reached says nothing of what is learned.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks import harness

Offsets = frozenset[int]


def powers(length: int, keys: int) -> Offsets:
    """0, the powers of two below `length`, and the nearest distances up to `keys` in all."""
    found = {0} | {1 << i for i in range((length - 1).bit_length())}
    if keys < len(found):
        raise SystemExit(f"--keys = {keys} is not allowed; allowed: {len(found)} or more, for a row of {length}")
    rest = (distance for distance in range(length) if distance not in found)
    return frozenset(found | {distance for distance, _ in zip(rest, range(keys - len(found)))})


def window(keys: int) -> Offsets:
    """The nearest."""
    return frozenset(range(keys))


def dilated(keys: int, stride: int) -> Offsets:
    """Every stride-th."""
    return frozenset(stride * i for i in range(keys))


def strided(keys: int, near: int, stride: int) -> Offsets:
    """The `near` nearest and multiples of the stride beyond them, `keys` in all."""
    first = -(-near // stride)
    return window(near) | {stride * i for i in range(first, first + keys - near)}


def reached(layers: Sequence[Offsets], length: int) -> np.ndarray:
    """[d, length] bool: whether a distance is a sum of one of each of the first d layers' distances, d = 1, 2, .."""
    now, rows = np.arange(length) == 0, []
    for offsets in layers:
        now = np.any([np.pad(now[: length - o], (o, 0)) for o in offsets if o < length], axis=0)
        rows.append(now)
    return np.array(rows)


def facts(layers: Sequence[Offsets], length: int) -> list[dict[str, int]]:
    """Per number of layers: `covered`, `reached`, `farthest` (see the module's docstring)."""
    return [
        {
            "covered": length if row.all() else int(np.argmin(row)),
            "reached": int(row.sum()),
            "farthest": int(np.flatnonzero(row)[-1]),
        }
        for row in reached(layers, length)
    ]


def layers_to_cover(rows: list[dict[str, int]], length: int) -> int | None:
    """The fewest layers that cover the row; None: more than there are."""
    return next((d for d, row in enumerate(rows, 1) if row["covered"] == length), None)


def best_strided(length: int, layers: int, keys: int) -> tuple[int, int]:
    """(near, stride) that cover the row in the fewest layers, or in `layers` the most of it; of equals the smallest."""

    def rank(near: int, stride: int) -> tuple[int, int]:
        rows = facts([strided(keys, near, stride)] * layers, length)
        return layers_to_cover(rows, length) or layers + 1, -rows[-1]["covered"]

    tried = ((near, stride) for near in range(1, keys) for stride in range(near, length))
    return min(tried, key=lambda split: rank(*split))


def compare(length: int, layers: int, keys: int) -> dict[str, list[dict[str, int]]]:
    """`facts` by pattern; the strides are in the names."""
    span, near = -(-length // keys), keys // 2
    stride = -(-length // (keys - near + 1))
    best = best_strided(length, layers, keys)
    patterns = {
        "power": [powers(length, keys)] * layers,
        "window": [window(keys)] * layers,
        f"dilated by {span}": [dilated(keys, span)] * layers,
        f"strided, {near} near, stride {stride}": [strided(keys, near, stride)] * layers,
        f"best strided, {best[0]} near, stride {best[1]}": [strided(keys, *best)] * layers,
        "growing": [dilated(keys, keys**i) for i in range(layers)],
    }
    for name, stack in patterns.items():
        assert {len(offsets) for offsets in stack} == {keys}, name
    return {name: facts(stack, length) for name, stack in patterns.items()}


def verdict(table: dict[str, list[dict[str, int]]], length: int) -> dict[str, object]:
    """The claim's two parts: every distance below 2^d; in fewer layers than patterns whose layers are alike."""
    within = all(row["covered"] >= min(2**d, length) for d, row in enumerate(table["power"], 1))
    needs = {name: layers_to_cover(rows, length) for name, rows in table.items()}
    alike = [count for name, count in needs.items() if name not in ("power", "growing") and count is not None]
    fewer = needs["power"] is not None and all(needs["power"] < count for count in alike)
    return {"reaches_2_to_the_d": within, "layers_to_cover": needs, "fewer_than_all_others_alike": fewer}


def main() -> int:
    """Prints the table; 1 where power does not reach every distance below 2^d."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reach", description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=256, help="n, positions or blocks of a row (256)")
    parser.add_argument("--layers", type=int, default=8, help="d up to so many (8)")
    parser.add_argument("--keys", type=int, help="keys per query; default: of the powers of two alone")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = parser.parse_args()
    for name, value, least in (("length", args.length, 4), ("layers", args.layers, 1)):
        if value < least:
            parser.error(f"--{name} = {value} is not allowed; allowed: {least} or more")
    keys = (args.length - 1).bit_length() + 1 if args.keys is None else args.keys
    table = compare(args.length, args.layers, keys)
    found = verdict(table, args.length)
    cell = lambda row: f"{row['covered']}" + (f" ({row['reached']})" if row["reached"] != row["covered"] else "")
    cells = [[name, *map(cell, rows), str(found["layers_to_cover"][name] or "-")] for name, rows in table.items()]
    columns = ["pattern", *(f"d = {d}" for d in range(1, args.layers + 1)), "layers to cover"]
    title = f"distances covered without a gap (all that are reached), n = {args.length}, {keys} keys per query"
    harness.print_table(columns, cells, title)
    print(f"power reaches every distance below 2^d: {'yes' if found['reaches_2_to_the_d'] else 'no'}")
    print(f"in fewer layers than the others alike: {'yes' if found['fewer_than_all_others_alike'] else 'no'}")
    if args.json:
        record = {"length": args.length, "layers": args.layers, "keys": keys, "patterns": table, "verdict": found}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(not found["reaches_2_to_the_d"])


if __name__ == "__main__":
    sys.exit(main())
