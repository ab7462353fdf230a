"""Reports of `attnlab.launch.compile` in words."""

from __future__ import annotations

import statistics
from typing import Any

_GIB = 2**30


def program(report: dict[str, Any]) -> list[str]:
    """The lines that `attnlab compile` prints."""
    r, memory = report, report["memory"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
    lines = [
        f"{r['topology']}: {r['devices']} devices, {mesh}; {r['parameters']:,} parameters",
        f"step: {r['sequences']} sequences of {r['length']} in {r['accumulate']} parts, remat {r['remat']}; "
        f"traced in {r['trace_seconds']:.0f} s, compiled in {r['compile_seconds']:.0f} s "
        f"({r['compile_cpu_seconds']:.0f} s of CPU)",
    ]
    for op, chosen in r["implementations"].items():
        lines += [f"{op}: {name} for {spec}" for spec, name in chosen.items()]
    if memory["total"] is None:
        needed = "" if memory["peak"] is None else f": {_gib(memory['peak'])} of {_gib(memory['hbm'])}"
        return [*lines, f"does not fit, the compiler refuses it{needed}"]
    names = ("arguments", "temporaries", "outputs", "aliased", "code")
    parts = ", ".join(f"{name} {_gib(memory[name])}" for name in names)
    peak = "" if memory["peak"] is None else f", peak {_gib(memory['peak'])}"
    spare = memory["spare"]
    verdict = f"fits, {_gib(spare)} to spare" if memory["fits"] else f"does not fit, by {_gib(-spare)}"
    flops = r["flops"]
    once = flops["compiler_loops_once"]
    once = "the compiler has no count of its own" if once is None else f"{once:.4g} by the compiler, loops once"
    lines += [
        f"memory per device: {parts}; total {_gib(memory['total'])}{peak}; {verdict} of {_gib(memory['hbm'])}",
        f"FLOPs per device: {flops['declared']:.4g} declared; {flops['compiler']:.4g} in the program's products "
        f"({once}) and {flops['kernels']:.4g} in kernels",
    ]
    for kind, c in r["collectives"].items():
        crossing = f", {_gib(c['crossing'])} over the network" if c["crossing"] else ""
        lines.append(f"{kind}: {c['count']:,}, {_gib(c['bytes'])}; a device sends {_gib(c['sent'])}{crossing}")
    if r["kernels"]:
        lines.append("kernels: " + ", ".join(f"{name} {count:,}" for name, count in sorted(r["kernels"].items())))
    floors = ", ".join(f"{name} {1e3 * value:.4g} ms" for name, value in r["floor_seconds"].items())
    network = ""
    if r["network_bytes"]:
        network = f", network {_gib(r['network_bytes'])}"
        network += "" if "network" in r["floor_seconds"] else " (its speed is not published: no floor)"
    lines += [
        f"HBM traffic {_gib(r['hbm_bytes'])}, interconnect {_gib(r['interconnect_bytes'])}{network}",
        f"a step takes at least: {floors}; bound by {r['bound']}",
        f"so at most {r['tokens_per_second_at_most']:,.0f} tokens/s, MFU {100 * r['mfu_at_most']:.1f} %",
    ]
    if r["unknown_loops"]:
        lines.append(f"{r['unknown_loops']} loops run as often as the data says: counted once")
    return lines


def ranking(reports: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table that a search prints."""
    rows = []
    for r in reports:
        memory = r["memory"]
        needed = memory["peak"] or memory["total"]
        seconds = r["floor_seconds"][r["bound"]] if "bound" in r else None
        rows.append([
            r["overrides"],
            "-" if needed is None else _gib(needed),
            "yes" if memory["fits"] else "no",
            "-" if seconds is None else f"{seconds:.4g}",
            r.get("bound", "-"),
            "-" if seconds is None else f"{100 * r['mfu_at_most']:.1f} %",
            f"{r['compile_seconds']:.0f}",
        ])  # fmt: skip
    return ["overrides", "memory", "fits", "step s", "bound", "MFU at most", "compile s"], rows


def tiles(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of a kernel's candidates, from `attnlab.launch.tune.Table.report`."""
    names = list(report["default"])
    rows = []
    for entry in report["candidates"]:
        figures = entry.get("figures")
        said = f"{statistics.median(figures):.6g}" if figures else entry["failed"]
        rows.append([said, *(str(entry["blocks"][name]) for name in names)])
    return [report["measure"], *names], rows


def _gib(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 100 else f"{count / 2**20:.2f} MiB"
