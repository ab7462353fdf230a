"""What tests cost, and which are slow.

`bash scripts/test.sh --costs FILE` writes the CPU seconds of each test and its processes; `python -m tests.costs FILE`
tells where they went, and writes tests/slow.txt anew: tests of which a case takes more than `SLOW` seconds, which
`-m "not slow"` leaves out beside those that say so themselves. Of the laws that every mixer is held to, it tries those
of the everyday mixers (tests/mixers/cases.py), whatever they cost.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
from collections.abc import Iterable

import pytest

SLOW = 0.6  # CPU seconds of a test's dearest case
FILE = pathlib.Path(__file__).with_name("slow.txt")
BATTERY = "tests/mixers/test_contract"


def slow() -> set[str]:
    """Tests, without their cases, that are slow by measure."""
    return set(FILE.read_text().split())


class Costs:
    """A plugin that appends a line for each test to a file: CPU seconds, and the test's id."""

    def __init__(self, path: str):
        self._path = path

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        before = sum(os.times()[:4])
        yield
        with open(self._path, "a") as out:
            out.write(f"{sum(os.times()[:4]) - before:.2f}\t{item.nodeid}\n")


def read(path: str | pathlib.Path) -> dict[str, float]:
    """CPU seconds by the ids of tests.

    Raises:
      ValueError: a line is no number and id.
    """
    lines = (line.split("\t") for line in pathlib.Path(path).read_text().splitlines())
    return {name: float(seconds) for seconds, name in lines}


def dear(costs: dict[str, float]) -> list[str]:
    """Tests, without their cases, of which a case is slow; those of the battery are left out."""
    return sorted({name.partition("[")[0] for name, seconds in costs.items() if seconds > SLOW and BATTERY not in name})


def summary(costs: dict[str, float], count: int = 25) -> Iterable[str]:
    """Lines: the sum, and the dearest files."""
    files = collections.Counter()
    for name, seconds in costs.items():
        files[name.partition("::")[0]] += seconds
    yield f"{len(costs)} tests, {sum(files.values()):.0f} CPU seconds"
    yield from (f"{seconds:7.1f} {name}" for name, seconds in files.most_common(count))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.costs", description=__doc__)
    parser.add_argument("file", help="what --costs of a run of the whole suite wrote")
    costs = read(parser.parse_args().file)
    print("\n".join(summary(costs)))
    FILE.write_text("\n".join(dear(costs)) + "\n")


if __name__ == "__main__":
    main()
