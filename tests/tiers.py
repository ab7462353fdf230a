"""Which cases of a law every run of the suite tries, and which `--exhaustive` adds.

The first cross every branch once. The rest, more combinations of the same branches, cost minutes and find something
where the code they try has changed: `bash scripts/test.sh --exhaustive tests/kernels_pallas`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive


def often(*ids: str) -> pytest.MarkDecorator:
    """Of a test's cases every run tries those with these ids, as they stand in brackets; the others are exhaustive."""
    return pytest.mark.often(*ids)


def left_out(items: Iterable[pytest.Item], whole: bool) -> list[pytest.Item]:
    """What of the collected tests is exhaustive.

    Args:
      items: tests as pytest collected them.
      whole: whether all cases of each test are among them.

    Raises:
      pytest.UsageError: `often` names what is no case.
    """
    items, seen, named = list(items), set(), set()
    left = []
    for item in items:
        test, _, case = item.nodeid.partition("[")
        mark, case = item.get_closest_marker("often"), case.removesuffix("]")
        seen.add((test, case))
        named |= {(test, id) for id in mark.args} if mark else set()
        if item.get_closest_marker("exhaustive") or (mark and case not in mark.args):
            left.append(item)
    if whole and (unknown := sorted(named - seen)):
        raise pytest.UsageError(f"tests that are tried often are no cases: {unknown}")
    return left


def parametrize(names: str, cases: Iterable[Any], often: Iterable[Any], ids: Any = None, indirect: bool = False) -> Any:
    """`pytest.mark.parametrize` of all cases; those not in `often` are exhaustive.

    Raises:
      ValueError: one that is often tried is no case.
    """
    cases, often, several = list(cases), list(often), "," in names
    if unknown := [c for c in often if c not in cases]:
        raise ValueError(f"{unknown} are none of the cases {cases}")
    rest = lambda case: pytest.param(*(case if several else (case,)), marks=exhaustive)
    return pytest.mark.parametrize(names, [c if c in often else rest(c) for c in cases], ids=ids, indirect=indirect)
