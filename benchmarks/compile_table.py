"""What the TPU compiler says of the mixers: train steps compiled for whole pods, each in a process of its own.

Every row is appended to a JSON file as it comes, and what is there is not compiled again: the command goes on where it
stopped. The tables of docs/compile_results.md are written from the file.

    python -m benchmarks.compile_table                        # compiles what is missing, then writes the tables
    python -m benchmarks.compile_table --only 1b-titans       # rows whose name contains this, again
    python -m benchmarks.compile_table --write                # only the tables
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

MIXERS = ("softmax", "gated", "moh", "flow", "lightning", "titans")
SEQUENCES = {"v5e:16x16": 2, "v5p:4x4x4": 4, "v6e:16x16": 4}  # of a device, by topology
FEWER = {("7b", "titans", "v5e:16x16"): 1}  # where these do not fit
LENGTH = 4096
GIB = 2.0**30
LIMIT = 600  # seconds of CPU that a compile may take
_LLAMA = {"model.mlp_width": 11008, "model.vocab": 32000}  # Llama-2-7B's shape
_ROUTED = (("model.mixers.M.impl", "gather"), ("model.mixers.M.gather_impl", "routed"))
_CHUNK = "model.mixers.M.chunk"
_NAMED = tuple(f"model.mixers.M.{key}" for key in ("gather_impl", "core.impl", "impl"))
_CORE = (("model.mixers.M.core.impl", "flash"),)
_HOPPER = (  # our kernels, asked for
    ("flash", "softmax", (("model.mixers.M.impl", "flash"),)),
    ("gated", "gated", (("model.mixers.M.impl", "flash"),)),
    ("moh", "moh", (("model.mixers.M.impl", "dense"), *_CORE)),
    ("moh-routed", "moh", (("model.mixers.M.impl", "gather"), ("model.mixers.M.gather_impl", "routed_xla"), *_CORE)),
)
_FILES = "docs/compile_results.json", "docs/compile_results.md"


@dataclasses.dataclass(frozen=True)
class Row:
    """One compile: the config is `configs/lm.py:size=...,mixer=...` with `overrides`."""

    name: str
    size: str
    mixer: str
    topology: str
    sequences: int  # of a device
    remat: str
    overrides: tuple[tuple[str, Any], ...] = ()

    def command(self) -> list[str]:
        """What to run."""
        devices = devices_of(self.topology)
        settings = {
            "data.length": LENGTH, "data.batch": devices * self.sequences, "model.remat": self.remat,
            **dict(self.overrides),
        }  # fmt: skip
        return [
            sys.executable, "-m", "attnlab", "compile",
            "--config", f"configs/lm.py:size={self.size},mixer={self.mixer}", "--topology", self.topology, "--json",
            *(f"--config.{key}={value}" for key, value in settings.items()),
        ]  # fmt: skip


def devices_of(topology: str) -> int:
    """Chips of a topology of one slice."""
    count = 1
    for n in topology.partition(":")[2].split("x"):
        count *= int(n)
    return count


def rows() -> list[Row]:
    """All rows, those that matter most first; GPUs need attnlab[compile-cuda]."""
    llama = tuple(_LLAMA.items())
    two_layers = (*llama, ("model.layers", 2), ("model.unroll", 2))
    found = [
        Row("llama-v5p-full", "7b", "softmax", "v5p:4x4x4", 4, "full", llama),
        Row("llama-v5p-minimal", "7b", "softmax", "v5p:4x4x4", 4, "minimal", llama),
        Row("llama-v5e-full", "7b", "softmax", "v5e:16x16", 2, "full", llama),
        Row("llama-2-layers-full", "7b", "softmax", "v5p:4x4x4", 4, "full", two_layers),
        Row("llama-2-layers-minimal", "7b", "softmax", "v5p:4x4x4", 4, "minimal", two_layers),
    ]
    plan = [("7b", ("softmax",)), ("1b", MIXERS), ("7b", MIXERS[1:])]
    for size, mixers in plan:
        for mixer in mixers:
            for topology, sequences in SEQUENCES.items():
                sequences = FEWER.get((size, mixer, topology), sequences)
                found.append(Row(f"{size}-{mixer}-{topology}", size, mixer, topology, sequences, "full"))
    for topology, sequences in SEQUENCES.items():
        found.append(Row(f"1b-parallax-{topology}", "1b", "parallax", topology, sequences, "full"))
    topology = "v6e:16x16"
    for mixer in ("based", "agent", "local_linear", "gated_deltanet", "kda"):
        found.append(Row(f"1b-{mixer}-{topology}", "1b", mixer, topology, SEQUENCES[topology], "full"))
    chunk = ((_CHUNK, 64),)
    found.append(Row(f"1b-titans-chunk-64-{topology}", "1b", "titans", topology, SEQUENCES[topology], "full", chunk))
    found.append(Row(f"1b-moh-routed-{topology}", "1b", "moh", topology, SEQUENCES[topology], "full", _ROUTED))
    for size, topology in (("1b", "h100:8"), ("7b", "h100:8x8")):
        found.append(Row(f"hopper-{size}", size, "softmax", topology, 2, "full"))
    for name, mixer, overrides in _HOPPER:
        found.append(Row(f"hopper-1b-{name}", "1b", mixer, "h100:8", 4, "full", overrides))
    return found


def run(row: Row, timeout: float) -> dict[str, Any]:
    """The row's report, or why there is none."""
    started = time.perf_counter()
    facts = dataclasses.asdict(row) | {"overrides": dict(row.overrides)}
    try:
        done = subprocess.run(row.command(), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return facts | {"failed": f"stopped after {timeout:.0f} s"}
    facts["seconds"] = time.perf_counter() - started
    try:
        return facts | {"report": json.loads(done.stdout)}
    except json.JSONDecodeError:
        lines = done.stderr.strip().splitlines()
        return facts | {"failed": lines[-1] if lines else f"exit code {done.returncode}"}


def table(results: list[dict[str, Any]]) -> list[str]:
    """Rows of a Markdown table, one for each result."""
    columns = ["size", "mixer", "topology", "sequences a device", "remat", "arguments + temporaries, GiB", "peak, GiB",
               "fits", "products + kernels, FLOPs", "declared", "kernel calls", "sent, GiB",
               "compute / memory / interconnect (/ network), s", "bound", "compile, s (CPU s)"]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(_cells(r)) + " |" for r in results]


def _cells(result: dict[str, Any]) -> list[str]:
    knobs = result.get("overrides", {})
    named = next((knobs[key] for key in _NAMED if key in knobs), None)
    named = f"chunk {knobs[_CHUNK]}" if _CHUNK in knobs else named
    mixer = result["mixer"] + (f", {named}" if named else "")
    head = [result["size"], mixer, result["topology"], str(result["sequences"]), result["remat"]]
    report = result.get("report")
    if report is None:
        return [*head, *["-"] * 2, f"no program: {result['failed']}", *["-"] * 7]
    memory, spent = report["memory"], f"{report['compile_seconds']:.0f} ({report['compile_cpu_seconds']:.0f})"
    if report["compile_cpu_seconds"] > LIMIT:
        spent += f": over {LIMIT}"
    if memory["total"] is None:  # the compiler refused it
        needed = "-" if memory["peak"] is None else f"{memory['peak'] / GIB:.2f}"
        short = "no" if memory["spare"] is None else f"no, by {-memory['spare'] / GIB:.2f} GiB"
        return [*head, "-", needed, short, *["-"] * 6, spent]
    flops, floors = report["flops"], report["floor_seconds"]
    fits = "yes" if memory["fits"] else f"no, by {-memory['spare'] / GIB:.2f} GiB"
    return [
        *head, f"{(memory['arguments'] + memory['temporaries']) / GIB:.2f}", f"{(memory['peak'] or 0) / GIB:.2f}", fits,
        f"{flops['compiler']:.3g} + {flops['kernels']:.2g}", f"{flops['declared']:.3g}",
        ", ".join(f"{name} {count}" for name, count in report["kernels"].items()) or "none",
        f"{report['interconnect_bytes'] / GIB:.1f}",
        " / ".join(f"{seconds:.2f}" for seconds in floors.values()), report["bound"], spent,
    ]  # fmt: skip


def unscanned(results: list[dict[str, Any]]) -> list[str]:
    """A table of XLA's own counts of FLOPs, of steps without a loop."""
    lines = ["| remat | XLA's own count | products, read from the text | kernels |", "|---|---|---|---|"]
    for r in results:
        flops = r["report"]["flops"]
        lines.append(
            f"| {r['remat']} | {flops['compiler_loops_once']:.3g} | {flops['compiler']:.4g} | {flops['kernels']:.3g} |"
        )
    return lines


def write(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Puts the tables between their marks in a Markdown file."""
    order = {row.name: i for i, row in enumerate(rows())}
    results = sorted((r for r in results if r["name"] in order), key=lambda r: order[r["name"]])
    tables = {
        "llama": table([r for r in results if r["name"] in ("llama-v5p-full", "llama-v5p-minimal", "llama-v5e-full")]),
        "layers": unscanned([r for r in results if r["name"].startswith("llama-2-layers") and "report" in r]),
        "1b": table([r for r in results if r["name"].startswith("1b-")]),
        "7b": table([r for r in results if r["name"].startswith("7b-")]),
        "hopper": table([r for r in results if r["name"].startswith("hopper-")]),
    }
    text = path.read_text()
    for name, lines in tables.items():
        text = between_marks(text, name, lines)
    path.write_text(text)


def between_marks(text: str, name: str, lines: list[str]) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end -->` replaced."""
    start = f"<!-- {name} -->\n"
    head, mark, tail = text.partition(start)
    if not mark or "<!-- end -->" not in tail:
        raise SystemExit(f"the document has no place for its table: {start.strip()} ... <!-- end -->")
    return head + start + "\n".join(lines) + "\n" + tail[tail.index("<!-- end -->") :]


def main() -> int:
    """0, or 1 where a row has no program."""
    args = _parser().parse_args()
    known = {r["name"]: r for r in json.loads(args.results.read_text())} if args.results.exists() else {}
    for row in rows():
        wanted = args.only in row.name if args.only else row.name not in known
        if args.write or not wanted:
            continue
        print(f"{row.name} ...", flush=True)
        known[row.name] = run(row, args.timeout)
        args.results.write_text(json.dumps(list(known.values()), indent=1) + "\n")
        print("  ", " | ".join(_cells(known[row.name])), flush=True)
    write(list(known.values()), args.document)
    return int(any("failed" in result for result in known.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    results, document = map(pathlib.Path, _FILES)
    parser.add_argument("--results", type=pathlib.Path, default=results, help=f"where rows are kept ({results})")
    parser.add_argument("--document", type=pathlib.Path, default=document, help=f"where the tables go ({document})")
    parser.add_argument("--only", help="compile the rows whose name contains this, again")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    parser.add_argument("--timeout", type=float, default=LIMIT, help=f"seconds of one row, start included ({LIMIT})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
