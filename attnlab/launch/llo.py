"""What the TPU compiler schedules for a kernel, read from its dump: regions of code, their bundles and what fills them.

A bundle is one instruction word of a core, and takes one cycle where nothing stalls. A region is what a branch goes
around (`pl.when`) or back over (a loop). Slots are in the order of the compiler's own columns.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator

# Per chip: bundles behind a branch that still run; cycles that a 16-row bfloat16 product occupies a matrix unit; units.
DELAY = {"v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 6}
CYCLES = {"v5e": 16, "v5p": 16, "v6e": 8, "tpu7x": 8}
UNITS = {"v5e": 4, "v5p": 4, "v6e": 2, "tpu7x": 2}
SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLD", "FILL", "VST", "SPILL", "SALU")
_BUNDLES = "final_bundles.txt"
_ALLOCATIONS = "pre-finalize-registers-and-allocations.txt"
_USE = "final_hlo-static-per-bundle-utilization.txt"


def arguments(folder: pathlib.Path) -> str:
    """What LIBTPU_INIT_ARGS must be, before libtpu is loaded, for schedules to be written to a folder."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"


@dataclasses.dataclass
class Region:
    """Bundles [start, end) of a kernel.

    Attributes:
      kind: "kernel", "when" or "loop".
      trips: of a loop; None where it is known at run time only.
      inside: regions within it.
      own: counts of what is in no region within it: "bundles", the slots used, "products" (of 16 rows).
    """

    kind: str
    start: int
    end: int
    trips: int | None = None
    inside: list[Region] = dataclasses.field(default_factory=list)
    own: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def total(self) -> collections.Counter[str]:
        """Counts of it with all that is within it, each once."""
        out = collections.Counter(self.own)
        for region in self.inside:
            out.update(region.total())
        return out

    def walk(self) -> Iterator[Region]:
        """It and every region within it, outer ones first."""
        yield self
        for region in self.inside:
            yield from region.walk()


def kernels(folder: pathlib.Path, name: str, chip: str) -> list[Region]:
    """Schedules in a folder of the kernels whose name contains `name`."""
    found = []
    for use in sorted(folder.glob(f"*{name}*{_USE}")):
        number = use.name.split("-")[0]
        bundles = [path for path in folder.glob(f"{number}-*{name}*{_BUNDLES}") if "schedule-analysis" not in path.name]
        found.append(read(bundles[0].read_text(errors="replace"), use.read_text(), chip))
    return found


def vmem(folder: pathlib.Path, name: str) -> int:
    """Bytes of fast memory that the first kernel of that name is given: its windows and scratch."""
    path = sorted(folder.glob(f"*{name}*{_ALLOCATIONS}"))[0]
    sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+), scoped", path.read_text())
    return sum(int(size, 16) for size in sizes)


def clear(folder: pathlib.Path) -> None:
    """Deletes what has been dumped."""
    for path in folder.iterdir():
        os.unlink(path)


def read(bundles: str, use: str, chip: str) -> Region:
    """The regions of one kernel, from the two files that the compiler writes of it."""
    words = _words(bundles)
    counts = [[int(x) for x in line.split()] for line in use.splitlines() if re.match(r"\s*\d+(\s+\d+){9}\s*$", line)]
    counts = counts[1:]  # the first row: how many slots there are
    if len(counts) != len(words):
        raise ValueError(f"{len(words)} bundles, and counts of {len(counts)}: not of one kernel")
    root = Region("kernel", 0, len(words))
    for region in sorted(_branches(words, DELAY[chip]), key=lambda r: (r.start, -r.end)):
        at = root
        while inside := [r for r in at.inside if r.start <= region.start and region.end <= r.end]:
            at = inside[0]
        at.inside.append(region)
    for region in root.walk():
        mine = set(range(region.start, region.end))
        for inner in region.inside:
            mine -= set(range(inner.start, inner.end))
        region.own["bundles"] = len(mine)
        for i in mine:
            region.own.update(dict(zip(SLOTS, counts[i], strict=True)))
            for kind in re.findall(r"vmatmul\.([a-z0-9.\[\]]*?)mxu\d", words[i]):
                region.own["products"] += 1 if "bf16" in kind else 0.5  # of float32, 8 rows
    return root


def _words(text: str) -> list[str]:
    """Instruction words; one may run over several lines."""
    words: list[str] = []
    for line in text.splitlines(keepends=True):
        found = re.match(r"\s*(?:0x)?([0-9a-f]+)\s+(?:[A-Z]{2})?\s*:\s*(?:> ?)*\s*\{", line)
        if found and int(found[1], 16) == len(words):
            words.append(line)
        elif words:
            words[-1] += line
    return words


def _branches(words: list[str], delay: int) -> Iterator[Region]:
    """What branches go around, forward, or back over."""
    where: dict[str, int] = {}
    for i, word in enumerate(words):
        for number in re.findall(r"Start(?:/End empty)? region (\d+)", word):
            where.setdefault(number, i)
    for i, word in enumerate(words):
        found = re.search(r"sbr\.rel.*?target = \$region(\d+)", word)
        if not found or found[1] not in where:
            continue
        target, end = where[found[1]], i + delay + 1
        if target > i:
            yield Region("when", end, target)
            continue
        start = next(x for x in range(target, i + 1) if " LB" in words[x][:12] or x == i)
        tests = re.findall(r"scmp\S* %\S+, (\d+) /\* loop exit test", "".join(words[start:end]))
        yield Region("loop", start, end, int(tests[-1]) if tests else None)


def lines(region: Region, chip: str, least: int = 20, depth: int = 0) -> Iterator[str]:
    """The tree in words, regions of at least `least` bundles."""
    total = region.total()
    if total["bundles"] < least:
        return
    product = total["products"] * CYCLES[chip] / UNITS[chip]
    slots = " ".join(f"{slot} {total[slot]}" for slot in SLOTS)
    yield (
        f"{'  ' * depth}{region.kind} {region.start}-{region.end} trips {region.trips} own {region.own['bundles']} "
        f"total {total['bundles']} products {product:.0f} {slots}"
    )
    for inner in region.inside:
        yield from lines(inner, chip, least, depth + 1)
