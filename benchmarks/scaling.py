"""Weak scaling on paper: what one chip computes, holds and sends in a train step on 16 to 4096 chips, by the compiler.

Every chip has the same number of sequences everywhere, so that no cost of a chip should grow but by what the mesh axis
implies: see docs/scaling.md. Every program is compiled in a process of its own and appended to a JSON file; what is
there is not compiled again. The table and the plot (attnlab[plot]) are written from the file.

    python -m benchmarks.scaling                      # compiles what is missing, then writes table and plot, and judges
    python -m benchmarks.scaling --write              # only writes and judges
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from benchmarks import compile_table

MIXERS = ("softmax", "gated", "lightning")
TOPOLOGIES = {16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x4x16", 1024: "v5p:8x8x16", 4096: "v5p:16x16x16"}
FSDP = 16  # chips that share a copy of the state; the others are copies
SEQUENCES, LENGTH, SIZE, REMAT = 2, 2048, "1b", "full"
ALLOWED = 0.05  # growth beyond what the axis implies
COSTS = ("flops", "memory", "sent")
GIB = 2.0**30
_FILES = tuple(f"docs/scaling.{suffix}" for suffix in ("json", "md", "png"))


@dataclasses.dataclass(frozen=True)
class Point:
    """What a chip of one program does: FLOPs, bytes held and sent; and what is implied, from the smallest program."""

    mixer: str
    chips: int
    flops: float
    memory: float
    sent: float
    implied: dict[str, float]

    def growth(self) -> dict[str, float]:
        """Growth beyond what is implied, by cost; negative where it is less."""
        return {cost: getattr(self, cost) / self.implied[cost] - 1 for cost in COSTS}


def row(mixer: str, chips: int) -> compile_table.Row:
    """The compile of one point."""
    mesh = {"data.length": LENGTH, "mesh.data": chips // FSDP, "mesh.fsdp": FSDP}
    return compile_table.Row(f"{mixer}-{chips}", SIZE, mixer, TOPOLOGIES[chips], SEQUENCES, REMAT, tuple(mesh.items()))


def points(results: list[dict[str, Any]]) -> list[Point]:
    """Of all programs, each judged by its mixer's smallest.

    Copies of the model sum their gradients: an all-reduce of each chip's share of them, in fp32 at most, over n copies,
    of which a chip sends 2 (n - 1) / n. Nothing else may grow.
    """
    found = []
    for mixer in dict.fromkeys(r["mixer"] for r in results):
        reports = sorted((r["report"] for r in results if r["mixer"] == mixer), key=lambda report: report["devices"])
        first = _costs(reports[0])
        for report in reports:
            copies, shards = report["mesh"]["data"], report["mesh"]["fsdp"]
            gradients = 4 * report["parameters"] / shards
            added = 2 * gradients * ((copies - 1) / copies - _once(reports[0]))
            implied = first | {"sent": first["sent"] + added}
            found.append(Point(mixer, report["devices"], **_costs(report), implied=implied))
    return found


def _once(report: dict[str, Any]) -> float:
    copies = report["mesh"]["data"]
    return (copies - 1) / copies


def _costs(report: dict[str, Any]) -> dict[str, float]:
    memory, flops = report["memory"], report["flops"]
    return {
        "flops": flops["compiler"] + flops["kernels"],
        "memory": memory["arguments"] + memory["temporaries"],
        "sent": report["interconnect_bytes"],
    }


def table(found: list[Point]) -> list[str]:
    """Rows of a Markdown table."""
    lines = ["| mixer | chips | mesh | FLOPs | arguments + temporaries, GiB | sent, GiB | implied, GiB "
             "| growth beyond, % |",
             "|---" * 8 + "|"]  # fmt: skip
    for p in found:
        growth = " / ".join(f"{100 * p.growth()[cost]:+.1f}" for cost in COSTS)
        lines.append(
            f"| {p.mixer} | {p.chips} | data {p.chips // FSDP} x fsdp {FSDP} | {p.flops:.4g} | {p.memory / GIB:.2f} "
            f"| {p.sent / GIB:.2f} | {p.implied['sent'] / GIB:.2f} | {growth} |"
        )
    return lines


def judge(found: list[Point]) -> list[str]:
    """A line for every cost that grows more than is allowed."""
    return [
        f"{p.mixer} on {p.chips} chips: {cost} grows by {100 * growth:.1f} % beyond what is implied"
        for p in found
        for cost, growth in p.growth().items()
        if growth > ALLOWED
    ]


def plot(found: list[Point], path: pathlib.Path) -> None:
    """Each cost against chips, by mixer; dashed what is implied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"flops": "TFLOPs", "memory": "arguments + temporaries, GiB", "sent": "sent, GiB"}
    figure, axes = pyplot.subplots(1, len(COSTS), figsize=(13, 4))
    for axis, cost in zip(axes, COSTS):
        unit = 1e12 if cost == "flops" else GIB
        for i, mixer in enumerate(dict.fromkeys(p.mixer for p in found)):
            mine = [p for p in found if p.mixer == mixer]
            chips = [p.chips for p in mine]
            axis.plot(chips, [getattr(p, cost) / unit for p in mine], f"C{i}o-", label=mixer)
            axis.plot(chips, [p.implied[cost] / unit for p in mine], f"C{i}--", linewidth=1)
        axis.set_xscale("log", base=4)
        axis.set_xticks(list(TOPOLOGIES), [str(n) for n in TOPOLOGIES])
        axis.set_ylim(0, 1.15 * max(max(getattr(p, cost), p.implied[cost]) for p in found) / unit)
        axis.set_xlabel("chips")
        axis.set_title(titles[cost])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    """0, or 1 where a program is missing or a cost grows more than is allowed."""
    args = _parser().parse_args()
    known = {r["name"]: r for r in json.loads(args.results.read_text())} if args.results.exists() else {}
    for chips in TOPOLOGIES:
        for mixer in MIXERS:
            wanted = row(mixer, chips)
            if args.write or "report" in known.get(wanted.name, {}):
                continue
            print(f"{wanted.name} ...", flush=True)
            known[wanted.name] = result = compile_table.run(wanted, args.timeout)
            args.results.write_text(json.dumps(list(known.values()), indent=1) + "\n")
            print("  ", result.get("failed") or f"{result['seconds']:.0f} s", flush=True)
    failed = [f"{name}: {r['failed']}" for name, r in known.items() if "failed" in r]
    found = points([r for r in known.values() if "report" in r])
    args.document.write_text(compile_table.between_marks(args.document.read_text(), "scaling", table(found)))
    plot(found, args.plot)
    for line in (problems := failed + judge(found)):
        print(line)
    return int(bool(problems))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in zip(("results", "document", "plot"), map(pathlib.Path, _FILES), strict=True):
        parser.add_argument(f"--{name}", type=pathlib.Path, default=default, help=f"({default})")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one program, start included (600)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
